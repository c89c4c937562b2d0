"""Packing the archives of ILSVRC2012: in place, in many processes and tasks, killed and started again, then verified."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import functional as theirs
from test_shards import flip_byte, place_of

from asgd_mpi.data.manifest import MANIFEST, read_manifest
from asgd_mpi.data.shards import ShardSet
from asgd_mpi.errors import DataError
from data_prep import digits, synthetic
from data_prep.devkit import read_devkit
from data_prep.imagenet import prepare
from data_prep.inspect import inspect
from data_prep.tasks import rank_and_size
from data_prep.verify import verify

REPOSITORY = Path(__file__).parents[2]
SHARD = 16


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """6 classes of 10 and 3 small images, as archives and as a tree, and packed from the archives."""
    root = tmp_path_factory.mktemp("synthetic")
    synthetic.generate(root, classes=6, train=10, val=3, width=60, height=45)
    prepare(root / "archives", root / "packed", shard_size=SHARD, workers=1)
    return root


@pytest.fixture
def archives(made, tmp_path):
    return shutil.copytree(made / "archives", tmp_path / "archives")


@pytest.fixture
def packed(made, tmp_path):
    return shutil.copytree(made / "packed", tmp_path / "packed")


def contents(root, pattern="*"):
    return {path.name: path.read_bytes() for path in root.glob(pattern)}


def start(source, out, *options, environment=()):
    return subprocess.Popen(
        [sys.executable, "-m", "data_prep.imagenet", "--source", source, "--out", out, "--shard-size", str(SHARD), *options],
        cwd=REPOSITORY, env=os.environ | dict(environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def test_archives_and_tree_of_the_same_images_give_byte_identical_shards(made, tmp_path):
    prepare(made / "tree", tmp_path / "out", shard_size=SHARD, workers=2)
    assert len(contents(tmp_path / "out", "*.h5")) == 4 + 2
    assert contents(tmp_path / "out", "*.h5") == contents(made / "packed", "*.h5")


def test_a_validation_image_has_the_class_that_ground_truth_and_meta_mat_give_it(made):
    kit = read_devkit(made / "archives")
    val = ShardSet.open(made / "packed", "val")
    assert len(kit.truth) == val.num_samples == 18
    for index in range(18):
        place = int(val.source(index)[-13:-5]) - 1
        synset = sorted(set(kit.truth))[int(val.labels(index))]
        assert kit.truth[place] == synset
        assert next((made / "tree/val").rglob(f"*{place + 1:08d}.JPEG")).parent.name == synset
    assert kit.truth != sorted(kit.truth)
    assert val.class_names[0] == "class n00001000"


def test_a_flat_validation_directory_needs_the_kit_and_gives_the_same_shards(made, tmp_path):
    shutil.copytree(made / "tree/train", tmp_path / "tree/train")
    (tmp_path / "tree/val").mkdir()
    for path in (made / "tree/val").rglob("*.JPEG"):
        shutil.copy(path, tmp_path / "tree/val")
    with pytest.raises(
        DataError, match="18 validation images .* put ILSVRC2012_devkit_t12.tar.gz into"
    ):
        prepare(tmp_path / "tree", tmp_path / "out", shard_size=SHARD)
    with tarfile.open(made / "archives/ILSVRC2012_devkit_t12.tar.gz") as tar:
        tar.extractall(tmp_path / "tree")
    prepare(tmp_path / "tree", tmp_path / "out", shard_size=SHARD)
    assert contents(tmp_path / "out") == contents(made / "packed")


@pytest.mark.parametrize("share", [0.2, 0.55, 0.97, 0.999])
def test_an_archive_that_was_cut_off_is_noticed_before_anything_is_written(
    archives, tmp_path, share
):
    path = archives / "ILSVRC2012_img_train.tar"
    with tarfile.open(path) as tar:
        last = max(entry.offset_data + entry.size for entry in tar)
    os.truncate(path, min(int(path.stat().st_size * share), last))
    with pytest.raises(DataError, match="ILSVRC2012_img_train.tar.*(cut off|damaged)"):
        prepare(archives, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_development_kit_that_is_none_or_that_counts_other_images_is_an_error(
    archives, made, tmp_path
):
    kit = archives / "ILSVRC2012_devkit_t12.tar.gz"
    good = kit.read_bytes()
    kit.write_bytes(good[: len(good) // 2])
    with pytest.raises(DataError, match="no development kit of ILSVRC2012, or is damaged"):
        prepare(archives, tmp_path / "out")
    kit.write_bytes(good)
    with tarfile.open(archives / "ILSVRC2012_img_val.tar", "w") as tar:
        for path in sorted((made / "tree/val").rglob("*.JPEG"))[:-1]:
            tar.add(path, path.name)
    with pytest.raises(
        DataError, match="17 validation images, but the development kit has the classes of 18"
    ):
        prepare(archives, tmp_path / "out")


@pytest.mark.parametrize("workers", [1, 3])
def test_killed_at_any_moment_and_started_again_it_gives_byte_identical_files(
    made, tmp_path, workers
):
    dice = random.Random(workers)
    # on a busy machine it may be done before it is killed: that says nothing
    assert any(
        killed_until_it_is_done(made, tmp_path / f"out{attempt}", workers, dice)
        for attempt in range(10)
    )


def killed_until_it_is_done(made, out, workers, dice) -> int:
    """Kill a packing and start it again until it is done; return how many were killed."""
    kills = 0
    for _ in range(6):
        process = start(made / "archives", out, "--workers", str(workers))
        while process.poll() is None and not (out / ".packing/plan.json").exists():
            time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.08))
        process.kill()  # its processes must not go on writing
        process.communicate(timeout=300)  # until the processes that it has started are gone, too
        kills += process.returncode == -signal.SIGKILL
        if (out / MANIFEST).exists():
            break
    else:
        prepare(made / "archives", out, shard_size=SHARD)
    assert contents(out) == contents(made / "packed")
    return kills


def test_a_bad_image_stops_all_processes_and_once_it_is_replaced_the_packing_goes_on(tmp_path):
    synthetic.generate(tmp_path, classes=4, train=40, val=2, width=60, height=45, broken=1)
    with pytest.raises(
        DataError, match=r"train/n00001021/n00001021_39.JPEG is no readable image: .*\(0 bytes\)"
    ):
        prepare(tmp_path / "tree", tmp_path / "out", shard_size=20, workers=2)
    assert not (tmp_path / "out" / MANIFEST).exists()
    shutil.copy(
        tmp_path / "tree/train/n00001021/n00001021_37.JPEG",
        tmp_path / "tree/train/n00001021/n00001021_39.JPEG",
    )
    prepare(tmp_path / "tree", tmp_path / "out", shard_size=20)
    verify(tmp_path / "out")


def test_a_finished_shard_is_not_packed_again(made, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("data_prep.imagenet.finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(made / "archives", tmp_path / "out", shard_size=SHARD, workers=1)
    monkeypatch.undo()
    before = {
        path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob(".packing/*/*.h5")
    }
    # this one is
    os.truncate(tmp_path / "out/.packing/train-00001-of-00004.h5/train-00001-of-00004.h5", 1000)
    prepare(made / "archives", tmp_path / "out", shard_size=SHARD, workers=1)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.h5")}
    assert {name for name in before if before[name] != after[name]} == {"train-00001-of-00004.h5"}
    assert contents(tmp_path / "out") == contents(made / "packed")


def test_going_on_with_other_options_or_images_is_refused_and_says_which(
    made, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.imagenet.pack", lambda *_, **__: None)
        prepare(made / "archives", tmp_path / "out", shard_size=SHARD)
    with pytest.raises(DataError, match=r"packed otherwise \(short_side None there, 32 here\)"):
        prepare(made / "archives", tmp_path / "out", shard_size=SHARD, short_side=32)
    shutil.copytree(made / "tree", tmp_path / "tree")
    next((tmp_path / "tree/val").rglob("*.JPEG")).unlink()
    with pytest.raises(DataError, match=r"packed otherwise \(other images\)"):
        prepare(tmp_path / "tree", tmp_path / "out", shard_size=SHARD)


def test_a_packing_process_whose_parent_was_killed_before_it_could_know_ends():
    code = "import os; from data_prep.packing import _start_process; _start_process({}); print('works')"
    for parent, works in (("os.getppid()", True), ("os.getpid()", False)):
        done = subprocess.run(
            [sys.executable, "-c", code.format(parent)],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert (done.returncode == 0, "works" in done.stdout) == (works, works), done.stderr


def test_tasks_of_a_launcher_share_the_shards_out_and_the_last_one_writes_the_manifest(
    made, tmp_path
):
    for order in ([0, 1, 2], [2, 0, 1]):
        out = tmp_path / f"out{order[0]}"
        for rank in order:
            assert not (out / MANIFEST).exists()
            task = {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "3"}
            process = start(made / "archives", out, "--workers", "1", environment=task.items())
            _, errors = process.communicate()
            assert process.returncode == 0, errors
        assert contents(out) == contents(made / "packed")
        assert not (out / ".packing").exists()


def test_under_mpirun_all_tasks_together_give_the_same_files(made, tmp_path, openmpi):
    done = openmpi.run(3, "-m", "data_prep.imagenet", "--source", str(made / "archives"), "--out", str(tmp_path / "out"),
                       "--shard-size", str(SHARD), "--workers", "2", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(made / "packed")


def test_rank_and_size_come_from_the_launcher_or_are_0_and_1():
    assert rank_and_size({}) == (0, 1)
    assert rank_and_size({"SLURM_PROCID": "0"}) == (0, 1)  # in a batch script, outside of srun
    assert rank_and_size({"PMI_RANK": "2", "PMI_SIZE": "5"}) == (2, 5)


def test_the_header_check_keeps_the_same_bytes_and_still_finds_a_file_that_is_cut_off(
    made, tmp_path
):
    prepare(made / "archives", tmp_path / "fast", shard_size=SHARD, check="header")
    assert contents(tmp_path / "fast", "*.h5") == contents(made / "packed", "*.h5")
    synthetic.generate(
        tmp_path / "broken", classes=2, train=5, val=1, width=60, height=45, broken=3
    )
    for name in ("archives", "tree"):
        prepare(
            tmp_path / "broken" / name,
            tmp_path / name,
            check="header",
            on_bad_image="skip",
            workers=2,
        )
        manifest, _ = read_manifest(tmp_path / name)
        assert {name[-6] for name in manifest.splits["train"].skipped} == {"2", "3", "4"}


def test_raw_mode_stores_what_torchvision_resizes_and_crops_to_the_bit(made, tmp_path):
    prepare(made / "archives", tmp_path / "out", mode="raw", raw_size=24, shard_size=SHARD)
    train = ShardSet.open(tmp_path / "out", "train")
    assert (train.encoding, train.image_shape, train.num_samples) == ("raw", (24, 24, 3), 60)
    for index in range(0, 60, 7):
        image = Image.open(made / "tree" / train.source(index)).convert("RGB")
        square = theirs.center_crop(theirs.resize(image, 24), [24, 24])
        assert np.array_equal(train.read(index), np.asarray(square))


def test_mean_and_std_are_those_of_all_training_pixels_or_of_as_many_images_as_asked(
    made, tmp_path
):
    manifest, _ = read_manifest(made / "packed")
    pixels = [
        np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
        for path in (made / "tree/train").rglob("*.JPEG")
    ]
    pixels = np.concatenate(pixels) / 255
    # The CMYK and the PNG file were encoded again, which moves their pixels a little.
    assert manifest.mean == pytest.approx(pixels.mean(axis=0).tolist(), abs=2e-4)
    assert manifest.std == pytest.approx(pixels.std(axis=0).tolist(), abs=2e-4)
    prepare(made / "tree", tmp_path / "out", shard_size=7, num_measured=20)
    some, _ = read_manifest(tmp_path / "out")
    train = ShardSet.open(tmp_path / "out", "train")
    chosen = np.concatenate([np.asarray(Image.open(made / "tree" / train.source(i)).convert("RGB")).reshape(-1, 3)
                             for i in range(0, 60, 3)]) / 255  # fmt: skip
    assert some.mean == pytest.approx(chosen.mean(axis=0).tolist(), abs=1e-3)


def test_verify_passes_what_was_packed_and_the_digits(packed, tmp_path, capsys):
    digits.prepare(tmp_path / "digits")
    for root in (packed, tmp_path / "digits"):
        verify(root)
        assert f"{root} is whole" in capsys.readouterr().out


def test_verify_names_a_flipped_bit_by_shard_and_source(packed):
    name = "train-00002-of-00004.h5"
    source = ShardSet.open(packed, "train").source(2 * SHARD)
    flip_byte(packed / name, place_of(packed / name, "jpeg") + 30)
    with pytest.raises(DataError) as raised:
        verify(packed)
    assert f"{name}: its checksum is" in str(raised.value)
    assert source in str(raised.value)
    assert "has 2 faults" in str(raised.value)


def test_verify_notices_another_order(packed, monkeypatch):
    monkeypatch.setattr("data_prep.verify.shuffled", lambda names, seed, split: names)
    with pytest.raises(
        DataError, match="train: sample 0 is train/.* but by seed 0 train/.* stands there"
    ):
        verify(packed)


def test_inspect_prints_a_row_a_split_and_draws_as_many_samples_as_asked(packed, tmp_path, capsys):
    inspect(packed, tmp_path / "sheet.png", rows=2, columns=3)
    assert [line.split()[:3] for line in capsys.readouterr().out.splitlines()[3:5]] == [
        ["train", "60", "4"],
        ["val", "18", "2"],
    ]
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (3 * 160, 2 * 194)
    cells = [
        np.asarray(sheet)[80 + 194 * row, 80 + 160 * column]
        for row in range(2)
        for column in range(3)
    ]
    assert all(cell.min() < 255 for cell in cells)  # none is white

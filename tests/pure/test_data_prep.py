"""data_prep: what it packs, what it refuses, and what it leaves behind when it fails."""

import errno
import gzip
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import h5py
import numpy as np
import pytest
from photos import write_odd_files, write_tree

from asgd_mpi.data.decode import decode
from asgd_mpi.data.manifest import MANIFEST, read_manifest
from asgd_mpi.data.shards import ShardSet
from asgd_mpi.errors import DataError, UserError
from data_prep import digits, fashion_mnist, writer
from data_prep.imagenet import prepare


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "tree")


def by_source(root, split="train"):
    shards = ShardSet.open(root, split)
    return {shards.source(i): shards.read(i) for i in range(shards.num_samples)}


def test_grey_and_rgb_jpegs_are_kept_byte_for_byte_and_the_others_become_rgb_jpegs(tree, tmp_path):
    write_odd_files(tree)
    prepare(tree, tmp_path / "out", shard_size=10)
    packed = by_source(tmp_path / "out")
    files = sorted(str(path.relative_to(tree)) for path in (tree / "train").rglob("*.*"))
    assert sorted(packed) == files
    converted = {name for name in files if packed[name].tobytes() != (tree / name).read_bytes()}
    assert {Path(name).name for name in converted} == {"cmyk.JPEG", "really_png.JPEG", "alpha.png"}
    assert all(decode(data).shape[2] == 3 for data in packed.values())


def test_labels_follow_the_sorted_class_directories_and_sizes_are_width_and_height(tree, tmp_path):
    prepare(tree, tmp_path / "out")
    shards = ShardSet.open(tmp_path / "out", "train")
    assert shards.class_names == ["n00000000", "n00000001", "n00000002"]
    with h5py.File(tmp_path / "out/train-00000-of-00001.h5") as file:
        sizes = file["size"][:]
    for index, label in enumerate(shards.labels(np.arange(shards.num_samples))):
        assert shards.source(index).split("/")[1] == shards.class_names[label]
        assert decode(shards.read(index)).shape[:2] == tuple(sizes[index][::-1])


def test_the_same_seed_gives_byte_identical_files_for_any_number_of_workers_and_another_seed_does_not(
    tree, tmp_path
):
    for name, seed, workers in (("a", 1, 1), ("b", 1, 3), ("c", 2, 1)):
        time.sleep(1.1)  # a time stamp in the file would be another one
        prepare(tree, tmp_path / name, shard_size=7, seed=seed, workers=workers)
    files = {name: {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "abc"}
    # 24 train and 9 val images in shards of 7, the manifest and the report
    assert len(files["a"]) == 4 + 2 + 2
    assert files["a"] == files["b"]
    assert all(files["a"][name] != files["c"][name] for name in files["a"])


def test_every_shard_mixes_the_classes(tmp_path):
    prepare(
        write_tree(tmp_path / "tree", num_classes=4, train=24, val=1),
        tmp_path / "out",
        shard_size=24,
    )
    shards = ShardSet.open(tmp_path / "out", "train")
    for first in range(0, 96, 24):
        assert set(shards.labels(np.arange(first, first + 24))) == {0, 1, 2, 3}


def test_short_side_shrinks_larger_images_and_keeps_smaller_ones_byte_for_byte(tree, tmp_path):
    prepare(tree, tmp_path / "out", short_side=50)
    for name, data in by_source(tmp_path / "out").items():
        original = np.fromfile(tree / name, dtype=np.uint8)
        if min(decode(original).shape[:2]) > 50:
            assert min(decode(data).shape[:2]) == 50
        else:
            assert np.array_equal(data, original)


def damage(tree):
    bad = tree / "train/n00000001/train_1_3.JPEG"
    bad.write_bytes(bad.read_bytes()[:-200])
    return bad


def test_an_undecodable_image_stops_the_packing_by_default_and_is_named(tree, tmp_path):
    damage(tree)
    with pytest.raises(
        DataError, match=r"train/n00000001/train_1_3\.JPEG.*truncated.*--on-bad-image skip"
    ):
        prepare(tree, tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_an_undecodable_image_is_skipped_only_if_asked_and_then_named_and_counted(
    tree, tmp_path, capsys
):
    damage(tree)
    (tree / "val/n00000000/val_0_0.JPEG").write_bytes(b"not an image")
    prepare(tree, tmp_path / "out", shard_size=10, on_bad_image="skip")
    manifest, _ = read_manifest(tmp_path / "out")
    assert manifest.splits["train"].skipped == ["train/n00000001/train_1_3.JPEG"]
    assert (manifest.splits["train"].num_samples, manifest.splits["val"].num_samples) == (23, 8)
    assert len(by_source(tmp_path / "out")) == 23
    output = capsys.readouterr()
    assert "train_1_3.JPEG" in output.err
    assert "1 skipped" in output.out


def test_a_shard_without_a_single_good_image_stops_even_when_skipping(tree, tmp_path):
    for path in (tree / "val").rglob("*.JPEG"):
        path.write_bytes(b"not an image")
    with pytest.raises(DataError, match="not one of 9 val images"):
        prepare(tree, tmp_path / "out", on_bad_image="skip")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_split_is_named(tree, tmp_path, split):
    shutil.rmtree(tree / split)
    with pytest.raises(
        DataError, match=f"neither ILSVRC2012_img_{split}.tar nor a directory {split}"
    ):
        prepare(tree, tmp_path / "out")


def test_a_validation_set_without_class_directories_is_explained(tree, tmp_path):
    shutil.rmtree(tree / "val")
    (tree / "val").mkdir()
    (tree / "val/ILSVRC2012_val_00000001.JPEG").touch()
    with pytest.raises(DataError, match="the 1 validation images .* development kit"):
        prepare(tree, tmp_path / "out")


def test_empty_classes_and_classes_unknown_to_train_are_counted_and_named(tree, tmp_path):
    (tree / "train/n00000009").mkdir()
    with pytest.raises(DataError, match=r"1 of 4 classes in .*train have no image \(n00000009\)"):
        prepare(tree, tmp_path / "out")
    (tree / "train/n00000009").rename(tree / "val/n00000008")
    shutil.copy(tree / "val/n00000000/val_0_0.JPEG", tree / "val/n00000008")
    with pytest.raises(DataError, match=r"1 classes that are not in train \(n00000008\)"):
        prepare(tree, tmp_path / "out")


def test_files_that_are_no_images_stay_out_and_are_reported(tree, tmp_path, capsys):
    (tree / "train/n00000000/notes.txt").touch()
    prepare(tree, tmp_path / "out")
    assert (
        "1 files are no images and stay out: 1 .txt (n00000000/notes.txt)"
        in capsys.readouterr().err
    )


def test_a_link_to_a_file_that_is_gone_is_an_error_even_when_skipping(tree, tmp_path):
    (tree / "train/n00000000/gone.JPEG").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match="cannot read .*gone.JPEG: No such file"):
        prepare(tree, tmp_path / "out", on_bad_image="skip")


def test_a_complete_data_set_is_not_overwritten_but_an_interrupted_one_is_finished(
    tree, tmp_path, monkeypatch
):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.imagenet.finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(tree, tmp_path / "out")
    prepare(tree, tmp_path / "out")
    with pytest.raises(DataError, match="already holds a complete data set"):
        prepare(tree, tmp_path / "out", seed=5)


def test_too_little_disk_space_is_noticed_before_anything_is_written(tree, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(DataError, match="its disk has 0.000 GB free"):
        prepare(tree, tmp_path / "out")
    assert [
        path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".listing-")
    ] == []


# h5py raises the first kind from a write and the second from closing a file.
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "x"), RuntimeError("write failed: No space left on device")]
)
def test_a_disk_that_fills_up_is_a_data_error_and_leaves_no_partial_shard(
    tree, tmp_path, monkeypatch, error
):
    def full(path, *_):
        path.write_bytes(b"half a shard")
        raise error

    monkeypatch.setattr(writer, "_write_shard", full)
    with pytest.raises(
        DataError, match="disk or quota is full while writing .*train-00000-of-00001.h5"
    ):
        prepare(tree, tmp_path / "out", workers=1)
    assert {path.name for path in (tmp_path / "out").rglob("*") if "listing" not in path.name} == {
        ".packing",
        "plan.json",
    }


def test_an_output_directory_that_cannot_be_made_or_written_is_a_data_error(
    tree, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write .*file/out.*where you may write"):
        prepare(tree, tmp_path / "file" / "out")

    def denied(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(writer, "_write_shard", denied)
    with pytest.raises(DataError, match="Permission denied"):
        prepare(tree, tmp_path / "out")


def test_the_digits_are_1437_train_and_360_val_images_in_the_same_class_proportions(tmp_path):
    digits.prepare(tmp_path)
    train, val = ShardSet.open(tmp_path, "train"), ShardSet.open(tmp_path, "val")
    assert (train.num_samples, val.num_samples, train.image_shape) == (1437, 360, (8, 8, 1))
    assert len(list(tmp_path.glob("train-*.h5"))) == 3
    shares = [np.bincount(s.labels(np.arange(s.num_samples))) / s.num_samples for s in (train, val)]
    assert np.abs(shares[0] - shares[1]).max() < 0.005
    assert not {train.source(i) for i in range(1437)} & {val.source(i) for i in range(360)}
    pixels = np.stack([train.read(i) for i in range(1437)]) / 255
    assert (pixels.min(), pixels.max()) == (0, 1)
    assert (train.mean[0], train.std[0]) == pytest.approx((pixels.mean(), pixels.std()))


def test_jobs_that_need_the_digits_at_the_same_moment_all_get_them(tmp_path):
    make = "import sys, pathlib; from data_prep import digits; digits.prepare_once(pathlib.Path(sys.argv[1]))"
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", make, str(tmp_path / "data" / "digits")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    said = [job.communicate(timeout=300)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0, 0]
    assert sum("1437 train" in text for text in said) == 1
    assert ShardSet.open(tmp_path / "data" / "digits", "train").num_samples == 1437


def test_the_command_line_packs_a_tree_and_reports_a_users_mistake_in_one_line_with_status_2(
    tree, tmp_path
):
    def command(*options):
        return subprocess.run(
            [sys.executable, "-m", "data_prep.imagenet", *map(str, options)], capture_output=True, text=True,
            cwd=Path(__file__).parents[2], env=os.environ | {"COLUMNS": "200"},
        )  # fmt: skip

    done = command(
        "--source", tree, "--out", tmp_path / "out", "--shard-size", 10, "--on-bad-image", "skip"
    )
    assert (done.returncode, "train: 24 images of 3 classes in 3 shards" in done.stdout) == (
        0,
        True,
    )
    again = command("--source", tree, "--out", tmp_path / "out")
    assert again.returncode == 2
    assert again.stderr.startswith("error: ")
    assert again.stderr.count("\n") == 1


def test_idx_files_become_a_data_set_and_damaged_ones_are_named(tmp_path, capsys):
    rng, sizes = np.random.default_rng(0), {"train": 70, "t10k": 20}
    images = {
        stem: rng.integers(0, 256, (count, 28, 28), np.uint8) for stem, count in sizes.items()
    }
    labels = {stem: rng.integers(0, 10, count).astype(np.uint8) for stem, count in sizes.items()}
    for stem, count in sizes.items():
        header = np.array([count, 28, 28], ">u4").tobytes()
        (tmp_path / f"{stem}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(b"\0\0\x08\x03" + header + images[stem].tobytes())
        )
        (tmp_path / f"{stem}-labels-idx1-ubyte").write_bytes(
            b"\0\0\x08\x01" + header[:4] + labels[stem].tobytes()
        )
    fashion_mnist.prepare(tmp_path / "out", tmp_path, limit=60)
    train, val = (ShardSet.open(tmp_path / "out", split) for split in ("train", "val"))
    assert (train.num_samples, val.num_samples, train.num_classes) == (60, 20, 10)
    assert {
        val.source(i): (val.labels(np.array([i])).item(), val.read(i).tobytes()) for i in range(20)
    } == {
        f"t10k/{row}": (label, image.tobytes())
        for row, (image, label) in enumerate(zip(images["t10k"], labels["t10k"]))
    }
    whole = (tmp_path / "train-images-idx3-ubyte.gz").read_bytes()
    for damaged in (
        whole[:400],
        gzip.compress(b"\0\0\x08\x03" + header),
        b"",
        gzip.compress(b"\0\0\x0d\x03" + header),
    ):
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(damaged)
        with pytest.raises(
            UserError, match="train-images-idx3-ubyte.gz is damaged .*: fetch it again"
        ):
            fashion_mnist.prepare(tmp_path / "again", tmp_path)
    with pytest.raises(UserError, match="dataset-fashion-mnist"):
        fashion_mnist.prepare(tmp_path / "again", tmp_path / "out")

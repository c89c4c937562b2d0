"""The shard reader: it returns what was packed, or says what is wrong with which file."""

import fcntl
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest
from photos import write_tree

from asgd_mpi.data import retrying_file
from asgd_mpi.data.manifest import MANIFEST
from asgd_mpi.data.shards import DamagedSample, ShardSet
from asgd_mpi.errors import DataError
from data_prep.imagenet import prepare

SHARD = "train-00001-of-00003.h5"  # samples 10..19


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    prepare(write_tree(root / "tree"), root / "shards", shard_size=10)
    return root


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(retrying_file, "WAITS_S", (0.0, 0.05, 0.2))


@pytest.fixture
def root(pristine, tmp_path):
    return shutil.copytree(pristine / "shards", tmp_path / "shards")


def edit_manifest(root, **changes):
    path = root / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip_byte(path, at):
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def place_of(path, name):
    with h5py.File(path) as file:
        return file[name].id.get_offset()


def test_every_sample_comes_back_with_the_bytes_of_its_source(pristine, root):
    shards = ShardSet.open(root, "train")
    assert shards.num_samples == 24
    for index in range(24):
        assert (
            shards.read(index).tobytes() == (pristine / "tree" / shards.source(index)).read_bytes()
        )


def test_labels_are_int64_for_any_choice_of_indices(root):
    shards = ShardSet.open(root, "train")
    labels = shards.labels(np.array([23, 0, 0, 10]))
    assert labels.dtype == np.int64
    assert [f"n{label:08d}" for label in labels] == [
        shards.source(i).split("/")[1] for i in (23, 0, 0, 10)
    ]


def test_many_threads_read_the_same_bytes_as_one(root):
    shards = ShardSet.open(root, "train")
    indices = np.random.default_rng(0).integers(0, 24, 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(shards.read, indices))
    alone = [shards.read(i) for i in range(24)]
    assert all(np.array_equal(data, alone[i]) for i, data in zip(indices, together, strict=True))


def test_the_fingerprint_is_the_same_for_both_splits_and_changes_with_the_data_set(root):
    before = ShardSet.open(root, "train").fingerprint
    assert before == ShardSet.open(root, "val").fingerprint
    edit_manifest(root, seed=7)
    assert ShardSet.open(root, "train").fingerprint != before


def test_one_flipped_bit_in_an_image_is_noticed_and_the_source_image_named(root):
    shards = ShardSet.open(root, "train")
    flip_byte(root / SHARD, place_of(root / SHARD, "jpeg") + 3)
    with pytest.raises(
        DamagedSample, match=f"sample 0 of .*{SHARD} .{shards.source(10)}.*checksum"
    ):
        shards.read(10)
    for index in set(range(24)) - {10}:
        shards.read(index)


@pytest.mark.parametrize("name", ["label", "xxh3"])
def test_one_flipped_bit_in_a_label_or_a_checksum_is_noticed(root, name):
    flip_byte(root / SHARD, place_of(root / SHARD, name))
    with pytest.raises(DataError):  # at the latest when the sample is read
        ShardSet.open(root, "train").read(10)


def test_a_flipped_bit_anywhere_in_a_shard_never_gives_other_bytes_or_labels(root):
    good = ShardSet.open(root, "train")
    expected = {
        good.source(i): (good.read(i).tobytes(), int(good.labels(i))) for i in range(10, 20)
    }
    contents = (root / SHARD).read_bytes()
    for at in np.random.default_rng(0).integers(0, len(contents), 150).tolist():
        flip_byte(root / SHARD, at)
        try:
            shards = ShardSet.open(root, "train")
            for index in range(10, 20):
                assert (
                    shards.read(index).tobytes(),
                    int(shards.labels(index)),
                ) in expected.values()
        except DataError:
            pass
        (root / SHARD).write_bytes(contents)


def test_a_directory_without_a_manifest_is_told_how_to_be_made(root, tmp_path):
    (root / MANIFEST).unlink()
    with pytest.raises(DataError, match="no manifest.json.*python -m data_prep.imagenet"):
        ShardSet.open(root, "train")
    with pytest.raises(DataError, match="not a directory"):
        ShardSet.open(tmp_path / "nothing", "train")


def test_a_missing_split_lists_those_that_there_are(root):
    with pytest.raises(DataError, match="no split 'test'; it has train, val"):
        ShardSet.open(root, "test")


def test_an_unknown_format_version_is_refused_before_anything_else_is_read(root):
    (root / MANIFEST).write_text(
        json.dumps({"format": "asgd-shard", "format_version": 2, "new": 1})
    )
    with pytest.raises(
        DataError, match="asgd-shard version 2, but this program reads asgd-shard version 1"
    ):
        ShardSet.open(root, "train")


@pytest.mark.parametrize("text", ["", "[]", '{"format": "asgd-shard", "format_version": 1}'])
def test_a_damaged_manifest_is_a_data_error(root, text):
    (root / MANIFEST).write_text(text)
    with pytest.raises(DataError, match="damaged or was edited"):
        ShardSet.open(root, "train")


def test_a_missing_shard_is_named(root):
    (root / SHARD).unlink()
    with pytest.raises(
        DataError, match=f"{SHARD}, listed in manifest.json, cannot be read: No such file"
    ):
        ShardSet.open(root, "train")


def test_a_shard_truncated_by_one_byte_is_refused_with_both_sizes(root):
    contents = (root / SHARD).read_bytes()
    (root / SHARD).write_bytes(contents[:-1])
    with pytest.raises(
        DataError, match=f"{SHARD} is truncated.*{len(contents) - 1} bytes on disk, {len(contents)}"
    ):
        ShardSet.open(root, "train")


def test_a_shard_truncated_while_it_is_read_is_an_error_that_is_never_skipped(root):
    retries = []
    shards = ShardSet.open(root, "train", retries.append)
    (root / SHARD).write_bytes((root / SHARD).read_bytes()[:5000])
    with pytest.raises(
        DataError, match=f"sample 9 of shard .*{SHARD} .*truncated while in use.*after 4 attempts"
    ) as raised:
        shards.read(19)
    assert not isinstance(raised.value, DamagedSample)
    assert [f"sample 9 of {root / SHARD} cannot be read" in retry for retry in retries] == [
        True
    ] * 3


def test_a_shard_that_is_gone_while_it_is_read_is_an_error_with_its_name(root, monkeypatch):
    shards = ShardSet.open(root, "train", on_retry=lambda message: None)
    monkeypatch.setattr(retrying_file.RetryingFile, "_try_to_read", lambda *_: "Stale file handle")
    (root / SHARD).unlink()
    with pytest.raises(
        DataError,
        match=f"sample 2 of shard .*{SHARD} cannot be read: No such file or directory, after 4",
    ):
        shards.read(12)


def test_a_shard_that_comes_back_is_read_on_by_all_threads(root):
    retries = []
    shards = ShardSet.open(root, "train", retries.append)
    expected, contents = [shards.read(i).tobytes() for i in range(24)], (root / SHARD).read_bytes()
    os.truncate(root / SHARD, 0)
    with ThreadPoolExecutor(9) as pool:
        pending = [pool.submit(shards.read, i) for i in range(10, 18)]
        while len(retries) < 8:
            time.sleep(0.001)
        (root / "copy").write_bytes(contents)
        (root / "copy").rename(root / SHARD)
        assert [future.result().tobytes() for future in pending] == expected[10:18]
    assert [shards.read(i).tobytes() for i in range(24)] == expected


def test_a_shard_that_comes_back_with_other_contents_never_gives_wrong_data(root):
    shards = ShardSet.open(root, "train", on_retry=lambda message: None)
    os.truncate(root / SHARD, 0)
    (root / "copy").write_bytes(bytes(100_000))
    (root / "copy").rename(root / SHARD)
    with pytest.raises(DamagedSample, match="checksum"):
        shards.read(10)


def test_a_lock_that_keeps_hdf5_from_opening_a_shard_does_not_keep_a_run_from_reading_it(root):
    with open(root / SHARD, "rb") as other:
        # what HDF5 asks for meets this, as it meets a file system without locks
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            h5py.File(root / SHARD, "r", locking=True)
        assert len(ShardSet.open(root, "train").read(10)) > 0


def test_samples_to_come_are_announced_to_the_disk_in_the_order_in_which_they_lie_there(
    root, monkeypatch
):
    shards, announced, read = ShardSet.open(root, "train"), [], []
    monkeypatch.setattr(os, "posix_fadvise", lambda *hint: announced.append(hint))
    really_read = os.preadv
    monkeypatch.setattr(
        os,
        "preadv",
        lambda fd, buffers, at: (
            read.append((fd, at, len(buffers[0]), os.POSIX_FADV_WILLNEED))
            or really_read(fd, buffers, at)
        ),
    )
    shards.expect(np.array([17, 3, 23, 9, 10]))
    for index in (3, 9, 10, 17, 23):
        shards.read(index)
    assert announced == read and len(read) == 5


def test_announcing_samples_of_a_disk_that_takes_no_hints_is_harmless(root, monkeypatch):
    def refuse(*_):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    shards = ShardSet.open(root, "train")
    shards.expect(np.arange(24))
    assert len(shards.read(5)) > 0


def test_an_unfinished_shard_is_refused(root):
    size = (root / SHARD).stat().st_size
    with h5py.File(root / SHARD, "r+") as file:
        file.attrs["complete"] = 0
    assert (root / SHARD).stat().st_size == size
    with pytest.raises(DataError, match="complete is 0, not 1"):
        ShardSet.open(root, "train")


def test_two_shards_that_were_swapped_are_noticed(root):
    other = root / "train-00000-of-00003.h5"
    contents = other.read_bytes(), (root / SHARD).read_bytes()
    other.write_bytes(contents[1]), (root / SHARD).write_bytes(contents[0])
    with pytest.raises(DataError, match="truncated or was changed|shard is 1, not 0"):
        ShardSet.open(root, "train")


def test_a_label_beyond_the_class_names_is_refused(root):
    edit_manifest(root, class_names=["a", "b"], synsets=[])
    with pytest.raises(
        DataError, match="24 train samples of 2 classes, but the shards hold 24 with labels up to 2"
    ):
        ShardSet.open(root, "train")

"""The sources for a trial: a directory tree and made-up images, behind the same loader and task as shards."""

import numpy as np
import pytest
from photos import write_odd_files, write_tree

from asgd_mpi.config import parse
from asgd_mpi.data.augment import make_policy
from asgd_mpi.data.loader import Loader
from asgd_mpi.data.order import Order
from asgd_mpi.data.shards import DamagedSample
from asgd_mpi.data.trials import FolderSet, SyntheticSet
from asgd_mpi.errors import DataError
from asgd_mpi.task import complete, open_task


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "tree")


def test_a_tree_gives_every_file_once_with_its_bytes_and_the_label_of_its_directory(tree):
    folder = FolderSet(tree, "train")
    assert (folder.num_samples, folder.num_classes) == (24, 3)
    for index in range(24):
        assert folder.read(index).tobytes() == (tree / folder.source(index)).read_bytes()
        assert folder.source(index).split("/")[1] == folder.class_names[int(folder.labels(index))]
    assert len({folder.source(index) for index in range(24)}) == 24
    assert (np.diff(folder.labels(np.arange(24))) < 0).any()  # not sorted by class


def test_a_tree_behind_the_loader_gives_batches_and_counts_what_is_no_rgb_or_grey_jpeg(tree):
    write_odd_files(tree)  # a grey and a CMYK JPEG and a PNG named .JPEG; the .png is not listed
    folder, reports = FolderSet(tree, "train"), []
    loader = Loader(folder, Order(27, seed=0), make_policy("reference", 28), 0, 2, "skip", reports.append)
    batch = loader.batch(0, 0, 27)
    assert (len(batch.images), batch.skipped) == (25, 2)
    assert sorted("cmyk" in report or "really_png" in report for report in reports) == [True, True]


def test_a_file_that_is_gone_is_an_error_and_one_that_was_cut_off_is_damaged(tree):
    folder = FolderSet(tree, "train")
    path = tree / folder.source(5)
    contents = path.read_bytes()
    for num_bytes in (len(contents) // 2, 0):
        path.write_bytes(contents[:num_bytes])
        with pytest.raises(DamagedSample, match=f"{path} is no JPEG file or was cut off: {num_bytes} bytes"):
            folder.read(5)
    path.unlink()
    with pytest.raises(DataError, match=f"{path} cannot be read: No such file"):
        folder.read(5)


def test_what_is_no_tree_says_what_a_tree_is(tmp_path):
    with pytest.raises(DataError, match="no tree of train/<class>"):
        FolderSet(tmp_path, "train")


def test_synthetic_images_are_a_function_of_their_number_and_differ():
    made = SyntheticSet("train")
    assert made.read(17).shape == made.image_shape == (256, 256, 3)
    assert np.array_equal(made.read(17), SyntheticSet("train").read(17))
    assert not np.array_equal(made.read(17), made.read(18))
    counts = np.bincount(made.labels(np.arange(10_000)), minlength=1000)
    assert (counts.min(), counts.max()) == (10, 10)


@pytest.mark.parametrize(("options", "num_train", "num_classes"), [
    (["--data.source", "synthetic"], 1_281_167, 1000), (["--data.source", "folder"], 24, 3),
])  # fmt: skip
def test_a_task_opens_either_and_sees_images_of_224_pixels(tree, options, num_train, num_classes):
    config = complete(parse([*options, "--data.path", str(tree), "--data.augment", "paper"]))
    task = open_task(config)
    assert (task.train.num_samples, task.train.num_classes, config.data.image_size) == (num_train, num_classes, 224)
    assert task.train_loader().batch(0, 0, 4).images.shape == (4, 3, 224, 224)
    assert task.val_loader().batch(0, 0, 4).images.shape == (4, 3, 224, 224)

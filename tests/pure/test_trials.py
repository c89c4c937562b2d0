"""The sources for a trial: a directory tree and made-up images, behind the same loader and task as shards."""

import numpy as np
import pytest
from photos import write_odd_files, write_tree

from asgd_mpi import evaluate
from asgd_mpi.config.parse import parse
from asgd_mpi.data.augment import make_policy
from asgd_mpi.data.folder import FolderSet, SyntheticSet
from asgd_mpi.data.loader import Loader
from asgd_mpi.data.order import Order
from asgd_mpi.data.shards import DamagedSample
from asgd_mpi.errors import DataError
from asgd_mpi.record import checkpoint
from asgd_mpi.task import complete, open_task
from data_prep import imagenet


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


def test_a_tree_behind_the_loader_gives_batches_of_all_that_data_prep_would_pack(tree):
    write_odd_files(tree)  # a grey and a CMYK JPEG, a PNG named .JPEG and a .png
    (tree / "train" / "n00000000" / "no_image.JPEG").write_bytes(b"not an image")
    folder, reports = FolderSet(tree, "train"), []
    loader = Loader(folder, Order(29, seed=0), make_policy("reference", 28), 0, 2, reports.append)
    batch = loader.batch(0, 0, 29)
    assert (len(batch.images), batch.skipped) == (28, 1)
    assert len(reports) == 1 and "no_image.JPEG" in reports[0]


def test_a_file_that_is_gone_is_an_error_and_one_that_was_cut_off_is_damaged(tree):
    folder = FolderSet(tree, "train")
    path = tree / folder.source(5)
    contents = path.read_bytes()
    for num_bytes in (len(contents) // 2, 0):
        path.write_bytes(contents[:num_bytes])
        with pytest.raises(DamagedSample, match=rf"{path} was cut off \({num_bytes} bytes\)"):
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
    assert (task.train.num_samples, task.train.num_classes, config.data.image_size) == (
        num_train,
        num_classes,
        224,
    )
    assert task.train_loader().batch(0, 0, 4).images.shape == (4, 3, 224, 224)
    assert task.val_loader().batch(0, 0, 4).images.shape == (4, 3, 224, 224)


@pytest.fixture
def checkpointed(tree, tmp_path):
    """An untrained network of the tree's classes, saved as a run saves one."""
    task = open_task(
        complete(
            parse(
                [
                    "--data.source",
                    "folder",
                    "--data",
                    str(tree),
                    "--model",
                    "torchvision:resnet18",
                    "--data.image_size",
                    "32",
                    "--epochs",
                    "1",
                    "--batch-size",
                    "8",
                    "--data.augment",
                    "none",
                    "--rule.momentum",
                    "0",
                    "--rule.weight_decay",
                    "0",
                    "--lr",
                    "0.1",
                    "--schedule.name",
                    "constant",
                    "--schedule.warmup_epochs",
                    "0",
                ]
            )
        )
    )
    checkpoint.stage(tmp_path / "staging")
    sha256 = checkpoint.write_tensors(
        tmp_path / "staging" / checkpoint.MODEL, task.build_module().state_dict()
    )
    checkpoint.commit(
        tmp_path / "staging",
        tmp_path / "v7",
        checkpoint.Manifest(
            7,
            24,
            "torchvision:resnet18",
            3,
            3,
            32,
            task.train.fingerprint,
            list(task.train.mean),
            list(task.train.std),
            0.5,
            0.5,
            files={checkpoint.MODEL: sha256},
        ),
    )
    return tmp_path / "v7"


def test_a_checkpoint_is_evaluated_on_a_tree_with_the_result_of_its_shards(
    checkpointed, tree, tmp_path, capsys
):
    imagenet.prepare(tree, tmp_path / "shards", shard_size=4)
    capsys.readouterr()
    found = []
    for options in (
        ["--data", str(tree), "--data.source", "folder"],
        [f"--data={tmp_path / 'shards'}"],
    ):
        assert evaluate.main([str(checkpointed), *options, "--device", "cpu"]) == 0
        found.append(capsys.readouterr().out)
    assert found[0].startswith(
        f"version 7 of torchvision:resnet18, 9 images of {tree} (val): top-1 accuracy "
    )
    assert found[0].split(": ")[1] == found[1].split(": ")[1]


def test_an_evaluation_stops_at_a_damaged_file_or_leaves_it_out_and_counts_it(
    checkpointed, tree, capsys
):
    path = next((tree / "val").rglob("*.JPEG"))
    path.write_bytes(path.read_bytes()[:100])
    options = [str(checkpointed), "--data", str(tree), "--data.source", "folder", "--device", "cpu"]
    assert evaluate.main(options) == 2 and str(path) in capsys.readouterr().err
    assert evaluate.main([*options, "--data.on_bad_image", "skip"]) == 0
    done = capsys.readouterr()
    assert (
        "8 images" in done.out
        and "and 1 damaged ones left out" in done.out
        and str(path) in done.err
    )


def test_a_tree_taken_for_shards_is_told_of_the_option_that_reads_trees(checkpointed, tree, capsys):
    assert evaluate.main([str(checkpointed), "--data", str(tree), "--device", "cpu"]) == 2
    assert "--data.source folder" in capsys.readouterr().err

"""Scores are of the classes that a checkpoint was trained on, by name."""

import msgspec
import pytest
import torch

from asgd_mpi import evaluate
from asgd_mpi.data.shards import ShardSet
from asgd_mpi.errors import DataError
from asgd_mpi.model import networks
from asgd_mpi.record import checkpoint
from asgd_mpi.record.checkpoint import MODEL, Manifest

CPU = torch.device("cpu")


def measured(digits, trained_on, class_names=None):
    """The errors, in evaluation on the digits, of a checkpoint that knows these classes."""
    shards = ShardSet.open(digits, "val")
    shards.class_names = class_names or shards.class_names
    manifest = Manifest(
        1,
        1,
        "digits_cnn",
        10,
        1,
        8,
        "",
        list(shards.mean),
        list(shards.std),
        class_names=trained_on,
    )
    return evaluate.measure(
        networks.build("digits_cnn", 10, 1, 8).state_dict(), manifest, shards, 100, CPU, threads=1
    )


def test_other_classes_than_those_trained_are_refused_with_names_beside_names(digits):
    names = ShardSet.open(digits, "val").class_names
    # none: of an older version
    assert measured(digits, names).num_samples == measured(digits, []).num_samples == 360
    with pytest.raises(
        DataError,
        match=r"10 of the 10 classes .*: class 0 was 'x0', is '0'; class 1 was 'x1'.*; \.\.\..*Give the data set",
    ):
        measured(digits, [f"x{name}" for name in names])
    with pytest.raises(
        DataError,
        match=r"2 of the 10 classes .* in another order: class 0 was '1', is '0'; class 1 was '0', is '1'\. ",
    ):
        measured(digits, [names[1], names[0], *names[2:]])


def test_a_name_may_be_written_with_composed_characters_or_with_accents_apart(digits):
    names = [f"caf\u00e9 {label}" for label in range(10)]
    assert (
        measured(digits, names, [name.replace("\u00e9", "e\u0301") for name in names]).num_samples
        == 360
    )


def test_a_checkpoint_keeps_the_names_under_its_seal_and_older_ones_are_read(tmp_path):
    module = networks.build("digits_cnn", 10, 1, 8)
    for number, names in enumerate([["a", "b"], []]):
        staging = tmp_path / f".{number}"
        checkpoint.stage(staging)
        sha256 = checkpoint.write_tensors(staging / MODEL, module.state_dict())
        checkpoint.commit(
            staging,
            tmp_path / str(number),
            Manifest(1, 1, "", 2, 1, 8, "", [0.0], [1.0], files={MODEL: sha256}, class_names=names),
        )
        assert checkpoint.verify(tmp_path / str(number)).class_names == names
    path = tmp_path / "1" / checkpoint.MANIFEST
    said = msgspec.json.decode(path.read_bytes())
    del said["class_names"]  # as it was before they were kept
    path.write_bytes(msgspec.json.encode(said))
    assert checkpoint.verify(tmp_path / "1").class_names == []
    path = tmp_path / "0" / checkpoint.MANIFEST
    path.write_bytes(path.read_bytes().replace(b'"b"', b'"c"'))
    with pytest.raises(checkpoint.RunDirError, match="damaged"):
        checkpoint.verify(tmp_path / "0")

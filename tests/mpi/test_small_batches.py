"""Batches that a network cannot be trained on alone: a rest of one image with batch norm, and what damaged images leave."""

import h5py
import pytest

from asgd_mpi.config import parse as configuration
from asgd_mpi.data.loader import ranges
from asgd_mpi.errors import ConfigError
from asgd_mpi.offline.trainer import SingleProcessTrainer
from asgd_mpi.protocol.ledger import Ledger, Plan
from asgd_mpi.runtime import preflight
from asgd_mpi.task import complete, open_task


def task_of(digits, *options):
    task = open_task(
        complete(
            configuration.parse(
                [
                    "--data",
                    str(digits),
                    "--model",
                    "small_networks:strict",
                    "--data.augment",
                    "none",
                    "--epochs",
                    "1",
                    *options,
                ]
            )
        )
    )
    return preflight.try_out_(task, task.first_module())[0]


def test_a_rest_that_is_too_small_goes_with_the_batch_before_and_nothing_else_moves():
    assert ranges(3, 0, 9, 4, 2) == [(3, 0, 4), (3, 4, 9)]
    assert ranges(3, 0, 9, 4) == [(3, 0, 4), (3, 4, 8), (3, 8, 9)]
    # alone: its loader leaves it out
    assert ranges(0, 8, 9, 4, 2) == [(0, 8, 9)]
    # what was pushed of a lease does not move the others
    for start in range(0, 16, 4):
        assert ranges(0, start, 17, 4, 2) == [
            one for one in ranges(0, 0, 17, 4, 2) if one[1] >= start
        ]


@pytest.mark.parametrize(
    "samples, batch, lease, epochs",
    [(17, 4, 1, 2), (13, 3, 4, 3), (9, 2, 2, 1), (5, 4, 1, 3), (3, 2, 1, 2)],
)
@pytest.mark.parametrize("workers", [1, 3])
def test_no_lease_leaves_a_rest_of_one_and_every_image_of_every_epoch_is_lent_once(
    samples, batch, lease, epochs, workers
):
    ledger = Ledger(
        Plan(workers, samples, 0, epochs * samples, batch, lease, 1.0, smallest=2),
        lambda samples, staleness: 0.1,
    )
    lent, seen = [], set()
    while any(account.leases for account in ledger._accounts):
        for number, account in enumerate(ledger._accounts):
            for one in account.leases:
                if (number, one.number) not in seen:
                    seen.add((number, one.number))
                    lent.append((one.epoch, one.start, one.stop))
            if account.leases:
                account.cursor = account.leases[0].stop
                ledger._relend(number)
    assert sorted(
        position
        for epoch, start, stop in lent
        for position in ((epoch, at) for at in range(start, stop))
    ) == [(epoch, at) for epoch in range(epochs) for at in range(samples)]
    assert all(stop - start >= 2 for _, start, stop in lent)


def test_the_trial_step_finds_how_many_images_a_network_needs(digits):
    assert task_of(digits).config.data.min_batch == 2
    assert task_of(digits, "--model", "digits_cnn").config.data.min_batch == 1
    assert task_of(digits, "--model", "digits_cnn", "--data.min_batch", "3").smallest == 3
    for options, part in (
        (["--batch-size", "1"], "--data.batch_size 1"),
        (["--data.min_batch", "1"], "--data.min_batch 1"),
        (["--batch-size", "6", "--compute.micro_batches", "4"], "--compute.micro_batches 4"),
    ):
        with pytest.raises(ConfigError, match=part):
            task_of(digits, *options)


def test_micro_batches_of_a_rest_are_fewer_and_none_has_one_image(digits):
    computation = SingleProcessTrainer(
        task_of(digits, "--batch-size", "8", "--compute.micro_batches", "4"), 1
    )
    # 5 images: 2 and 3
    computed = computation.compute_(0, [(0, 1432, 1437)], computation.first)
    assert computed.is_finite and computed.skipped == 0
    computation.close()


def damaged(digits, tmp_path, indices):
    """A copy of the data set in which some training images are damaged."""
    import shutil

    copy = tmp_path / "damaged"
    shutil.copytree(digits, copy)
    from asgd_mpi.data.shards import ShardSet

    for index in indices:
        shards = ShardSet.open(copy, "train")
        file, row = divmod(index, 512)
        with h5py.File(sorted(copy.glob("train-*.h5"))[file], "r+") as shard:
            name = next(
                key for key in shard if shard[key].dtype == "uint8" and shard[key].ndim == 4
            )
            shard[name][row] = 255 - shard[name][row]
        del shards
    return copy


def test_a_batch_without_an_image_counts_its_positions_and_its_step_is_one_of_a_gradient_of_zero(
    digits, tmp_path
):
    order = task_of(digits).train_loader()
    lone, pair = order.order.indices(0, 40, 41), order.order.indices(0, 48, 51)
    order.close()
    copy = damaged(digits, tmp_path, [*lone.tolist(), *pair.tolist()])
    task, said = (
        task_of(
            copy,
            "--data.on_bad_image",
            "skip",
            "--rule.momentum",
            "0",
            "--rule.weight_decay",
            "0",
            "--batch-size",
            "4",
        ),
        [],
    )
    loader = task.train_loader(said.append)
    assert (batch := loader.batch(0, 40, 41)).skipped == 1 and len(batch.labels) == 0
    # 3 of 4 are damaged: one is too few
    whole = loader.batch(0, 48, 52)
    assert (whole.skipped, len(whole.labels), len(whole.images)) == (4, 0, 0)
    assert any("1 whole images" in text and "min_batch" in text for text in said)
    loader.close()
    computation = SingleProcessTrainer(task, 1)
    computed = computation.compute_(0, [(0, 48, 52)], computation.first)
    assert computed.is_finite and computed.skipped == 4 and computed.loss == 0.0
    assert not computation.flat.gradient.any()
    both = computation.compute_(0, [(0, 48, 52), (0, 52, 56)], computation.first)
    alone = computation.compute_(0, [(0, 52, 56)], computation.first)
    assert both.loss == alone.loss and both.skipped == 4
    computation.close()


def test_a_run_with_a_rest_of_one_and_a_lone_damaged_image_ends_well_is_audited_and_replays(
    openmpi, digits, tmp_path
):
    order = task_of(digits).train_loader()
    copy = damaged(digits, tmp_path, order.order.indices(0, 40, 44).tolist())
    order.close()
    ran = openmpi.train(
        3,
        "--data",
        str(copy),
        "--model",
        "small_networks:strict",
        "--batch-size",
        "4",
        "--epochs",
        "1",
        "--data.augment",
        "none",
        "--data.on_bad_image",
        "skip",
        "--run.dir",
        "run",
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "the last batch of an epoch takes the rest" in ran.stdout
    for command in (["asgd_mpi.report", "--audit", "run"], ["asgd_mpi.replay", "run"]):
        done = openmpi.run(1, "-m", *command, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr

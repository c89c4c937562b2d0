"""Batch norm's refusal of one image is told from an error of the network's own."""

import pytest

from asgd_mpi.config import parse as configuration
from asgd_mpi.errors import ConfigError
from asgd_mpi.runtime import preflight
from asgd_mpi.task import complete, open_task


def least(digits, name, *options):
    """The least batch that the trial step finds for a network."""
    task = open_task(
        complete(
            configuration.parse(
                ["--data", str(digits), "--model", f"small_networks:{name}", *options]
            )
        )
    )
    return preflight.try_out_(task, task.first_module())[0].config.data.min_batch


def test_batch_norm_that_refuses_one_image_asks_for_two(digits):
    assert least(digits, "strict") == 2 and least(digits, "helped") == 1


def test_another_error_of_one_image_is_the_networks_own_and_told(digits):
    with pytest.raises(
        ConfigError,
        match=r"^--model.name small_networks:pairs fails for one image in training: ValueError: needs a "
        r"pair of images \(.*small_networks.py.*give --data.min_batch 2",
    ):
        least(digits, "pairs")


def test_a_run_without_batches_of_one_image_may_train_such_a_network(digits):
    assert least(digits, "pairs", "--data.min_batch", "2") == 2

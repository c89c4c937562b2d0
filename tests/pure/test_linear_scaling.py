"""Synchronous rules scale the rate with the workers: whoever trains on too few images for that is told before the run."""

import pytest

from asgd_mpi import simulate
from asgd_mpi.config import rulebook
from asgd_mpi.config.options import RuleConfig
from asgd_mpi.record.events import Retirement
from asgd_mpi.runtime import losses


@pytest.mark.parametrize(
    "name, num_workers, batch_size, num_samples, is_told",
    [
        ("sync", 16, 16, 1437, False),
        ("sync", 32, 16, 1437, True),
        ("sync_backup", 32, 16, 1437, True),
        ("sync", 32, 256, 1_281_167, False),
        ("sync", 1, 1437, 1437, False),
        ("asgd", 64, 512, 1437, False),
        ("softsync", 64, 512, 1437, False),
    ],
)
def test_a_step_of_too_large_a_share_of_an_epoch_is_told(
    name, num_workers, batch_size, num_samples, is_told
):
    told = rulebook.doubt_of_linear_scaling(RuleConfig(name), num_workers, batch_size, num_samples)
    assert bool(told) == is_told
    assert (
        not told
        or f"{rulebook.linear_scale(RuleConfig(name), num_workers) * batch_size:,} of 1,437 images"
        in told
    )


def test_a_simulation_that_diverges_says_why_in_a_few_lines(capfd):
    assert (
        simulate.main(
            [
                "--workers",
                "32",
                "--rule",
                "sync",
                "--epochs",
                "4",
                "--lr",
                "1e6",
                "--run.progress",
                "none",
            ]
        )
        == 2
    )
    told = capfd.readouterr().err
    assert "36% of an epoch" in told and "docs/convergence.md" in told
    assert told.count("retired") <= 4 and len(told.splitlines()) < 12


def test_ranks_that_are_lost_for_one_reason_are_told_in_one_line():
    def loss(rank: int, reason: str) -> Retirement:
        return Retirement(0.0, rank, 7, 16, reason, True)

    assert losses.told(
        [
            loss(2, "died"),
            loss(1, "died"),
            loss(3, "died"),
            loss(5, "ill"),
            loss(9, "bored"),
            loss(7, "bored"),
        ]
    ) == ("  ranks 1 to 3: died\n  rank 5: ill\n  ranks 7, 9: bored")
    assert (
        losses.told([loss(rank, "died") for rank in range(2, 40, 2)])
        == "  ranks 2, 4, 6, 8, 10, 12, 14, 16 and 11 more: died"
    )

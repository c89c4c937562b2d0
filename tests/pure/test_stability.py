"""The limit of stability, and what a step is worth under rules that make it of several gradients."""

import numpy as np
import pytest

from asgd_mpi.config import parse as configuration
from asgd_mpi.config import rulebook
from asgd_mpi.config.options import Recipe, ScheduleConfig
from asgd_mpi.config.resolved import with_recipe
from asgd_mpi.optim.lr_schedule import Schedule
from asgd_mpi.optim.stability import limit


def spectral_radius(n, rate, momentum, momentum_at):
    """Of what one push of every worker makes of (weights, their snapshots, velocities); curvature 1."""
    is_shared = momentum_at.startswith("server")
    state = np.eye(1 + n + (1 if is_shared else n))
    for worker in range(n):
        gradient = state[1 + worker].copy()
        velocity = 1 + n + (0 if is_shared else worker)
        state[velocity] = momentum * state[velocity] + gradient
        looks_ahead = momentum_at in ("dana", "server_nag")
        state[0] -= rate * (
            gradient + momentum * state[velocity] if looks_ahead else state[velocity]
        )
        state[1 + worker] = state[0]
    return max(abs(np.linalg.eigvals(state)))


@pytest.mark.parametrize("momentum_at", ["dana", "worker", "server", "server_nag", "none"])
@pytest.mark.parametrize(
    "n, momentum", [(1, 0.9), (2, 0.5), (3, 0.99), (7, 0.9), (8, 0.0), (13, 0.95), (64, 0.9)]
)
def test_the_limit_is_where_the_eigenvalues_of_a_turn_leave_the_unit_circle(
    n, momentum, momentum_at
):
    momentum = 0.0 if momentum_at == "none" else momentum
    edge = limit(n, momentum, momentum_at)
    assert (
        spectral_radius(n, 0.999 * edge, momentum, momentum_at)
        < 1
        < spectral_radius(n, 1.001 * edge, momentum, momentum_at)
    )


def test_below_the_limit_no_smaller_rate_is_unstable():
    for momentum_at in ("dana", "worker", "server_nag"):
        edge = limit(6, 0.97, momentum_at)
        assert all(
            spectral_radius(6, share * edge, 0.97, momentum_at) < 1
            for share in np.linspace(0.02, 0.99, 40)
        )


def test_without_momentum_the_limit_of_many_workers_is_the_published_one():
    for n in (33, 100, 1000):
        assert limit(n, 0.0, "none") == pytest.approx(
            2 * np.sin(np.pi / (2 * (2 * n - 1))), rel=1e-9
        )


def completed(*options):
    return with_recipe(
        configuration.parse(list(options)), Recipe(20, 16, "none", 0.9, 0.0, "constant", 0.05, 2)
    )


@pytest.mark.parametrize(
    "options, num_workers, staleness, weight",
    [
        (["--rule", "softsync"], 8, 9, 1 / 10),
        (["--rule", "softsync"], 8, 0, 1.0),
        (["--rule", "softsync", "--rule.splits", "4"], 12, 7, 1 / 2),
        (["--rule", "softsync", "--exchange.overlap", "true"], 6, 3, 1 / 2),
        ([], 8, 15, 1 / 2),
        (["--exchange.overlap", "true"], 4, 15, 1 / 2),
        (["--rule", "softsync", "--rule.splits", "2"], 5, 4, 1 / 2),
    ],
)
def test_the_delay_adaptive_weight_counts_in_one_unit_what_is_under_way_and_how_stale_it_is(
    options, num_workers, staleness, weight
):
    config = completed(*options)
    under_way = rulebook.in_flight(config.rule, num_workers, config.exchange.overlap)
    rate = Schedule(config.schedule, 100, 1000, num_workers, config.rule.staleness, under_way)
    assert rate(999, staleness) / rate(999, 0) == pytest.approx(weight)


@pytest.mark.parametrize(
    "name, options, num_workers, scale",
    [
        ("sync", [], 8, 8),
        ("sync", [], 1, 1),
        ("sync_backup", ["--rule.backup", "2"], 9, 7),
        ("softsync", [], 8, 1),
        ("asgd", [], 8, 1),
    ],
)
def test_a_synchronous_step_takes_the_rate_of_all_its_gradients_after_a_warm_up_from_that_of_one(
    name, options, num_workers, scale
):
    config = completed("--rule", name, *options)
    rate = Schedule(
        config.schedule,
        100,
        1000,
        num_workers,
        config.rule.staleness,
        scale=rulebook.linear_scale(config.rule, num_workers),
    )
    assert rate(200) == rate(700) == pytest.approx(0.05 * scale)
    if name.startswith("sync"):
        assert rate(0) == pytest.approx(0.05) and rate(100) == pytest.approx(0.05 * (1 + scale) / 2)
        told = rulebook.expected_staleness(config.rule, num_workers, num_workers)
        assert f"mean of {scale} gradients" in told and (f"{scale} times the rate" in told) == (
            scale > 1
        )


def test_a_schedule_without_warm_up_begins_at_the_scaled_rate():
    assert Schedule(
        ScheduleConfig(name="constant", lr=0.1, warmup_epochs=0.0), 100, 1000, 4, scale=4
    )(0) == pytest.approx(0.4)

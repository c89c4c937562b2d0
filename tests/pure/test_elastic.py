"""easgd and eamsgd against algorithms 1 and 2 of Zhang, Choromanska, LeCun 2015, on a parabola: x0 = 1, gradient x.

The simulation computes; the algorithms are written down again here, in the paper's own variables, and driven by its log.
"""

import pytest
import torch
from test_simulate import play

from asgd_mpi.offline.simulation import Times

TOGETHER = Times(1.0, 0.01, 0.0, 0.001)  # all workers fetch before the first push arrives


def follow(game, alpha, momentum, eta_at):
    """Algorithm 1, or 2 with momentum, on the centres that each worker of the game read; returns all centres.

    x: x_i before the pull; v = -rate * velocity, the form of torch.optim.SGD, which is the paper's while the rate stays.
    """
    centres, workers = [1.0], {}
    for push in game.pushes:
        x, velocity, last, eta = workers.get(push.worker) or (
            centres[push.base],
            0.0,
            0.0,
            eta_at(push.base),
        )
        for batch in range(push.positions):
            pull = alpha * (x - centres[push.read_version]) if batch == push.positions - 1 else 0.0
            v = -last * velocity
            gradient = x + momentum * v
            velocity, last = momentum * velocity + gradient, eta
            x = x + momentum * v - eta * gradient - pull
        centres.append(centres[-1] + pull)
        workers[push.worker] = x, velocity, last, eta_at(push.read_version)
    return centres


def test_the_difference_of_two_workers_in_step_shrinks_by_one_minus_eta_minus_alpha():
    """The eigenvalue of the synchronous case; of the gradient after the pull it would be (1 - eta)(1 - alpha)."""
    eta, alpha, differences = 0.25, 0.5, []
    first = iter([4.0, -4.0])

    def apart_(flat, normalise, batch, seed, accumulate=False):
        flat.gradient.copy_(flat.weights + next(first, 0.0))
        return 0.0

    def watch(game):
        applied = game.computation.applied

        def noted(latest, verdict, positions):
            one, other = (replica._own[0].item() for replica in game.computation.replicas)
            if verdict.worker == 1:
                differences.append(one - other)
            return applied(latest, verdict, positions)

        game.computation.applied = noted

    play(
        2,
        16,
        eta=eta,
        times=TOGETHER,
        name="easgd",
        alpha=alpha,
        watch=watch,
        compute_gradient_=apart_,
    )
    assert differences == [-2 * (1 - eta - alpha) ** k for k in range(8)]


@pytest.mark.parametrize("eta", [0.3, 1.0, 1.6])
def test_one_worker_is_stable_up_to_the_edge_of_the_paper(eta):
    edge = (4 - 2 * eta) / (4 - eta)
    inside, outside = (
        play(1, 900, eta=eta, name="easgd", alpha=factor * edge).computation.seen
        for factor in (0.98, 1.02)
    )
    assert max(map(abs, inside[-50:])) < 1e-3 and not max(map(abs, outside[-50:])) < 1e2


@pytest.mark.parametrize("n_push", [1, 3])
@pytest.mark.parametrize("name, momentum", [("easgd", 0.0), ("eamsgd", 0.75)])
def test_workers_of_speeds_that_differ_and_a_rate_that_falls_follow_the_algorithm(
    name, momentum, n_push
):
    game = play(
        3,
        240,
        n_push=n_push,
        times=Times(1.0, 0.07, 0.01, 0.05, spread=0.4),
        failures="slow:3x@rank2",
        name=name,
        alpha=0.3,
        lr_at=lambda samples, staleness=0: 0.2 if samples < 60 else 0.1,
        momentum=momentum,
        momentum_at="dana" if momentum else "none",
    )
    # of the centre, which is fetched just before a push
    assert {push.staleness for push in game.pushes} >= {0, 1}
    centres = follow(game, 0.3, momentum, lambda version: 0.2 if n_push * version < 60 else 0.1)
    assert game.computation.seen == pytest.approx(centres, abs=2e-6)
    assert (
        max(
            abs(one - other)
            for one, other in zip(
                game.computation.seen, follow(game, 0.3, momentum, lambda version: 0.2)
            )
        )
        > 1e-3
    )


def test_a_gradient_that_is_not_finite_is_refused_and_its_worker_begins_anew_at_the_centre():
    calls = []

    def compute_(flat, normalise, batch, seed, accumulate=False):
        calls.append(flat.gradient.copy_(flat.weights))
        if len(calls) == 10:
            flat.gradient.fill_(torch.nan)
        return 0.0

    game = play(
        2,
        40,
        n_push=2,
        name="eamsgd",
        momentum=0.5,
        momentum_at="dana",
        alpha=0.3,
        compute_gradient_=compute_,
    )
    assert game.num_dropped == 1 and game.ledger.samples == 40
    assert torch.isfinite(game.latest.weights).all() and abs(game.latest.weights[0]) < 1

"""Rules and schedules: numbers in, numbers out."""

import math

import pytest
import torch

from asgd_mpi.config import RuleConfig, ScheduleConfig
from asgd_mpi.server.rules import PIECE, Asgd, pieces
from asgd_mpi.server.schedule import Schedule


def step(rule, weights, gradient, lr):
    weights = weights.clone()
    for piece in pieces(len(weights)):
        rule.apply_(weights, gradient, lr, piece)
    return weights


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-3])
def test_one_worker_equals_torch_sgd_to_the_bit(momentum, weight_decay):
    torch.manual_seed(0)
    size = 2 * PIECE + 48
    parameter = torch.nn.Parameter(torch.randn(size))
    optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=momentum, weight_decay=weight_decay, foreach=False)
    rule, weights = Asgd(size, RuleConfig(momentum=momentum, weight_decay=weight_decay)), parameter.detach().clone()
    for k in range(5):
        parameter.grad = torch.randn(size)
        optimizer.param_groups[0]["lr"] = lr = 0.1 / (k + 1)
        optimizer.step()
        weights = step(rule, weights, parameter.grad, lr)
        assert torch.equal(weights, parameter)


def trace(workers, pushes, eta, momentum=0.0):
    """x0 = 1, gradient x, all workers pull version 0, round robin, a worker pulls again right after its push."""
    rule, x = Asgd(1, RuleConfig(momentum=momentum, weight_decay=0.0)), torch.ones(1)
    held, seen = [x] * workers, [1.0]
    for k in range(pushes):
        x = step(rule, x, held[k % workers], eta)
        held[k % workers] = x
        seen.append(x.item())
    return seen


def test_the_traces_of_asgd_on_a_parabola_are_the_exact_ones():
    assert trace(2, 8, 1 / 2) == [1, 1 / 2, 0, -1 / 4, -1 / 4, -1 / 8, 0, 1 / 16, 1 / 16]
    assert trace(3, 8, 1 / 2) == [1, 1 / 2, 0, -1 / 2, -3 / 4, -3 / 4, -1 / 2, -1 / 8, 1 / 4]


def test_the_trace_of_heavy_ball_on_the_server_is_the_exact_one():
    assert trace(2, 6, 1 / 4, momentum=1 / 2) == [1, 3 / 4, 3 / 8, 0, -9 / 32, -27 / 64, -27 / 64]


@pytest.mark.parametrize("delay, limit", list(enumerate([2, 1, 0.618033988750, 0.445041867913, 0.347296355334])))
def test_the_edge_of_stability_is_where_theory_puts_it(delay, limit):
    assert limit == pytest.approx(2 * math.sin(math.pi / (2 * (2 * delay + 1))))
    assert abs(trace(delay + 1, 2000, 0.97 * limit)[-1]) < 1e-3
    assert not abs(trace(delay + 1, 2000, 1.03 * limit)[-1]) < 1e3  # or no number any more


def schedule(workers=4, **fields):
    return Schedule(ScheduleConfig(**{"name": "constant", "lr": 1.0, "warmup_epochs": 0.0} | fields), 100, 1000, workers)


def test_the_rate_is_a_function_of_the_samples_applied():
    assert [schedule(name="step", step_epochs=3)(s) for s in (0, 299, 300, 600)] == pytest.approx([1, 1, 0.1, 0.01])
    assert [schedule(name="cosine")(s) for s in (0, 500, 1000)] == pytest.approx([1, 0.5, 0])
    assert schedule()(999) == 1.0


def test_warm_up_rises_from_the_rate_over_the_number_of_workers():
    warm = schedule(warmup_epochs=2)
    assert [warm(s) for s in (0, 100, 200, 300)] == pytest.approx([0.25, 0.625, 1, 1])
    assert schedule(workers=1, warmup_epochs=2)(0) == 1.0

"""The running mean of the server's weights: what it is, to the bit where it can be, and what becomes of it."""

import math

import pytest
import torch

from asgd_mpi import evaluate, replay, simulate
from asgd_mpi.config.options import RuleConfig
from asgd_mpi.optim.rules import EMA, make_rule
from asgd_mpi.protocol.messages import Verdict
from asgd_mpi.record import checkpoint
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.vector.partition import pieces


def keeping(ema_samples, size=48, name="asgd"):
    config = RuleConfig(
        name=name, momentum=0.0, momentum_at="none", weight_decay=0.0, ema_samples=ema_samples
    )
    return make_rule(size, config, 1)


def push_(rule, weights, gradient, samples, count, lr=0.1):
    verdict = Verdict(lr, rate=lr, samples=samples, count=count)
    for piece in pieces(len(weights)):
        rule.apply_(weights, gradient, verdict, piece)
        rule.average_(weights, verdict, piece)


def test_the_mean_of_weights_that_stay_is_those_weights_to_the_bit():
    rule, weights = keeping(100), torch.randn(48)
    for number in range(200):
        push_(rule, weights, torch.zeros(48), 16 * number, 16)
        assert torch.equal(rule.state[EMA], weights)


def test_at_first_it_is_the_plain_mean_over_samples():
    rule, weights, seen = keeping(10_000), torch.zeros(48), []
    for number in range(10):
        push_(rule, weights, -torch.ones(48), 16 * number, 16, lr=1.0)
        seen.append(weights[0].item())
        assert rule.state[EMA][5].item() == pytest.approx(sum(seen) / len(seen), rel=1e-6)


def test_it_forgets_by_samples_whatever_a_push_holds():
    """The same samples in pushes of 8 and of 16, with weights that stay in between."""
    torch.manual_seed(0)
    rules, weights = [keeping(100), keeping(100)], torch.randn(48)
    for rule in rules:
        rule.state[EMA].copy_(torch.randn(48, generator=torch.Generator().manual_seed(1)))
    for start in range(1000, 1320, 16):
        push_(rules[0], weights, torch.zeros(48), start, 8)
        push_(rules[0], weights, torch.zeros(48), start + 8, 8)
        push_(rules[1], weights, torch.zeros(48), start, 16)
    assert torch.allclose(rules[0].state[EMA], rules[1].state[EMA], rtol=2**-22, atol=1e-7)
    assert not torch.allclose(rules[0].state[EMA], weights, atol=1e-3)


@pytest.mark.parametrize(
    "staleness, of_weights, of_mean",
    [
        (0, 0.052632, 0.004588),
        (1, 0.058201, 0.004636),
        (3, 0.071579, 0.004753),
        (7, 0.115108, 0.005153),
    ],
)
def test_the_noise_that_staleness_adds_is_taken_out_of_the_mean(staleness, of_weights, of_mean):
    """A parabola, unit noise, rate 0.1, a = 0.99: the variances are those of the linear recursion, by its Lyapunov equation."""
    torch.manual_seed(0)
    size = 50_000
    rule, weights = keeping(-1 / math.log(0.99), size), torch.zeros(size)
    read = [weights.clone() for _ in range(staleness + 1)]
    for _ in range(500):
        push_(rule, weights, read.pop(0) + torch.randn(size), 10**9, 1)
        read.append(weights.clone())
    assert weights.var().item() == pytest.approx(of_weights, rel=0.04)
    assert rule.state[EMA].var().item() == pytest.approx(of_mean, rel=0.04)


def test_it_is_saved_beside_the_weights_and_evaluated_with_statistics_of_its_own(
    digits, tmp_path, capsys
):
    options = ["--data", str(digits), "--model", "networks_for_tests:normed"]
    options += ["--rule.ema_samples", "300", "--epochs", "2", "--run.progress", "none"]
    run = RunDir(tmp_path / "run")
    assert simulate.main([*options, "--workers", "3", "--out", str(run.path)]) == 0
    told = next(line for line in capsys.readouterr().out.splitlines() if "running mean" in line)
    directory = next(run.checkpoints.glob("v*"))
    last, mean = checkpoint.load(directory)[0], checkpoint.load(directory / "ema.pt")[0]
    assert last.keys() == mean.keys()
    assert not any(torch.equal(last[name], mean[name]) for name in last if name.endswith("weight"))
    assert replay.main([str(run.path), "--model", "networks_for_tests:normed"]) == 0
    measured = ["--data", str(digits), "--model", "networks_for_tests:normed"]
    capsys.readouterr()
    assert evaluate.main([str(directory / "ema.pt"), *measured, "--batch-size", "16"]) == 0
    said = capsys.readouterr().out
    assert "the running mean of the weights at version" in said
    loss = float(said.split("loss ")[1])
    # on other images than the simulation's (not augmented): about the same, and far from what x's statistics would give
    assert loss == pytest.approx(float(told.split("loss ")[1].split(",")[0]), abs=0.15)


def test_a_mean_that_begins_later_begins_with_the_weights_of_then():
    rule, weights = keeping(100), torch.randn(48)
    assert rule.load_({EMA: weights, "velocity": torch.ones(48)})
    push_(rule, weights.clone(), torch.zeros(48), 5000, 16)
    assert torch.equal(rule.state[EMA], weights)

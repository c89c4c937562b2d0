"""dc_asgd: what is squared is the gradient itself, and the way is from the weights that it was computed on."""

import pytest
import torch
from test_pace import ENDLESS, completed
from test_simulate import play

from asgd_mpi.config import rulebook
from asgd_mpi.config.options import RuleConfig
from asgd_mpi.errors import ConfigError
from asgd_mpi.offline.simulation import Times
from asgd_mpi.optim.rules import make_rule
from asgd_mpi.protocol.ledger import Ledger, LedgerError
from asgd_mpi.protocol.messages import Header, Kind, Verdict

LAMBDA = {"dc_asgd_c": 0.04, "dc_asgd_a": 2.0}


def moved(name, gradient, scale=1.0, weight_decay=0.0, lr=0.5):
    """How far the weights 3, 5 move by a gradient that was computed on 1, 1."""
    config = RuleConfig(name=name, momentum=0.0, momentum_at="none", weight_decay=weight_decay, dc_lambda=LAMBDA[name])
    rule, weights = make_rule(2, config, 2), torch.tensor([3.0, 5.0])
    rule.begin_(1, torch.ones(2))
    rule.apply_(weights, scale * torch.tensor(gradient), Verdict(lr, worker=1, scale=scale), slice(0, 2))
    return (torch.tensor([3.0, 5.0]) - weights).tolist()


@pytest.mark.parametrize("scale", [1.0, 1 / 16, 1 / 256])
def test_a_gradient_that_was_scaled_down_is_compensated_as_the_one_that_it_was(scale):
    found = moved("dc_asgd_c", [5.0, 2.0], scale)
    assert found == pytest.approx([0.5 * scale * (5 + 0.04 * 25 * 2), 0.5 * scale * (2 + 0.04 * 4 * 4)], rel=1e-3)    # 2 of 5 in the first
    size = 0.05 ** 0.5                                                                              # of the first mean square
    assert moved("dc_asgd_a", [5.0, 2.0], scale) == pytest.approx(
        [0.5 * scale * (5 + 2 * 25 * 2 / (5 * size)), 0.5 * scale * (2 + 2 * 4 * 4 / (2 * size))], rel=1e-3)


@pytest.mark.parametrize("name", LAMBDA)
def test_weight_decay_is_not_squared(name):
    plain, decayed = moved(name, [5.0, 2.0]), moved(name, [5.0, 2.0], weight_decay=0.25)
    assert [more - less for more, less in zip(decayed, plain)] == pytest.approx([0.5 * 0.25 * 3, 0.5 * 0.25 * 5])
    assert moved(name, [0.0, 0.0], weight_decay=0.25) == [0.5 * 0.25 * 3, 0.5 * 0.25 * 5]


@pytest.mark.parametrize("limit", [{"max_drift": 0.25}, {"clip_norm": 1.5}])
def test_workers_whose_gradients_are_limited_take_the_steps_of_the_equation(limit):
    def steep_(flat, normalise, batch, seed, accumulate=False):
        flat.gradient[0] = 3 * flat.weights[0] + 1
        return 0.0

    eta, workers = 0.125, 3
    game = play(workers, 60, eta=eta, times=Times(1.0, 0.07, 0.01, 0.05, spread=0.4), failures="slow:3x@rank2", name="dc_asgd_c",
                dc_lambda=0.5, compute_gradient_=steep_, **limit)
    seen, scales = [1.0], set()
    for push in game.pushes:
        at = seen[push.read_version]
        gradient = 3 * at + 1
        longest = limit.get("clip_norm") or limit["max_drift"] * abs(at) / (eta * workers)
        scale = min(1.0, longest / abs(gradient))
        scales.add(scale)
        seen.append(seen[-1] - eta * scale * (gradient + 0.5 * gradient ** 2 * (seen[-1] - at)))
    assert min(scales) < 0.5 and game.computation.seen == pytest.approx(seen, abs=1e-5)


@pytest.mark.parametrize("options, reason", [
    (["--n-sync", "2"], "--exchange.n_push 2 .* a sum over several has another square"),
    (["--n-sync", "auto"], "--exchange.n_push auto .* another square"),
    (["--exchange.overlap", "true"], "--exchange.overlap true .* weights that a gradient was computed on"),
    (["--exchange.n_fetch", "3"], "--exchange.n_fetch 3 .* weights that a gradient was computed on"),
    (["--exchange.wire", "float16"], "what rounding them loses")])
@pytest.mark.parametrize("name", LAMBDA)
def test_what_leaves_the_server_without_the_gradient_or_its_weights_is_refused(name, options, reason):
    with pytest.raises(ConfigError, match=reason):
        rulebook.check(completed("--rule", name, *options), 4)


@pytest.mark.parametrize("scale", [0.0, -0.5, 1.5, float("nan"), float("inf")])
def test_a_scale_that_no_limit_gives_is_refused(scale):
    ledger = Ledger(ENDLESS, lambda samples, staleness: 1.0)
    with pytest.raises(LedgerError, match="scaled by"):
        ledger.judge(Header(Kind.GRADIENT, 0, 1, 0, 1, 0, 1, scale=scale))
    assert ledger.version == 0 and ledger.judge(Header(Kind.GRADIENT, 0, 1, 0, 1, 0, 1, scale=0.25)).scale == 0.25

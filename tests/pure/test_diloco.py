"""diloco: workers that train on their own between two exchanges, and the server's step with the way that they went."""

from types import SimpleNamespace

import pytest
import torch
from test_loops import Cluster, make_task
from torch import nn

from asgd_mpi.config.options import Config, DataConfig, ExchangeConfig, RuleConfig
from asgd_mpi.config.rulebook import RULEBOOK
from asgd_mpi.offline.simulation import Times, simulate
from asgd_mpi.optim.replica import Replica
from asgd_mpi.optim.rules import make_rule
from asgd_mpi.optim.step import ScaledLoss
from asgd_mpi.protocol.messages import Verdict
from asgd_mpi.record.audit import audit
from asgd_mpi.record.events import read_log
from asgd_mpi.replay import replay
from asgd_mpi.vector.flat import FlatModel
from asgd_mpi.vector.partition import PIECE, pieces

PLAIN = ["--rule", "diloco", "--rule.outer_rate", "1", "--rule.outer_momentum", "0"]
PLAIN += ["--rule.outer_pushes", "1"]
MODEL = ["--model", "networks_for_tests:without_dropout"]
TIMES = Times(0.1, 0.01, 0.01, 0.01, spread=0.3)


def outer(weights, ways, num_workers, weight=1.0, **rule):
    """The weights after some pushes, each applied piece by piece."""
    config = RuleConfig(name="diloco", momentum=0.0, momentum_at="none", **rule)
    server, weights = make_rule(len(weights), config, num_workers), weights.clone()
    for version, way in enumerate(ways):
        verdict = Verdict(0.1 * weight, version, rate=0.1)
        for piece in pieces(len(weights)):
            server.apply_(weights, way, verdict, piece)
    return weights


def test_pushes_of_one_number_come_to_what_nesterov_makes_of_their_mean():
    ways = [torch.tensor([float(k)]) for k in (1, 2, 3, 4)] * 3
    x = outer(torch.zeros(1), ways, num_workers=4)
    assert x.item() == pytest.approx(-14.08575, rel=1e-6)
    # half of the way throughout, if every push has half of its weight
    assert outer(torch.zeros(1), ways, 4, weight=0.5).item() == pytest.approx(x.item() / 2)


@pytest.mark.parametrize("num_pushes", [1, 3])
def test_the_outer_trace_is_that_of_torch_nesterov_on_the_mean(num_pushes):
    torch.manual_seed(0)
    size = PIECE + 48
    parameter = nn.Parameter(torch.randn(size))
    optimizer = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    begun, ways = parameter.detach().clone(), torch.randn(4 * num_pushes, size)
    for step in range(4):
        parameter.grad = ways[step * num_pushes : (step + 1) * num_pushes].mean(0)
        optimizer.step()
        done = list(ways[: (step + 1) * num_pushes])
        torch.testing.assert_close(outer(begun, done, num_pushes), parameter.detach())


INNER = {
    "none": lambda one: torch.optim.SGD(one, weight_decay=0.01, foreach=False),
    "worker": lambda one: torch.optim.SGD(one, momentum=0.5, weight_decay=0.01, foreach=False),
    "dana": lambda one: torch.optim.SGD(
        one, momentum=0.5, weight_decay=0.01, nesterov=True, foreach=False
    ),
    "adamw": lambda one: torch.optim.AdamW(one, betas=(0.9, 0.95), fused=True),
    "adam": lambda one: torch.optim.Adam(one, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
    "nadamw": lambda one: torch.optim.NAdam(
        one, betas=(0.9, 0.95), weight_decay=0.01, decoupled_weight_decay=True, foreach=False
    ),
}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("inner", INNER)
def test_one_worker_with_an_outer_rate_of_1_is_the_inner_optimizer_alone_to_the_bit(
    inner, overlap, monkeypatch
):
    """With overlap what it fetches lacks its last push. Over several pushes and a resume, at a rate that follows the worker's own batches. Weights from 1 to 2, which change little."""
    torch.manual_seed(1)
    at = inner if inner in ("worker", "dana") else "none"
    size, momentum, num_inner = PIECE + 4096, 0.0 if at == "none" else 0.5, 3
    gradients = torch.randn(12, size)
    coming = iter(gradients)

    def compute_gradient_(self, flat, *rest):
        flat.gradient.copy_(next(coming))
        return 1.0

    monkeypatch.setattr(ScaledLoss, "compute_gradient_", compute_gradient_)
    rule = RuleConfig(
        name="diloco",
        momentum=momentum,
        momentum_at=at,
        optimizer=inner if "ada" in inner else "sgd",
        beta2=0.95,
        weight_decay=0.01,
        max_drift=0.0,
        outer_rate=1.0,
        outer_momentum=0.0,
        outer_pushes=1,
    )
    config = Config(
        rule=rule,
        exchange=ExchangeConfig(n_push=num_inner, n_fetch=num_inner, overlap=overlap),
        data=DataConfig(batch_size=2),
    )
    flat = FlatModel(nn.Linear(size, 1, bias=False), torch.device("cpu"))
    x = torch.rand(size) / 2 + 1.25

    def rate_at(samples):
        return 0.01 / (1 + samples)

    replica, server = Replica(flat, config, 1, rate_at), make_rule(size, rule, 1)
    parameter = nn.Parameter(x.clone())
    optimizer = INNER[inner]([parameter])
    batch = SimpleNamespace(size=1)
    before = x.clone()
    for push in range(4):
        flat.weights.copy_(before if overlap else x)
        # the first one lacks nothing
        replica.fetched_(push, 2 * num_inner * push, flat.weights, lacks_push=overlap and push > 0)
        before = x.clone()
        for inner in range(num_inner):
            replica.add(batch, None)
            step = num_inner * push + inner
            parameter.grad = gradients[step].clone()
            optimizer.param_groups[0]["lr"] = rate_at(2 * step)
            optimizer.step()
        assert replica.finish()
        for piece in pieces(size):
            server.apply_(x, flat.gradient, Verdict(0.3, push, rate=0.3), piece)
        assert torch.equal(x, parameter.detach())
        if push == 1 and not overlap:
            kept = {name: tensor.clone() for name, tensor in replica.state.items()}
            replica = Replica(flat, config, 1, rate_at)
            replica.load_(kept)


def test_one_inner_step_without_momentum_is_asgd_and_several_are_downpour(digits):
    def weights(*options):
        momentum = ["--rule.momentum", "0", "--rule.staleness", "constant", "--rule.max_drift", "0"]
        task = make_task(
            digits, *MODEL, *options, *momentum, "--schedule.name", "constant", epochs=0.5
        )
        return simulate(task, 3, TIMES).latest.weights

    inner = ["--rule.momentum_at", "none", "--lr", "0.05", "--schedule.warmup_epochs", "0"]
    asgd = weights("--rule", "asgd", *inner)
    downpour = weights("--rule", "downpour", *inner, "--n-sync", "4")
    torch.testing.assert_close(weights(*PLAIN, *inner, "--n-sync", "1"), asgd)
    torch.testing.assert_close(weights(*PLAIN, *inner, "--n-sync", "4"), downpour)
    assert not torch.allclose(asgd, downpour)


@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        ["--exchange.wire", "topk", "--exchange.density", "0.1"],
        ["--exchange.overlap", "true", "--exchange.wire", "int8"],
    ],
    ids=["topk", "overlap"],
)
def test_a_run_uses_every_sample_once_and_replays_to_the_bit(
    digits, tmp_path, num_workers, options
):
    model = ["--model", "networks_for_tests:broad"]
    task = make_task(digits, "--rule", "diloco", "--n-sync", "5", *model, *options)
    cluster = Cluster(task, num_workers, tmp_path)
    found = audit(
        cluster.train(),
        1437,
        round(1.5 * 1437),
        num_workers,
        reads_own_pushes="--exchange.overlap" not in options,
    )
    assert not found.violations and [epoch.missing for epoch in found.epochs] == [0, 0]
    log = list(read_log(cluster.run.pushes))
    assert torch.equal(replay(task, log, num_workers)[0].weights, cluster.server.window.latest)
    assert cluster.server.final_score.loss < 2.25


def test_what_a_checkpoint_keeps_of_a_worker_is_its_inner_velocity(digits):
    task = make_task(digits, "--rule", "diloco", "--n-sync", "2")
    flat = FlatModel(task.build_module(), torch.device("cpu"))
    assert set(Replica(flat, task.config, 3, lambda samples: 0.1).state) == {"velocity"}
    assert RULEBOOK["diloco"].moves == "local"

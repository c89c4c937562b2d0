"""diloco: workers that train on their own between two exchanges, and the server's step with the way that they went."""

from types import SimpleNamespace

import pytest
import torch
from test_loops import Cluster, make_task
from torch import nn

from asgd_mpi.config import parse, written
from asgd_mpi.config.options import Config, DataConfig, ExchangeConfig, RuleConfig
from asgd_mpi.config.rulebook import RULEBOOK, doubts, outer_rate, share_ahead
from asgd_mpi.offline.simulation import Times, simulate
from asgd_mpi.optim.replica import Replica
from asgd_mpi.optim.rules import make_rule
from asgd_mpi.optim.step import ScaledLoss
from asgd_mpi.protocol.messages import Verdict
from asgd_mpi.record.audit import audit
from asgd_mpi.record.events import read_log
from asgd_mpi.replay import replay
from asgd_mpi.task import complete, for_workers, open_task
from asgd_mpi.vector.flat import FlatModel
from asgd_mpi.vector.partition import PIECE, pieces

PLAIN = ["--rule", "diloco", "--rule.outer_rate", "1", "--rule.outer_momentum", "0"]
PLAIN += ["--rule.outer_pushes", "1"]
MODEL = ["--model", "networks_for_tests:without_dropout"]
TIMES = Times(0.1, 0.01, 0.01, 0.01, spread=0.3)


def outer(weights, ways, num_workers, weight=1.0, outer_momentum=0.9):
    """The weights after some pushes, each applied piece by piece, with the outer step of the papers."""
    config = RuleConfig(
        name="diloco",
        momentum=0.0,
        momentum_at="none",
        outer_rate=0.7,
        outer_momentum=outer_momentum,
    )
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


def farthest(num_workers, outer_rate, outer_momentum, overlap, ahead=0.5):
    """Return the largest distance of the weights from 0 in the last of 200 rounds; a worker that sets out from x is at 0 within a push."""
    config = RuleConfig(
        name="diloco",
        momentum=0.0,
        momentum_at="none",
        outer_rate=outer_rate,
        outer_ahead=ahead,
        outer_momentum=outer_momentum,
    )
    share = share_ahead(config, num_workers)
    server, x, far = make_rule(1, config, num_workers), torch.ones(1), []
    began = [x.clone() for _ in range(num_workers)]
    fetched = [x.clone() for _ in range(num_workers)]
    for version in range(200 * num_workers):
        worker = version % num_workers
        way = began[worker]
        server.apply_(x, way, Verdict(0.1, version, rate=0.1), slice(0, 1))
        # with overlap what it fetched a push ago, and a part of its own way
        began[worker] = fetched[worker] - share * way if overlap else x.clone()
        fetched[worker] = x.clone()
        far.append(abs(x.item()))
    return max(far[-num_workers:])


@pytest.mark.parametrize("num_workers", [3, 8, 32])
@pytest.mark.parametrize("overlap", [False, True])
def test_workers_that_take_turns_converge_at_the_default_outer_step_for_any_number(
    num_workers, overlap
):
    rate = outer_rate(RuleConfig(name="diloco"), overlap)
    assert farthest(num_workers, rate, RuleConfig().outer_momentum, overlap) < 1e-6


@pytest.mark.parametrize(
    "overlap, ahead, edge",
    [(False, 0.5, 1.65), (True, 0, 0.9), (True, 0.25, 1.05), (True, 0.5, 1.6), (True, 1, 0.95)],
)
def test_the_largest_stable_outer_rate_of_eight_workers_and_that_of_the_papers_is_not_with_their_momentum(
    overlap, ahead, edge
):
    assert farthest(8, edge, 0.0, overlap, ahead) < 1
    assert farthest(8, 1.06 * edge, 0.0, overlap, ahead) > 1
    assert farthest(8, 0.7, 0.9, overlap, ahead) > 10


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
        outer_ahead=0.5,
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


@pytest.mark.parametrize(
    "ahead, num_workers, share", [(0.5, 8, 0.5), (0.25, 2, 0.5), (0, 8, 1 / 8)]
)
def test_with_overlap_a_worker_goes_a_share_of_its_own_way_ahead_of_what_it_fetched(
    ahead, num_workers, share, monkeypatch
):
    def compute_gradient_(self, flat, *rest):
        flat.gradient.fill_(1.0)
        return 1.0

    monkeypatch.setattr(ScaledLoss, "compute_gradient_", compute_gradient_)
    rule = RuleConfig(
        name="diloco",
        optimizer="sgd",
        momentum=0.0,
        momentum_at="none",
        weight_decay=0.0,
        max_drift=0.0,
        outer_rate=0.8,
        outer_ahead=ahead,
    )
    exchange, data = ExchangeConfig(n_push=1, n_fetch=1, overlap=True), DataConfig(batch_size=2)
    flat = FlatModel(nn.Linear(4, 1, bias=False), torch.device("cpu"))
    config = Config(rule=rule, exchange=exchange, data=data)
    replica = Replica(flat, config, num_workers, lambda samples: 0.1)
    flat.weights.fill_(2.0)
    replica.fetched_(0, 0, flat.weights)
    replica.add(SimpleNamespace(size=1), None)
    assert replica.finish()
    torch.testing.assert_close(flat.gradient, torch.full_like(flat.gradient, 0.1))  # its way
    flat.weights.fill_(3.0)
    replica.fetched_(1, 2, flat.weights, lacks_push=True)
    replica.begin_()
    ahead_of_it = torch.full_like(flat.weights, 3 - 0.8 * share * 0.1)
    torch.testing.assert_close(flat.weights, ahead_of_it)


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


@pytest.mark.parametrize(
    "options, rate",
    [
        ([], 1.0),
        (["--exchange.overlap", "true"], 1.0),
        (["--n-sync", "auto", "--rule.outer_ahead", "0"], 0.5),
        (["--rule.outer_momentum", "0.9"], 0.7),
        (["--rule.outer_momentum", "0.9", "--exchange.overlap", "true"], 0.5),
        (["--rule.outer_rate", "0.3", "--exchange.overlap", "true"], 0.3),
    ],
    ids=str,
)
def test_the_server_goes_less_of_the_way_with_a_momentum_of_its_own_and_where_no_worker_goes_ahead(
    digits, options, rate
):
    assert make_task(digits, "--rule", "diloco", *options).config.rule.outer_rate == rate


def test_averaged_workers_take_the_root_of_their_number_times_the_rate_up_to_a_limit_unless_it_is_given(
    digits,
):
    def opened(*options, num_workers=3):
        asked = parse.parse(["--data", str(digits), "--rule", "diloco", *options])
        task, told = for_workers(open_task(complete(asked)), asked, num_workers)
        return task.config, told

    config, [told] = opened()
    assert config.schedule.lr == pytest.approx(0.0346, abs=1e-4) and config.data.batch_size == 16
    assert (
        "3 workers: lr 0.034641, not 0.02 as the recipe has for one" in told and "--lr 0.02" in told
    )
    # the number whose ways are averaged
    assert opened("--rule.outer_pushes", "2")[0].schedule.lr == pytest.approx(0.02 * 2**0.5)
    assert [opened(num_workers=n)[0].schedule.lr for n in (4, 32)] == [0.04, 0.04]
    adamw = ["--rule.optimizer", "adamw"]
    rates = [opened(*adamw, num_workers=n)[0].schedule.lr for n in (4, 8, 32)]
    assert rates == pytest.approx([0.002, 0.002 * 2**0.5, 0.004])
    for given in (["--lr", "0.02"], ["--batch-size", "16"], ["--rule.outer_pushes", "1"]):
        config, told = opened(*given)
        assert (config.schedule.lr, told) == (0.02, [])
    assert opened(num_workers=1)[1] == []
    # what a run has recorded, another number of workers goes on with
    config, _ = opened()
    again = parse.parse([], base=written.asked(written.record(config, 3)))
    task, told = for_workers(open_task(complete(again)), again, 8)
    assert (task.config.schedule.lr, told) == (config.schedule.lr, [])


@pytest.mark.parametrize(
    "options, num_workers, told",
    [
        (["--rule", "diloco"], 8, "diloco: 37 rounds in which each worker trains 50 batches"),
        (["--rule", "diloco", "--exchange.n_push", "auto"], 8, "diloco: 187 rounds"),
        (["--rule", "diloco", "--epochs", "31"], 8, "diloco: 290 rounds"),
        (["--rule", "diloco", "--epochs", "32"], 8, ""),
        (["--rule", "diloco", "--n-sync", "5"], 8, ""),
        (["--rule", "diloco"], 1, ""),
        (["--rule", "asgd", "--n-sync", "50"], 8, ""),
    ],
)
def test_a_run_with_few_rounds_of_local_training_is_told_before_it(
    digits, options, num_workers, told
):
    config = make_task(digits, "--epochs", "4", *options).config
    found = doubts(config, num_workers, num_samples=60_000)
    assert [told] == [doubt[: len(told)] for doubt in found] if told else not found


def test_a_run_of_before_goes_on_with_the_outer_step_that_it_has_recorded(digits):
    rule = ["--rule", "diloco", "--rule.outer_rate", "0.7", "--rule.outer_momentum", "0.9"]
    before = written.record(make_task(digits, *rule).config, 8)
    again = complete(parse.parse([], base=written.asked(before)))
    assert (again.rule.outer_rate, again.rule.outer_momentum) == (0.7, 0.9)


def test_a_run_from_before_workers_went_ahead_does_not_when_it_goes_on(digits):
    overlaps = ["--rule", "diloco", "--exchange.overlap", "true", "--rule.outer_rate", "0.5"]
    text = written.record(make_task(digits, *overlaps).config, 8)
    assert "  outer_ahead: 0.5\n" in text
    before = complete(parse.parse([], base=written.asked(text.replace("  outer_ahead: 0.5\n", ""))))
    assert before.rule.outer_ahead == 0 and share_ahead(before.rule, 8) == 0.5 / 8
    assert share_ahead(complete(parse.parse(["--data", str(digits), *overlaps])).rule, 8) == 0.25


def test_eight_workers_that_exchange_every_five_batches_learn_the_digits_by_default(digits):
    """In 18 rounds; n_sync 1 comes to 97.5 %. With an outer momentum of 0.9 and the rate of one worker it was 54 %."""
    words = "--epochs 8 --run.validate_every 8 --rule diloco --n-sync 5 --exchange.wire int8"
    asked = parse.parse(["--data", str(digits), *words.split()])
    task, _ = for_workers(open_task(complete(asked)), asked, 8)
    game = simulate(task, 8, Times(0.01, 0.001, 0.0001, 0.001, spread=0.3))
    assert game.scores[-1].named["top1_error"] < 0.2


def test_what_a_checkpoint_keeps_of_a_worker_is_its_inner_velocity(digits):
    task = make_task(digits, "--rule", "diloco", "--n-sync", "2")
    flat = FlatModel(task.build_module(), torch.device("cpu"))
    assert set(Replica(flat, task.config, 3, lambda samples: 0.1).state) == {"velocity"}
    assert RULEBOOK["diloco"].moves == "local"

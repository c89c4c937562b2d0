"""The simulation: what a run computes, on a clock of its own; and the rules, played through it."""

import dataclasses
import random
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_loops import EXCHANGES, RULES, Cluster, make_task
from torch import nn

from asgd_mpi import replay, simulate
from asgd_mpi.config.failures import parse as parse_failures
from asgd_mpi.config.options import Config, DataConfig, ExchangeConfig, RuleConfig, ScheduleConfig
from asgd_mpi.config.rulebook import RULEBOOK, pacing
from asgd_mpi.errors import TrainingDiverged, WorkersLost
from asgd_mpi.offline.simulation import Machines, Simulation, Times, prepare
from asgd_mpi.offline.simulation import simulate as train
from asgd_mpi.offline.trainer import Computed, SingleProcessTrainer, Snapshot
from asgd_mpi.optim.objective import Tally
from asgd_mpi.optim.lr_schedule import Schedule
from asgd_mpi.optim.replica import Replica
from asgd_mpi.optim.rules import make_rule
from asgd_mpi.optim.stability import limit
from asgd_mpi.optim.step import ScaledLoss
from asgd_mpi.protocol.ledger import Plan
from asgd_mpi.record.audit import audit
from asgd_mpi.record.events import Interval, Note, Push
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.summary import summarize
from asgd_mpi.simulate import write_run
from asgd_mpi.vector.flat import FlatModel
from asgd_mpi.vector.vector_format import VectorFormat

TIMES = Times(0.01, 0.001, 0.0001, 0.001, spread=0.3)
AT_ONCE = Times(1.0, 0.0, 0.0, 0.0)


def without_times(pushes):
    return [
        dataclasses.astuple(push)[1:]
        if dataclasses.is_dataclass(push)
        else [getattr(push, name) for name in push.__struct_fields__ if name != "t"]
        for push in pushes
    ]


@pytest.mark.parametrize("rule", RULES)
def test_one_simulated_worker_leaves_the_log_and_the_weights_of_a_real_one(digits, tmp_path, rule):
    options = RULES[rule] + {
        "sync_backup": ["--rule.backup", "0"],
        "softsync": ["--rule.splits", "1"],
    }.get(rule.partition(",")[0], [])
    task = make_task(
        digits,
        "--rule",
        rule.partition(",")[0],
        *options,
        "--model",
        "networks_for_tests:without_dropout",
        epochs=0.5,
    )
    cluster = Cluster(task, 1, tmp_path)
    pushes = cluster.train()
    simulation = train(task, 1, TIMES)
    assert without_times(simulation.pushes) == without_times(pushes)
    assert torch.equal(simulation.latest.weights, cluster.server.window.latest)
    score = cluster.server.final_score
    assert (simulation.scores[-1].top1_error, simulation.scores[-1].version) == (
        score.top1_error,
        score.version,
    )


@pytest.mark.parametrize(
    "options", [options for options in EXCHANGES if "auto" not in options], ids=" ".join
)
def test_one_simulated_worker_exchanges_as_a_real_one_does(digits, tmp_path, options):
    task = make_task(digits, *options, epochs=0.5)
    pushes = Cluster(task, 1, tmp_path).train()
    assert without_times(train(task, 1, TIMES).pushes) == without_times(pushes)


def test_one_worker_is_plain_sequential_sgd_to_the_bit(digits):
    task = make_task(
        digits,
        "--lr",
        "0.05",
        "--schedule.name",
        "constant",
        "--schedule.warmup_epochs",
        "0",
        "--rule.momentum",
        "0.9",
        "--rule.weight_decay",
        "0",
        "--batch-size",
        "16",
        "--model",
        "networks_for_tests:without_dropout",
    )
    simulation = train(task, 1, TIMES)
    module, loader = task.build_module(), task.train_loader()
    optimizer = torch.optim.SGD(
        module.parameters(), lr=0.05, momentum=0.9, nesterov=True, foreach=False
    )
    for push in simulation.pushes:
        batch = loader.batch(push.epoch, push.start, push.stop)
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(task.normalise(batch.images)), batch.labels).backward()
        optimizer.step()
    assert torch.equal(FlatModel(module, torch.device("cpu")).weights, simulation.latest.weights)
    assert len(simulation.pushes) == 90 + 45  # 1.5 epochs


@pytest.mark.parametrize("rule", RULES)
def test_a_simulation_is_a_run_that_replays_to_the_bit_and_can_be_reported(digits, tmp_path, rule):
    task = make_task(
        digits,
        "--rule",
        rule.partition(",")[0],
        # most of the time of the embedded one goes into its convolutions
        *["--model", "networks_for_tests:small", "--batch-size", "16", *RULES[rule]],
        *["--inject", "slow:3x@rank2,kill@t=0.2s:rank4"],
        epochs=1,
    )
    simulation = train(task, 5, TIMES)
    run = RunDir.create(tmp_path / "run", "")
    write_run(run, task, simulation)
    assert replay.main([str(run.path), "--model", "networks_for_tests:small"]) == 0
    summary = summarize(run)
    assert summary.status == "finished" and not summary.problems and not summary.audit.violations
    assert [epoch.missing for epoch in summary.audit.epochs] == [0]
    assert summary.num_workers == 5 and [loss.rank for loss in summary.retirements] == [4]
    assert summary.training_s == simulation.pushes[-1].t
    slow, quick = summary.workers[1], summary.workers[4]
    assert slow.pushes < quick.pushes or rule in ("sync", "ssp")


def test_the_same_options_give_the_same_log_and_another_seed_another_one(digits):
    def log(seed):
        task = make_task(digits, "--seed", seed, "--exchange.n_push", "auto", epochs=0.5)
        return train(task, 6, TIMES).pushes

    first = log("1")
    assert first == log("1") and first != log("2")


def test_a_push_sums_up_as_many_batches_as_it_was_asked_to_whatever_a_lease_holds(digits):
    simulation = train(
        make_task(digits, "--rule", "easgd", "--n-sync", "10", "--batch-size", "4"), 2, TIMES
    )
    whole = [push.positions == 40 for push in simulation.pushes]
    assert sum(whole) > 0.9 * len(whole) and max(push.positions for push in simulation.pushes) == 40


def test_a_late_gradient_is_dropped_and_its_images_are_trained_again(digits):
    task = make_task(digits, "--rule", "ringmaster", "--rule.max_staleness", "4", epochs=1)
    simulation = train(task, 5, TIMES)
    assert simulation.num_dropped > 10 and max(push.staleness for push in simulation.pushes) == 3
    assert simulation.ledger.samples == 1437


def test_a_loss_that_is_no_number_ends_the_simulation_with_advice(digits):
    with pytest.raises(TrainingDiverged, match="(?s)no longer finite at version .*--schedule.lr"):
        train(make_task(digits, "--lr", "1e9"), 2, TIMES)


def test_when_the_last_worker_dies_the_simulation_says_so(digits):
    with pytest.raises(WorkersLost, match="no worker is left at version"):
        train(make_task(digits, "--inject", "kill@t=0.1s:rank1,raise@step3:rank2"), 2, TIMES)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--workers", "0"], "--workers 0: from 1 to 4096"),
        (["--step-time", "0"], "--step-time 0"),
        (["--push-time", "-1"], "--push-time -1"),
        (["--spread", "nan"], "--spread nan"),
        (["--slow", "3x@9"], "ranks 1 to 8"),
        (["--slow", "3@x"], "--run.inject slow:3@rankx"),
        (["--inject", "stop@t=3s:rank1"], "a simulation knows slow, kill, raise only"),
        (["--roole", "sync"], "--rule"),
        (
            ["--rule", "sync", "--exchange.overlap", "true"],
            "--exchange.overlap true with --rule.name sync",
        ),
        (["--times-from", "nowhere"], "no run directory nowhere"),
        (["--resume", "x"], "begins anew"),
        (["--servers", "2"], "--servers 2: the weights are the same"),
        (["--stages", "2"], "--stages 2: the weights are the same"),
        (["--model.batchnorm", "server_ema"], "--model.batchnorm server_ema"),
    ],
)
def test_what_cannot_be_simulated_is_refused_with_the_reason(
    digits, capsys, monkeypatch, tmp_path, options, message
):
    monkeypatch.chdir(tmp_path)
    assert simulate.main(["--data", str(digits), *options]) == 2
    assert message in capsys.readouterr().err


def test_the_command_prints_accuracy_against_virtual_time_and_takes_the_times_of_a_run(
    digits, capsys, tmp_path
):
    options = ["--data", str(digits), "--epochs", "2", "--run.progress", "none"]
    threads = torch.get_num_threads()
    slow = ["--slow", "2x@3", "--step-time", "20", "--out", str(tmp_path / "a")]
    assert simulate.main([*options, "--workers", "3", *slow]) == 0
    out = capsys.readouterr().out
    assert "accuracy" in out and "mean staleness" in out and "images a virtual second" in out
    found = simulate.times_of([RunDir.open(tmp_path / "a")])
    # a mean over the pushes
    assert found.step_s == pytest.approx(0.02 * (1 + 1 + 2) / 3, rel=0.2)
    assert found.apply_s == pytest.approx(0.0001, rel=0.5) and found.fetch_s == pytest.approx(
        0.001, rel=0.1
    )
    assert simulate.main([*options, "--workers", "3", "--times-from", str(tmp_path / "a")]) == 0
    torch.set_num_threads(threads)


# ---- rules on a parabola: x0 = 1, gradient x


class Parabola(SingleProcessTrainer):
    """A network of one weight, whose gradient is the weight itself; `seen`: the weight after each step."""

    def __init__(self, config, num_workers, lr_at=None):
        self.flat = FlatModel(nn.Linear(1, 1, bias=False), torch.device("cpu"))
        self.flat.weights[0] = 1.0
        self.task, self.objective = SimpleNamespace(config=config, computes=True), None
        self.first = Snapshot(0, 0, self.flat.weights.clone())
        self.schedule = lr_at or Schedule(
            config.schedule, 1, 1, num_workers, config.rule.staleness, num_workers
        )
        self.pushed = self.fetched = VectorFormat(self.flat.num_floats)
        self.rule = make_rule(self.flat.num_floats, config.rule, num_workers)
        self.replicas = [
            Replica(self.flat, config, num_workers, self.schedule, shares=True)
            for _ in range(num_workers)
        ]
        self.seen, self.sums = [1.0], []

    def applied(self, latest, verdict, positions):
        fresh = super().applied(latest, verdict, positions)
        if verdict.mean_of:
            self.seen.append(fresh.weights[0].item())
        self.sums.append((fresh.weights + sum(replica._own for replica in self.replicas))[0].item())
        return fresh

    def validate_(self, snapshot, start, stop, worker=0):
        right = float(stop - start)
        return Tally(stop - start, sums={"loss": 0.0, "top1": right, "top5": right})

    def _batches(self, segments):
        return (
            SimpleNamespace(skipped=0, size=1)
            for _, start, stop in segments
            for _ in range(start, stop)
        )


def own_weights_(flat, normalise, batch, seed, accumulate=False):
    """In place of ScaledLoss.compute_gradient_."""
    flat.gradient.copy_(flat.gradient + flat.weights if accumulate else flat.weights)
    return 0.0


def play(
    num_workers,
    pushes,
    eta=0.5,
    times=AT_ONCE,
    failures="",
    n_push=1,
    n_fetch=None,
    lr_at=None,
    watch=lambda game: None,
    compute_gradient_=own_weights_,
    **rule,
):
    """A simulation of `pushes` samples, batches of 1."""
    rule = RuleConfig(
        **{
            "momentum": 0.0,
            "momentum_at": "none",
            "staleness": "constant",
            "weight_decay": 0.0,
            "dc_lambda": 0.04,
            "max_drift": 0.0,
        }
        | rule
    )
    exchange = ExchangeConfig(
        n_push=n_push, n_fetch=n_fetch or n_push, overlap=False, fetch_wire="float32"
    )
    config = Config(
        rule=rule,
        exchange=exchange,
        data=DataConfig(batch_size=1),
        schedule=ScheduleConfig(name="constant", lr=eta, warmup_epochs=0.0),
    )
    plan = Plan(
        num_workers, 1000, 0, pushes, 1, max(4, n_push), 1e9, pacing=pacing(rule, num_workers)
    )
    game = Simulation(
        plan,
        exchange,
        Parabola(config, num_workers, lr_at),
        Machines(times, failures=parse_failures(failures)),
        RULEBOOK[rule.name].moves,
    )
    watch(game)
    with mock.patch.object(ScaledLoss, "compute_gradient_", staticmethod(compute_gradient_)):
        game.run()
    return game


def test_a_worker_recovers_from_one_loss_that_is_no_number():
    calls = []

    def compute_(flat, normalise, batch, seed, accumulate=False):
        calls.append(own_weights_(flat, normalise, batch, seed, accumulate))
        if len(calls) == 5:
            flat.gradient.fill_(torch.nan)
        return torch.inf if len(calls) == 5 else 0.0

    game = play(2, 20, compute_gradient_=compute_)
    assert game.num_dropped == 1 and game.ledger.samples == 20 and not game.is_degraded


def test_a_simulation_warns_of_a_loss_that_rises_as_a_run_does(capsys):
    def loss_(flat, normalise, batch, seed, accumulate=False):
        own_weights_(flat, normalise, batch, seed, accumulate)
        return flat.weights[0].item() ** 2 / 2

    def warnings(share):
        game = play(3, 1500, share * limit(3, 0.0, "none"), compute_gradient_=loss_)
        return [event.text for event in game.books[0].events if isinstance(event, Note)]

    (told,) = warnings(1.01)
    assert "the loss rises" in told and "a measured staleness of 2.0" in told
    assert told in capsys.readouterr().out and warnings(0.99) == []


@pytest.mark.parametrize("rule, option", [("asgd", "rule.momentum"), ("adamw", "rule.beta1")])
def test_what_a_simulation_advises_against_a_loss_that_rises_is_of_its_rule(digits, rule, option):
    game = prepare(make_task(digits, "--rule", rule), 2, TIMES)
    game.computation.close()
    assert f"a lower --{option}, or" in game.loss_watch.warning(0.1)


def test_the_traces_of_asgd_are_the_exact_ones():
    assert play(2, 8).computation.seen == [1, 1 / 2, 0, -1 / 4, -1 / 4, -1 / 8, 0, 1 / 16, 1 / 16]
    assert play(3, 40).computation.seen[:9] == [
        1,
        1 / 2,
        0,
        -1 / 2,
        -3 / 4,
        -3 / 4,
        -1 / 2,
        -1 / 8,
        1 / 4,
    ]


def test_the_trace_of_softsync_is_the_exact_one():
    seen = play(4, 40, name="softsync", splits=2, staleness="inverse").computation.seen
    assert seen[:7] == [1, 1 / 2, 0, -1 / 4, -5 / 16, -1 / 4, -9 / 64]


@pytest.mark.parametrize(
    "rule",
    [
        dict(name="dc_asgd_c", dc_lambda=0.0),
        dict(name="dc_asgd_a", dc_lambda=0.0),
        dict(name="ringmaster", max_staleness=10**9),
        dict(name="ssp", slack=10**9),
        dict(name="softsync", splits=5),
    ],
    ids=lambda rule: rule["name"],
)
def test_a_rule_without_what_makes_it_special_is_asgd(rule):
    def seen(**rule):
        return play(5, 200, eta=0.1, times=TIMES, failures="slow:4x@rank2", **rule).computation.seen

    assert seen(**rule) == seen() and len(seen()) == 201
    # it can tell
    assert (
        seen(name="dc_asgd_c", dc_lambda=0.5) != seen() != seen(name="ringmaster", max_staleness=3)
    )


@pytest.mark.parametrize("k", [1, 7])
def test_downpour_with_one_worker_is_sequential_sgd(k):
    assert (
        play(1, 14, eta=0.25, n_push=k, name="downpour").computation.seen[7 // k]
        == 0.13348388671875
    )


def test_downpour_moves_its_own_weights_between_two_fetches():
    """Two workers, n_push 1 and n_fetch 2: the second of its gradients is of its own weights, 1/2, whatever others did."""
    game = play(2, 40, n_push=1, n_fetch=2, name="downpour")
    assert game.computation.seen[:5] == [1, 1 / 2, 0, -1 / 4, -1 / 2]


def test_easgd_keeps_the_sum_of_the_centre_and_of_all_workers_when_nobody_descends():
    game = play(
        4,
        400,
        n_push=2,
        lr_at=lambda samples, staleness=0: 0.3 * (samples < 40),
        times=TIMES,
        name="easgd",
        failures="slow:3x@rank2",
    )
    sums = game.computation.sums
    late = sums[60:]
    assert late == pytest.approx([late[0]] * len(late), rel=1e-6)
    assert max(sums[:10]) - min(sums[:10]) > 0.1
    x = [replica._own[0].item() for replica in game.computation.replicas]
    # drawn together
    assert x == pytest.approx([game.latest.weights[0].item()] * 4, rel=1e-2)


def test_sync_is_sgd_with_the_mean_gradient_whoever_is_slow():
    game = play(4, 40, times=TIMES, failures="slow:5x@rank3", name="sync")
    # then some run out of samples
    assert game.computation.seen[:9] == [0.5**k for k in range(9)]
    assert [push.mean_of for push in game.pushes[:32]] == [0, 0, 0, 4] * 8


@pytest.mark.parametrize("name", ["sync", "ssp", "sync_backup"])
def test_those_who_wait_for_a_worker_go_on_when_it_dies(name):
    game = play(
        4,
        60,
        name=name,
        slack=0,
        failures="raise@step3:rank2,slow:3x@rank2,raise@step4:rank3,slow:2x@rank3",
    )
    assert game.ledger.members == [0, 3] and game.ledger.samples == 60


def test_a_worker_of_ssp_starts_when_theory_lets_it():
    starts = []

    def watch(game):
        game.workers[0].step_s = lambda: starts.append(round(game.now, 3)) or 1.0

    play(2, 200, failures="slow:4x@rank2", name="ssp", slack=3, watch=watch)
    assert starts[:12] == [0, 1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32]


def test_the_staleness_identity_of_a_straggler_has_the_exact_numbers():
    game = play(4, 990, times=Times(1 - 1e-6, 0, 0, 0), failures="slow:10.00001x@rank4", eta=0.01)
    pushes = game.pushes[:310]
    found = audit(pushes, num_workers=4)
    assert found.age_applied + found.age_at_end == 1240 and found.age_between == 0
    assert {push.staleness for push in pushes if push.worker == 3} == {30}
    assert sum(push.staleness for push in pushes) / 310 == pytest.approx(2.9806, abs=1e-4)


# ---- whoever is slow, dies or finishes early


class NoArithmetic:
    """Computes nothing; now and then a gradient is not finite."""

    def __init__(self, num_workers, nonfinite, seed):
        self.first = Snapshot(0, 0, torch.zeros(1))
        self.pushed = self.fetched = VectorFormat(1)
        self.schedule = lambda samples, staleness=0: 1.0
        self.replicas = [SimpleNamespace(base=-1) for _ in range(num_workers)]
        self.flat = SimpleNamespace(gradient=torch.zeros(1))
        self._nonfinite, self._random = nonfinite, random.Random(seed)

    def compute_(self, worker, segments, fetched, centre=None, lacks_push=False):
        return Computed(1.0, 0, self._random.random() >= self._nonfinite)

    def applied(self, latest, verdict, positions):
        assert verdict.version == latest.version
        return Snapshot(latest.version + 1, latest.samples + positions, latest.weights)

    def undo_(self, worker):
        pass

    def begin_anew_(self, worker):
        pass

    def validate_(self, snapshot, start, stop, worker=0):
        return Tally(stop - start)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_rule_deadlocks_or_loses_a_sample_whoever_is_slow_dies_or_finishes_early(data):
    draw = data.draw
    name, num_workers = draw(st.sampled_from(list(RULEBOOK))), draw(st.integers(1, 6))
    entry = RULEBOOK[name]
    rule = RuleConfig(
        name=name,
        splits=draw(st.integers(1, num_workers)),
        max_staleness=draw(st.integers(1, 4)),
        slack=draw(st.integers(0, 3)),
        backup=draw(st.integers(0, num_workers - 1)),
    )
    n_push = draw(st.integers(1, 5))
    n_fetch = n_push if entry.moves == "elastic" else n_push * draw(st.integers(1, 3))
    exchange = ExchangeConfig(
        n_push=n_push, n_fetch=n_fetch, overlap=entry.may_overlap and draw(st.booleans())
    )
    if exchange.overlap and draw(st.booleans()):
        exchange = ExchangeConfig(n_push="auto", n_fetch=1, overlap=True)
    total = draw(st.integers(1, 260))
    plan = Plan(
        num_workers,
        100,
        draw(st.integers(0, 20)),
        total,
        4,
        draw(st.integers(1, 4)),
        draw(st.sampled_from([0.5, 1, 9])),
        max_nonfinite=draw(st.sampled_from([1, 2, 10**9])),
        warm_start=draw(st.sampled_from([0, 0, 30])),
        pacing=pacing(rule, num_workers),
        lease_pushes=draw(st.integers(0, 4)),
    )
    failures = [
        f"slow:{draw(st.sampled_from(['1', '3', '7', '30']))}x@rank{rank}"
        for rank in range(1, num_workers + 1)
    ]
    immortal = draw(st.integers(1, num_workers))
    mortal = [
        rank for rank in range(1, num_workers + 1) if rank != immortal and draw(st.booleans())
    ]
    failures += [
        draw(
            st.sampled_from(
                [
                    f"kill@t=0.{draw(st.integers(0, 29)):02d}s:rank{rank}",
                    f"raise@step{draw(st.integers(1, 6))}:rank{rank}",
                ]
            )
        )
        for rank in mortal
    ]
    times = Times(
        0.01,
        *(draw(st.sampled_from([0.0, 0.001, 0.03])) for _ in range(3)),
        spread=draw(st.sampled_from([0.0, 0.4])),
    )
    nonfinite, seed = draw(st.sampled_from([0.0, 0.0, 0.15])), draw(st.integers(0, 9))
    game = Simulation(
        plan,
        exchange,
        NoArithmetic(num_workers, nonfinite, seed),
        Machines(times, seed, parse_failures(",".join(failures))),
        entry.moves,
    )
    try:
        game.run()
    except (TrainingDiverged, WorkersLost):
        assert not game.ledger.members and nonfinite
        return

    pushes = [push for push in game.pushes if isinstance(push, Push)]
    reads_own = not exchange.overlap and n_fetch == n_push
    found = audit(pushes, 100, total, num_workers, reads_own_pushes=reads_own)
    given_up = sum(part.stop - part.start for part in game.ledger.given_up)
    assert not found.violations
    assert (
        sum(epoch.covered for epoch in found.epochs)
        == sum(push.positions for push in pushes)
        == total - given_up
    )
    assert (
        found.age_applied + found.age_between + found.age_at_end == num_workers * found.num_versions
    )
    whole = (
        len(pushes)
        if not given_up
        else max((i + 1 for i, push in enumerate(pushes) if push.mean_of), default=0)
    )
    # each is of one step; of a range given up nothing closes it
    assert sum(push.mean_of for push in pushes) == whole
    assert nonfinite or entry.pacing(rule, num_workers).may_drop or not game.num_dropped


def test_with_n_push_auto_nobody_waits_for_a_full_server(digits):
    task = make_task(digits, "--exchange.n_push", "auto")
    plan = dataclasses.replace(
        task.plan(8),
        num_samples=10**6,
        num_validation=0,
        total_samples=16000 * task.config.data.batch_size,
    )
    game = Simulation(
        plan,
        task.config.exchange,
        NoArithmetic(8, 0.0, 0),
        Machines(Times(step_s=0.1, push_s=0.01, apply_s=0.06, fetch_s=0.01, spread=0.3)),
    )
    game.run()
    # a push waits for those of seven others: 4 steps and more
    assert len(game.pushes) < 16000 / 4
    assert 16000 / 8 * 0.1 / game.now > 0.98  # 0.56 with leases of 4 batches


def test_a_push_moves_the_weights_by_a_share_of_their_norm_by_default_where_several_workers_push():
    def first_step(num_workers, **options):
        return (
            1
            - play(
                num_workers, 6, compute_gradient_=steep_, **{"max_drift": None} | options
            ).computation.seen[1]
        )

    def steep_(flat, normalise, batch, seed, accumulate=False):
        flat.gradient[0] = 4 + (flat.gradient[0] if accumulate else 0)
        return 0.0

    # eta 0.5 times 4; of a weight of 1
    assert first_step(1) == 2 and first_step(2) == 0.25 / 2 and first_step(4) == 0.25 / 4
    assert first_step(2, n_push=2) == 0.25 / 2  # in all of its batches
    # each of its own, on its own weight
    assert first_step(4, name="downpour", n_push=2) == 0.25 / 4 * (1 + (1 - 0.25 / 8)) / 2
    # each counts twice in the end
    assert first_step(2, max_drift=2.0, momentum=0.5, momentum_at="worker") == 0.5
    # a step is the mean of two
    assert first_step(4, name="softsync", splits=2, max_drift=0.5) == 0.5 * 2 / 4
    assert (
        first_step(1, max_drift=0.5) == 0.5
        and first_step(2, max_drift=0.0) == first_step(2, name="sync") == 2
    )


def test_a_gradient_is_clipped_to_its_norm_for_each_batch():
    def first_step(num_workers, **options):
        return 1 - play(num_workers, 6, compute_gradient_=steep_, **options).computation.seen[1]

    def steep_(flat, normalise, batch, seed, accumulate=False):
        flat.gradient[0] = 4 + (flat.gradient[0] if accumulate else 0)
        return 0.0

    assert first_step(2, clip_norm=3.0) == first_step(1, clip_norm=3.0) == 1.5
    assert first_step(2, clip_norm=3.0, n_push=2) == 3  # of a sum of two batches
    assert first_step(2, clip_norm=3.0, max_drift=0.25) == 0.25 / 2


def test_a_worker_that_has_died_counts_no_push_of_what_it_had_summed_up():
    game = play(2, 8, n_push=2, times=TIMES, failures="kill@step2:rank1")
    assert game.workers[0].is_dead and game.ledger.samples == 8
    counted = [
        sum(event.pushes for event in book.events if isinstance(event, Interval))
        for book in game.books
    ]
    assert counted == [4, 0, 4]

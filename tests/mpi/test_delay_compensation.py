"""dc_asgd: what is squared is the gradient itself, and the way is from the weights that it was computed on."""

import itertools
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from test_loops import Cluster, make_task
from test_pace import ENDLESS, completed
from test_simulate import play

from asgd_mpi import replay as replay_command
from asgd_mpi.config import rulebook
from asgd_mpi.config.options import RuleConfig
from asgd_mpi.errors import ConfigError
from asgd_mpi.offline.simulation import Times
from asgd_mpi.optim.rules import make_rule
from asgd_mpi.protocol.ledger import Ledger, LedgerError
from asgd_mpi.protocol.messages import Header, Kind, Verdict
from asgd_mpi.record.audit import audit
from asgd_mpi.record.events import Member, read_log
from asgd_mpi.replay import replay

LAMBDA = {"dc_asgd_c": 0.04, "dc_asgd_a": 2.0}


def moved(name, gradient, scale=1.0, weight_decay=0.0, lr=0.5):
    """How far the weights 3, 5 move by a gradient that was computed on 1, 1."""
    config = RuleConfig(
        name=name,
        momentum=0.0,
        momentum_at="none",
        weight_decay=weight_decay,
        dc_lambda=LAMBDA[name],
    )
    rule, weights = make_rule(2, config, 2), torch.tensor([3.0, 5.0])
    rule.read_(1, torch.ones(2))
    rule.apply_(
        weights, scale * torch.tensor(gradient), Verdict(lr, worker=1, scale=scale), slice(0, 2)
    )
    return (torch.tensor([3.0, 5.0]) - weights).tolist()


@pytest.mark.parametrize("scale", [1.0, 1 / 16, 1 / 256])
def test_a_gradient_that_was_scaled_down_is_compensated_as_the_one_that_it_was(scale):
    found = moved("dc_asgd_c", [5.0, 2.0], scale)
    # 2 of 5 in the first
    assert found == pytest.approx(
        [0.5 * scale * (5 + 0.04 * 25 * 2), 0.5 * scale * (2 + 0.04 * 4 * 4)], rel=1e-3
    )
    # of the first mean square
    size = 0.05**0.5
    assert moved("dc_asgd_a", [5.0, 2.0], scale) == pytest.approx(
        [0.5 * scale * (5 + 2 * 25 * 2 / (5 * size)), 0.5 * scale * (2 + 2 * 4 * 4 / (2 * size))],
        rel=1e-3,
    )


@pytest.mark.parametrize("name", LAMBDA)
def test_weight_decay_is_not_squared(name):
    plain, decayed = moved(name, [5.0, 2.0]), moved(name, [5.0, 2.0], weight_decay=0.25)
    assert [more - less for more, less in zip(decayed, plain)] == pytest.approx(
        [0.5 * 0.25 * 3, 0.5 * 0.25 * 5]
    )
    assert moved(name, [0.0, 0.0], weight_decay=0.25) == [0.5 * 0.25 * 3, 0.5 * 0.25 * 5]


@pytest.mark.parametrize("limit", [{"max_drift": 0.25}, {"clip_norm": 1.5}])
def test_workers_whose_gradients_are_limited_take_the_steps_of_the_equation(limit):
    def steep_(flat, normalise, batch, seed, accumulate=False):
        flat.gradient[0] = 3 * flat.weights[0] + 1
        return 0.0

    eta, workers = 0.125, 3
    game = play(
        workers,
        60,
        eta=eta,
        times=Times(1.0, 0.07, 0.01, 0.05, spread=0.4),
        failures="slow:3x@rank2",
        name="dc_asgd_c",
        dc_lambda=0.5,
        compute_gradient_=steep_,
        **limit,
    )
    seen, scales = [1.0], set()
    for push in game.pushes:
        at = seen[push.read_version]
        gradient = 3 * at + 1
        longest = limit.get("clip_norm") or limit["max_drift"] * abs(at) / (eta * workers)
        scale = min(1.0, longest / abs(gradient))
        scales.add(scale)
        seen.append(seen[-1] - eta * scale * (gradient + 0.5 * gradient**2 * (seen[-1] - at)))
    assert min(scales) < 0.5 and game.computation.seen == pytest.approx(seen, abs=1e-5)


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--n-sync", "2"], "--exchange.n_push 2 .* a sum over several has another square"),
        (["--n-sync", "auto"], "--exchange.n_push auto .* another square"),
        (
            ["--exchange.overlap", "true"],
            "--exchange.overlap true .* weights that a gradient was computed on",
        ),
        (
            ["--exchange.n_fetch", "3"],
            "--exchange.n_fetch 3 .* weights that a gradient was computed on",
        ),
        (["--exchange.wire", "float16"], "what rounding them loses"),
    ],
)
@pytest.mark.parametrize("name", LAMBDA)
def test_what_leaves_the_server_without_the_gradient_or_its_weights_is_refused(
    name, options, reason
):
    with pytest.raises(ConfigError, match=reason):
        rulebook.check(completed("--rule", name, *options), 4)


@pytest.mark.parametrize("scale", [0.0, -0.5, 1.5, float("nan"), float("inf")])
def test_a_scale_that_no_limit_gives_is_refused(scale):
    ledger = Ledger(ENDLESS, lambda samples, staleness: 1.0)
    with pytest.raises(LedgerError, match="scaled by"):
        ledger.judge(Header(Kind.GRADIENT, 0, 1, 0, 1, 0, 1, scale=scale))
    assert (
        ledger.version == 0
        and ledger.judge(Header(Kind.GRADIENT, 0, 1, 0, 1, 0, 1, scale=0.25)).scale == 0.25
    )


def test_a_gradient_on_another_snapshot_than_the_one_that_is_kept_is_refused():
    ledger = Ledger(replace(ENDLESS, keeps_reads=True), lambda samples, staleness: 1.0)

    def read(packet, version, is_there=True):
        ledger.keep(Header(Kind.READ, 0, packet, version, 0, 0, 0), is_there)
        return dict(ledger.take_news())[0].read

    def push(packet, version):
        ledger.judge(Header(Kind.GRADIENT, 0, packet, version, 1, ledger.version, 1))

    with pytest.raises(LedgerError, match="version -1 is kept"):
        push(1, 0)
    assert read(1, 0, is_there=False) == -1 and read(2, 0) == 0
    push(3, 0)
    # nothing read since: the same weights, as with n_fetch above 1
    push(4, 0)
    assert read(5, 2) == 2
    with pytest.raises(LedgerError, match="version 2 is kept"):
        push(6, 1)
    ledger.retire(0, for_good=False)
    assert ledger.readmit(Header(Kind.READ, 0, 6, 2, 0, 0, 0))
    assert dict(ledger.take_news())[0].read == -1
    with pytest.raises(LedgerError, match="nobody keeps"):
        Ledger(ENDLESS, lambda samples, staleness: 1.0).keep(
            Header(Kind.READ, 0, 1, 0, 0, 0, 0), True
        )


@pytest.mark.parametrize("name", LAMBDA)
def test_the_way_is_from_the_very_snapshot_that_each_gradient_was_computed_on(
    digits, tmp_path, one_thread, name
):
    model = "networks_for_tests:without_dropout"
    task = make_task(digits, "--rule", name, "--run.validate_every", "0.2", "--model", model)
    cluster = Cluster(task, 4, tmp_path)
    server, snapshots, used, asked = cluster.server, {}, {}, itertools.count(1)
    apply_, next_snapshot, snapshot = (
        server.rule.apply_,
        server.window.next_snapshot,
        server.window.snapshot,
    )

    def watched_(weights, pushed, verdict, piece):
        used[verdict.version] = server.rule._read[verdict.worker].clone()
        apply_(weights, pushed, verdict, piece)

    def held(version):
        return None if next(asked) % 7 == 0 else snapshot(version)

    @contextmanager
    def kept(version, samples):
        with next_snapshot(version, samples) as weights:
            yield weights
        snapshots[version] = weights.clone()

    def retire():
        """A worker now and then, whatever it is about to do."""
        if (number := next(passes)) % 15 == 0:
            server._retire(number // 15 % 4, "on purpose", for_good=False)

    passes = itertools.count(1)
    server.rule.apply_, server.window.next_snapshot = watched_, kept
    server.at_every_pass = retire
    # some of what was read is gone by the time that the server hears of it
    server.window.snapshot = held
    pushes = cluster.train()
    assert len(pushes) == len(used) > 60
    for push in pushes:
        assert torch.equal(used[push.version], snapshots[push.read_version])
    made, later = {}, 0
    for push in pushes:
        later += push.read_version > made.get(push.worker, 0)
        made[push.worker] = push.version + 1
    # else this shows nothing
    assert later > 5 and next(asked) > 40
    log = list(read_log(cluster.run.pushes))
    assert sum(isinstance(entry, Member) for entry in log) >= 2
    assert not audit(pushes, cluster.plan.num_samples, cluster.plan.total_samples, 4).violations
    flat, _ = replay(task, log, 4)
    assert torch.equal(flat.weights, server.window.latest)


def test_slices_and_a_resume_compensate_with_what_was_read_to_the_bit(openmpi, digits, tmp_path):
    options = ["--data", str(digits), "--rule", "dc_asgd_a", "--run.validate_every", "0.3"]
    ran = openmpi.train(
        5, *options, "--epochs", "0.7", "--servers", "2", "--run.dir", "run", cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stderr
    more = ["--resume", "run", "--epochs", "1.2", "--override", "run.epochs"]
    ran = openmpi.train(3, *more, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert replay_command.main([str(tmp_path / "run")]) == 0

"""Both loops, driven in one process by a fake exchange: the worker's and the server's code without MPI."""

import threading
import time

import pytest
import torch
from fakes import Exchange, FakeInbox, FakeOutbox, FakeServerWindow, FakeWorkerWindow
from torch import nn

from asgd_mpi.comm.arrival import Arrival
from asgd_mpi.config import parse as configuration
from asgd_mpi.config.rulebook import RULEBOOK, workers_keep_state
from asgd_mpi.errors import RunDirError, TrainingDiverged
from asgd_mpi.optim.formats import fetch_format, push_format
from asgd_mpi.optim.replica import Replica
from asgd_mpi.optim.rules import make_rule
from asgd_mpi.protocol.ledger import Ledger
from asgd_mpi.protocol.messages import Header, Kind, Mail, Orders, Score
from asgd_mpi.record import checkpoint
from asgd_mpi.record.audit import audit
from asgd_mpi.record.checkpoint import Manifest
from asgd_mpi.record.events import (
    Checkpoint,
    EventLog,
    Fetch,
    Interval,
    Publish,
    Validation,
    read_events,
    read_log,
    read_pushes,
)
from asgd_mpi.record.meter import Meter
from asgd_mpi.record.progress import Progress
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.replay import replay
from asgd_mpi.runtime.checkpointer import Checkpointer
from asgd_mpi.runtime.client import Formats, ServerClient
from asgd_mpi.runtime.server import Links, Server, ServerBooks, ServerHabits
from asgd_mpi.runtime.worker import Books, Subject, Worker
from asgd_mpi.runtime.worker_checkpointer import WorkerCheckpointer
from asgd_mpi.task import complete, open_task
from asgd_mpi.vector import codec
from asgd_mpi.vector.flat import FlatModel

CPU = torch.device("cpu")
ABOUT = Manifest(0, 0, "digits_cnn", 10, 1, 8, "", [0.0], [1.0])


class Cluster:
    """A server in this thread, workers in others."""

    def __init__(self, task, num_workers, directory):
        self.task, self.num_workers, self.directory = task, num_workers, directory
        self.plan = task.plan(num_workers)
        flat = FlatModel(task.build_module(), CPU)
        config = task.config.exchange
        self.exchange = Exchange(
            flat.num_floats,
            flat.num_statistics,
            fetch_format(config.fetch_wire, flat.module),
            push=push_format(config, flat.module),
        )
        self.run = RunDir.create(directory / "run", "test")
        statistics = torch.zeros(flat.num_statistics) if flat.statistics else None
        if flat.statistics:
            flat.save_statistics(statistics)
        self.log, self.pushes = EventLog(self.run.metrics_of(0)), EventLog(self.run.pushes)
        groups = task.groups(flat.module)
        rule = make_rule(flat.num_floats, task.config.rule, num_workers, groups)
        checkpointer = Checkpointer(
            self.run,
            0,
            ABOUT,
            FlatModel(task.build_module(), CPU),
            rule,
            keep=3,
            sync=self.pushes.sync,
        )
        self.server = Server(
            Links(FakeServerWindow(self.exchange), FakeInbox(self.exchange)),
            Ledger(self.plan, task.schedule(num_workers)),
            rule,
            ServerBooks(
                Meter(self.log, 1.0),
                self.log,
                self.pushes,
                Progress("none", self.plan.total_samples, self.plan.num_samples),
                checkpointer,
            ),
            ServerHabits(
                20,
                task.config.failure,
                task.config.checkpoint,
                hash_snapshots=True,
                averages_statistics=task.config.model.batchnorm == "server_ema",
                workers_keep_momentum=workers_keep_state(task.config),
                workers_move=bool(RULEBOOK[task.config.rule.name].moves),
            ),
            statistics,
        )
        self.first_weights = flat.weights
        self.sent_bytes = []

    def work(self, number):
        exchange = self.task.config.exchange
        elastic = RULEBOOK[self.task.config.rule.name].moves == "elastic"
        flat = FlatModel(
            self.task.build_module(), CPU, spare=exchange.overlap, spare_weights=elastic
        )
        replica = Replica(
            flat,
            self.task.config,
            self.num_workers,
            self.task.schedule(self.num_workers),
            groups=self.task.groups(flat.module),
            kept_at=self.task.kept_at,
        )
        log = EventLog(self.run.metrics_of(number + 1))
        loaders = self.task.train_loader(), self.task.val_loader()
        outbox, meter = FakeOutbox(self.exchange, self.sent_bytes), Meter(log, 1.0)
        client = ServerClient(
            FakeWorkerWindow(self.exchange, number),
            outbox,
            flat,
            meter,
            exchange.overlap,
            elastic,
            Formats(self.exchange.layout.fetched, self.exchange.layout.pushed),
        )
        Worker(
            number,
            client,
            replica,
            Subject(self.task.objective, *loaders),
            self.task.config,
            Books(meter, WorkerCheckpointer(self.run, 0, number), log),
        ).run()
        meter.flush()
        log.close()

    def train(self):
        threads = [
            threading.Thread(target=self.work, args=[number], daemon=True)
            for number in range(self.num_workers)
        ]
        self.server.publish_first(self.first_weights)
        for thread in threads:
            thread.start()
        self.server.run()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
        self.log.close()
        self.pushes.close()
        return list(read_pushes(self.run.pushes))


def make_task(digits, *options, epochs=1.5):
    config = configuration.parse(["--data", str(digits), "--epochs", str(epochs), *options])
    return open_task(complete(config))


EXCHANGES = [
    [],
    ["--n-sync", "3"],
    ["--exchange.overlap", "true"],
    ["--exchange.n_push", "auto"],
    ["--exchange.n_push", "2", "--exchange.n_fetch", "4"],
    ["--n-sync", "7", "--exchange.overlap", "true"],
    ["--exchange.wire", "bfloat16"],
    ["--exchange.wire", "float16", "--exchange.overlap", "true"],
    ["--exchange.wire", "int4", "--model", "networks_for_tests:broad"],
    ["--exchange.wire", "topk", "--exchange.density", "0.1", "--exchange.overlap", "true"]
    + ["--model", "networks_for_tests:broad"],
]


@pytest.mark.parametrize("options", EXCHANGES, ids=" ".join)
@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_run_uses_every_sample_once_and_applies_every_push_once(
    digits, tmp_path, num_workers, options
):
    cluster = Cluster(make_task(digits, *options), num_workers, tmp_path)
    reads_own_pushes = options in ([], EXCHANGES[1], EXCHANGES[6])
    found = audit(cluster.train(), 1437, round(1.5 * 1437), num_workers, reads_own_pushes)
    assert not found.violations and [epoch.missing for epoch in found.epochs] == [0, 0]
    assert (
        found.age_applied + found.age_between + found.age_at_end == num_workers * found.num_versions
    )


@pytest.mark.parametrize("options", EXCHANGES, ids=" ".join)
def test_the_replay_of_a_run_gives_the_same_weights_to_the_bit(digits, tmp_path, options):
    cluster = Cluster(make_task(digits, *options), 1, tmp_path)
    pushes = cluster.train()
    assert torch.equal(replay(cluster.task, pushes, 1)[0].weights, cluster.server.window.latest)


RULES = {
    "sasgd": [],
    "downpour": ["--exchange.n_push", "2", "--exchange.n_fetch", "4"],
    "diloco": ["--n-sync", "4"],
    "diloco, adamw": ["--rule.optimizer", "adamw", "--n-sync", "4", "--exchange.wire", "int8"],
    "adagrad": ["--lr", "0.01"],
    "adamw": ["--rule.ema_samples", "500"],
    "adam": ["--n-sync", "2"],
    "nadamw": [],
    "softsync, adamw": ["--rule.optimizer", "adamw"],
    "sync_backup, nadamw": ["--rule.optimizer", "nadamw"],
    "softsync": ["--rule.splits", "2"],
    "ringmaster": ["--rule.max_staleness", "3"],
    "ringmaster, adamw": "--rule.optimizer adamw --rule.momentum_at dana --rule.max_staleness 3".split(),
    "ssp": ["--rule.slack", "1"],
    "dc_asgd_c": ["--rule.momentum_at", "server_nag", "--rule.momentum", "0.5"],
    "dc_asgd_a": [],
    "easgd": ["--n-sync", "4"],
    "eamsgd": ["--n-sync", "4"],
    "sync": [],
    "sync_backup": [],
    "asgd": ["--rule.warm_start_epochs", "0.5", "--rule.clip_norm", "0.5"],
}


@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_uses_every_sample_once_and_replays_to_the_bit(
    digits, tmp_path, rule, num_workers
):
    name = rule.partition(",")[0]
    options = RULES[rule] + (
        ["--rule.backup", "0"] if num_workers == 1 and name == "sync_backup" else []
    )
    options += ["--model", "networks_for_tests:without_dropout"]
    cluster = Cluster(make_task(digits, "--rule", name, *options), num_workers, tmp_path)
    pushes = cluster.train()
    # which fetches less often
    found = audit(pushes, 1437, round(1.5 * 1437), num_workers, reads_own_pushes=rule != "downpour")
    assert not found.violations and [epoch.missing for epoch in found.epochs] == [0, 0]
    log = list(read_log(cluster.run.pushes))
    assert torch.equal(
        replay(cluster.task, log, num_workers)[0].weights, cluster.server.window.latest
    )
    # it learns: a guess among 10 classes has 2.30
    assert cluster.server.final_score.loss < 2.25


@pytest.mark.parametrize("wire", ["bfloat16", "float16"])
@pytest.mark.parametrize("rule", ["asgd", "downpour", "sync"])
def test_a_run_with_a_narrower_wire_replays_to_the_bit_and_only_with_the_same_rounding(
    digits, tmp_path, rule, wire
):
    options = ["--rule", rule, "--model", "networks_for_tests:without_dropout"]
    cluster = Cluster(make_task(digits, *options, "--exchange.wire", wire, epochs=1), 3, tmp_path)
    cluster.train()
    log = list(read_log(cluster.run.pushes))
    assert torch.equal(replay(cluster.task, log, 3)[0].weights, cluster.server.window.latest)
    assert cluster.server.final_score.loss < 2.25
    with pytest.raises(RunDirError, match="recorded a loss of"):
        replay(make_task(digits, *options, epochs=1), log, 3)
    workers = [list(read_events(cluster.run.metrics_of(rank))) for rank in (1, 2, 3)]
    published = {
        event.version: event.hash
        for event in read_events(cluster.run.metrics_of(0))
        if isinstance(event, Publish)
    }
    fetched = [event for events in workers for event in events if isinstance(event, Fetch)]
    assert fetched and all(published[event.version] == event.hash for event in fetched)
    vector = codec.num_bytes(len(cluster.first_weights), wire)
    assert vector < 0.51 * codec.num_bytes(len(cluster.first_weights), "float32")
    intervals = [event for events in workers for event in events if isinstance(event, Interval)]
    assert sum(interval.bytes_pushed for interval in intervals) == vector * sum(
        interval.pushes for interval in intervals
    )


def test_snapshots_are_published_in_order_up_to_the_last_version(digits, tmp_path):
    cluster = Cluster(make_task(digits, epochs=0.5), 1, tmp_path)
    pushes = cluster.train()
    published = [
        event.version
        for event in read_events(cluster.run.metrics_of(0))
        if isinstance(event, Publish)
    ]
    assert (
        published == sorted(set(published)) and published[0] == 0 and published[-1] == len(pushes)
    )


def test_the_final_score_is_of_the_last_version_and_of_every_validation_image(digits, tmp_path):
    cluster = Cluster(make_task(digits), 1, tmp_path)
    pushes = cluster.train()
    score = cluster.server.final_score
    assert (score.version, score.num_images, score.final) == (len(pushes), 360, True)


def test_a_compiled_network_is_used_compiled_and_replays_to_the_bit(digits, tmp_path, monkeypatch):
    compiled, compile_ = [], nn.Module.compile

    def without_code(module):  # a back end that needs no compiler of C++
        compiled.append(module)
        compile_(module, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", without_code)
    cluster = Cluster(make_task(digits, "--compute.compile", "true", epochs=0.3), 1, tmp_path)
    pushes = cluster.train()
    assert len(compiled) == 1 and compiled[0]._compiled_call_impl
    assert torch.equal(replay(cluster.task, pushes, 1)[0].weights, cluster.server.window.latest)


def test_the_final_error_is_told_with_the_stored_statistics_too_as_a_run_that_keeps_to_them_has_it(
    digits, tmp_path
):
    final = {}
    for policy in ("recalibrate", "local"):
        task = make_task(
            digits,
            "--model",
            "networks_for_tests:normed",
            "--model.batchnorm",
            policy,
            "--run.validate_every",
            "9",
        )
        cluster = Cluster(task, 1, tmp_path / policy)
        cluster.train()
        [final[policy]] = [
            event
            for event in read_events(cluster.run.metrics_of(0))
            if isinstance(event, Validation)
        ]
    assert (
        final["recalibrate"].stored_top1_error
        == final["local"].top1_error
        != final["recalibrate"].top1_error
    )
    assert final["local"].stored_top1_error is None


def test_the_servers_running_statistics_are_those_of_one_worker_alone_and_others_see_them_too(
    digits, tmp_path
):
    states, errors = {}, {}
    for policy, num_workers in (("local", 1), ("server_ema", 1), ("server_ema", 3)):
        task = make_task(
            digits,
            "--model",
            "networks_for_tests:normed",
            "--model.batchnorm",
            policy,
            "--run.validate_every",
            "9",
        )
        cluster = Cluster(task, num_workers, tmp_path / f"{policy}{num_workers}")
        cluster.train()
        [final] = [
            event
            for event in read_events(cluster.run.metrics_of(0))
            if isinstance(event, Validation)
        ]
        errors[policy, num_workers] = final.top1_error
        states[policy, num_workers], _ = checkpoint.load(next(cluster.run.checkpoints.glob("v*")))
    for name in ("1.running_mean", "1.running_var"):
        torch.testing.assert_close(states["server_ema", 1][name], states["local", 1][name])
        assert 0 < (states["server_ema", 3][name] - states["local", 1][name]).abs().max() < 0.5
    assert errors["server_ema", 1] == errors["local", 1] and errors["server_ema", 3] < 0.5


def test_a_loss_that_is_no_number_ends_the_run_with_advice(digits, tmp_path):
    cluster = Cluster(make_task(digits, "--lr", "1e9"), 1, tmp_path)
    thread = threading.Thread(target=cluster.work, args=[0], daemon=True)
    cluster.server.publish_first(cluster.first_weights)
    thread.start()
    with pytest.raises(
        TrainingDiverged, match="(?s)rank 1: 3 gradients in a row were not finite.*--schedule.lr"
    ):
        cluster.server.run()
    cluster.exchange.mail[0] = Mail(judged=10**9, version=0, orders=Orders.STOP)
    thread.join(120)


@pytest.mark.parametrize(
    "policy, value, is_member", [("server_ema", float("nan"), True), ("recalibrate", 0.0, False)]
)
def test_statistics_that_are_no_numbers_or_unasked_for_do_no_harm(
    digits, tmp_path, policy, value, is_member
):
    task = make_task(digits, "--model", "networks_for_tests:normed", "--model.batchnorm", policy)
    server = Cluster(task, 2, tmp_path).server
    before = server.statistics.clone()
    header = Header(Kind.STATISTICS, 0, 1, 0, 0, 0, 0)
    server._take_note(Arrival(0, header, torch.zeros(0), torch.full_like(before, value)))
    assert torch.equal(server.statistics, before) and (0 in server.ledger.members) == is_member


def test_two_workers_may_both_write_the_best_version(digits, tmp_path):
    """Seen after a resume: a validation was lent again, and another one was due at the same version."""
    cluster = Cluster(make_task(digits), 2, tmp_path)
    checkpointer, score = cluster.server.checkpointer, Score(5, 360, 0.1, 0.2, 0.1, final=False)
    for worker in (0, 1):
        best = WorkerCheckpointer(cluster.run, 0, worker)
        best.save_best(5, FlatModel(cluster.task.build_module(), CPU).module.state_dict())
        assert best.take_done(wait=True) == [(Kind.BEST, 5)]
        best.close()
    for worker in (0, 1):
        checkpointer.keep_best(worker, 5, score, 800)
    events = checkpointer.finish(5, 20)
    assert [event.version for event in events] == [5] and events[0].num_bytes > 0
    assert checkpoint.verify(cluster.run.checkpoint(5)).top1_error == 0.2 and not list(
        cluster.run.checkpoints.glob(".*")
    )


def test_a_checkpoint_waits_until_the_one_before_it_has_its_name(digits, tmp_path, monkeypatch):
    """Seen: without momentum to wait for they share a directory, which was renamed while the next one was written into it."""

    def slowly(*arguments):
        time.sleep(0.1)
        return commit(*arguments)

    commit = checkpoint.commit
    monkeypatch.setattr(checkpoint, "commit", slowly)
    cluster = Cluster(
        make_task(digits, "--rule", "easgd", "--checkpoint.every_samples", "160"), 2, tmp_path
    )
    cluster.train()
    saved = [
        event.version
        for event in read_events(cluster.run.metrics_of(0))
        if isinstance(event, Checkpoint)
    ]
    # the last, and the best
    left = [checkpoint.verify(directory) for directory in cluster.run.checkpoints.glob("v*")]
    assert len(saved) >= 2 and any(manifest.is_resumable for manifest in left)
    assert max(manifest.version for manifest in left) == max(saved) == cluster.server.ledger.version

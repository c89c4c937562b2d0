"""A worker's whole loop on a virtual clock: under every order it rests for hours with a limit of minutes, while the server lives."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_loops import CPU, make_task
from test_window import make_pair

from asgd_mpi.comm import wait
from asgd_mpi.errors import DeadlineExceeded
from asgd_mpi.optim.replica import Replica
from asgd_mpi.protocol.messages import Kind, Lease, Mail, Orders, Work
from asgd_mpi.record.events import EventLog
from asgd_mpi.record.meter import Meter
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.runtime.client import ServerClient
from asgd_mpi.runtime.worker import Books, Disturbances, Subject, Worker
from asgd_mpi.runtime.worker_checkpointer import WorkerCheckpointer
from asgd_mpi.vector.flat import FlatModel

HOUR_S, LIMIT_S, STALL_S, STEP_S = 3600.0, 600.0, 120.0, 5.0
QUIET = -1.0  # of a meter that has seen no progress since
GO_ON, STOP, LEAVE = Mail(0, 0), Mail(0, 0, Orders.STOP), Mail(0, 0, Orders.LEAVE)
LEASES = (Lease(1, Work.TRAIN, 0, 0, 16), Lease(2, Work.TRAIN, 0, 16, 32))
# What the worker is told at first, what it is told after it has said something, and hours later; and what it says in all.
ORDERS = {
    "no lease, then the end": (GO_ON, {}, STOP, [Kind.GOODBYE]),
    "no lease, then left": (GO_ON, {}, LEAVE, [Kind.GOODBYE]),
    "retired for good, then the end": (Mail(0, 0, Orders.REST), {}, STOP, [Kind.GOODBYE]),
    "retired for good, then left": (Mail(0, 0, Orders.REST), {}, LEAVE, [Kind.GOODBYE]),
    "retired for now, and back": (
        Mail(0, 0, Orders.REPORT),
        {1: Mail(0, 0, dropped=1)},
        replace(STOP, dropped=1),
        [Kind.HERE, Kind.GOODBYE],
    ),
    "to save": (replace(GO_ON, save=1), {}, replace(STOP, save=1), [Kind.SAVED, Kind.GOODBYE]),
    "held": (
        replace(GO_ON, leases=LEASES),
        {1: replace(GO_ON, hold=True, leases=LEASES[1:])},
        replace(STOP, leases=()),
        [Kind.GRADIENT, Kind.GOODBYE],
    ),
    "asked to end by a signal of its own": (GO_ON, {}, LEAVE, [Kind.SIGNAL, Kind.GOODBYE]),
    "failed": (GO_ON, {}, STOP, [Kind.FAILED, Kind.GOODBYE]),
    "the end at once": (STOP, {}, STOP, [Kind.GOODBYE]),
    "left at once": (LEAVE, {}, LEAVE, [Kind.GOODBYE]),
}


class Server:
    """What the worker sees of a server, and the clock that both live by: time passes when the worker sleeps."""

    def __init__(self, window, orders, monkeypatch, dies_at_s=float("inf")):
        self.first, self.answers, self.at_last, _ = orders
        self.window, self.dies_at_s, self.now, self.said = window, dies_at_s, 0.0, []
        self.quiet_s = self.longest_quiet_s = 0.0
        window._asked = {}
        monkeypatch.setattr(
            wait, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep)
        )
        self.payload = torch.zeros(window.layout.payload_bytes, dtype=torch.uint8)
        self.order(self.first)

    def order(self, mail):
        self.mail = mail
        self.window.post(0, replace(mail, judged=len(self.said)))

    def sleep(self, seconds):
        self.now += STEP_S
        self.quiet_s = self.quiet_s + STEP_S if self.meter.last_progress == QUIET else 0.0
        self.longest_quiet_s = max(self.longest_quiet_s, self.quiet_s)
        self.meter.last_progress = QUIET
        if self.now < self.dies_at_s:
            self.window.answer()  # its loop turns
            if self.now > 5 * HOUR_S:
                self.order(self.at_last)

    # as an outbox
    @property
    def sent(self):
        return len(self.said)

    def send(self, header, num_bytes):
        self.said.append(header.kind)
        self.order(self.answers.get(len(self.said), self.mail))

    def wait(self):
        pass


def make_worker(digits, directory, monkeypatch, what, **more):
    task = make_task(digits, "--compute.threads", "1")
    flat = FlatModel(task.build_module(), CPU)
    window, reader = make_pair(flat.num_floats)
    reader.world.timeout_s = LIMIT_S
    with window.next_snapshot(0, 0) as weights:
        weights.copy_(flat.weights)
    server = Server(window, ORDERS[what], monkeypatch, **more)
    run = RunDir.create(directory / "run", "test")
    run.staging(1).mkdir()
    meter = Meter(EventLog(run.metrics_of(1)), 1e9)
    client = ServerClient(reader, server, flat, meter, overlap=False)
    worker = Worker(
        0,
        client,
        Replica(flat, task.config, 1, task.schedule(1)),
        Subject(task.objective, task.train_loader(), task.val_loader()),
        task.config,
        Books(meter, WorkerCheckpointer(run, 0, 0)),
        disturbances=Disturbances(lambda: "SIGTERM" if "signal" in what else ""),
    )
    server.meter = meter
    return server, worker.rest if what == "failed" else worker.run


@pytest.mark.parametrize("what", ORDERS)
def test_under_every_order_it_rests_for_hours_and_says_what_is_due(
    digits, tmp_path, monkeypatch, what
):
    server, live = make_worker(digits, tmp_path, monkeypatch, what)
    live()
    assert server.said == ORDERS[what][-1]
    assert "at once" in what or server.now > 5 * HOUR_S
    assert server.longest_quiet_s < STALL_S  # to rest by order is no stall


@pytest.mark.parametrize("what", [what for what in ORDERS if "at once" not in what])
def test_under_every_order_it_finds_a_server_that_has_died_within_the_limit(
    digits, tmp_path, monkeypatch, what
):
    server, live = make_worker(digits, tmp_path, monkeypatch, what, dies_at_s=3 * HOUR_S)
    with pytest.raises(
        DeadlineExceeded, match=r"rank 1 \(worker 0 on n1\) waits for rank 0 to .*: no sign of life"
    ):
        live()
    assert 3 * HOUR_S + 0.9 * LIMIT_S < server.now < 3 * HOUR_S + 1.2 * LIMIT_S

"""Where things lie in the server's memory, and how much of it there must be."""

import shutil
import time
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from asgd_mpi.comm import worker_window
from asgd_mpi.comm.layout import PAGE, Layout
from asgd_mpi.comm.server_window import ServerWindow
from asgd_mpi.comm.worker_window import Snapshot, WorkerWindow
from asgd_mpi.config.limits import MOST_SLOTS
from asgd_mpi.errors import ConfigError
from asgd_mpi.protocol.messages import Header, Kind, Mail
from asgd_mpi.record.events import PHASES, EventLog, read_events
from asgd_mpi.record.meter import Meter
from asgd_mpi.runtime.client import ServerClient
from asgd_mpi.vector.codec import BLOCK
from asgd_mpi.vector.flat import FlatModel
from asgd_mpi.vector.partition import pieces
from asgd_mpi.vector.vector_format import VectorFormat

WIRES = ["float32", "bfloat16", "float16", "int8"]


def fetching(num_parameters, wire):
    """The format of weights that are fetched; some of them are those of norms."""
    return VectorFormat(num_parameters, wire, ((8, 16),) if wire == "int8" else ())


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("num_parameters", [16, 1600, 3 * BLOCK + 16, 3 << 30])
def test_nothing_in_the_memory_overlaps(wire, num_parameters):
    layout = Layout(num_parameters, 3, 5, 0, fetching(num_parameters, wire))
    parts = [
        (place(worker), place(worker + 1))
        for place in (layout.promise, layout.mail)
        for worker in range(5)
    ]
    for slot in range(3):
        parts.append((layout.slot(slot), layout.slot(slot) + 4 * num_parameters))
        if wire != "float32":
            parts.append((layout.shown(slot), layout.shown(slot) + layout.vector_bytes))
    assert (
        all(end <= begin for (_, end), (begin, _) in zip(parts, parts[1:]))
        and parts[-1][1] <= layout.server_bytes
    )
    assert (
        all(begin % PAGE == 0 for begin, _ in parts[10:])
        and layout.worker_bytes >= layout.vector_bytes
    )


@pytest.mark.parametrize(
    "wire, size",
    [
        ("float32", "3 snapshots and the gradients of 4 workers of that host need 2670 MiB"),
        ("bfloat16", "need 2480 MiB"),
    ],
)
def test_too_little_shared_memory_is_told_with_the_size_that_is_needed(wire, size, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64 << 20))
    layout = Layout(100_000_000, 3, 4, 0, VectorFormat(100_000_000, wire))
    window = ServerWindow(SimpleNamespace(host="n1", size=5), layout)
    with pytest.raises(
        ConfigError,
        match=f"n1 has 64 MiB of shared memory left in .*{size}.*size=.*--exchange.ring",
    ):
        window._check_shared_memory(4, window.layout.server_bytes)


def make_pair(
    num_parameters: int, ring: int = 3, wire: str = "float32"
) -> tuple[ServerWindow, WorkerWindow]:
    """The windows of a server and of its only worker over the same memory, in one process."""
    layout = Layout(num_parameters, ring, 1, 0, fetching(num_parameters, wire))
    segments = {
        0: np.zeros(layout.server_bytes, np.uint8),
        1: np.zeros(layout.worker_bytes, np.uint8),
    }
    worlds = [
        SimpleNamespace(
            rank=rank,
            size=2,
            worker=rank - 1,
            host="n1",
            timeout_s=5.0,
            demand_server=lambda: None,
            as_loss_of_server=nullcontext,
        )
        for rank in segments
    ]
    pair = ServerWindow(worlds[0], layout), WorkerWindow(worlds[1], layout)
    for window in pair:
        window._targets = [(SimpleNamespace(Sync=lambda: None), 0)]
        window._attach(segments)
    return pair


def publish(server: ServerWindow, version: int, packet: int | None = None):
    """Write version `version`, of which every number is that, and say so piece by piece: a generator, to go on when it is to."""
    with server.next_snapshot(version, 10 * version) as weights:
        if packet is not None:
            server.promise(0, packet)
        for piece in pieces(len(weights)):
            weights[piece] = version
            server.show(piece)
            yield


def test_the_longest_ring_keeps_as_many_versions_and_the_beat_goes_on():
    server, worker = make_pair(64, ring=MOST_SLOTS)
    server._asked, into = {}, torch.zeros(worker.whole.vector_bytes, dtype=torch.uint8)
    for version in range(2 * MOST_SLOTS):
        list(publish(server, version))
        server.answer()
        beat = worker._beat()
        snapshot = worker.fetch(into, version)
        assert (snapshot.version, snapshot.samples, worker._beat()) == (version, 10 * version, beat)
        assert (into.view(torch.float32) == version).all()
    held = [version for version in range(version + 1) if server.snapshot(version) is not None]
    assert held == list(range(MOST_SLOTS, 2 * MOST_SLOTS)) and beat > MOST_SLOTS


@pytest.mark.parametrize("wire", WIRES)
def test_a_worker_copies_an_update_behind_the_server_that_writes_it(wire, monkeypatch):
    monkeypatch.setattr(worker_window, "STRIDE", BLOCK)
    size = 3 * BLOCK + 16
    server, worker = make_pair(size, wire=wire)
    list(publish(server, 4))
    writing, copies = publish(server, 5, packet=7), []
    next(writing)

    def copy(*arguments, copy=worker._copy):
        copy(*arguments)
        copies.append(arguments[1].nbytes)
        # only then the next piece is written, and after the last one published
        next(writing, None)

    monkeypatch.setattr(worker, "_copy", copy)
    into = torch.zeros(worker.whole.vector_bytes, dtype=torch.uint8)
    snapshot = worker.follow(7, into)
    assert (snapshot.version, snapshot.samples, snapshot.torn_reads, snapshot.followed) == (
        5,
        50,
        0,
        True,
    )
    assert worker.is_latest(5) and len(copies) == 4 and sum(copies) == worker.whole.vector_bytes
    arrived = worker.whole.fetched.vector_in(into)
    for piece in (slice(0, BLOCK), slice(3 * BLOCK, size)):
        assert (arrived[piece] == 5.0).all()


def test_a_worker_whose_slot_is_needed_again_while_it_follows_reads_anew_and_counts_it(monkeypatch):
    monkeypatch.setattr(worker_window, "STRIDE", BLOCK)
    server, worker = make_pair(3 * BLOCK, ring=2)
    list(publish(server, 1))
    writing = publish(server, 2, packet=1)
    next(writing)

    def copy(*arguments, copy=worker._copy):
        copy(*arguments)
        for snapshot in (writing, publish(server, 3), publish(server, 4)):
            list(snapshot)

    with monkeypatch.context() as patch:
        patch.setattr(worker, "_copy", copy)
        assert worker.follow(1, into := torch.zeros(12 * BLOCK, dtype=torch.uint8)) is None
    snapshot = worker.fetch(into, at_least=2)
    assert (snapshot.version, snapshot.torn_reads, snapshot.followed) == (4, 1, False)
    assert (into.view(torch.float32) == 4).all()


def test_there_is_nothing_to_follow_for_a_packet_that_is_not_applied_or_a_vector_that_is_short():
    server, worker = make_pair(2 * worker_window.STRIDE)
    server.post(0, Mail(judged=3, version=0))
    assert worker.follow(3, torch.zeros(8 * worker_window.STRIDE, dtype=torch.uint8)) is None
    assert (
        make_pair(worker_window.STRIDE)[1].follow(
            1, torch.zeros(4 * worker_window.STRIDE, dtype=torch.uint8)
        )
        is None
    )


@pytest.mark.parametrize("latest, fetches", [(5, 0), (6, 1)])
def test_what_a_worker_followed_is_fetched_anew_if_it_was_held_until_there_was_a_newer_one(
    latest, fetches
):
    flat = FlatModel(nn.Linear(4, 4), torch.device("cpu"))
    window = SimpleNamespace(
        follow=lambda packet, into, whole: Snapshot(5, 50, 0, followed=True),
        await_mail=lambda *_: Mail(judged=1, version=5),
        is_latest=lambda version: version == latest,
        fetch=lambda into, at_least, whole: Snapshot(6, 60, 0),
    )
    outbox = SimpleNamespace(payload=flat.gradient.view(torch.uint8), sent=1, send=lambda *_: None)
    counts = {}
    client = ServerClient(
        window, outbox, flat, SimpleNamespace(add=lambda **more: counts.update(more)), overlap=False
    )
    client.push_gradient(Header(Kind.GRADIENT, 0, 1, 4, 1, 0, 1), fetch=True)
    assert client.wait() and client.version == latest and client.samples == 10 * latest
    assert counts["followed"] == 1 - fetches and counts["fetches"] == 1


def test_an_interval_that_ends_amid_an_exchange_holds_no_time_of_before_it_began(tmp_path):
    flat = FlatModel(nn.Linear(4, 4), torch.device("cpu"))
    window = SimpleNamespace(await_mail=lambda *_: Mail(judged=1, version=0))
    outbox = SimpleNamespace(
        payload=flat.gradient.view(torch.uint8),
        sent=1,
        send=lambda *_: time.sleep(0.02),
    )
    log = EventLog(tmp_path / "log.jsonl")
    meter = Meter(log, interval_s=0.0)
    client = ServerClient(window, outbox, flat, meter, overlap=False)
    client.push_gradient(Header(Kind.GRADIENT, 0, 1, 4, 1, 0, 1), fetch=False)
    meter.tick()
    client.wait()
    meter.flush()
    log.close()
    first, second = read_events(tmp_path / "log.jsonl")
    assert first.push >= 0.02 and second.push == 0
    for interval in (first, second):
        phases = sum(getattr(interval, phase) for phase in PHASES)
        assert phases == pytest.approx(interval.t1 - interval.t0, abs=1e-6)

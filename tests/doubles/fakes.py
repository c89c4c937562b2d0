"""An exchange inside one process: two deques and a dictionary in place of MPI, to drive both loops in a plain test."""

import threading
import time
from collections import deque
from contextlib import contextmanager

import torch

from asgd_mpi.comm.layout import Layout
from asgd_mpi.comm.arrival import Arrival
from asgd_mpi.comm.worker_window import Snapshot
from asgd_mpi.vector import codec
from asgd_mpi.vector.vector_format import VectorFormat


class Exchange:
    """What the two sides share."""

    def __init__(
        self,
        num_floats: int,
        num_statistics: int = 0,
        fetch: VectorFormat | None = None,
        ring: int = 3,
        push: VectorFormat | None = None,
    ):
        self.lock = threading.Lock()
        self.layout = Layout(num_floats, ring, 0, num_statistics, fetch, push=push)
        self.ring = [torch.zeros(num_floats) for _ in range(ring)]
        self.shown = [torch.zeros(self.layout.vector_bytes, dtype=torch.uint8) for _ in range(ring)]
        self.version, self.slot, self.versions = -1, 0, [-1] * ring
        self.mail = {}
        self.packets = deque()


class FakeServerWindow:
    def __init__(self, exchange: Exchange):
        self._exchange = exchange

    @property
    def whole(self):
        return self._exchange.layout

    @property
    def version(self):
        return self._exchange.version

    @property
    def latest(self):
        return self._exchange.ring[self._exchange.slot]

    def snapshot(self, version):
        exchange = self._exchange
        held = [slot for slot, one in enumerate(exchange.versions) if one == version]
        return exchange.ring[held[0]] if held else None

    @contextmanager
    def next_snapshot(self, version, samples):
        exchange = self._exchange
        with exchange.lock:
            slot = (exchange.slot + 1) % len(exchange.ring)
            self._next = (
                exchange.ring[slot],
                exchange.layout.fetched.vector_in(exchange.shown[slot]),
            )
            yield exchange.ring[slot]
            exchange.version, exchange.samples, exchange.slot = version, samples, slot
            exchange.versions[slot] = version

    def show(self, piece):
        weights, shown = self._next
        shown[piece] = weights[piece]

    def promise(self, worker, packet):
        pass

    def show_statistics(self, statistics):
        self._exchange.statistics = statistics.clone()

    def post(self, worker, mail):
        self._exchange.mail[worker] = mail


class FakeInbox:
    def __init__(self, exchange: Exchange):
        self._exchange = exchange
        self.dead = set()

    def take(self, seconds):
        until = time.monotonic() + seconds
        while not self._exchange.packets and time.monotonic() < until:
            time.sleep(0.0005)
        return [self._exchange.packets.popleft() for _ in range(len(self._exchange.packets))]

    def poll(self):
        return bool(self._exchange.packets)

    def release(self, arrival):
        pass


class FakeWorkerWindow:
    def __init__(self, exchange: Exchange, worker: int):
        self._exchange, self._worker = exchange, worker

    def await_mail(self, packets, until=lambda mail: True, for_what=""):
        def poll():
            mail = self._exchange.mail.get(self._worker)
            return mail if mail is not None and mail.judged >= packets and until(mail) else None

        return _wait(poll, f"mail of worker {self._worker}: {for_what}")

    def read_mail(self):
        return self._exchange.mail.get(self._worker)

    def follow(self, packet, into, whole=False):
        return None

    def fetch(self, into, at_least, whole=False):
        exchange = self._exchange
        with exchange.lock:
            into.copy_(
                exchange.ring[exchange.slot].view(torch.uint8)
                if whole
                else exchange.shown[exchange.slot]
            )
            assert self._exchange.version >= at_least
            return Snapshot(self._exchange.version, self._exchange.samples, torn_reads=0)

    def read_statistics(self):
        return self._exchange.statistics


class FakeOutbox:
    def __init__(self, exchange: Exchange, sent_bytes: list[int] | None = None):
        self._exchange, self._sent_bytes = exchange, [] if sent_bytes is None else sent_bytes
        self.sent = 0
        self.payload = torch.zeros(exchange.layout.payload_bytes, dtype=torch.uint8)

    def send(self, header, num_bytes):
        self.sent += 1
        payload, layout = self.payload.clone(), self._exchange.layout
        self._sent_bytes.append(num_bytes)
        payload[num_bytes:] = 255  # does not travel
        self._exchange.packets.append(
            Arrival(
                header.worker,
                header,
                layout.pushed.vector_in(payload, header.kept),
                codec.vector_in(payload, layout.num_statistics, "float32"),
            )
        )


def _wait(poll, what, timeout_s=120.0):
    started = time.monotonic()
    while not (result := poll()):
        assert time.monotonic() - started < timeout_s, f"nothing came: {what}"
        time.sleep(0.0005)
    return result

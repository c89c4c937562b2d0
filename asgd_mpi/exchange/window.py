"""The server's memory, as workers see it: numbered, whole snapshots of the weights, and the mail of every worker.

Rank 0 owns, in bytes:

    control   16 words of int64: latest version, its slot; and for each slot of the ring its version and its sample clock
    mail      N x 16 words: see wire.pack_mail
    ring      K slots of P float32, each on a page of its own; in a narrower wire format (see codec) followed by what workers
              read of them

The server writes the next snapshot beside the latest one, and only then moves on. A slot's version word is taken away
before the slot is written and set again after: a worker reads the word after the weights, and knows that it holds
exactly one version; if the word has changed the read is torn, counted, and done again. With K = 3 a read is torn only
if two newer snapshots appear while it lasts.

Passive target: nobody asks, and the server is not in the way. The memory is one shared window on the server's host
(Win_allocate_shared), where a fetch is a plain copy, and where each worker of that host also owns a slot for its
gradient, which the server reads in place. If there are other hosts, the same memory is exposed to them by a second
window (Win_create). Where the network has no one-sided reads of its own, an MPI library makes them of messages, at a price
(Open MPI 5 over TCP: each byte that is read crosses the link three times); a worker of another host measures at the start
whether long reads are faster when the server, which is inside MPI anyway, answers them with plain messages: the same bytes,
and as torn. Requests end by polling, with a deadline. Source of the calls: MPI 4.1, chapter 12.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from mpi4py import MPI

from asgd_mpi.errors import ConfigError
from asgd_mpi.exchange import codec, wait, wire
from asgd_mpi.exchange.world import PROCESS_FAILED, World, cut
from asgd_mpi.server.ledger import Mail
from asgd_mpi.topology import SERVER

T = TypeVar("T")

PAGE = 4096
CONTROL_WORDS = 16
LATEST, SLOT, FIRST_WORD = 0, 1, 2   # positions of the control words
WORDS_OF_SLOT = 2                    # its version, and the samples that this version has seen
ABSENT = -1                          # the version word of a slot that is being written
WORD = 8                             # bytes
QUESTION, ANSWER = 3, 4              # tags of a read by messages
SHORT = 1 << 16                      # bytes: up to so many are always read one-sided
SAMPLE, TRIES = 1 << 20, 3           # bytes and repetitions of a measured read,
CLEARLY = 1.25                       # ... and how much faster one-sided reads must be: they may load the link three times
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Layout:
    """Where things lie in the server's memory, in bytes. Raises ConfigError if the ring is too long for its words."""

    num_parameters: int       # P
    ring: int                 # K
    num_workers: int          # N
    num_statistics: int = 0   # batch-norm statistics of the network, floats
    wire: str = "float32"     # format of what travels, one of codec.DTYPES

    def __post_init__(self):
        room = (CONTROL_WORDS - FIRST_WORD) // WORDS_OF_SLOT
        if self.ring > room:
            raise ConfigError(f"--exchange.ring {self.ring}: the window has room for {room} slots.")

    def mail(self, worker: int) -> int:
        return WORD * (CONTROL_WORDS + wire.MAIL_WORDS * worker)

    def slot(self, index: int) -> int:
        """The weights, (P,) float32."""
        return _to_page(self.mail(self.num_workers)) + index * (self._whole + self._shown)

    def shown(self, index: int) -> int:
        """The weights as they travel."""
        return self.slot(index) + (self._whole if self._shown else 0)

    @property
    def server_bytes(self) -> int:
        return self.slot(self.ring)

    @property
    def vector_bytes(self) -> int:
        """A vector as it travels."""
        return codec.num_bytes(self.num_parameters, self.wire)

    @property
    def payload_bytes(self) -> int:
        """The longest payload of a packet."""
        return max(self.vector_bytes, 4 * self.num_statistics)

    @property
    def worker_bytes(self) -> int:
        """A worker on the server's host: its gradient."""
        return _to_page(self.payload_bytes)

    @property
    def _whole(self) -> int:
        return _to_page(4 * self.num_parameters)

    @property
    def _shown(self) -> int:
        return 0 if self.wire == "float32" else _to_page(self.vector_bytes)


def _version_word(slot: int) -> int:
    return FIRST_WORD + WORDS_OF_SLOT * slot


def _to_page(num_bytes: int) -> int:
    return -(-num_bytes // PAGE) * PAGE


class _Window:
    """What both sides share: the collective beginning and end."""

    def __init__(self, world: World, layout: Layout):
        self.world = world
        self.layout = layout
        self._windows: list[MPI.Win] = []

    def open(self) -> None:
        """Allocate the memory; all ranks call this together. Raises ConfigError if the host has too little of it."""
        self.world.barrier("all ranks to open the window")
        node = self.world.on_this_host()
        ranks = MPI.Group.Translate_ranks(node.group, list(range(node.size)), self.world.comm.group)
        near = SERVER in ranks
        if self.world.is_server:
            self._check_shared_memory(sum(rank <= self.layout.num_workers for rank in ranks) - 1)
        is_worker = near and self.world.rank <= self.layout.num_workers       # and no further stage of one
        size = self.layout.server_bytes if self.world.is_server else self.layout.worker_bytes if is_worker else 0
        info = MPI.Info.Create({"alloc_shared_noncontig": "true"})   # each segment on pages of its own
        shared = MPI.Win.Allocate_shared(size, 1, info, node)
        self._windows.append(shared)
        self._attach({rank: _bytes(shared.Shared_query(i)[0]) for i, rank in enumerate(ranks)} if near else {})
        if node.size < self.world.size:
            self._windows.append(MPI.Win.Create(shared.tomemory() if self.world.is_server else None, 1,
                                                comm=self.world.comm))
        self._win, self._target = (shared, ranks.index(SERVER)) if near else (self._windows[-1], SERVER)
        for window in self._windows:
            window.Lock_all(MPI.MODE_NOCHECK)
        self.world.barrier("all ranks to open the window")  # the first access needs the server inside MPI once
        if node.size < self.world.size:
            self._meet(near)

    def _meet(self, near: bool) -> None:
        """Find out how workers of other hosts read; all ranks call it."""
        raise NotImplementedError

    def close(self) -> None:
        """End the access; the memory is given back at the end of the process, when nobody waits for a dead rank."""
        for window in reversed(self._windows):
            window.Unlock_all()

    def _attach(self, segments: dict[int, np.ndarray]) -> None:
        """Take views of the shared segments, by rank: those of the server's host, none elsewhere."""
        raise NotImplementedError

    def _check_shared_memory(self, num_local_workers: int) -> None:
        needed = self.layout.server_bytes + num_local_workers * self.layout.worker_bytes
        demand_shared_memory(
            self.world.host, needed, f"{self.layout.ring} snapshots and the gradients of {num_local_workers} workers of that host")


def demand_shared_memory(host: str, needed: int, what: str) -> None:
    """Raise ConfigError if this host has fewer bytes left than `what` needs."""
    if not SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise ConfigError(
            f"{host} has {free / 2**20:.0f} MiB of shared memory left in {SHARED_MEMORY}, but {what} need "
            f"{needed / 2**20:.0f} MiB: the ranks would be killed by a bus error. Make it larger (`mount -o remount,size=...`, "
            "or --shm-size of a container), lower --exchange.ring, or put fewer workers on the server's host.")


def _bytes(memory: MPI.buffer) -> np.ndarray:
    return np.frombuffer(memory, np.uint8)


class ServerWindow(_Window):
    """Rank 0's side: writes snapshots and mail into its own memory, reads the gradients of its host in place."""

    def _attach(self, segments: dict[int, np.ndarray]) -> None:
        layout, own = self.layout, segments[SERVER]
        self._memory = own
        self._asked: dict[int, MPI.Request] = {}              # by worker: what it is to ask for next,
        self._answers: dict[int, list[MPI.Request]] = {}      # ... and what it gets
        words = own[:layout.mail(layout.num_workers)].view(np.int64)
        self._control = words[:CONTROL_WORDS]
        self._control[:] = ABSENT
        self._mail = words[CONTROL_WORDS:].reshape(-1, wire.MAIL_WORDS)
        memory, size = torch.from_numpy(own), layout.num_parameters
        self._ring = [codec.vector_in(memory[layout.slot(k):], size, "float32") for k in range(layout.ring)]
        self._shown = [codec.vector_in(memory[layout.shown(k):], size, layout.wire) for k in range(layout.ring)]
        self._near = {rank - 1 for rank in segments}
        self.payloads = {rank - 1: torch.from_numpy(segment[:layout.payload_bytes])   # uint8, of each worker of this host
                         for rank, segment in segments.items() if SERVER < rank <= layout.num_workers}

    def _meet(self, near: bool) -> None:
        far = set(range(self.world.size - 1)) - self._near         # further stages of workers read, too
        self._questions = {worker: np.empty(2, np.int64) for worker in far}      # where to read, and how many bytes
        self._asked = {worker: self._listen(worker) for worker in self._questions}
        met = self.world.comm.Ibarrier()
        wait.until(lambda: self.answer() or met.Test(), self.world.timeout_s, "rank 0 waits for workers of other hosts to "
                   "measure their links", wait.BUSY_S)

    def answer(self) -> None:
        """Let workers of other hosts read, with messages; to be called often."""
        for worker, request in list(self._asked.items()):
            try:
                if request.Test():
                    offset, num_bytes = self._questions[worker].tolist()
                    self._answers[worker] = [self.world.comm.Isend([part, MPI.BYTE], dest=worker + 1, tag=ANSWER)
                                             for _, part in cut(self._memory[offset:offset + num_bytes])]
                    self._asked[worker] = self._listen(worker)
                if all(answer.Test() for answer in self._answers.get(worker, [])):
                    self._answers.pop(worker, None)
            except MPI.Exception as error:    # under mpirun --with-ft ulfm: the inbox tells of it
                if error.Get_error_class() not in PROCESS_FAILED:
                    raise
                del self._asked[worker]

    def close(self) -> None:
        for request in self._asked.values():
            request.Cancel()
            request.Free()
        super().close()

    def _listen(self, worker: int) -> MPI.Request:
        return self.world.comm.Irecv(self._questions[worker], source=worker + 1, tag=QUESTION)

    @property
    def version(self) -> int:
        return int(self._control[LATEST])

    @property
    def latest(self) -> torch.Tensor:
        """The latest snapshot, (P,) float32: read it, do not write it."""
        return self._ring[self._control[SLOT]]

    @contextmanager
    def next_snapshot(self, version: int, samples: int) -> Iterator[torch.Tensor]:
        """The slot of the next snapshot, (P,) float32, to be written and shown whole; published on exit as `version`."""
        slot = self._next_slot
        self._set(_version_word(slot), ABSENT)
        yield self._ring[slot]
        self._set(_version_word(slot) + 1, samples)
        self._set(_version_word(slot), version)    # the weights are there before their version word,
        self._control[SLOT] = slot
        self._set(LATEST, version)            # ... and that before anybody is sent to the slot

    def show(self, piece: slice) -> None:
        """A piece of the next snapshot has been written: let it be read in the format that travels."""
        if self.layout.wire != "float32":
            self._shown[self._next_slot][piece] = self._ring[self._next_slot][piece]

    @property
    def _next_slot(self) -> int:
        return (int(self._control[SLOT]) + 1) % self.layout.ring

    def post(self, worker: int, mail: Mail) -> None:
        self._mail[worker] = wire.pack_mail(mail)
        self._win.Sync()

    def _set(self, word: int, value: int) -> None:
        self._control[word] = value
        self._win.Sync()


@dataclass(frozen=True)
class Snapshot:
    """What a fetch brought beside the weights."""

    version: int
    samples: int              # that the server had applied
    torn_reads: int


class WorkerWindow(_Window):
    """A worker's side: reads with request-based one-sided calls, or asks for long reads where that is faster."""

    def _attach(self, segments: dict[int, np.ndarray]) -> None:
        self._segments = segments
        self.payload = self.payload_of(self.world.worker)
        self._control = np.empty(CONTROL_WORDS, np.int64)
        self._mail = np.empty(wire.MAIL_WORDS, np.int64)
        self._question, self._asks = np.empty(2, np.int64), False
        self.reads = ""                       # of a worker of another host: how it reads, in words

    def _meet(self, near: bool) -> None:
        if not near:
            read_s, asked_s = (self._time(asks) for asks in (False, True))
            self._asks = asked_s < CLEARLY * read_s
            self.reads = (f"rank {self.world.rank} on {self.world.host} reads weights "
                          f"{'by messages' if self._asks else 'one-sided'}: {SAMPLE / 1e9 / asked_s:.2f} GB/s by messages, "
                          f"{SAMPLE / 1e9 / read_s:.2f} GB/s one-sided")
        self.world.barrier("workers of other hosts to measure their links")

    def _time(self, asks: bool) -> float:
        """Seconds that the best of some reads takes, scaled to SAMPLE bytes."""
        self._asks, times = asks, []
        into = np.empty(min(SAMPLE, self.layout.server_bytes), np.uint8)
        for _ in range(TRIES):
            started = time.perf_counter()
            self._get(into, 0, "a sample")
            times.append(time.perf_counter() - started)
        return min(times) * SAMPLE / len(into)

    def payload_of(self, worker: int) -> torch.Tensor | None:
        """Where a worker of the server's host leaves its gradient, (payload_bytes,) uint8; None of another host."""
        segment = self._segments.get(worker + 1)
        return torch.from_numpy(segment[:self.layout.payload_bytes]) if segment is not None and len(segment) else None

    def read_mail(self) -> Mail | None:
        """This worker's mail; None if it was being written."""
        self._get(self._mail, self.layout.mail(self.world.worker), "its mail")
        return wire.unpack_mail(self._mail.tolist())

    def await_mail(self, packets: int, until: Callable[[Mail], bool] = lambda mail: True, for_what: str = "") -> Mail:
        """The first mail that knows of `packets` judged packets, and of which `until` holds."""
        def poll() -> Mail | None:
            mail = self.read_mail()
            return mail if mail is not None and mail.judged >= packets and until(mail) else None

        return self._until(poll, for_what or f"judge its packet {packets}")

    def fetch(self, into: torch.Tensor, at_least: int, whole: bool = False) -> Snapshot:
        """Read the latest snapshot into `into`, uint8 on the host: one version, `at_least` or newer.

        It is in the format that travels, (vector_bytes,), or as the server holds it, if `whole`: (P,) float32.
        """
        place = self.layout.slot if whole else self.layout.shown
        return self.fetch_by(lambda slot: self._get(into.numpy(), place(slot), "a snapshot"), at_least)

    def fetch_by(self, read: Callable[[int], None], at_least: int) -> Snapshot:
        """Let `read` read the latest snapshot, which is in the slot that it is told; again, while the read was torn."""
        torn_reads = 0
        while True:
            self._until(lambda: self._read_control()[LATEST] >= at_least, f"publish version {at_least}")
            slot = int(self._control[SLOT])
            version, samples = (int(word) for word in self._control[_version_word(slot):][:WORDS_OF_SLOT])
            if version >= at_least:
                read(slot)
                if self._read_control()[_version_word(slot)] == version:
                    return Snapshot(version, samples, torn_reads)
            torn_reads += 1

    def read_places(self, places: Sequence[tuple[slice, slice]], slot: int, into: torch.Tensor, whole: bool) -> int:
        """Read some places of a slot into those of `into`, (p,) float32 on the host; returns the bytes. See `fetch_by`."""
        layout, num_bytes = self.layout, 0
        for there, here in places:
            if whole or layout.wire == "float32":
                memory = into[here].numpy()
                self._get(memory, layout.slot(slot) + 4 * there.start, "its part of a snapshot")
                num_bytes += memory.nbytes
                continue
            memories = []
            for span in codec.spans(layout.num_parameters, there):
                memories.append(np.empty(len(span), np.uint8))
                self._get(memories[-1], layout.shown(slot) + span.start, "its part of a snapshot")
                num_bytes += len(span)
            codec.unpack_(into[here], there.start, *map(torch.from_numpy, memories), layout.wire)
        return num_bytes

    def _read_control(self) -> np.ndarray:
        self._get(self._control, 0, "the control words")
        return self._control

    def _get(self, into: np.ndarray, offset: int, what: str) -> None:
        if self._asks and into.nbytes > SHORT:
            self._question[:] = offset, into.nbytes
            requests = [self.world.comm.Irecv([part, MPI.BYTE], source=SERVER, tag=ANSWER) for _, part in cut(into)]
            requests.append(self.world.comm.Isend(self._question, dest=SERVER, tag=QUESTION))
        else:
            requests = [self._win.Rget(part, self._target, target=(offset + start, part.nbytes, MPI.BYTE))
                        for start, part in cut(into)]
        self._until(lambda: all(request.Test() for request in requests), f"let it read {what}", wait.BUSY_S)

    def _until(self, poll: Callable[[], T | None], what: str, longest_s: float = wait.LONGEST_S) -> T:
        worker = self.world.worker % self.layout.num_workers                 # that of a further stage, too: see topology
        who = f"rank {self.world.rank} (worker {worker} on {self.world.host})"
        return wait.until(lambda: poll() or self.world.demand_server(), self.world.timeout_s,
                          f"{who} waits for rank 0 to {what}", longest_s)

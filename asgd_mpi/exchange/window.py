"""The server's memory, as workers see it: numbered, whole snapshots of the weights, and the mail of every worker.

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

Several servers publish the same versions in the same slots, rank 0 as the last of them (see `server.fellow`). So a worker
that has seen version v in rank 0's control words reads the slices from that slot of all servers at once; if after that all
of them still call it v, it holds the whole of version v. What is said of the server's host goes for each server's.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from mpi4py import MPI

from asgd_mpi.errors import ConfigError
from asgd_mpi.exchange import codec, wait, wire
from asgd_mpi.exchange.layout import CONTROL_WORDS, LATEST, SLOT, STATISTICS_FROM, WORDS_OF_SLOT, Layout, version_word
from asgd_mpi.exchange.world import PROCESS_FAILED, World, cut
from asgd_mpi.server.ledger import Mail
from asgd_mpi.topology import SERVER, ranks_of_servers

T = TypeVar("T")

ABSENT = -1                          # the version word of a slot that is being written
QUESTION, ANSWER = 3, 4              # tags of a read by messages
SHORT = 1 << 16                      # bytes: up to so many are always read one-sided
SAMPLE, TRIES = 1 << 20, 3           # bytes and repetitions of a measured read,
CLEARLY = 1.25                       # ... and how much faster one-sided reads must be: they may load the link three times
SHARED_MEMORY = Path("/dev/shm")


class _Window:
    """What all sides share: the collective beginning and end. `layout` is that of the whole."""

    def __init__(self, world: World, layout: Layout):
        self.world = world
        self.whole = layout
        self.servers = ranks_of_servers(world.size, layout.num_servers)     # by slice
        self._windows: list[MPI.Win] = []

    def open(self) -> None:
        """Allocate the memory; all ranks call this together. Raises ConfigError if the host has too little of it."""
        self.world.barrier("all ranks to open the window")
        node = self.world.on_this_host()
        ranks = MPI.Group.Translate_ranks(node.group, list(range(node.size)), self.world.comm.group)
        near = set(ranks) & set(self.servers)
        if near and self.world.rank == min(near):
            self._check_shared_memory(sum(SERVER < rank <= self.whole.num_workers for rank in ranks),
                                      sum(self.whole.of(self.servers.index(rank)).server_bytes for rank in near))
        info = MPI.Info.Create({"alloc_shared_noncontig": "true"})   # each segment on pages of its own
        shared = MPI.Win.Allocate_shared(self._own_bytes(bool(near)), 1, info, node)
        self._windows.append(shared)
        self._attach({rank: _bytes(shared.Shared_query(i)[0]) for i, rank in enumerate(ranks)} if near else {})
        if node.size < self.world.size:
            self._windows.append(MPI.Win.Create(shared.tomemory() if self.world.rank in self.servers else None, 1,
                                                comm=self.world.comm))
        self._targets = [(shared, ranks.index(rank)) if rank in near else (self._windows[-1], rank) for rank in self.servers]
        for window in self._windows:
            window.Lock_all(MPI.MODE_NOCHECK)
        self.world.barrier("all ranks to open the window")  # the first access needs the server inside MPI once
        if node.size < self.world.size:
            self._meet([number for number, rank in enumerate(self.servers) if rank not in near])

    def _own_bytes(self, has_server: bool) -> int:
        """The size of this rank's segment; `has_server`: whether one is on this host."""
        raise NotImplementedError

    def _meet(self, far: list[int]) -> None:
        """Find out how workers read from servers of other hosts, `far` of this one; all ranks call it."""
        raise NotImplementedError

    def close(self) -> None:
        """End the access; the memory is given back at the end of the process, when nobody waits for a dead rank."""
        for window in reversed(self._windows):
            window.Unlock_all()

    def _attach(self, segments: dict[int, np.ndarray]) -> None:
        """Take views of the shared segments, by rank: those of this host if it has a server, or none."""
        raise NotImplementedError

    def _check_shared_memory(self, num_local_workers: int, server_bytes: int) -> None:
        needed = server_bytes + num_local_workers * self.whole.worker_bytes
        demand_shared_memory(
            self.world.host, needed, f"{self.whole.ring} snapshots and the gradients of {num_local_workers} workers of that host")


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
    """A server's side: writes snapshots and mail into its own memory, reads the gradients of its host in place.

    `layout` is that of its own memory; mail is posted by rank 0 only.
    """

    def __init__(self, world: World, layout: Layout, number: int = 0):
        super().__init__(world, layout)
        self.layout, self._number = layout.of(number), number

    def _own_bytes(self, has_server: bool) -> int:
        return self.layout.server_bytes

    def _attach(self, segments: dict[int, np.ndarray]) -> None:
        layout, own = self.layout, segments[self.world.rank]
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
        if layout.num_statistics:
            statistics = own[layout.statistics:][:STATISTICS_FROM + 4 * layout.num_statistics]
            self._writes, self._statistics = statistics[:STATISTICS_FROM].view(np.int64), statistics[STATISTICS_FROM:].view(np.float32)
            self._writes[:] = 0
        self._near = {rank - 1 for rank in segments}
        start = self.whole.travels(self._number).start
        self.payloads = {rank - 1: torch.from_numpy(segment[start:start + layout.payload_bytes])   # uint8, of each worker of
                         for rank, segment in segments.items() if SERVER < rank <= layout.num_workers}     # ... this host

    def _meet(self, far: list[int]) -> None:
        workers = set(range(self.world.size - len(self.servers))) - self._near       # further stages of workers read, too
        self._questions = {worker: np.empty(2, np.int64) for worker in workers}  # where to read, and how many bytes
        self._asked = {worker: self._listen(worker) for worker in self._questions}
        met = self.world.comm.Ibarrier()
        wait.until(lambda: self.answer() or met.Test(), self.world.timeout_s, f"rank {self.world.rank} waits for workers of "
                   "other hosts to measure their links", wait.BUSY_S)

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
        self._set(version_word(slot), ABSENT)
        yield self._ring[slot]
        self._set(version_word(slot) + 1, samples)
        self._set(version_word(slot), version)    # the weights are there before their version word,
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
        self._targets[0][0].Sync()

    def show_statistics(self, statistics: torch.Tensor) -> None:
        """Let workers read batch-norm statistics, float32."""
        self._writes[0] += 1
        self._targets[0][0].Sync()
        self._statistics[:] = statistics.numpy()
        self._targets[0][0].Sync()
        self._writes[1] = self._writes[0]
        self._targets[0][0].Sync()

    def _set(self, word: int, value: int) -> None:
        self._control[word] = value
        self._targets[self._number][0].Sync()


@dataclass(frozen=True)
class Snapshot:
    """What a fetch brought beside the weights."""

    version: int
    samples: int              # that the server had applied
    torn_reads: int


class WorkerWindow(_Window):
    """A worker's side: copies from the shared memory of its host; from a server of another host it reads with request-based
    one-sided calls, or asks for long reads where that is faster."""

    def __init__(self, world: World, layout: Layout):
        super().__init__(world, layout)
        self._layouts = [layout.of(number) for number in range(layout.num_servers)]
        self._travels = [layout.travels(number) for number in range(layout.num_servers)]

    def _own_bytes(self, has_server: bool) -> int:
        is_worker = self.world.rank <= self.whole.num_workers                 # and no further stage of one
        return self.whole.worker_bytes if has_server and is_worker else 0

    def _attach(self, segments: dict[int, np.ndarray]) -> None:
        self._segments = segments
        self.payload = self.payload_of(self.world.worker)
        self.near = [rank in segments for rank in self.servers]               # by slice: whether its server shares memory
        self._controls = np.empty((len(self.servers), CONTROL_WORDS), np.int64)
        self._mail = np.empty(wire.MAIL_WORDS, np.int64)      # a copy, or that of rank 0 itself
        if self.near[0]:
            start = self.whole.mail(self.world.worker)
            self._mail = segments[SERVER][start:start + self._mail.nbytes].view(np.int64)
        self._questions = np.empty((len(self.servers), 2), np.int64)
        self._asks = [False for _ in self.servers]
        self.reads = ""                       # of a worker of another host: how it reads, in words

    def _meet(self, far: list[int]) -> None:
        self.reads = "\n".join(self._measure(number) for number in far)
        self.world.barrier("workers of other hosts to measure their links")

    def _measure(self, number: int) -> str:
        """Choose how to read from a server; says so."""
        read_s, asked_s = (self._time(number, asks) for asks in (False, True))
        self._asks[number] = asked_s < CLEARLY * read_s
        slice_ = f" of slice {number}" if len(self.servers) > 1 else ""
        return (f"rank {self.world.rank} on {self.world.host} reads weights{slice_} "
                f"{'by messages' if self._asks[number] else 'one-sided'}: {SAMPLE / 1e9 / asked_s:.2f} GB/s by messages, "
                f"{SAMPLE / 1e9 / read_s:.2f} GB/s one-sided")

    def _time(self, number: int, asks: bool) -> float:
        """Seconds that the best of some reads takes, scaled to SAMPLE bytes."""
        self._asks[number], times = asks, []
        into = np.empty(min(SAMPLE, self._layouts[number].server_bytes), np.uint8)
        for _ in range(TRIES):
            started = time.perf_counter()
            self._get({number: (into, 0)}, "a sample")
            times.append(time.perf_counter() - started)
        return min(times) * SAMPLE / len(into)

    def payload_of(self, worker: int) -> torch.Tensor | None:
        """Where a worker of a server's host leaves its gradient, (payload_bytes,) uint8; None of another host."""
        segment = self._segments.get(worker + 1)
        return torch.from_numpy(segment[:self.whole.payload_bytes]) if segment is not None and len(segment) else None

    def read_mail(self) -> Mail | None:
        """This worker's mail; None if it was being written."""
        if self.near[0]:
            self._targets[0][0].Sync()
        else:
            self._get({0: (self._mail, self.whole.mail(self.world.worker))}, "its mail")
        return wire.unpack_mail(self._mail.tolist())

    def await_mail(self, packets: int, until: Callable[[Mail], bool] = lambda mail: True, for_what: str = "") -> Mail:
        """The first mail that knows of `packets` judged packets, and of which `until` holds."""
        def poll() -> Mail | None:
            if self.near[0] and self._mail[0] < packets:      # a look that costs nothing, the most frequent by far
                return None
            mail = self.read_mail()
            return mail if mail is not None and mail.judged >= packets and until(mail) else None

        return self._until(poll, for_what or f"judge its packet {packets}")

    def fetch(self, into: torch.Tensor, at_least: int, whole: bool = False) -> Snapshot:
        """Read the latest snapshot into `into`, uint8 on the host: one version, `at_least` or newer.

        It is in the format that travels, (vector_bytes,), or as the server holds it, if `whole`: (P,) float32.
        """
        weights, servers = into.numpy(), range(len(self.servers))
        return self.fetch_by(lambda slot: self._get({number: self._place(number, slot, weights, whole) for number in servers},
                                                    "a snapshot"), at_least)

    def fetch_by(self, read: Callable[[int], None], at_least: int) -> Snapshot:
        """Let `read` read the latest snapshot, which is in the slot that it is told; again, while the read was torn."""
        torn_reads = 0
        while True:
            self._until(lambda: self._read_controls([0])[0][LATEST] >= at_least, f"publish version {at_least}")
            slot = int(self._controls[0][SLOT])
            version, samples = (int(word) for word in self._controls[0][version_word(slot):][:WORDS_OF_SLOT])
            if version >= at_least:
                read(slot)
                if all(control[version_word(slot)] == version for control in self._read_controls(range(len(self.servers)))):
                    return Snapshot(version, samples, torn_reads)
            torn_reads += 1

    def read_places(self, places: Sequence[tuple[slice, slice]], slot: int, into: torch.Tensor, whole: bool) -> int:
        """Read some places of a slot into those of `into`, (p,) float32 on the host; returns the bytes. See `fetch_by`."""
        num_bytes = 0
        for there, here in places:
            for number, numbers in enumerate(self.whole.slices):
                start, stop = max(there.start, numbers.start), min(there.stop, numbers.stop)
                if start < stop:
                    own = into[here.start + start - there.start:here.start + stop - there.start]
                    num_bytes += self._read_piece(number, slice(start - numbers.start, stop - numbers.start), slot, own, whole)
        return num_bytes

    def _read_piece(self, number: int, piece: slice, slot: int, into: torch.Tensor, whole: bool) -> int:
        """Read a piece of the slice of a server into all of `into`; returns the bytes."""
        layout, what = self._layouts[number], "its part of a snapshot"
        if whole or layout.wire == "float32":
            self._get({number: (into.numpy(), layout.slot(slot) + 4 * piece.start)}, what)
            return 4 * len(into)
        span = codec.span(layout.num_parameters, piece)
        memory = np.empty(len(span), np.uint8)
        self._get({number: (memory, layout.shown(slot) + span.start)}, what)
        codec.unpack_(into, piece.start, torch.from_numpy(memory), layout.num_parameters, layout.wire)
        return len(span)

    def read_statistics(self) -> torch.Tensor:
        """The batch-norm statistics that rank 0 shows, (num_statistics,) float32: those of one moment."""
        place, writes = self._layouts[0].statistics, np.empty(2, np.int64)
        found = np.empty(self.whole.num_statistics, np.float32)
        while True:
            self._get({0: (writes, place)}, "its statistics")
            seen = writes[1]
            self._get({0: (found, place + STATISTICS_FROM)}, "its statistics")
            self._get({0: (writes, place)}, "its statistics")
            if writes[0] == seen:
                return torch.from_numpy(found)

    def _place(self, number: int, slot: int, weights: np.ndarray, whole: bool) -> tuple[np.ndarray, int]:
        """Where a slice goes to in `weights`, and where it lies in its server's memory."""
        layout, numbers = self._layouts[number], self.whole.slices[number]
        if whole:
            return weights[4 * numbers.start:4 * numbers.stop], layout.slot(slot)
        return weights[self._travels[number]], layout.shown(slot)

    def _read_controls(self, numbers: Iterable[int]) -> np.ndarray:
        self._get({number: (self._controls[number], 0) for number in numbers}, "the control words")
        return self._controls

    def _get(self, reads: dict[int, tuple[np.ndarray, int]], what: str) -> None:
        """Read from several servers at once: (into, from which byte on) of each. Raises ServerLost."""
        far = {number: read for number, read in reads.items() if not self.near[number]}
        with self.world.as_loss_of_server():
            requests = [request for number, read in far.items() for request in self._begin_to_get(number, *read)]
            for number in reads.keys() - far.keys():
                self._copy(number, *reads[number])
            self._until(lambda: all(request.Test() for request in requests), f"let it read {what}", wait.BUSY_S,
                        [self.servers[number] for number in far])

    def _copy(self, number: int, into: np.ndarray, offset: int) -> None:
        """An Rget of memory of this host takes ten times as long to begin, which is all that a look at the mail takes."""
        self._targets[number][0].Sync()
        into.view(np.uint8)[:] = self._segments[self.servers[number]][offset:offset + into.nbytes]

    def _begin_to_get(self, number: int, into: np.ndarray, offset: int) -> list[MPI.Request]:
        if self._asks[number] and into.nbytes > SHORT:
            question, server = self._questions[number], self.servers[number]
            question[:] = offset, into.nbytes
            requests = [self.world.comm.Irecv([part, MPI.BYTE], source=server, tag=ANSWER) for _, part in cut(into)]
            return [*requests, self.world.comm.Isend(question, dest=server, tag=QUESTION)]
        window, target = self._targets[number]
        return [window.Rget(part, target, target=(offset + start, part.nbytes, MPI.BYTE)) for start, part in cut(into)]

    def _until(self, poll: Callable[[], T | None], what: str, longest_s: float = wait.LONGEST_S,
               servers: Sequence[int] = (SERVER,)) -> T:
        worker = self.world.worker % self.whole.num_workers                  # that of a further stage, too: see topology
        who = f"rank {self.world.rank} (worker {worker} on {self.world.host})"
        return wait.until(lambda: poll() or self.world.demand_server(), self.world.timeout_s,
                          f"{who} waits for rank {', '.join(map(str, servers))} to {what}", longest_s)

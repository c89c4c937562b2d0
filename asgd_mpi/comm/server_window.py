"""The server's memory, as workers see it: numbered, whole snapshots of the weights, and the mail of every worker.

The server writes the next snapshot beside the latest one, and only then moves on. A slot's version word is taken away
before the slot is written and set again after: a worker reads the word after the weights, and knows that it holds
exactly one version; if the word has changed the read is torn, counted, and done again. With K = 3 a read is torn only
if two newer snapshots appear while it lasts. A worker of the server's host that has just pushed need not wait for the end: the
server says which slot will hold its gradient and how far that is written, and the worker copies behind it.

Passive target: nobody asks, and the server is not in the way. The memory is one shared window on the server's host
(Win_allocate_shared), where a fetch is a plain copy, and where each worker of that host also owns a slot for its
gradient, which the server reads in place. If there are other hosts, the same memory is exposed to them by a second
window (Win_create). Where the network has no one-sided reads of its own, an MPI library makes them of messages, at a price
(Open MPI 5 over TCP: each byte that is read crosses the link three times); a worker of another host measures at the start
whether long reads are faster when the server, which is inside MPI anyway, answers them with plain messages: the same bytes,
and as torn. Requests end by polling, with a deadline. Source of the calls: MPI 4.1, chapter 12.

Several servers publish the same versions in the same slots, rank 0 as the last of them (see `runtime.slice_server`). So a worker
that has seen version v in rank 0's control words reads the slices from that slot of all servers at once; if after that all
of them still call it v, it holds the whole of version v. What is said of the server's host goes for each server's.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from asgd_mpi.comm import wait
from asgd_mpi.comm.layout import (
    BEAT,
    COMING,
    LATEST,
    PACKET,
    PROMISE_WORDS,
    PROMISED_SLOT,
    SAMPLES,
    SLOT,
    STATISTICS_FROM,
    VERSION,
    WRITTEN,
    Layout,
    words_of_slot,
)
from asgd_mpi.comm.mpi import MPI
from asgd_mpi.comm.world import PROCESS_FAILED, World, cut
from asgd_mpi.config.topology import SERVER, ranks_of_servers
from asgd_mpi.errors import ConfigError
from asgd_mpi.protocol import messages
from asgd_mpi.protocol.messages import Mail
from asgd_mpi.vector import codec

ABSENT = -1  # the version word of a slot that is being written
QUESTION, ANSWER = 3, 4  # tags of a read by messages
SHARED_MEMORY = Path("/dev/shm")


class Window:
    """What all sides share: the collective beginning and end. `layout` is that of the whole."""

    def __init__(self, world: World, layout: Layout):
        self.world = world
        self.whole = layout
        self.servers = ranks_of_servers(world.size, layout.num_servers)  # by slice
        self._windows: list[MPI.Win] = []

    def open(self) -> None:
        """Allocate the memory; all ranks call this together. Raises ConfigError if the host has too little of it."""
        self.world.barrier("all ranks to open the window")
        node = self.world.on_this_host()
        ranks = MPI.Group.Translate_ranks(node.group, list(range(node.size)), self.world.comm.group)
        near = set(ranks) & set(self.servers)
        if near and self.world.rank == min(near):
            self._check_shared_memory(
                sum(SERVER < rank <= self.whole.num_workers for rank in ranks),
                sum(self.whole.of(self.servers.index(rank)).server_bytes for rank in near),
            )
        # each segment on pages of its own
        info = MPI.Info.Create({"alloc_shared_noncontig": "true"})
        with self.world.meeting("all ranks of its host to share memory"):
            shared = MPI.Win.Allocate_shared(self._own_bytes(bool(near)), 1, info, node)
        self._windows.append(shared)
        segments = {}
        if near:
            segments = {rank: bytes_of(shared.Shared_query(i)[0]) for i, rank in enumerate(ranks)}
        self._attach(segments)
        if node.size < self.world.size:
            memory = shared.tomemory() if self.world.rank in self.servers else None
            with self.world.meeting("all ranks to show their memory"):
                self._windows.append(MPI.Win.Create(memory, 1, comm=self.world.comm))
        self._targets = [
            (shared, ranks.index(rank)) if rank in near else (self._windows[-1], rank)
            for rank in self.servers
        ]
        for window in self._windows:
            with self.world.meeting("all ranks to begin to read"):
                window.Lock_all(MPI.MODE_NOCHECK)
        # the first access needs the server inside MPI once
        self.world.barrier("all ranks to open the window")
        if node.size < self.world.size:
            self._meet([number for number, rank in enumerate(self.servers) if rank not in near])

    def _own_bytes(self, has_server: bool) -> int:
        """Return the size of this rank's segment; `has_server`: whether one is on this host."""
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
            self.world.host,
            needed,
            f"{self.whole.ring} snapshots and the gradients of {num_local_workers} workers of that host",
        )


def demand_shared_memory(host: str, needed: int, what: str) -> None:
    """Raise ConfigError if this host has fewer bytes left than `what` needs."""
    if not SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise ConfigError(
            f"{host} has {free / 2**20:.0f} MiB of shared memory left in {SHARED_MEMORY}, but {what} need "
            f"{needed / 2**20:.0f} MiB: the ranks would be killed by a bus error. Make it larger (`mount -o remount,size=...`, "
            "or --shm-size of a container), lower --exchange.ring, or put fewer workers on the server's host."
        )


def bytes_of(memory: MPI.buffer) -> np.ndarray:
    """Return MPI's memory as uint8, in place."""
    # the stubs of mpi4py do not say that it is a buffer
    return np.frombuffer(memory, np.uint8)  # type: ignore[call-overload]


class ServerWindow(Window):
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
        # by worker: what it is to ask for next,
        self._asked: dict[int, MPI.Request] = {}
        self._answers: dict[int, list[MPI.Request]] = {}  # ... and what it gets
        self._control = own[: layout.promise(0)].view(np.int64)
        self._control[:] = ABSENT
        self._promises = (
            own[layout.promise(0) : layout.mail(0)].view(np.int64).reshape(-1, PROMISE_WORDS)
        )
        self._promises[:] = ABSENT
        self._mail = (
            own[layout.mail(0) : layout.mail(layout.num_workers)]
            .view(np.int64)
            .reshape(-1, messages.MAIL_WORDS)
        )
        memory, size = torch.from_numpy(own), layout.num_parameters
        self._ring = [
            codec.vector_in(memory[layout.slot(k) :], size, "float32") for k in range(layout.ring)
        ]
        self._shown = [
            layout.fetched.vector_in(memory[layout.shown(k) :]) for k in range(layout.ring)
        ]
        if layout.num_statistics:
            statistics = own[layout.statistics :][: STATISTICS_FROM + 4 * layout.num_statistics]
            self._writes, self._statistics = (
                statistics[:STATISTICS_FROM].view(np.int64),
                statistics[STATISTICS_FROM:].view(np.float32),
            )
            self._writes[:] = 0
        self._near = {rank - 1 for rank in segments}
        # of all of what is pushed, uint8, of each worker of this host
        self.payloads = {
            rank - 1: torch.from_numpy(segment[: self.whole.payload_bytes])
            for rank, segment in segments.items()
            if SERVER < rank <= layout.num_workers
        }

    def slice_of(self, payload: torch.Tensor, kept: int) -> torch.Tensor:
        """Return what a payload, uint8, holds for this server, if so many numbers of a chunk were pushed."""
        return payload[self.whole.pushed_at(self._number, kept)]

    def _meet(self, far: list[int]) -> None:
        # further stages of workers read, too
        workers = set(range(self.world.size - len(self.servers))) - self._near
        # where to read, and how many bytes
        self._questions = {worker: np.empty(2, np.int64) for worker in workers}
        self._asked = {worker: self._listen(worker) for worker in self._questions}
        met = self.world.comm.Ibarrier()
        wait.until(
            met.Test,
            self.world.timeout_s,
            f"rank {self.world.rank} waits for workers of other hosts to measure their links",
            wait.BUSY_S,
            meanwhile=self.answer,
        )

    def answer(self) -> None:
        """Show that this server lives, and let workers of other hosts read, with messages; to be called often."""
        self._control[BEAT] += 1
        for worker, request in list(self._asked.items()):
            try:
                if request.Test():
                    offset, num_bytes = self._questions[worker].tolist()
                    self._answers[worker] = [
                        self.world.comm.Isend([part, MPI.BYTE], dest=worker + 1, tag=ANSWER)
                        for _, part in cut(self._memory[offset : offset + num_bytes])
                    ]
                    self._asked[worker] = self._listen(worker)
                if all(answer.Test() for answer in self._answers.get(worker, [])):
                    self._answers.pop(worker, None)
            except MPI.Exception as error:  # under mpirun --with-ft ulfm: the inbox tells of it
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
        return self._ring[int(self._control[SLOT])]

    def snapshot(self, version: int) -> torch.Tensor | None:
        """Return a snapshot that the ring still holds, (P,) float32, to be read before the next pass; None if it does not."""
        slots = range(self.layout.ring)
        held = [slot for slot in slots if self._control[words_of_slot(slot)][VERSION] == version]
        return self._ring[held[0]] if held else None

    @contextmanager
    def next_snapshot(self, version: int, samples: int) -> Iterator[torch.Tensor]:
        """Yield the slot of the next snapshot, (P,) float32, to be written and shown whole; published on exit as `version`."""
        slot, words = self._next_slot, self._control[words_of_slot(self._next_slot)]
        self._set(words, VERSION, ABSENT)
        self._set(words, WRITTEN, 0)
        self._set(words, COMING, version)
        yield self._ring[slot]
        self._set(words, SAMPLES, samples)
        self._set(words, VERSION, version)  # the weights are there before their version word,
        self._control[SLOT] = slot
        # ... and that before anybody is sent to the slot
        self._set(self._control, LATEST, version)

    def promise(self, worker: int, packet: int) -> None:
        """Say that the snapshot that is being written will hold this packet: its worker, if of this host, may follow it."""
        self._set(self._promises[worker], PROMISED_SLOT, self._next_slot)
        self._set(self._promises[worker], PACKET, packet)

    def show(self, piece: slice) -> None:
        """Let the next snapshot be read up to the end of this piece, in the format that travels."""
        slot = self._next_slot
        if self.layout.fetched.wire != "float32":
            self._shown[slot][piece] = self._ring[slot][piece]
        self._targets[self._number][0].Sync()
        self._set(self._control[words_of_slot(slot)], WRITTEN, piece.stop)

    @property
    def _next_slot(self) -> int:
        return (int(self._control[SLOT]) + 1) % self.layout.ring

    def post(self, worker: int, mail: Mail) -> None:
        self._mail[worker] = messages.pack_mail(mail)
        self._targets[0][0].Sync()

    def show_statistics(self, statistics: torch.Tensor) -> None:
        """Let workers read batch-norm statistics, float32."""
        self._writes[0] += 1
        self._targets[0][0].Sync()
        self._statistics[:] = statistics.numpy()
        self._targets[0][0].Sync()
        self._writes[1] = self._writes[0]
        self._targets[0][0].Sync()

    def _set(self, words: np.ndarray, number: int, value: int) -> None:
        words[number] = value
        self._targets[self._number][0].Sync()

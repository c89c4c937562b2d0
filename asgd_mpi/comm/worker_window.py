"""A worker's side of the window: it reads snapshots, its mail and statistics out of the servers' memory.

On the server's host a read is a plain copy out of shared memory; from a server of another host it is a one-sided call, or, if
that was measured to be faster, a question that the server answers with plain messages. What is read, and how a torn read
is told, is written in `server_window`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from asgd_mpi.comm import wait
from asgd_mpi.comm.layout import (
    BEAT,
    COMING,
    CONTROL_WORDS,
    LATEST,
    PACKET,
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
from asgd_mpi.comm.server_window import ABSENT, ANSWER, QUESTION, Window
from asgd_mpi.comm.world import World, cut
from asgd_mpi.config.topology import SERVER
from asgd_mpi.protocol import messages
from asgd_mpi.protocol.messages import Mail
from asgd_mpi.vector import codec
from asgd_mpi.vector.vector_format import VectorFormat

T = TypeVar("T")

SHORT = 1 << 16  # bytes: up to so many are always read one-sided
SAMPLE, TRIES = 1 << 20, 3  # bytes and repetitions of a measured read,
# ... and how much faster one-sided reads must be: they may load the link three times
CLEARLY = 1.25
# floats that a worker which follows waits for: each time it wakes, others must rest
STRIDE = 1 << 20
# the longest pause between two looks at the mail over a link, while a worker waits by order: each look is half a kilobyte or more
FAR_S = 0.02


@dataclass(frozen=True)
class Snapshot:
    """What a fetch brought beside the weights."""

    version: int
    samples: int  # that the server had applied
    torn_reads: int
    followed: bool = False  # it was read while it was written


class WorkerWindow(Window):
    """A worker's side: copies from the shared memory of its host; from a server of another host it reads with request-based
    one-sided calls, or asks for long reads where that is faster."""

    def __init__(self, world: World, layout: Layout):
        super().__init__(world, layout)
        self._layouts = [layout.of(number) for number in range(layout.num_servers)]
        # of each slot, and for the weights as they travel or as the servers hold them: where each slice goes to in a vector, and
        # where it lies in its server's memory
        self._places = [
            {whole: self._places_of(slot, whole) for whole in (False, True)}
            for slot in range(layout.ring)
        ]
        # that of a further stage, too: see topology
        worker = world.worker % layout.num_workers
        self._who = f"rank {world.rank} (worker {worker} on {world.host})"

    def _own_bytes(self, has_server: bool) -> int:
        # and no further stage of one
        is_worker = self.world.rank <= self.whole.num_workers
        return self.whole.worker_bytes if has_server and is_worker else 0

    def _attach(self, segments: dict[int, np.ndarray]) -> None:
        self._segments = segments
        self.payload = self.payload_of(self.world.worker)
        # by slice: whether its server shares memory
        self.near = [rank in segments for rank in self.servers]
        self._controls = np.empty((len(self.servers), CONTROL_WORDS), np.int64)
        self._words = [self._controls[:, words_of_slot(slot)] for slot in range(self.whole.ring)]
        self._mail = np.empty(messages.MAIL_WORDS, np.int64)  # a copy, or that of rank 0 itself
        if self.near[0]:
            layout, worker, memory = self.whole, self.world.worker, segments[SERVER]
            self._mail = memory[layout.mail(worker) : layout.mail(worker + 1)].view(np.int64)
            self._promise = memory[layout.promise(worker) : layout.promise(worker + 1)].view(
                np.int64
            )
            self._control = memory[: layout.promise(0)].view(np.int64)
        # what was followed, and could not be used
        self._torn = 0
        self._questions = np.empty((len(self.servers), 2), np.int64)
        self._asks = [False for _ in self.servers]
        self.reads = ""  # of a worker of another host: how it reads, in words

    def _meet(self, far: list[int]) -> None:
        self.reads = "\n".join(self._measure(number) for number in far)
        self.world.barrier("workers of other hosts to measure their links")

    def _measure(self, number: int) -> str:
        """Choose how to read from a server; says so."""
        read_s, asked_s = (self._time(number, asks) for asks in (False, True))
        self._asks[number] = asked_s < CLEARLY * read_s
        slice_ = f" of slice {number}" if len(self.servers) > 1 else ""
        way = "by messages" if self._asks[number] else "one-sided"
        return (
            f"rank {self.world.rank} on {self.world.host} reads weights{slice_} {way}: {SAMPLE / 1e9 / asked_s:.2f} GB/s by messages, "
            f"{SAMPLE / 1e9 / read_s:.2f} GB/s one-sided"
        )

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
        """Return where a worker of a server's host leaves its gradient, (payload_bytes,) uint8; None of another host."""
        segment = self._segments.get(worker + 1)
        if segment is not None and len(segment):
            return torch.from_numpy(segment[: self.whole.payload_bytes])
        return None

    def read_mail(self) -> Mail | None:
        """This worker's mail; None if it was being written."""
        if self.near[0]:
            self._targets[0][0].Sync()
        else:
            self._get({0: (self._mail, self.whole.mail(self.world.worker))}, "its mail")
        return messages.unpack_mail(self._mail.tolist())

    def await_mail(
        self, packets: int, until: Callable[[Mail], bool] = lambda mail: True, for_what: str = ""
    ) -> Mail:
        """Return the first mail that knows of `packets` judged packets, and of which `until` holds.

        A packet is judged within run.timeout_s. What `until` asks for (a lease, the others' step, the end of the run) may take
        as long as the server lives, as its beat shows.
        """

        def read() -> Mail | None:
            # a look that costs nothing, the most frequent by far
            if self.near[0] and self._mail[0] < packets:
                return None
            mail = self.read_mail()
            return mail if mail is not None and mail.judged >= packets else None

        def read_on() -> Mail | None:
            mail = read()
            return mail if mail is not None and until(mail) else None

        mail = self._until(read, f"judge its packet {packets}")
        if until(mail):
            return mail
        longest_s = wait.LONGEST_S if self.near[0] else FAR_S
        return self._until(read_on, for_what, longest_s, beat=self._beat)

    def _beat(self) -> int:
        """A number that changes for as long as rank 0 lives."""
        control = self._control if self.near[0] else self._read_controls([0])[0]
        return int(control[BEAT])

    def fetch(self, into: torch.Tensor, at_least: int, whole: bool = False) -> Snapshot:
        """Read the latest snapshot into `into`, uint8 on the host: one version, `at_least` or newer.

        It is in the format that travels, (vector_bytes,), or as the server holds it, if `whole`: (P,) float32.
        """
        weights = into.numpy()

        def read(slot: int) -> None:
            places = self._places[slot][whole]
            self._get(
                {number: (weights[here], there) for number, (here, there) in enumerate(places)},
                "a snapshot",
            )

        return self.fetch_by(read, at_least)

    def is_latest(self, version: int) -> bool:
        """Return whether the server, which is on this host, has published nothing newer."""
        return int(self._control[LATEST]) == version

    def fetch_by(self, read: Callable[[int], None], at_least: int) -> Snapshot:
        """Let `read` read the latest snapshot, which is in the slot that it is told; again, while the read was torn."""
        torn_reads, self._torn = self._torn, 0
        while True:
            self._until(
                lambda: self._read_controls([0])[0][LATEST] >= at_least,
                f"publish version {at_least}",
            )
            slot = int(self._controls[0][SLOT])
            words = self._words[slot]
            version, samples = int(words[0, VERSION]), int(words[0, SAMPLES])
            if version >= at_least:
                read(slot)
                self._read_controls(range(len(self.servers)))
                if (words[:, VERSION] == version).all():
                    return Snapshot(version, samples, torn_reads)
            torn_reads += 1

    def follow(self, packet: int, into: torch.Tensor, whole: bool = False) -> Snapshot | None:
        """Read the snapshot that will hold this packet, as `fetch` does, while it is being written and still in the cache.

        None if it could not be had so: the packet is not applied, the vector is short, not all of it is on this host, or the
        slot was needed again meanwhile.
        """
        size = self.whole.num_parameters
        if size <= STRIDE or self.near != [True]:
            return None
        self._until(
            lambda: self._promise[PACKET] == packet or self._mail[0] >= packet,
            f"judge its packet {packet}",
        )
        if self._promise[PACKET] != packet:
            return None
        self._targets[0][0].Sync()
        slot = int(self._promise[PROMISED_SLOT])
        words = self._control[words_of_slot(slot)]
        here, offset = self._places[slot][whole][0]
        memory = into.numpy()[here]
        form = VectorFormat(size) if whole else self.whole.fetched
        version, done = int(words[COMING]), 0

        def more() -> int:
            """How many numbers there are, if it is worth the way; ABSENT if it is no longer this version."""
            written = int(words[WRITTEN])
            if words[COMING] != version:
                return ABSENT
            if written >= min(done + STRIDE, size):
                return written
            return 0

        while done < size and (written := self._until(more, f"write version {version}")) != ABSENT:
            begin, end = form.bytes_to(done), form.bytes_to(written)
            self._copy(0, memory[begin:end], offset + begin)
            done = written
        self._until(
            lambda: words[VERSION] != ABSENT or words[COMING] != version,
            f"publish version {version}",
        )
        samples = int(words[SAMPLES])
        self._targets[0][0].Sync()
        if words[VERSION] != version:
            self._torn += 1
            return None
        return Snapshot(version, samples, 0, followed=True)

    def read_places(
        self, places: Sequence[tuple[slice, slice]], slot: int, into: torch.Tensor, whole: bool
    ) -> int:
        """Read some places of a slot into those of `into`, (p,) float32 on the host; returns the bytes. See `fetch_by`."""
        num_bytes = 0
        for there, here in places:
            for number, numbers in enumerate(self.whole.slices):
                start, stop = max(there.start, numbers.start), min(there.stop, numbers.stop)
                if start < stop:
                    own = into[here.start + start - there.start : here.start + stop - there.start]
                    num_bytes += self._read_piece(
                        number, slice(start - numbers.start, stop - numbers.start), slot, own, whole
                    )
        return num_bytes

    def _read_piece(
        self, number: int, piece: slice, slot: int, into: torch.Tensor, whole: bool
    ) -> int:
        """Read a piece of the slice of a server into all of `into`; returns the bytes."""
        layout, what = self._layouts[number], "its part of a snapshot"
        wire = layout.fetched.wire  # 4 or 2 bytes a number: others are refused with stages
        if whole or wire == "float32":
            self._get({number: (into.numpy(), layout.slot(slot) + 4 * piece.start)}, what)
            return 4 * len(into)
        span = codec.span(layout.num_parameters, piece)
        memory = np.empty(len(span), np.uint8)
        self._get({number: (memory, layout.shown(slot) + span.start)}, what)
        codec.unpack_(into, piece.start, torch.from_numpy(memory), layout.num_parameters, wire)
        return len(span)

    def read_statistics(self) -> torch.Tensor:
        """Return the batch-norm statistics that rank 0 shows, (num_statistics,) float32: those of one moment."""
        place, writes = self._layouts[0].statistics, np.empty(2, np.int64)
        found = np.empty(self.whole.num_statistics, np.float32)
        while True:
            self._get({0: (writes, place)}, "its statistics")
            seen = writes[1]
            self._get({0: (found, place + STATISTICS_FROM)}, "its statistics")
            self._get({0: (writes, place)}, "its statistics")
            if writes[0] == seen:
                return torch.from_numpy(found)

    def _places_of(self, slot: int, whole: bool) -> list[tuple[slice, int]]:
        if whole:
            return [
                (slice(4 * numbers.start, 4 * numbers.stop), layout.slot(slot))
                for numbers, layout in zip(self.whole.slices, self._layouts)
            ]
        return [
            (self.whole.read_at(number), layout.shown(slot))
            for number, layout in enumerate(self._layouts)
        ]

    def _read_controls(self, numbers: Iterable[int]) -> np.ndarray:
        self._get({number: (self._controls[number], 0) for number in numbers}, "the control words")
        return self._controls

    def _get(self, reads: dict[int, tuple[np.ndarray, int]], what: str) -> None:
        """Read from several servers at once: (into, from which byte on) of each. Raises ServerLost."""
        far = [self.servers[number] for number in reads if not self.near[number]]
        with self.world.as_loss_of_server() if far else nullcontext():
            requests: list[MPI.Request] = []
            for number, (into, offset) in reads.items():
                if not self.near[number]:
                    requests += self._begin_to_get(number, into, offset)
            for number, (into, offset) in reads.items():
                if self.near[number]:
                    self._copy(number, into, offset)
            if requests:
                self._until(
                    lambda: all(request.Test() for request in requests),
                    f"let it read {what}",
                    wait.BUSY_S,
                    far,
                )

    def _copy(self, number: int, into: np.ndarray, offset: int) -> None:
        """An Rget of memory of this host takes ten times as long to begin, which is all that a look at the mail takes."""
        self._targets[number][0].Sync()
        into.view(np.uint8)[:] = self._segments[self.servers[number]][offset : offset + into.nbytes]

    def _begin_to_get(self, number: int, into: np.ndarray, offset: int) -> list[MPI.Request]:
        if self._asks[number] and into.nbytes > SHORT:
            question, server = self._questions[number], self.servers[number]
            question[:] = offset, into.nbytes
            requests = [
                self.world.comm.Irecv([part, MPI.BYTE], source=server, tag=ANSWER)
                for _, part in cut(into)
            ]
            return [*requests, self.world.comm.Isend(question, dest=server, tag=QUESTION)]
        window, target = self._targets[number]
        return [
            window.Rget(part, target, target=(offset + start, part.nbytes, MPI.BYTE))
            for start, part in cut(into)
        ]

    def _until(
        self,
        poll: Callable[[], T | None],
        what: str,
        longest_s: float = wait.LONGEST_S,
        servers: Sequence[int] = (SERVER,),
        beat: Callable[[], int] | None = None,
    ) -> T:
        return wait.until(
            poll,
            self.world.timeout_s,
            f"{self._who} waits for rank {', '.join(map(str, servers))} to {what}",
            longest_s,
            beat,
            meanwhile=self.world.demand_server,
        )

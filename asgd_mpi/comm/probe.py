"""Measurements of MPI itself, for the doctor: what the library is, whether a window works, how fast rank 0 is reached.

Every function is one step that all ranks take; the doctor puts a deadline on each of them and lets no rank go on to the
next one before all are through, so that there are no collective calls in here which a rank that fails would leave the
others in. The polled waits have a limit of their own (`world.timeout_s`). Numbers come back as plain values that JSON can
hold. A prober is the first worker of a host: it measures for all of them.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch

from asgd_mpi.comm import wait
from asgd_mpi.comm.mpi import MPI
from asgd_mpi.comm.world import World, cut, library, settle, takes_gpu_memory
from asgd_mpi.config.topology import SERVER, Topology

TAG = 7
GPU_BYTES = 1 << 20  # of a message from GPU to GPU
WORD = 8  # bytes
SAMPLE, TRIES = (
    1 << 20,
    2,
)  # bytes of a message whose speed is measured, and how often: the first one opens the connection
SMALL, LARGE = 50, 5  # repetitions of a message of one word, and of one of the window's size
SILENCE_S = 1.0  # rank 0 stays out of MPI for so long,
# ... and a read that begins this much later must be over by half of what is left,
PATIENCE_S = 0.2
# ... as long as it begins no later than this: then at least as much is left of rank 0's sleep
LATE_S = (SILENCE_S + PATIENCE_S) / 2
THREAD_LEVELS = {
    MPI.THREAD_SINGLE: "single",
    MPI.THREAD_FUNNELED: "funneled",
    MPI.THREAD_SERIALIZED: "serialized",
    MPI.THREAD_MULTIPLE: "multiple",
}


def facts() -> dict:
    """Return what this rank knows of its MPI, without a message to anybody."""
    name, version = MPI.get_vendor()
    return {
        "library": library(),
        "built_for": f"{name} {'.'.join(map(str, version))}",
        "thread_level": THREAD_LEVELS[MPI.Query_thread()],
        "takes_gpu_memory": takes_gpu_memory(),
    }


def probers(places: Topology) -> list[int]:
    """Return the first worker of each host, in rank order."""
    return [rank for rank in range(SERVER + 1, places.size) if places.position_on_host(rank) == 0]


def talk(world: World) -> None:
    """Say the first words: a barrier."""
    world.barrier("all ranks to come to the first barrier")


def message_round(world: World, ranks: list[int], device: torch.device) -> None:
    """Each of these ranks sends the next one a message from the memory of its GPU into that of the other.

    Raises ValueError if something else arrives.
    """
    at = ranks.index(world.rank)
    sent, got = (
        torch.full((GPU_BYTES,), value, dtype=torch.uint8, device=device)
        for value in (world.rank % 251 + 1, 0)
    )
    settle(got)
    requests = [
        world.comm.Irecv([got, MPI.BYTE], ranks[at - 1], TAG),
        world.comm.Isend([sent, MPI.BYTE], ranks[(at + 1) % len(ranks)], TAG),
    ]
    wait.until(
        lambda: MPI.Request.Testall(requests),
        world.timeout_s,
        f"rank {world.rank} waits for {GPU_BYTES} bytes of GPU memory from rank {ranks[at - 1]}",
    )
    wrong = int((got != ranks[at - 1] % 251 + 1).sum())
    if wrong:
        raise ValueError(
            f"{wrong} of {GPU_BYTES} bytes are not those that rank {ranks[at - 1]} sent from the memory of its GPU"
        )


def speeds(world: World, workers: Sequence[int]) -> tuple[float, float]:
    """Return the bytes/s of a message of SAMPLE bytes to rank 0, and of one from it, of the slowest of some workers.

    They are all under way at the same time, as those of a training may be. Those that share memory with rank 0 are left out; inf if
    all do. All ranks call it, and get the same.
    """
    node = world.on_this_host()
    ranks = MPI.Group.Translate_ranks(node.group, list(range(node.size)), world.comm.group)
    node.Free()
    is_near = world.gather(SERVER in ranks)
    workers = [rank for rank in workers if not is_near[rank]]
    best = [0.0, 0.0]
    for _ in range(TRIES):
        for way, measure in enumerate((_time_sent, _time_got)):
            world.barrier("all ranks to measure their links")
            seconds = measure(world, workers) if workers else 0.0
            if world.rank in workers:
                best[way] = max(best[way], SAMPLE / max(seconds, 1e-9))
    found = [one for rank, one in enumerate(world.gather(best)) if rank in workers]
    return (
        min((send for send, _ in found), default=math.inf),
        min((read for _, read in found), default=math.inf),
    )


def _time_sent(world: World, workers: Sequence[int]) -> float:
    """Return the seconds until rank 0 has said that a message of this worker has arrived."""
    started, message, word = time.perf_counter(), np.zeros(SAMPLE, np.uint8), np.zeros(1, np.int64)
    if world.is_server:
        coming = {rank: (np.zeros(SAMPLE, np.uint8), word.copy()) for rank in workers}
        wanted = {rank: world.comm.Irecv(into, rank, TAG) for rank, (into, _) in coming.items()}
        answers: list[MPI.Request] = []

        def answer() -> bool:
            for rank, request in list(wanted.items()):
                if request.Test():
                    del wanted[rank]
                    answers.append(world.comm.Isend(coming[rank][1], rank, TAG))
            return not wanted and MPI.Request.Testall(answers)

        wait.until(answer, world.timeout_s, "rank 0 waits for messages that measure links")
    elif world.rank in workers:
        requests = [world.comm.Irecv(word, SERVER, TAG), world.comm.Isend(message, SERVER, TAG)]
        _complete(world, requests)
    return time.perf_counter() - started


def _time_got(world: World, workers: Sequence[int]) -> float:
    """Return the seconds until a message of rank 0 is here."""
    started, message = time.perf_counter(), np.zeros(SAMPLE, np.uint8)
    if world.is_server:
        _complete(world, [world.comm.Isend(message, rank, TAG) for rank in workers])
    elif world.rank in workers:
        _complete(world, [world.comm.Irecv(message, SERVER, TAG)])
    return time.perf_counter() - started


def _complete(world: World, requests: list[MPI.Request]) -> None:
    wait.until(
        lambda: MPI.Request.Testall(requests),
        world.timeout_s,
        f"rank {world.rank} waits for a message that measures a link",
    )


def leave() -> None:
    """End MPI here, where somebody watches, and not when the interpreter exits."""
    MPI.Finalize()


class WindowProbe:
    """`num_bytes` at rank 0, carried as those of a training: each method is one step, in the order in which they stand.

    Ranks of its host reach them through a shared window, all others through a second one over the same memory.
    """

    def __init__(self, world: World, num_bytes: int):
        self.world = world
        # what rank 0 puts in, and everybody gets out
        self.memory = np.arange(num_bytes // WORD, dtype=np.int64)
        # ... and the place for it, touched beforehand
        self._seen = np.zeros_like(self.memory)
        self._windows: list[MPI.Win] = []
        # the window of this rank (`allocate`), and rank 0 in it
        self._win: MPI.Win
        self._target = SERVER

    def allocate(self) -> dict:
        """Make the windows; what can be found out of how the library carries them."""
        node = cast(
            MPI.Intracomm,
            self.world.comm.Split_type(MPI.COMM_TYPE_SHARED, key=self.world.rank),
        )
        ranks = MPI.Group.Translate_ranks(node.group, list(range(node.size)), self.world.comm.group)
        num_bytes = self.memory.nbytes if self.world.is_server else 0
        shared = MPI.Win.Allocate_shared(num_bytes, 1, comm=node)
        self._windows.append(shared)
        if node.size < self.world.size:
            memory = shared.tomemory() if self.world.is_server else None
            self._windows.append(MPI.Win.Create(memory, 1, comm=self.world.comm))
        if SERVER in ranks:
            self._win, self._target = shared, ranks.index(SERVER)
        else:
            self._win, self._target = self._windows[-1], SERVER
        prefix = "OMPI_MCA_osc" if MPI.get_vendor()[0] == "Open MPI" else "MPIR_CVAR_"
        settings = {name: value for name, value in os.environ.items() if name.startswith(prefix)}
        return {
            "memory_model": "unified" if self._win.model == MPI.WIN_UNIFIED else "separate",
            "settings": settings,
        }

    def lock(self) -> None:
        for window in self._windows:
            window.Lock_all(MPI.MODE_NOCHECK)

    def put(self) -> None:
        """Rank 0 fills the window with one-sided writes to itself."""
        if self.world.is_server:
            self._finish(
                [
                    self._win.Rput(part, self._target, target=(start, part.nbytes, MPI.BYTE))
                    for start, part in cut(self.memory)
                ],
                "its own write",
            )
            self._win.Flush(self._target)

    def get(self) -> None:
        """Every rank reads all of it. Raises ValueError if it is not what rank 0 wrote."""
        self._read(self._seen)
        wrong = int(np.count_nonzero(self._seen != self.memory))
        if wrong:
            raise ValueError(
                f"{wrong} of {len(self._seen)} words read from the window are not those that were written"
            )

    def atomic(self) -> None:
        """Every rank counts the window's first word up, from 0."""
        self._win.Fetch_and_op(np.ones(1, np.int64), np.empty(1, np.int64), self._target)
        self._win.Flush(self._target)

    def count(self) -> None:
        """Every rank looks at that word. Raises ValueError if a count is lost."""
        count = self._seen[:1]
        self._read(count)
        if count[0] != self.world.size:
            raise ValueError(
                f"{self.world.size} ranks counted one word up from 0, and it is {count[0]}"
            )

    def silent_target(self, probers: Sequence[int]) -> tuple[float, bool] | None:
        """Seconds that a prober's read took while rank 0 slept outside MPI, and whether it began in time; None on other ranks.

        Rank 0 goes to sleep after it has heard of every prober, and tells them before: a read that begins within LATE_S of
        the prober's own word begins while rank 0 sleeps, however late either of them is.
        """
        word = np.zeros(1, np.int64)
        if self.world.is_server:
            for prober in probers:
                self._receive(word, prober)
            for prober in probers:
                self._send(word, prober)
            time.sleep(SILENCE_S)
        if self.world.rank not in probers:
            return None
        said = time.perf_counter()
        self._send(word, SERVER)
        self._receive(word, SERVER)
        time.sleep(PATIENCE_S)
        is_in_time = time.perf_counter() - said <= LATE_S
        return self._timed(lambda: self._read(self._seen)), is_in_time

    def free(self) -> None:
        for window in reversed(self._windows):
            window.Unlock_all()
            window.Free()

    def links(self, places: Topology) -> list[dict]:
        """On rank 0: for each prober the latency (s) and bandwidth (bytes/s) to rank 0, two-sided and one-sided."""
        measured = []
        for prober in probers(places):
            if self.world.is_server:
                measured.append(
                    {"rank": prober, "host": places.hosts[prober]} | self._serve(prober)
                )
            elif self.world.rank == prober:
                self._measure()
        return measured

    def _measure(self) -> None:
        """A prober's side: time everything, then report to rank 0."""
        word, whole = self.memory[:1], self.memory
        ack = np.empty(1, np.int64)

        def there_and_back(payload: np.ndarray) -> None:
            self._send(payload, SERVER)
            self._receive(ack, SERVER)

        times = np.array(
            [
                statistics.median(self._timed(lambda: there_and_back(word)) for _ in range(SMALL))
                / 2,
                statistics.median(self._timed(lambda: there_and_back(whole)) for _ in range(LARGE)),
                statistics.median(
                    self._timed(lambda: self._read(self._seen[:1])) for _ in range(SMALL)
                ),
                statistics.median(
                    self._timed(lambda: self._read(self._seen)) for _ in range(LARGE)
                ),
            ]
        )
        self._send(times, SERVER)

    def _serve(self, prober: int) -> dict:
        """Rank 0's side: take and answer, and stay inside MPI while the prober reads the window."""
        into, ack = np.empty_like(self.memory), np.zeros(1, np.int64)
        for num_words, repetitions in ((1, SMALL), (len(into), LARGE)):
            for _ in range(repetitions):
                self._receive(into[:num_words], prober)
                self._send(ack, prober)
        times = np.empty(4)
        self._receive(times, prober)
        send_s, sent_s, read_s, got_s = times.tolist()
        return {
            "send_latency_s": send_s,
            "send_bytes_per_s": into.nbytes / sent_s,
            "read_latency_s": read_s,
            "read_bytes_per_s": into.nbytes / got_s,
        }

    def _read(self, into: np.ndarray) -> None:
        """Read the beginning of the window."""
        self._finish(
            [
                self._win.Rget(part, self._target, target=(start, part.nbytes, MPI.BYTE))
                for start, part in cut(into)
            ],
            "a read of the window",
        )

    def _send(self, payload: np.ndarray, dest: int) -> None:
        requests = [self.world.comm.Isend(part, dest, TAG) for _, part in cut(payload)]
        self._finish(requests, f"rank {dest} to take {payload.nbytes} bytes")

    def _receive(self, into: np.ndarray, source: int) -> None:
        requests = [self.world.comm.Irecv(part, source, TAG) for _, part in cut(into)]
        self._finish(requests, f"{into.nbytes} bytes from rank {source}")

    def _finish(self, requests: list[MPI.Request], what: str) -> None:
        wait.until(
            lambda: MPI.Request.Testall(requests),
            self.world.timeout_s,
            f"rank {self.world.rank} waits for {what}",
        )

    @staticmethod
    def _timed(act: Callable[[], None]) -> float:
        started = time.perf_counter()
        act()
        return time.perf_counter() - started

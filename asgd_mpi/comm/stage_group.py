"""The ranks of one replica: what its stages send each other, and the vectors that they share.

A replica stays on one host. Each stage has its part of the vectors for itself. Its leader, the rank of stage 0, owns a shared
window (Win_allocate_shared) in which the stages put them together where somebody wants the whole: the gradient, unless the
server reads it elsewhere in memory of this host, and, when a checkpoint is due, weights, velocity and batch-norm statistics.
Pages of it that nobody has written take no memory. Tensors of a micro-batch travel as messages that say themselves what
they hold: nonblocking sends, matched probes (MPI 4.1, 3.8.2). Between GPUs a message lies in their memory, if the MPI library
says that it may (CUDA-aware MPI), and else in page-locked memory of the host.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import cast

import numpy as np
import torch

from asgd_mpi.comm import wait
from asgd_mpi.comm.mpi import MPI
from asgd_mpi.comm.server_window import bytes_of, demand_shared_memory
from asgd_mpi.comm.world import PROCESS_FAILED, World, settle, takes_gpu_memory
from asgd_mpi.errors import StageLost
from asgd_mpi.vector.packed import ALIGNMENT, pack, unpack

ACTIVATIONS, GRADIENTS, COMMANDS, REPLIES, SCORES = range(1, 6)  # tags


def memory_of_messages(device: torch.device) -> dict:
    """Return where `torch.empty` is to make messages to or from a stage that computes on `device`, so that none is copied twice."""
    if device.type != "cuda":
        return {}
    if takes_gpu_memory():
        return {"device": device}
    return {"pin_memory": True}


class StageChannel:
    """A channel (see pipeline.pipeline) to or from one stage; `watch` is called in every wait, and may raise.

    What is sent to a process that has ended is lost; to wait for something from there raises StageLost, as far as that is
    known (under `mpirun --with-ft ulfm`).
    """

    def __init__(
        self,
        team: StageGroup,
        stage: int,
        tag: int,
        device: torch.device,
        watch: Callable[[], None],
    ):
        self._team, self._stage, self._tag, self._device, self._watch = (
            team,
            stage,
            tag,
            device,
            watch,
        )
        self._memory = memory_of_messages(device)
        self._sends: list[tuple[MPI.Request, torch.Tensor]] = []
        self._receive: tuple[MPI.Request, torch.Tensor] | None = None

    def put(self, part: int, tensors: tuple[torch.Tensor, ...]) -> None:
        """Start to send a copy."""
        message = pack(part, tensors, self._memory)
        settle(message)
        with suppress(StageLost), self._alive():
            self._sends = [send for send in self._sends if not send[0].Test()]
            self._sends.append(
                (
                    self._team.comm.Isend([message, MPI.BYTE], dest=self._stage, tag=self._tag),
                    message,
                )
            )

    def has(self, part: int = 0) -> bool:
        with self._alive():
            return self._has()

    @contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except MPI.Exception as error:
            if error.Get_error_class() not in PROCESS_FAILED:
                raise
            self._team.world.has_lost_ranks = True
            raise StageLost(
                f"the process of stage {self._stage} of worker {self._team.worker} has ended; "
                "see its last words in the run directory (error.rank*.txt)"
            ) from None

    def _has(self) -> bool:
        if self._receive is None:
            status = MPI.Status()
            probed = self._team.comm.Improbe(source=self._stage, tag=self._tag, status=status)
            if probed is None:
                return False
            message = torch.empty(status.Get_count(MPI.BYTE), dtype=torch.uint8, **self._memory)
            settle(message)
            self._receive = probed.Irecv([message, MPI.BYTE]), message
        return self._receive[0].Test()

    def take(self, part: int) -> tuple[torch.Tensor, ...]:
        """Raises DeadlineExceeded."""
        wait.until(
            lambda: self.has(part) or self._watch(),
            self._team.timeout_s,
            f"{self._team.who} waits for stage {self._stage}",
        )
        assert self._receive is not None  # it has come
        (_, message), self._receive = self._receive, None
        arrived, tensors = unpack(message, self._device)
        if arrived != part:
            raise ValueError(f"stage {self._stage} sent part {arrived} where part {part} was due")
        return tensors

    def flush(self) -> None:
        """Return when everything has been sent."""
        with suppress(StageLost), self._alive():
            wait.until(
                lambda: all(request.Test() for request, _ in self._sends),
                self._team.timeout_s,
                f"{self._team.who} waits for stage {self._stage} to take what it sent",
            )
        self._sends.clear()

    def say(self, words: dict, tensors: tuple[torch.Tensor, ...] = ()) -> None:
        """Send what JSON can hold, and tensors with it."""
        text = torch.frombuffer(bytearray(json.dumps(words).encode()), dtype=torch.uint8)
        self.put(0, (text, *tensors))

    def hear(self) -> tuple[dict, tuple[torch.Tensor, ...]]:
        """Return what `say` sent."""
        text, *tensors = self.take(0)
        return json.loads(text.cpu().numpy().tobytes()), tuple(tensors)


class StageGroup:
    """This rank's replica, of num_stages ranks. All ranks make it together; a server is in none: its `worker` is None.

    gradient, weights, velocity: (P,) float32, and statistics: shared by the stages. `sync` comes between writing them and
    telling of it, and between hearing of it and reading them. payload: memory for the gradient, (4 P or more,) uint8, if it
    has a place already.
    """

    def __init__(
        self,
        world: World,
        worker: int | None,
        stage: int,
        num_stages: int,
        num_floats: int,
        num_statistics: int,
        payload: torch.Tensor | None = None,
    ):
        self.world, self.worker, self.stage, self.num_stages = world, worker, stage, num_stages
        colour = MPI.UNDEFINED if worker is None else worker
        with world.meeting("all ranks to form replicas"):
            comm = world.comm.Split(colour, stage)
            self.comm = cast(MPI.Intracomm, comm)
        if worker is None:
            return
        counts = (num_floats, num_floats, num_statistics, num_floats if payload is None else 0)
        sizes = [4 * -(-count // ALIGNMENT) * ALIGNMENT for count in counts]
        num_bytes = 0
        if stage == 0:
            num_bytes = sum(sizes)
            demand_shared_memory(
                world.host, num_bytes, f"the weights and the velocity of worker {worker}"
            )
        with world.meeting("the stages of its replica to share memory"):
            self._window = MPI.Win.Allocate_shared(num_bytes, 1, MPI.INFO_NULL, self.comm)
            self._window.Lock_all(MPI.MODE_NOCHECK)
        memory = bytes_of(self._window.Shared_query(0)[0])
        starts = np.cumsum([0, *sizes])
        self.weights, self.velocity, self.statistics, self.gradient = (
            torch.from_numpy(memory[start : start + 4 * count].view(np.float32))
            for start, count in zip(starts, counts)
        )
        if payload is not None:
            self.gradient = payload[: 4 * num_floats].view(torch.float32)

    @property
    def timeout_s(self) -> float:
        return self.world.timeout_s

    @property
    def who(self) -> str:
        return f"rank {self.world.rank} (stage {self.stage} of worker {self.worker} on {self.world.host})"

    def sync(self) -> None:
        self._window.Sync()

    def close(self) -> None:
        self._window.Unlock_all()

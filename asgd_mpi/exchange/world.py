"""The world of ranks: who is here, and the few words they exchange before and after training.

mpi4py is imported in this room (`asgd_mpi.exchange`) only. Collectives are nonblocking and polled with a deadline;
texts travel as bytes, never as pickles. Constructing a World communicates nothing; `start` does.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from mpi4py import MPI

from asgd_mpi import topology
from asgd_mpi.errors import ServerLost
from asgd_mpi.exchange import wait


PROCESS_FAILED = {getattr(MPI, name) for name in ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING", "ERR_REVOKED")
                  if hasattr(MPI, name)} - {MPI.ERR_UNKNOWN}
MAX_BYTES = 1 << 30   # of one message or read: counts end at 2^31 - 1, unless the MPI library has MPI_Isend_c and the like
LIFELINE = 2   # tag of a message that never comes: its receive fails when the server's process does


class World:
    """All ranks of the job; `timeout_s` limits every wait."""

    def __init__(self, timeout_s: float = 600.0):
        self.comm = MPI.COMM_WORLD
        self.rank = self.comm.rank
        self.size = self.comm.size
        self.host = socket.gethostname()
        self.timeout_s = timeout_s
        self.has_lost_ranks = False           # as far as the MPI library has told us
        self._lifelines: dict[int, MPI.Request] = {}      # by server's rank

    def renumber(self, order: list[int]) -> None:
        """Number the ranks anew: rank order[i] becomes i. All ranks call it."""
        if order != list(range(self.size)):
            self.comm = self.comm.Split(0, order.index(self.rank))
            self.rank = self.comm.rank

    @property
    def is_server(self) -> bool:
        return self.rank == topology.SERVER

    @property
    def worker(self) -> int:
        """0-based number of this worker, if it is one, or the leader of one."""
        return self.rank - 1

    def on_this_host(self) -> MPI.Comm:
        """A new communicator of the ranks that share memory with this one, in rank order; all ranks call it."""
        return self.comm.Split_type(MPI.COMM_TYPE_SHARED, key=self.rank)

    def hold_on_to(self, servers: Iterable[int]) -> None:
        """From now on `demand_server` can tell whether the processes of these ranks are alive, where the MPI library can."""
        for rank in set(servers) - {self.rank}:
            self._lifelines[rank] = self.comm.Irecv([bytearray(1), MPI.BYTE], source=rank, tag=LIFELINE)

    def let_go_of(self, servers: Iterable[int]) -> None:
        """They may end from now on: a process that leaves before others is taken for one that has failed."""
        for rank in set(servers) & set(self._lifelines):
            request = self._lifelines.pop(rank)
            request.Cancel()
            request.Free()

    def demand_server(self) -> None:
        """Raises ServerLost if a server's process has failed (known under `mpirun --with-ft ulfm`)."""
        for rank, lifeline in self._lifelines.items():
            try:
                lifeline.Test()
            except MPI.Exception as error:
                if error.Get_error_class() not in PROCESS_FAILED:
                    raise
                self.has_lost_ranks = True
                raise ServerLost(f"rank {self.rank} on {self.host}: the server's process (rank {rank}) has ended. What came "
                                 "after the last checkpoint is lost; go on from there with --resume RUN_DIR.") from None

    @contextmanager
    def as_loss_of_server(self) -> Iterator[None]:
        """Raises ServerLost where a call fails since the other process, a server's, has failed."""
        try:
            yield
        except MPI.Exception as error:
            if error.Get_error_class() not in PROCESS_FAILED:
                raise
            self.has_lost_ranks = True
            raise ServerLost(f"rank {self.rank} on {self.host}: the process of a server has ended. Go on from the last "
                             "checkpoint with --resume RUN_DIR.") from None

    def share(self, value: object | None) -> object:
        """Rank 0's `value`, on every rank; anything that JSON can hold."""
        data = json.dumps(value).encode() if self.is_server else b""
        length = np.array([len(data)], np.int64)
        self._complete(self.comm.Ibcast(length, root=0), "rank 0 to share a message")
        buffer = np.frombuffer(data, np.uint8).copy() if self.is_server else np.empty(length[0], np.uint8)
        self._complete(self.comm.Ibcast(buffer, root=0), "rank 0 to share a message")
        return json.loads(buffer.tobytes())

    def share_tensor_(self, tensor: torch.Tensor) -> None:
        """Set a tensor on the host, of a size that all ranks know, to rank 0's: the same bits on every rank."""
        whole = tensor.detach().contiguous()
        for _, part in cut(whole.flatten().view(torch.uint8).numpy()):
            self._complete(self.comm.Ibcast([part, MPI.BYTE], root=0), "rank 0 to share what is not trained")
        if whole.data_ptr() != tensor.data_ptr():
            tensor.copy_(whole)

    def gather(self, value: object) -> list:
        """Every rank's `value`, in rank order, on every rank; anything that JSON can hold."""
        data = np.frombuffer(json.dumps(value).encode(), np.uint8).copy()
        lengths = np.empty(self.size, np.int64)
        self._complete(self.comm.Iallgather(np.array([len(data)], np.int64), lengths), "all ranks to report")
        everything = np.empty(lengths.sum(), np.uint8)
        self._complete(self.comm.Iallgatherv(data, [everything, lengths]), "all ranks to report")
        ends = np.cumsum(lengths)
        return [json.loads(everything[end - length:end].tobytes()) for end, length in zip(ends, lengths)]

    def barrier(self, what: str) -> None:
        self._complete(self.comm.Ibarrier(), what)

    def leave(self, status: int) -> None:
        """Under `mpirun --with-ft ulfm`: end this process without MPI_Finalize, which may wait for dead ranks for ever."""
        if os.environ.get("OMPI_MCA_mpi_ft_enable") == "1":
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def abort(self, status: int) -> None:
        """End every rank of the job, now."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self.has_lost_ranks:       # after a failure Open MPI makes a status of 0 of it; the others see that we are gone
            os._exit(status)
        MPI.COMM_WORLD.Abort(status)

    def _complete(self, request: MPI.Request, what: str) -> None:
        wait.until(request.Test, self.timeout_s, f"rank {self.rank} waits for {what}")


def cut(memory: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """The bytes of `memory` in parts that one call carries each, and where each begins."""
    memory = memory.view(np.uint8)
    return [(start, memory[start:start + MAX_BYTES]) for start in range(0, len(memory), MAX_BYTES)]


def tasks_of_scheduler() -> int | None:
    """How many tasks Slurm says it started in this step; None outside Slurm."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") if "SLURM_PROCID" in os.environ else None
    return int(tasks) if tasks else None


def takes_gpu_memory() -> bool:
    """Whether the MPI library says that messages may lie in the memory of an NVIDIA GPU (Open MPI, MPICH and what is made of
    them). It does not if it was built without CUDA, or was told not to (OMPI_MCA_accelerator=null, MPIR_CVAR_ENABLE_GPU=0)."""
    try:
        return ctypes.CDLL(MPI.__file__).MPIX_Query_cuda_support() == 1
    except (AttributeError, OSError):
        return False


def settle(message: torch.Tensor) -> None:
    """Before MPI gets it: what a GPU has yet to do in this memory must be done, since MPI knows of no stream."""
    if message.is_cuda:
        torch.cuda.current_stream(message.device).synchronize()


def library() -> str:
    """The MPI library in one line."""
    return MPI.Get_library_version().split("\n")[0].split(", package")[0].strip("\0 ")

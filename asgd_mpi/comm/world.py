"""The world of ranks: who is here, and the few words they exchange before and after training.

mpi4py is imported in this room (`asgd_mpi.comm`) only. Collectives are nonblocking and polled with a deadline;
texts travel as bytes, never as pickles. Constructing a World communicates nothing; `start` does.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch

from asgd_mpi.comm import mpi, wait
from asgd_mpi.comm.mpi import MPI
from asgd_mpi.config import topology
from asgd_mpi.errors import RanksLost, ServerLost

PROCESS_FAILED = {
    getattr(MPI, name)
    for name in ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING", "ERR_REVOKED")
    if hasattr(MPI, name)
} - {MPI.ERR_UNKNOWN}
# of one message or read: counts end at 2^31 - 1, unless the MPI library has MPI_Isend_c and the like
MAX_BYTES = 1 << 30
LIFELINE = 2  # tag of a message that never comes: its receive fails when the server's process does
END = 9  # tag of the last words:
AT_END, STAY, GO = range(3)  # a rank is at its end; rank 0 is not; all are
LONGEST_LAST_WORK_S = 3600.0  # of rank 0, the report
# the launcher forwards output at leisure, and drops what it still holds when the job is aborted
FORWARDING_S = 0.5


class World:
    """All ranks of the job; `timeout_s` limits every wait."""

    def __init__(self, timeout_s: float = 600.0):
        self.comm: MPI.Intracomm = MPI.COMM_WORLD
        self.rank = self.comm.rank
        self.size = self.comm.size
        self.host = socket.gethostname()
        self.timeout_s = timeout_s
        self.has_lost_ranks = False  # as far as the MPI library has told us
        self._lifelines: dict[int, MPI.Request] = {}  # by server's rank
        self._last_words: list[tuple[MPI.Request, np.ndarray]] = []

    def renumber(self, order: list[int]) -> None:
        """Number the ranks anew: rank order[i] becomes i. All ranks call it."""
        if order != list(range(self.size)):
            with self.meeting("all ranks to take their numbers"):
                self.comm = cast(MPI.Intracomm, self.comm.Split(0, order.index(self.rank)))
            self.rank = self.comm.rank

    @property
    def is_server(self) -> bool:
        return self.rank == topology.SERVER

    @property
    def worker(self) -> int:
        """0-based number of this worker, if it is one, or the leader of one."""
        return self.rank - 1

    def on_this_host(self) -> MPI.Intracomm:
        """A new communicator of the ranks that share memory with this one, in rank order; all ranks call it."""
        with self.meeting("all ranks to say who shares memory"):
            # the stubs of mpi4py name the base class
            node = self.comm.Split_type(MPI.COMM_TYPE_SHARED, key=self.rank)
            return cast(MPI.Intracomm, node)

    @contextmanager
    def meeting(self, of_what: str) -> Iterator[None]:
        """Within, all ranks make a call that cannot be polled: it has the limit of every wait. Raises RanksLost."""
        with (
            wait.at_most(
                self.timeout_s,
                f"error: rank {self.rank} on {self.host} waits for {of_what}: not all came within "
                f"{self.timeout_s:g} s (--run.timeout_s). One of them may be stuck or dead.",
            ),
            self._as_loss_of_ranks(),
        ):
            yield

    def hold_on_to(self, servers: Iterable[int]) -> None:
        """From now on `demand_server` can tell whether the processes of these ranks are alive, where the MPI library can."""
        for rank in set(servers) - {self.rank}:
            self._lifelines[rank] = self.comm.Irecv(
                [bytearray(1), MPI.BYTE], source=rank, tag=LIFELINE
            )

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
                self._demand_loss(error)
                raise ServerLost(
                    f"rank {self.rank} on {self.host}: the server's process (rank {rank}) has ended. What came "
                    "after the last checkpoint is lost; go on from there with --resume RUN_DIR."
                ) from None

    @contextmanager
    def as_loss_of_server(self) -> Iterator[None]:
        """Raises ServerLost where a call fails since the other process, a server's, has failed."""
        try:
            yield
        except MPI.Exception as error:
            self._demand_loss(error)
            raise ServerLost(
                f"rank {self.rank} on {self.host}: the process of a server has ended. Go on from the last "
                "checkpoint with --resume RUN_DIR."
            ) from None

    @contextmanager
    def _as_loss_of_ranks(self) -> Iterator[None]:
        """Raises RanksLost where a call of all ranks fails since one of them has failed."""
        try:
            yield
        except MPI.Exception as error:
            self._demand_loss(error)
            raise RanksLost(
                "the process of another rank has ended while all were getting ready. The launcher's output, or "
                "error.rankNNN.txt in the run directory, says which; start the job again."
            ) from None

    def _demand_loss(self, error: MPI.Exception) -> None:
        """Raises the error again unless it says that a process has failed."""
        if error.Get_error_class() not in PROCESS_FAILED:
            raise error
        self.has_lost_ranks = True

    def share(self, value: object | None) -> object:
        """Rank 0's `value`, on every rank; anything that JSON can hold."""
        data = json.dumps(value).encode() if self.is_server else b""
        length = np.array([len(data)], np.int64)
        self._complete(self.comm.Ibcast(length, root=0), "rank 0 to share a message")
        if self.is_server:
            buffer = np.frombuffer(data, np.uint8).copy()
        else:
            buffer = np.empty(length[0], np.uint8)
        self._complete(self.comm.Ibcast(buffer, root=0), "rank 0 to share a message")
        return json.loads(buffer.tobytes())

    def share_tensor_(self, tensor: torch.Tensor) -> None:
        """Set a tensor on the host, of a size that all ranks know, to rank 0's: the same bits on every rank."""
        whole = tensor.detach().contiguous()
        for _, part in cut(whole.flatten().view(torch.uint8).numpy()):
            self._complete(
                self.comm.Ibcast([part, MPI.BYTE], root=0), "rank 0 to share what is not trained"
            )
        if whole.data_ptr() != tensor.data_ptr():
            tensor.copy_(whole)

    def gather(self, value: object) -> list:
        """Every rank's `value`, in rank order, on every rank; anything that JSON can hold."""
        data = np.frombuffer(json.dumps(value).encode(), np.uint8).copy()
        lengths = np.empty(self.size, np.int64)
        self._complete(
            self.comm.Iallgather(np.array([len(data)], np.int64), lengths), "all ranks to report"
        )
        everything = np.empty(lengths.sum(), np.uint8)
        self._complete(self.comm.Iallgatherv(data, [everything, lengths]), "all ranks to report")
        ends = np.cumsum(lengths)
        return [
            json.loads(everything[end - length : end].tobytes())
            for end, length in zip(ends, lengths)
        ]

    def barrier(self, what: str) -> None:
        self._complete(self.comm.Ibarrier(), what)

    @contextmanager
    def keeping_others(self) -> Iterator[None]:
        """Within, rank 0 does what is long and knows nothing of MPI: the others, who are at their end, hear that it lives."""
        is_over = threading.Event()

        def tell() -> None:
            until = time.monotonic() + LONGEST_LAST_WORK_S
            while not is_over.wait(self.timeout_s / 4) and time.monotonic() < until:
                for rank in range(1, self.size):
                    self._say_at_the_end(rank, STAY)

        teller = threading.Thread(target=tell, name="keeping others", daemon=True)
        teller.start()
        try:
            yield
        finally:
            is_over.set()
            teller.join()

    def leave(self, status: int, limit_s: float, status_without_all: int) -> None:
        """End MPI when every rank is at its end; all call it as the last thing.

        Rank 0 waits for the others for `limit_s`, and ends the job without who does not come, with `status_without_all`;
        they wait for rank 0 as long as it lives. Under `mpirun --with-ft ulfm` the process ends here, without MPI_Finalize,
        which may wait for dead ranks for ever. Raises ServerLost, DeadlineExceeded.
        """
        if self.is_server:
            late = self._late_at_the_end(limit_s)
            if late:
                self.end_without(late, status_without_all)
        else:
            self._await_the_end()
        if os.environ.get("OMPI_MCA_mpi_ft_enable") == "1":
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        mpi.end(limit_s, f"rank {self.rank} on {self.host}", status_without_all)

    def end_without(self, ranks: Iterable[int], status: int) -> None:
        """End the job though these ranks do not answer."""
        print(
            f"rank {', '.join(map(str, sorted(ranks)))} does not answer: the job is ended with it",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(FORWARDING_S)
        sys.stdout.flush()
        MPI.COMM_WORLD.Abort(status)

    def _await_the_end(self) -> None:
        word = np.array([STAY], np.int64)
        with self.as_loss_of_server():
            self._say_at_the_end(topology.SERVER, AT_END)
            while word[0] == STAY:
                wait.until(
                    self.comm.Irecv(word, source=topology.SERVER, tag=END).Test,
                    self.timeout_s,
                    f"rank {self.rank}, which is at its end, waits for rank 0 to end the job",
                )

    def _late_at_the_end(self, limit_s: float) -> list[int]:
        """Let all go that are at their end; returns the living ranks that did not come within the limit."""
        words = {rank: np.zeros(1, np.int64) for rank in range(1, self.size)}
        wanted = {rank: self.comm.Irecv(word, source=rank, tag=END) for rank, word in words.items()}
        wait.for_a_while(lambda: not self._pending(wanted), limit_s)
        if wanted:
            return sorted(wanted)
        taken = {rank: self._say_at_the_end(rank, GO) for rank in words}
        wait.for_a_while(lambda: not self._pending(taken), limit_s)
        return sorted(taken)

    def _say_at_the_end(self, rank: int, word: int) -> MPI.Request:
        """Send a word whose request is complete only when it has been taken: who hears the last one does not miss its sender."""
        message = np.array([word], np.int64)
        try:
            request = self.comm.Issend(message, dest=rank, tag=END)
        except MPI.Exception as error:
            self._demand_loss(error)
            return MPI.REQUEST_NULL
        self._last_words.append((request, message))  # its memory is to stay
        return request

    def _pending(self, requests: dict[int, MPI.Request]) -> dict[int, MPI.Request]:
        """Drop the requests that are complete, or whose rank has ended; returns what is left."""
        for rank, request in list(requests.items()):
            try:
                is_done = request.Test()
            except MPI.Exception as error:
                self._demand_loss(error)
                is_done = True
            if is_done:
                del requests[rank]
        return requests

    def abort(self, status: int) -> None:
        """End every rank of the job, now."""
        sys.stdout.flush()
        sys.stderr.flush()
        # after a failure Open MPI makes a status of 0 of it; the others see that we are gone
        if self.has_lost_ranks:
            os._exit(status)
        MPI.COMM_WORLD.Abort(status)

    def _complete(self, request: MPI.Request, what: str) -> None:
        with self._as_loss_of_ranks():
            wait.until(request.Test, self.timeout_s, f"rank {self.rank} waits for {what}")


def cut(memory: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Return the bytes of `memory` in parts that one call carries each, and where each begins."""
    memory = memory.view(np.uint8)
    return [
        (start, memory[start : start + MAX_BYTES]) for start in range(0, len(memory), MAX_BYTES)
    ]


def tasks_of_scheduler() -> int | None:
    """How many tasks Slurm says it started in this step; None outside Slurm."""
    if "SLURM_PROCID" in os.environ:
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS")
    else:
        tasks = None
    return int(tasks) if tasks else None


def takes_gpu_memory() -> bool:
    """Return whether the MPI library says that messages may lie in the memory of an NVIDIA GPU (Open MPI, MPICH and what is made of
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
    """Return the MPI library in one line."""
    return MPI.Get_library_version().split("\n")[0].split(", package")[0].strip("\0 ")

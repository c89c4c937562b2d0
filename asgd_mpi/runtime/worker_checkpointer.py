"""What a worker writes itself: its momentum for a checkpoint, and the model that it has just found the best.

Both go straight from the worker into the checkpoint's directory, in the background; the server is told when they are
there, and completes the checkpoint.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec
import torch

from asgd_mpi.errors import DiskRefuses
from asgd_mpi.protocol.messages import Kind
from asgd_mpi.record import checkpoint
from asgd_mpi.record.disk import write_whole
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.runtime.checkpointer import best_staging


class WorkerCheckpointer:
    """`take_done` names what has been written since the last call: a kind of packet, and the version it is of.

    What the disk refuses ends no worker: a checkpoint goes without its momentum, which rank 0 tells, and of a best model that is not
    kept `tell` gets a line, once.
    """

    def __init__(
        self,
        run: RunDir,
        restart: int,
        worker: int,
        tell: Callable[[str], None] = lambda text: None,
    ):
        self._run, self._restart, self._worker, self._tell = run, restart, worker, tell
        self._has_told = False
        self._thread = ThreadPoolExecutor(1, "keeper", checkpoint.step_back)
        self._hurry = threading.Event()
        self._frozen: dict[str, torch.Tensor] = {}
        self._under_way: list[tuple[Kind, int, Future[bool]]] = []
        self._best = -1  # the version that was written last for being the best

    def save(
        self, number: int, made: int, state: dict[str, torch.Tensor], is_copy: bool = False
    ) -> None:
        """Begin to write the momentum, whose last push made version `made`, for checkpoint `number`.

        is_copy: it does not change until the next call of `settle`.
        """
        self._hurry.clear()
        if any(kind == Kind.SAVED and not future.done() for kind, _, future in self._under_way):
            self._frozen = {}  # it is still being written
        if is_copy:
            self._frozen = state
        else:
            self._frozen = {
                name: self._frozen[name].copy_(vector)
                if name in self._frozen
                else vector.detach().cpu().clone()
                for name, vector in state.items()
            }
        staging = self._run.staging(number, self._restart)
        self._start(
            Kind.SAVED,
            made,
            checkpoint.save_worker,
            staging,
            self._worker,
            made,
            self._frozen,
            self._hurry,
        )

    def save_best(
        self, version: int, model: dict[str, torch.Tensor], is_copy: bool = False
    ) -> None:
        """Begin to write the state_dict of the validated version, unless it was written when it was validated before."""
        if version == self._best:
            return
        self._best = version
        if is_copy:
            frozen = model
        else:
            frozen = {name: tensor.detach().cpu().clone() for name, tensor in model.items()}
        self._start(Kind.BEST, version, self._write_best, version, frozen)

    def take_done(self, wait: bool = False) -> list[tuple[Kind, int]]:
        """Return what has been written (`wait`: all of it, in a hurry), in order; a momentum also if it never will be."""
        if wait:
            self._hurry.set()
        done = []
        while self._under_way and (wait or self._under_way[0][2].done()):
            kind, version, future = self._under_way.pop(0)
            if self._is_told_of(kind, version, future):
                done.append((kind, version))
        return done

    def _is_told_of(self, kind: Kind, version: int, future: Future[bool]) -> bool:
        try:
            return future.result()
        except DiskRefuses as error:
            if kind == Kind.SAVED:
                return True  # nobody is to wait for it
            if not self._has_told:
                self._has_told = True
                self._tell(
                    f"the model of version {version}, the best so far, is not kept beside the checkpoints: {error}"
                )
            return False

    def settle(self) -> None:
        """Return when all that was begun has been written."""
        self._hurry.set()
        for _, _, future in self._under_way:
            future.exception()  # waits; `take_done` raises it

    def close(self) -> None:
        self._hurry.set()
        self._thread.shutdown()

    def _start(self, kind: Kind, version: int, write, *arguments: object) -> None:
        self._under_way.append((kind, version, self._thread.submit(write, *arguments)))

    def _write_best(self, version: int, model: dict[str, torch.Tensor]) -> bool:
        staging = best_staging(self._run, version, self._restart, self._worker)
        checkpoint.stage(staging)
        sha256 = checkpoint.write_tensors(staging / checkpoint.MODEL, model)
        write_whole(
            staging / "model.json",
            msgspec.json.encode(checkpoint.WorkerState(self._worker, version, sha256)),
        )
        return True

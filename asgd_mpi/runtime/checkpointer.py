"""Checkpoints in the background: a frozen copy is written by one thread while the server goes on.

A checkpoint is whole when the thread has written the server's part and every worker that keeps momentum has written
its own, straight into the same directory; who has not after a while is left out, and begins without momentum.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import msgspec
import torch
from torch import nn

from asgd_mpi.config.resolved import Resolved
from asgd_mpi.config.rulebook import begins_anew, vectors_kept
from asgd_mpi.optim.rules import EMA, Rule, make_rule
from asgd_mpi.protocol.ledger import Ledger
from asgd_mpi.protocol.messages import Score
from asgd_mpi.record import checkpoint, disk
from asgd_mpi.record.checkpoint import EMA_MODEL, LEDGER, MODEL, SERVER, Manifest
from asgd_mpi.record.disk import write_whole
from asgd_mpi.record.events import Checkpoint
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.vector import finite
from asgd_mpi.vector.flat import FlatModel, num_floats

# of a checkpoint's small files; of a tensor's name and place in a file
ROOM_BYTES, ROOM_BYTES_OF_TENSOR = 1 << 16, 1 << 10
PATIENCE_S = 300.0  # for a worker to write its momentum
LOOK_S = 0.05  # between two looks at what is being written


@dataclasses.dataclass
class _Pending:
    """A checkpoint that is being written."""

    staging: Path
    manifest: Manifest
    started: float  # Unix seconds
    waits_for: set[int]  # workers,
    asked: frozenset[int]  # ... of these
    written: Future[dict[str, str]]  # file -> sha256


class Checkpointer:
    """Everything that the server writes as checkpoints. `flat` is a network to lay the weights out in, `about` the
    manifest's fields that do not change; `sync` forces the log of pushes to the disk. `room`: bytes that one checkpoint takes."""

    def __init__(
        self,
        run: RunDir,
        restart: int,
        about: Manifest,
        flat: FlatModel,
        rule: Rule,
        keep: int,
        sync: Callable[[], None],
        room: int = 0,
    ):
        self._room, self.saved_version = room, -1  # the last version that this start has saved
        self._run, self._restart, self._about = run, restart, about
        self._flat, self._rule, self._keep, self._sync = flat, rule, keep, sync
        self._thread = ThreadPoolExecutor(1, "saver", checkpoint.step_back)
        self._pending: _Pending | None = None
        self._completing: list[Future[Checkpoint | None]] = []
        self.patience_s = PATIENCE_S
        self._hurry = threading.Event()
        # workers and the versions that they have written as the best
        self._best: set[tuple[int, int]] = set()
        # the rule's state; nobody writes into it while it is written
        self._frozen: dict[str, torch.Tensor] = {}

    @property
    def is_busy(self) -> bool:
        """Return whether something is being written, or has not got its name yet: the next one may use the same directory."""
        return self._pending is not None or not all(
            completed.done() for completed in self._completing
        )

    @property
    def newest(self) -> str:
        """Say what a run that is cut short now goes on from."""
        whole = (directory for directory, manifest in checkpoint.resumable(self._run) if manifest)
        return str(next(whole, "its beginning: it has no checkpoint yet"))

    @property
    def num_floats(self) -> int:
        """P, of the whole network."""
        return self._flat.num_floats

    def why_no_room(self) -> str:
        """Return what to say when a last checkpoint still fits on the disk, and hardly more; empty while one is being written."""
        if not self._room or self.is_busy:
            return ""
        free = disk.free_bytes(self._run.path)
        if free is None or free >= self._room:
            return ""
        return (
            f"{free / 1e6:.1f} MB are left on the disk of {self._run.path}, and a checkpoint takes up to {self._room / 1e6:.1f} MB: "
            "the run ends while it can still be saved. Free some space."
        )

    def begin(
        self,
        number: int,
        freeze_: Callable[[torch.Tensor, dict[str, torch.Tensor]], None],
        ledger: Ledger,
        statistics: torch.Tensor | None,
        score: Score | None,
        waits_for: set[int],
    ) -> None:
        """Freeze the run as it is now and start to write it; `score` is the newest validation. Raises RunDirError.

        `freeze_` copies the weights and the rule's state, (P,) float32 each, into what it is given.
        """
        assert not self.is_busy
        staging = self._run.staging(number, self._restart)
        # announced before, and workers may have written into it
        if not disk.is_directory(staging):
            checkpoint.stage(staging)
        if statistics is not None:
            self._flat.load_statistics_(statistics)
        is_of_this = score is not None and score.version == ledger.version
        manifest = msgspec.structs.replace(
            self._about,
            version=ledger.version,
            samples=ledger.samples,
            num_workers=ledger.plan.num_workers,
            restart=self._restart,
            statistics_of=score.version if score else None,
            files={},
            momenta={},
            top1_error=score.top1_error if is_of_this else None,
            top5_error=score.top5_error if is_of_this else None,
            metrics=score.finite_metrics if is_of_this else {},
        )
        self._frozen = self._frozen or {
            name: torch.empty(self.num_floats) for name in self._rule.state
        }
        freeze_(self._flat.weights, self._frozen)
        todo = self._thread.submit(
            _write, staging, self._flat, self._frozen, ledger.state(), self._hurry
        )
        self._pending = _Pending(
            staging, manifest, time.time(), set(waits_for), frozenset(waits_for), todo
        )

    def announce(self, number: int) -> None:
        """Make the directory that workers are about to write into, ahead of `begin`. Raises RunDirError."""
        checkpoint.stage(self._run.staging(number, self._restart))

    def saved(self, worker: int) -> None:
        """A worker has written its part, or never will."""
        if self._pending:
            self._pending.waits_for.discard(worker)

    def poll(self, best: int) -> list[Checkpoint]:
        """Go on with what is being written; the checkpoints that have become whole. Raises RunDirError, TrainingDiverged."""
        pending = self._pending
        if (
            pending
            and pending.written.done()
            and (not pending.waits_for or time.time() - pending.started > self.patience_s)
        ):
            self._completing.append(self._thread.submit(self._complete, pending, best))
            self._pending = None
        whole = []
        while self._completing and self._completing[0].done():
            whole.append(self._completing.pop(0).result())
        return [event for event in whole if event]

    def finish(
        self, best: int, timeout_s: float, meanwhile: Callable[[], object] = lambda: None
    ) -> list[Checkpoint]:
        """Wait for what is being written, and complete it with the workers' parts that are there; from now on, hurry.

        meanwhile: called often, so that others hear that the server lives.
        """
        self._hurry.set()
        if self._pending:
            self._pending.waits_for.clear()
            _await([self._pending.written], timeout_s, meanwhile)
        whole = self.poll(best)
        _await(self._completing, timeout_s, meanwhile)
        return whole + self.poll(best)

    def _complete(self, pending: _Pending, best: int) -> Checkpoint:
        """On the thread: the disk may be busy for long with what has just been written."""
        pending.manifest.files |= pending.written.result()
        self._sync()  # what the momenta have seen is in the log
        directory = self._run.checkpoint(pending.manifest.version, self._restart)
        num_bytes = checkpoint.commit(pending.staging, directory, pending.manifest)
        checkpoint.prune(self._run, self._keep, best)
        self.saved_version = pending.manifest.version
        without = [
            worker + 1
            for worker in sorted(pending.asked)
            if str(worker) not in pending.manifest.momenta
        ]
        return Checkpoint(
            time.time(),
            pending.manifest.version,
            str(directory.relative_to(self._run.path)),
            time.time() - pending.started,
            num_bytes,
            without,
        )

    def keep_best(self, worker: int, version: int, score: Score, samples: int) -> None:
        """Complete a model that a worker has written because its version is the best one."""
        # told twice: what is written once is moved once
        if (worker, version) not in self._best:
            self._best.add((worker, version))
            self._completing.append(
                self._thread.submit(self._complete_best, worker, version, score, samples)
            )

    def _complete_best(
        self, worker: int, version: int, score: Score, samples: int
    ) -> Checkpoint | None:
        """None if it is there already: two workers may have validated the same version."""
        started = time.time()
        staging = best_staging(self._run, version, self._restart, worker)
        state = msgspec.json.decode(
            (staging / "model.json").read_bytes(), type=checkpoint.WorkerState
        )
        (staging / "model.json").unlink()
        manifest = msgspec.structs.replace(
            self._about,
            version=version,
            samples=samples,
            restart=self._restart,
            statistics_of=version,
            top1_error=score.top1_error,
            top5_error=score.top5_error,
            metrics=score.finite_metrics,
            files={MODEL: state.sha256},
            momenta={},
        )
        directory = self._run.checkpoint(version, self._restart)
        num_bytes = checkpoint.commit(staging, directory, manifest)
        if not num_bytes:
            return None
        checkpoint.prune(self._run, self._keep, version)
        return Checkpoint(
            time.time(),
            version,
            str(directory.relative_to(self._run.path)),
            time.time() - started,
            num_bytes,
        )

    def close(self) -> None:
        """End the thread, and remove what was not completed; the next start removes what a disk that hangs still holds."""
        if not self.is_busy:
            self._thread.shutdown()
            checkpoint.clean(self._run)


def _await(futures: list[Future], timeout_s: float, meanwhile: Callable[[], object]) -> None:
    until = time.monotonic() + timeout_s
    while wait(futures, LOOK_S).not_done and time.monotonic() < until:
        meanwhile()


def room_for(
    module: nn.Module, carried: Collection[str], config: Resolved, num_workers: int
) -> int:
    """Return the bytes that a checkpoint takes at most, with the best model that may be written at the same time.

    carried: the names of what the forward pass moves, which every worker saves.
    """
    state = module.state_dict()
    around = ROOM_BYTES_OF_TENSOR * len(state)
    model = sum(tensor.nbytes for tensor in state.values()) + around
    vector = 4 * num_floats(module) + around
    of_server = vector * len(make_rule(1, config.rule, num_workers).state)
    of_worker = 0
    if not begins_anew(config.rule):
        kept = vectors_kept(config.rule, config.exchange.wire)
        of_worker = vector * kept + sum(state[name].nbytes for name in carried)
    models = 3 if config.rule.ema_samples else 2
    return models * model + of_server + num_workers * of_worker + ROOM_BYTES


def best_staging(run: RunDir, version: int, restart: int, worker: int) -> Path:
    """Return where a worker writes the model that it has just validated."""
    return run.staging(version, restart).with_name(f".best{version:09d}.{restart}.{worker}")


def _write(
    staging: Path, flat: FlatModel, state: dict, ledger: dict, hurry: threading.Event
) -> dict[str, str]:
    """Write the server's part; returns file -> sha256. Raises RunDirError; TrainingDiverged if it is not finite."""
    for name, vector in {"weights": flat.weights, **state}.items():
        finite.demand(vector, f"the {name}")
    files = {MODEL: checkpoint.write_tensors(staging / MODEL, flat.module.state_dict(), hurry)}
    if EMA in state:
        flat.weights.copy_(state[EMA])
        files[EMA_MODEL] = checkpoint.write_tensors(
            staging / EMA_MODEL, flat.module.state_dict(), hurry
        )
    if state:
        files[SERVER] = checkpoint.write_tensors(staging / SERVER, state, hurry)
    write_whole(staging / LEDGER, msgspec.json.format(msgspec.json.encode(ledger)))
    files[LEDGER] = checkpoint.sha256(staging / LEDGER)
    return files

"""A checkpoint: one version of the run, in a directory of its own.

    model.pt          the state_dict of the plain module: torch.load(..., weights_only=True), readable without this package
    manifest.json     what it is of: version, network, data, errors, sha256 of every file
    ema.pt            the same, with the running mean of the weights in their place, if the run keeps one (rule.ema_samples)
  of a checkpoint that a run can be resumed from, also:
    server.pt         the rule's state, (P,) float32 vectors by name
    ledger.json       the sample clock, and what is to be trained next
    workerNNN.pt      the momentum that worker NNN keeps, (P,) float32

Order, augmentation and dropout are functions of (seed, epoch, position): no generator or cursor needs to be saved.
A checkpoint is written into a directory of another name, file by file, each forced to the disk, the manifest last;
then the directory is renamed. It loses its name again before it is removed: what has the name of a checkpoint is whole,
whenever the power fails.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Annotated, Literal, cast

import msgspec
import torch

import asgd_mpi
from asgd_mpi.errors import RunDirError, one_line, tell
from asgd_mpi.record import disk
from asgd_mpi.record.disk import unwritable, write_whole
from asgd_mpi.record.rundir import LEFT_OVER, REMOVED, REPLACED, RunDir, version_and_restart
from asgd_mpi.record.tensors import read_tensors
from asgd_mpi.untrusted import bounded, writers
from asgd_mpi.untrusted.plausible import (
    MAX_CHANNELS,
    MAX_CLASSES,
    MAX_SIDE,
    MAX_WORKERS,
    impossible_moments,
    out_of_range,
)

MODEL, SERVER, LEDGER, MANIFEST = "model.pt", "server.pt", "ledger.json", "manifest.json"
EMA_MODEL = "ema.pt"
_FILE = re.compile(r"model\.pt|ema\.pt|server\.pt|ledger\.json|worker[0-9]{3,7}\.pt")


class Manifest(msgspec.Struct):
    version: int
    samples: int
    model: str
    num_classes: int
    channels: int
    image_size: int
    data: str  # fingerprint of the data set it was trained on
    mean: list[float]  # per channel: an image is (pixel / 255 - mean) / std
    std: list[float]
    top1_error: float | None = None  # of exactly these weights, if they were validated
    top5_error: float | None = None
    format: int = 2
    restart: int = 0  # of the run that wrote it
    files: dict[str, str] = {}  # name -> sha256
    num_workers: int = 0
    # worker -> version that the last push in its momentum had made
    momenta: dict[str, int] = {}
    statistics_of: int | None = None  # version that the batch-norm statistics were measured on
    software: dict[str, str] = {}
    # in the order of the scores; none, if it was written before they were kept
    class_names: list[str] = []
    # short side of an image before the crop; 0 if it was written before it was kept
    resize: int = 0
    # of tasks of a user's own: of exactly these weights, by name
    metrics: dict[str, float] = {}
    is_own: bool = False  # a task of the user's: it has no classes, channels or sizes
    sha256: str = ""  # of all the above; in format 1 of model.pt, the only file

    @property
    def is_validated(self) -> bool:
        """Return whether exactly these weights were validated."""
        return self.top1_error is not None or bool(self.metrics)

    @property
    def is_resumable(self) -> bool:
        return LEDGER in self.files

    def seal(self) -> str:
        """Return the sha256 of what it says, but for that itself."""
        said = msgspec.structs.asdict(msgspec.structs.replace(self, sha256=""))
        for name in (
            "class_names",
            "resize",
            "metrics",
            "is_own",
        ):  # older ones say nothing of them
            if not said[name]:
                del said[name]
        return hashlib.sha256(msgspec.json.encode(said)).hexdigest()


Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Span = tuple[Count, Count, Count]  # epoch, start, stop


class _Ledger(msgspec.Struct):
    """The kinds and ranges of what Ledger.state says; whether it adds up the ledger finds out."""

    version: Count
    samples: Count
    lent: Count
    todo: list[tuple[Literal[1, 2], Count, Count, Count]]  # work, and a span
    later: list[tuple[Count, Count, Count, Count]]  # a span, and how often it was tried
    given_up: list[Span]
    validations_due: Literal[0, 1]
    best: tuple[Count, Count, float | None, float | None, float | None] | None
    gathered: Count = 0
    steps: Count = 0
    best_metrics: dict[str, float] = {}


class WorkerState(msgspec.Struct):
    """Beside workerNNN.pt until the checkpoint is whole."""

    worker: int
    made: int  # the version that its last push had made
    sha256: str


def software() -> dict[str, str]:
    """Return the versions that the weights depend on, to the bit."""
    return {"asgd_mpi": asgd_mpi.__version__, "torch": str(torch.__version__)}


def step_back() -> None:
    """Let this thread, which writes, leave the processors to those that train."""
    with suppress(OSError):
        # on Linux, of the thread alone
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def worker_file(worker: int) -> str:
    return f"worker{worker:03d}.pt"


class _Considerate:
    """A file that is written piece by piece, with pauses in between, until somebody is in a hurry; and its sha256."""

    PIECE, PAUSE = 1 << 20, 4  # bytes; times as long as a piece took

    def __init__(self, file: IO[bytes], hurry: threading.Event | None):
        self._file, self._hurry = file, hurry
        self.digest = hashlib.sha256()

    def write(self, content: bytes | memoryview) -> int:
        for start in range(0, len(content), self.PIECE):
            began = time.monotonic()
            piece = content[start : start + self.PIECE]
            self._file.write(piece)
            self.digest.update(piece)
            if self._hurry and len(piece) == self.PIECE:
                self._hurry.wait(self.PAUSE * (time.monotonic() - began))
        return len(content)

    def flush(self) -> None:
        self._file.flush()


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], hurry: threading.Event | None = None
) -> str:
    """Write and force to the disk; returns the sha256. Raises RunDirError.

    `hurry`: write slowly until it is set, so that the training beside it keeps processors and memory for itself.
    """
    try:
        with disk.open_own(path, "wb") as file:
            writer = _Considerate(file, hurry)
            # torch calls write and flush, and nothing else of a file
            torch.save(tensors, cast("IO[bytes]", writer))
            file.flush()
            os.fsync(file.fileno())
    except (
        OSError,
        RuntimeError,
    ) as error:  # torch makes an error of its own of what a file raises
        refused: BaseException | None = error
        while refused is not None and not isinstance(refused, OSError):
            refused = refused.__context__
        if refused is None:
            raise
        raise unwritable(path, refused) from error
    return writer.digest.hexdigest()


def save_worker(
    staging: Path,
    worker: int,
    made: int,
    tensors: dict[str, torch.Tensor],
    hurry: threading.Event | None = None,
) -> bool:
    """Write a worker's own state; False if nobody waits for it any more. Raises RunDirError."""
    if not disk.is_directory(staging):
        return False
    try:
        state = WorkerState(
            worker, made, write_tensors(staging / worker_file(worker), tensors, hurry)
        )
        write_whole(staging / f"worker{worker:03d}.json", msgspec.json.encode(state))
    except RunDirError:
        if disk.is_directory(staging):
            raise
        return False  # it was finished, or given up, without us
    return True


def stage(staging: Path) -> None:
    """Make the directory that a checkpoint is written into. Raises RunDirError."""
    try:
        disk.demand_no_link(staging)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    except OSError as error:
        raise unwritable(staging, error) from error


def commit(staging: Path, directory: Path, manifest: Manifest) -> int:
    """Complete the manifest, and give the checkpoint its name; returns its size in bytes. Raises RunDirError."""
    for path in sorted(staging.glob("worker*.json")):
        state = msgspec.json.decode(path.read_bytes(), type=WorkerState)
        manifest.files[worker_file(state.worker)] = state.sha256
        manifest.momenta[str(state.worker)] = state.made
        path.unlink()
    if old := _there(directory):
        if old.is_resumable >= manifest.is_resumable and old.is_validated >= manifest.is_validated:
            shutil.rmtree(staging)  # the same version, saved for another reason
            return 0
        _join_(staging, manifest, directory, old)
    manifest.sha256 = manifest.seal()
    write_whole(staging / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest)))
    try:
        _sync_directory(staging)
        if directory.is_symlink():
            directory.unlink()  # not what it leads to
        if directory.exists():
            os.replace(directory, replaced := directory.with_name(f"{REPLACED}{directory.name}"))
            os.replace(staging, directory)
            shutil.rmtree(replaced)
        else:
            os.replace(staging, directory)
        _sync_directory(directory.parent)
    except OSError as error:
        raise unwritable(directory, error) from error
    return sum(path.stat().st_size for path in directory.iterdir())


def read_manifest(directory: Path) -> Manifest:
    """Raises RunDirError if it is missing or damaged."""
    try:
        manifest = bounded.decode_json(
            bounded.read(directory / MANIFEST), msgspec.json.Decoder(Manifest)
        )
    except OSError as error:
        raise RunDirError(
            f"{directory} is not a checkpoint: {error.strerror}: {error.filename}. Give a directory "
            "under checkpoints/ of a run directory."
        ) from error
    except ValueError as error:
        raise RunDirError(
            f"the manifest of checkpoint {directory} is damaged: {error}. Take another checkpoint."
        ) from error
    if wrong := _impossible(manifest):
        raise RunDirError(
            f"the manifest of checkpoint {directory} cannot be true: {one_line(wrong)}. Take another checkpoint."
        )
    if manifest.format == 1:
        manifest.files = {MODEL: manifest.sha256}
    elif manifest.sha256 != (found := manifest.seal()):
        raise RunDirError(
            f"the manifest of checkpoint {directory} is damaged: its sha256 is {found[:16]}..., but "
            f"{manifest.sha256[:16]}... was written. Take another checkpoint."
        )
    return manifest


def _impossible(manifest: Manifest) -> str:
    """Return what no checkpoint says of itself; empty if there is nothing. Sizes are checked before anything is made of them."""
    most = 2**62
    least = 0 if manifest.is_own else 1
    wrong = out_of_range(
        [
            ("version", manifest.version, 0, most),
            ("samples", manifest.samples, 0, most),
            ("restart", manifest.restart, 0, 10**6),
            ("num_workers", manifest.num_workers, 0, MAX_WORKERS),
            ("num_classes", manifest.num_classes, least, MAX_CLASSES),
            ("channels", manifest.channels, least, MAX_CHANNELS),
            ("image_size", manifest.image_size, least, MAX_SIDE),
            (
                "resize",
                manifest.resize,
                manifest.image_size if manifest.resize else 0,
                2 * MAX_SIDE,
            ),
        ]
    )
    if wrong:
        return wrong
    if len(manifest.class_names) not in (0, manifest.num_classes):
        return f"it names {len(manifest.class_names)} classes, and has {manifest.num_classes}"
    for name in manifest.files:
        if not _FILE.fullmatch(name):
            return f"{name!r} is no file of a checkpoint"
    for worker in manifest.momenta:
        if not re.fullmatch("[0-9]{1,6}", worker):
            return f"{worker!r} is no worker"
    return impossible_moments(manifest.mean, manifest.std, manifest.channels)


def verify(directory: Path) -> Manifest:
    """Read all of a checkpoint, and compare it with its manifest. Raises RunDirError naming what is damaged."""
    manifest = read_manifest(directory)
    for name, written in manifest.files.items():
        _verify(directory / name, written)
    return manifest


def tell_of_writers(path: str | Path) -> None:
    """Say on stderr, in one line, if others than this user may change a checkpoint (or its model.pt)."""
    if line := writers.told(_directory_of(path)):
        tell(line, file=sys.stderr)


def load(path: str | Path) -> tuple[dict[str, torch.Tensor], Manifest]:
    """Return the network in directory `path` (or its model.pt, or ema.pt). Raises RunDirError if it is missing or damaged."""
    directory, file = _directory_of(path), EMA_MODEL if is_of_mean(path) else MODEL
    manifest = read_manifest(directory)
    _verify(directory / file, manifest.files.get(file, ""))
    return read_tensors(directory / file), manifest


def is_of_mean(path: str | Path) -> bool:
    """Return whether a path names the running mean of the weights in a checkpoint."""
    path = Path(path)
    return path.name == EMA_MODEL and (path.parent / MANIFEST).exists()


def _directory_of(path: str | Path) -> Path:
    path = Path(path)
    return path.parent if path.name == MODEL or is_of_mean(path) else path


def run_of(path: str | Path) -> Path:
    """Return the run directory that a checkpoint, or a model in it, lies in: RUN/checkpoints/NAME."""
    directory = Path(os.path.realpath(path))
    if directory.name in (MODEL, EMA_MODEL):
        directory = directory.parent
    return directory.parent.parent


def read_ledger(directory: Path) -> dict:
    """Return the saved ledger. Raises RunDirError."""
    try:
        content = bounded.read(directory / LEDGER)
        bounded.decode_json(content, msgspec.json.Decoder(_Ledger))
        return msgspec.json.decode(content, type=dict)
    except (OSError, ValueError) as error:
        raise RunDirError(
            f"{directory / LEDGER} cannot be read: {error}. Take another checkpoint."
        ) from error


def resumable(run: RunDir) -> Iterator[tuple[Path, Manifest | None]]:
    """Yield the checkpoints that claim to be resumable, the latest first; None for one whose manifest cannot be read."""
    found = []
    for directory in _all(run):
        try:
            manifest = read_manifest(directory)
        except RunDirError:
            manifest = None
        if manifest is None or manifest.is_resumable:
            version, restart = _version_and_restart(directory)
            found.append((restart, version, directory, manifest))
    yield from (
        (directory, manifest)
        for *_, directory, manifest in sorted(found, key=lambda one: one[:2], reverse=True)
    )


def best(run: RunDir) -> Path | None:
    """Return the checkpoint of the best version, as the newest ledger has it; None if nothing was validated. Raises RunDirError."""
    newest = next((directory for directory, manifest in resumable(run) if manifest), None)
    score = read_ledger(newest)["best"] if newest else None
    if newest is None or score is None:
        return None
    of_starts = range(_version_and_restart(newest)[1], -1, -1)
    kept = (run.checkpoint(score[0], restart) for restart in of_starts)
    return next((directory for directory in kept if directory.is_dir()), None)


def of_choice(run: RunDir, takes_best: bool = True) -> tuple[Path, str]:
    """Return the best checkpoint of a run, else its latest one that can be resumed, and which of them it is. Raises RunDirError."""
    if takes_best and (found := best(run)):
        return found, "best"
    latest = next((directory for directory, manifest in resumable(run) if manifest), None)
    if latest is None:
        raise RunDirError(
            f"{run.path} holds no checkpoint yet. Give another run, or wait for its first one (--checkpoint.every_s)."
        )
    return latest, "last"


def prune(run: RunDir, keep: int, best: int) -> None:
    """Remove all but the latest `keep` resumable checkpoints and those of version `best`."""
    latest = [directory for directory, manifest in resumable(run) if manifest][:keep]
    for directory in _all(run):
        if directory not in latest and _version_and_restart(directory)[0] != best:
            # not half of it under its name, if the power fails in between
            with suppress(OSError):
                os.replace(directory, removed := directory.with_name(f"{REMOVED}{directory.name}"))
                shutil.rmtree(removed)


def clean(run: RunDir) -> None:
    """Remove what an earlier start has left of checkpoints that were being written, replaced or removed."""
    whole = set(_all(run))
    for left in run.checkpoints.glob(".*"):
        if left not in whole and LEFT_OVER.fullmatch(left.name):
            shutil.rmtree(left, ignore_errors=True)


def _all(run: RunDir) -> Iterator[Path]:
    """Every checkpoint; one whose replacement had not got its name yet when the power failed is found under another."""
    yield from run.checkpoints_by_name
    for directory in sorted(run.checkpoints.glob(f"{REPLACED}v*")):
        name = directory.name.removeprefix(REPLACED)
        if version_and_restart(name) and not directory.with_name(name).exists():
            yield directory


def _version_and_restart(directory: Path) -> tuple[int, int]:
    """Return those of one of `_all`, which its name says."""
    found = version_and_restart(directory.name.removeprefix(REPLACED))
    assert found, f"{directory} is no checkpoint"
    return found


def _there(directory: Path) -> Manifest | None:
    """Return the manifest of a checkpoint that has this name already, if it can be read."""
    if directory.is_symlink():
        return None
    try:
        return read_manifest(directory)
    except RunDirError:
        return None


def _join_(staging: Path, manifest: Manifest, directory: Path, old: Manifest) -> None:
    """Take what an older checkpoint of the same version holds besides: what a resume needs, or a model with its own score.

    The models differ in what is measured for a validation (batch norm). One that is damaged is left out.
    """
    if old.is_resumable and not manifest.is_resumable:
        names = old.files.keys() - {MODEL}
        more = {"momenta": old.momenta, "num_workers": old.num_workers}
    elif old.is_validated and not manifest.is_validated:
        names = {MODEL}
        own = ("top1_error", "top5_error", "metrics", "statistics_of")
        more = {name: getattr(old, name) for name in own}
    else:
        return
    try:
        for name in names:
            _verify(directory / name, old.files[name])
            with disk.open_own(staging / name, "wb") as file:
                with bounded.open_plain(directory / name) as source:
                    shutil.copyfileobj(source, file)
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise unwritable(staging, error) from error
    except RunDirError:
        return
    manifest.files |= {name: old.files[name] for name in names}
    for name, value in more.items():
        setattr(manifest, name, value)


def _verify(path: Path, written: str) -> None:
    try:
        found = sha256(path)
    except OSError as error:
        raise RunDirError(
            f"{path.parent} is not a whole checkpoint: {error.strerror}: {path}. Take another one."
        ) from error
    if found != written:
        raise RunDirError(
            f"{path} is damaged: its sha256 is {found[:16]}..., but {written[:16]}... was written. "
            "Take another checkpoint."
        )


def sha256(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with bounded.open_plain(path) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

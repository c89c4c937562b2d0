"""The run directory: the one place that knows the names of its files (they are documented in the README).

Files that are written once are written whole: temporary file, flush, fsync, os.replace. Metrics are appended.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from asgd_mpi.errors import RunDirError


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, never a part of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> RunDirError:
    """What to say when a file of a run cannot be written."""
    return RunDirError(f"cannot write {path}: {error.strerror}. A run cannot go on without its records: free some space, "
                       "or give another directory with --run.dir DIR.")


class RunDir:
    """Paths of one run; `create` makes a new one, `open` takes one that a run left behind."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.versions = self.path / "versions.json"
        self.pushes = self.path / "pushes.log"
        self.finished = self.path / "finished.json"
        self.stalls = self.path / "stalls"
        self.metrics = self.path / "metrics"
        self.checkpoints = self.path / "checkpoints"
        self.report = self.path / "report"
        self.logs = self.path / "log"
        self.tensorboard = self.path / "tensorboard"

    @classmethod
    def create(cls, path: str | Path | None, name: str) -> RunDir:
        """Make a new run directory: `path`, or `runs/<date>_<name>`. Raises RunDirError."""
        path = Path(path) if path else Path("runs") / f"{time.strftime('%Y-%m-%dT%H%M%S')}_{name}"
        run = cls(path)
        if run.config.exists():
            raise RunDirError(
                f"{path} already holds a run (config.yaml): two runs in one directory would mix their records. Go on with "
                "that run by --resume, give another directory with --run.dir DIR, or leave it out for a new one under runs/."
            )
        try:
            for directory in (run.path, run.metrics, run.checkpoints, run.report):
                directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunDirError(
                f"cannot make the run directory {path}: {error.strerror}. "
                "Give one that you may write to with --run.dir DIR."
            ) from error
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """Take an existing run directory. Raises RunDirError."""
        run = cls(Path(path))
        if not run.path.is_dir():
            raise RunDirError(f"there is no run directory {path}: give one that asgd_mpi.train made.")
        if not run.config.exists():
            raise RunDirError(f"{path} is not a run directory: it has no config.yaml. Was it made by asgd_mpi.train?")
        return run

    def metrics_of(self, rank: int, restart: int = 0) -> Path:
        return self.metrics / f"rank{rank:03d}{_suffix(restart)}.jsonl"

    def pushes_of(self, restart: int) -> Path:
        return self.path / f"pushes{_suffix(restart)}.log"

    def config_of(self, restart: int) -> Path:
        return self.path / f"config{_suffix(restart)}.yaml"

    def log_of(self, rank: int) -> Path:
        return self.logs / f"rank{rank:03d}.txt"

    def error_of(self, rank: int) -> Path:
        return self.path / f"error.rank{rank:03d}.txt"

    def checkpoint(self, version: int, restart: int = 0) -> Path:
        return self.checkpoints / f"v{version:09d}{_suffix(restart)}"

    def staging(self, number: int, restart: int = 0) -> Path:
        """Where a checkpoint is written until it is whole."""
        return self.checkpoints / f".saving{number:06d}{_suffix(restart)}"

    @property
    def restarts(self) -> list[int]:
        """The restarts that have begun a log, in order; 0 is the first start."""
        return sorted(_restart_of(path) for path in self.path.glob("pushes*.log"))

    @property
    def metrics_files(self) -> list[tuple[int, int, Path]]:
        """(rank, restart, file), in order."""
        found = [(path.name.removeprefix("rank").partition(".")[0], path) for path in self.metrics.glob("rank*.jsonl")]
        return sorted((int(rank), _restart_of(path), path) for rank, path in found if rank.isdecimal())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory: a second job that wants to write it is told. Raises RunDirError.

        The lock ends with its process. A file system that knows no locks is told on stderr, and goes without.
        """
        with open(self.path / "lock", "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise RunDirError(f"{self.path} is being written by another job ({file.read().strip()}): two jobs in one "
                                  "run directory would damage it. End that one first, or give another directory with "
                                  "--run.dir DIR.") from None
            except OSError as error:
                print(f"{self.path} cannot be locked ({error.strerror}): see that only one job writes there.", file=sys.stderr)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            file.flush()
            yield


def _suffix(restart: int) -> str:
    return f".r{restart}" if restart else ""


def _restart_of(path: Path) -> int:
    """0 for `rank003.jsonl`, 2 for `rank003.r2.jsonl`."""
    middle = path.name.split(".")[1:-1]
    return int(middle[0][1:]) if middle and middle[0][:1] == "r" and middle[0][1:].isdecimal() else 0

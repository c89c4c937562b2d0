"""The run directory: the one place that knows the names of its files (they are documented in docs/run-directory.md).

Files that are written once are written whole: temporary file, flush, fsync, os.replace. Metrics are appended (see `disk`).
A name that this module would not give is the user's own: it is neither read nor removed, whatever it begins with.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from asgd_mpi.errors import RunDirError, tell
from asgd_mpi.record import disk
from asgd_mpi.untrusted import bounded, writers

_OF_RESTART = r"(?:\.r([1-9][0-9]{0,5}))?"
_LOG = re.compile(rf"pushes{_OF_RESTART}\.log")
_CONFIG = re.compile(rf"config{_OF_RESTART}\.yaml")
_METRICS = re.compile(rf"rank([0-9]{{3,7}}){_OF_RESTART}\.jsonl")
_CHECKPOINT = re.compile(rf"v([0-9]{{9,15}}){_OF_RESTART}")
_WRITER = re.compile(rb"process ([1-9][0-9]{0,9}) on ([A-Za-z0-9._-]{1,255}), since ")
_STALL = re.compile(r"([0-9]{9,12})\.txt")
# before the name of a checkpoint that is about to go
REPLACED, REMOVED = ".replaced-", ".removed-"
LEFT_OVER = re.compile(
    r"\.saving[0-9]{6,}(\.r[0-9]+)?|\.best[0-9]{9,}\.[0-9]+\.[0-9]+"
    r"|\.(replaced-|removed-(\.replaced-)?)v[0-9]{9,}(\.r[0-9]+)?"
)


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
        self.lock = self.path / "lock"

    @classmethod
    def create(cls, path: str | Path | None, name: str) -> RunDir:
        """Make a new run directory: `path`, or `runs/<date>_<name>`. Raises RunDirError."""
        try:
            if not path:
                path = _make_unique(f"{time.strftime('%Y-%m-%dT%H%M%S')}_{name}")
            run = cls(Path(path))
            path = run.path
            run.demand_new()
            run.path.mkdir(parents=True, exist_ok=True)
            for directory in (run.metrics, run.checkpoints, run.report):
                disk.make_directory(directory)
        except OSError as error:
            raise RunDirError(
                f"cannot make the run directory {path or error.filename}: {error.strerror}. "
                "Give one that you may write to with --run.dir DIR."
            ) from error
        return run

    def demand_new(self) -> None:
        """Raise RunDirError if a run has begun here."""
        if self.config.exists():
            raise RunDirError(
                f"{self.path} already holds a run (config.yaml): two runs in one directory would mix their records. Go on with "
                "that run by --resume, give another directory with --run.dir DIR, or leave it out for a new one under runs/."
            )

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """Take an existing run directory. Raises RunDirError."""
        run = cls(Path(path))
        # False for whatever the system says of a name; Path.is_dir raises
        if not os.path.isdir(run.path):
            raise RunDirError(
                f"there is no run directory {path}: give one that asgd_mpi.train made."
            )
        if not os.path.isfile(run.config):
            raise RunDirError(
                f"{path} is not a run directory: it has no config.yaml. Give one that a training made, such as runs/NAME."
            )
        return run

    @classmethod
    def open_told(cls, path: str | Path) -> RunDir:
        """Take an existing run directory whose files are to be believed; see `tell_of_writers`. Raises RunDirError."""
        run = cls.open(path)
        run.tell_of_writers()
        return run

    def tell_of_writers(self) -> None:
        """Say on stderr, in one line, if others than this user may change what is read here."""
        if line := writers.told(self.path):
            tell(line, file=sys.stderr)

    def metrics_of(self, rank: int, restart: int = 0) -> Path:
        return self.metrics / f"rank{rank:03d}{_suffix(restart)}.jsonl"

    def pushes_of(self, restart: int) -> Path:
        return self.path / f"pushes{_suffix(restart)}.log"

    def config_of(self, restart: int) -> Path:
        return self.path / f"config{_suffix(restart)}.yaml"

    @property
    def first(self) -> Path:
        """The weights that a loop of the user's began with: they are not a function of the seed."""
        return self.path / "first.pt"

    def versions_of(self, restart: int) -> Path:
        return self.path / f"versions{_suffix(restart)}.json"

    def log_of(self, rank: int) -> Path:
        return self.logs / f"rank{rank:03d}.txt"

    def error_of(self, rank: int) -> Path:
        return self.path / f"error.rank{rank:03d}.txt"

    def checkpoint(self, version: int, restart: int = 0) -> Path:
        return self.checkpoints / f"v{version:09d}{_suffix(restart)}"

    def staging(self, number: int, restart: int = 0) -> Path:
        """Return where a checkpoint is written until it is whole."""
        return self.checkpoints / f".saving{number:06d}{_suffix(restart)}"

    def holds(self, path: Path) -> bool:
        """Return whether a path lies in this directory. Raises RunDirError if a link in it leads there, or elsewhere."""
        root, path = Path(os.path.abspath(self.path)), Path(os.path.abspath(path))
        if not path.is_relative_to(root):
            return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))
        for parent in path.parents[: len(path.relative_to(root).parts) - 1]:
            disk.demand_no_link(parent)
        return True

    def demand_own(self, restart: int, num_ranks: int) -> None:
        """Raise RunDirError if what a start of so many ranks writes is a link, or a directory where nothing may be written."""
        directories = (
            self.metrics,
            self.checkpoints,
            self.report,
            self.logs,
            self.stalls,
            self.tensorboard,
        )
        whole = {
            self.config_of(restart),
            self.versions_of(restart),
            self.finished,
            *(self.report / f"report.{kind}" for kind in ("md", "json", "html")),
        }
        in_place = {self.lock, self.pushes_of(restart)}
        for rank in range(num_ranks):
            in_place |= {self.metrics_of(rank, restart), self.log_of(rank), self.error_of(rank)}
        for directory in (self.path, *directories):
            if directory != self.path:
                disk.demand_no_link(directory)
            for path in disk.entries(directory):
                if (
                    path in whole
                    or path in in_place
                    or directory == self.checkpoints
                    and LEFT_OVER.fullmatch(path.name)
                ):
                    disk.demand_no_link(path)
                if path in in_place:
                    disk.demand_one_name(path)
            disk.demand_writable(directory)

    @property
    def restarts(self) -> list[int]:
        """The restarts that have begun a log, in order; 0 is the first start."""
        return sorted(restart for (restart,) in _numbers(_LOG, self.path, os.path.isfile))

    @property
    def next_restart(self) -> int:
        """The number of a new start: no earlier one has used it for any file, however soon that one ended."""
        begun = [
            *self.restarts,
            *(restart for (restart,) in _numbers(_CONFIG, self.path, os.path.isfile)),
            *(restart for _, restart, _ in self.metrics_files),
        ]
        return max(begun, default=-1) + 1

    def latest(self, path_of: Callable[[int], Path]) -> Path:
        """Return the file of the newest start that has one, of `config_of` or `versions_of`."""
        paths = (path_of(restart) for restart in range(self.next_restart - 1, 0, -1))
        return next((path for path in paths if path.is_file()), path_of(0))

    @property
    def metrics_files(self) -> list[tuple[int, int, Path]]:
        """(rank, restart, file), in order."""
        return sorted(
            (rank, restart, self.metrics_of(rank, restart))
            for rank, restart in _numbers(_METRICS, self.metrics, os.path.isfile)
        )

    @property
    def checkpoints_by_name(self) -> list[Path]:
        """The directories that have the name of a checkpoint, in the order of (restart, version)."""
        found = _numbers(_CHECKPOINT, self.checkpoints, os.path.isdir)
        return [
            self.checkpoint(version, restart)
            for version, restart in sorted(found, key=lambda one: one[::-1])
        ]

    @property
    def stall_requests(self) -> list[str]:
        """The numbers of the stalls that ranks have asked about."""
        return sorted(f"{number}" for (number,) in _numbers(_STALL, self.stalls, os.path.isfile))

    def writer(self) -> tuple[int, str]:
        """Return the process that wrote here last, and its host; (0, "") if the lock does not say."""
        with suppress(OSError):
            found = _WRITER.match(bounded.read_start(self.lock, 400))
            if found:
                return int(found[1]), found[2].decode()
        return 0, ""

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory: a second job that wants to write it is told. Raises RunDirError.

        The lock ends with its process. A file system that knows no locks is told on stderr, and goes without.
        """
        try:
            file = disk.open_own(self.lock, "a+b", buffering=0)
        except OSError as error:
            raise disk.unwritable(self.lock, error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise RunDirError(
                    f"{self.path} is being written by another job ({_said(file.read(200))}): two jobs in one "
                    "run directory would damage it. End that one first, or give another directory with "
                    "--run.dir DIR."
                ) from None
            except OSError as error:
                print(
                    f"{self.path} cannot be locked ({error.strerror}): see that only one job writes there.",
                    file=sys.stderr,
                )
            # on a full disk it is locked all the same, but does not say by whom
            with suppress(OSError):
                file.truncate(0)
                file.write(
                    f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode()
                )
            yield


def _said(content: bytes) -> str:
    return content.decode(errors="backslashreplace").strip() or "it does not say which"


def _suffix(restart: int) -> str:
    return f".r{restart}" if restart else ""


def version_and_restart(name: str) -> tuple[int, int] | None:
    """Return what the name of a checkpoint says; None if it is not one."""
    found = _CHECKPOINT.fullmatch(name)
    return (int(found[1]), int(found[2] or 0)) if found else None


def _numbers(
    name: re.Pattern[str], directory: Path, is_ours: Callable[[Path], bool]
) -> list[tuple[int, ...]]:
    """Return the numbers in every name of `directory` that is wholly of this form, 0 for a part that is left out.

    A symbolic link is the user's own: removing what it leads to, or through it, would be no less wrong than another name.
    """
    try:
        names = sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise RunDirError(f"{directory} cannot be read: {error.strerror}.") from error
    matches = [found for text in names if (found := name.fullmatch(text))]
    return [
        tuple(int(number or 0) for number in found.groups())
        for found in matches
        if is_ours(directory / found.string) and not os.path.islink(directory / found.string)
    ]


def _make_unique(name: str) -> Path:
    """Make `runs/NAME`, or NAME-2, -3 ... if another run has begun in the same second: mkdir decides who was first."""
    path, number = Path("runs") / name, 1
    while True:
        with suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
        number += 1
        path = path.with_name(f"{name}-{number}")

"""What several processes may make at the same time, on any hosts: each makes a directory of its own, and one of them is taken.

In: a place, a path that all of them know. A process fills a directory that nobody else uses, `own(place)`, and renames it to
the place: the first one is taken, at once and whole, the others are told that they were late. No locks, which file systems
of clusters do not all have, and no clocks. A killed process leaves its own directory behind; `sweep` removes those.
"""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

OWN = ".own"
BOOT = Path("/proc/sys/kernel/random/boot_id")
PROCESSES = Path("/proc/self/ns/pid")
# nothing was written for so long: it belongs to nobody, even if its host cannot be asked
FORGOTTEN_S = 3600.0


def own(place: Path) -> Path:
    """Return a path beside `place` that no other process uses, on whichever host; it says whose it is."""
    return place.with_name(f"{place.name}.{whoami()}.{uuid.uuid4().hex[:8]}{OWN}")


def whoami() -> str:
    """Return what names this process among all of all machines."""
    return f"{_machine()}.{os.getpid()}"


def is_alive(process: str) -> bool:
    """Return False if a process, by its `whoami`, is known to have ended; that is not known of other machines'."""
    machine, _, number = process.partition(".")
    return machine != _machine() or not number.isdigit() or _lives(int(number))


@contextmanager
def making(place: Path) -> Iterator[Path]:
    """Make a directory of our own and yield it; afterwards it is gone if it was not taken."""
    mine = own(place)
    mine.mkdir()
    try:
        yield mine
    finally:
        shutil.rmtree(mine, ignore_errors=True)


def take(mine: Path, place: Path) -> bool:
    """Put our directory in its place; return False if another one is there already."""
    try:
        os.rename(mine, place)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    fsync(place.parent)
    return True


def remove(path: Path) -> None:
    """Remove a directory or file, if it is there and nobody else is at it."""
    with suppress(OSError):
        path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)


def put_away(place: Path) -> None:
    """Remove a directory that others may look at: at once from its place, then what is in it."""
    away = own(place)
    with suppress(FileNotFoundError):
        os.rename(place, away)
        remove(away)


def sweep(directory: Path) -> None:
    """Remove what killed processes have left in a directory: of this machine at once, of others when it is an hour old."""
    left = [Path(entry.path) for entry in os.scandir(directory) if entry.name.endswith(OWN)]
    now = _touched(directory) if left else 0.0
    for path in left:
        with suppress(OSError, ValueError):
            if (
                not is_alive(".".join(path.name.split(".")[-4:-2]))
                or now - _changed(path) > FORGOTTEN_S
            ):
                remove(path)


def fsync(path: Path) -> None:
    """Wait until a file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _machine() -> str:
    """Return what tells apart the machines, and the containers in them, whose process ids mean something else."""
    try:
        return BOOT.read_text().strip().replace("-", "") + os.readlink(PROCESSES).strip("pid:[]")
    except OSError:
        return os.uname().nodename.replace(".", "-")


def _lives(process: int) -> bool:
    """Return whether a process of this machine has not ended; one that nobody has waited for has."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def _touched(directory: Path) -> float:
    """Return the time by the clock of the file system."""
    mine = own(directory / "now")
    mine.touch()
    try:
        return _changed(mine)
    finally:
        mine.unlink()


def _changed(path: Path) -> float:
    """Return when something was last written to a file, or into a directory."""
    inside = list(path.iterdir()) if path.is_dir() else []
    return max(one.stat().st_mtime for one in [path, *inside])

"""Shared memory that dead MPI jobs have left on this host: found, and removed.

An MPI library keeps the memory that the ranks of a host share in files of /dev/shm. Ranks whose launcher is killed end within
some 3 s, but nobody removes their files: 16 MB of address space each with Open MPI 5, and the whole ring of snapshots if they
die while the window is made. A file is removed if all of this holds: it has the form of a name that Open MPI or MPICH gives
to such files, it belongs to this user, no process has it open or mapped, and all processes that could are seen from here.
Only the standard library is used, so that a job script can call this wherever Python is.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
PROCESSES = Path("/proc")
# may hide from everybody, and is no rank: one that it were would not hide from its user
INIT = "1"
# the first namespace of processes, PROC_PID_INIT_INO of linux/proc_ns.h
HOSTS_OWN_PIDS = "pid:[4026531836]"
OURS = re.compile(
    # Open MPI 5, 4: between two ranks
    r"(?:sm_segment|vader_segment)\.(?P<host>.+)\.(?P<uid>[0-9]+)\.[0-9a-f]+\.[0-9]+"
    # ... a window, until all have it
    r"|osc_(?:sm|rdma)\..+\.[0-9a-f]+\.[0-9]+\.[0-9]+"
    # MPICH, until all have it
    r"|mpich_shar_tmp[A-Za-z0-9]{6}"
)


@dataclass(frozen=True)
class Segment:
    path: Path
    num_bytes: int  # that it takes, not what it might
    inode: tuple[int, int]  # device and number


def dead(directory: Path = SHARED_MEMORY) -> list[Segment]:
    """Return the segments of this user that no process holds. Empty if that cannot be known from here."""
    found = list(_segments(directory))
    if not found or not _sees_all_processes(directory):
        return []
    held = _held()
    if held is None:
        return []
    return [segment for segment in found if segment.inode not in held]


def remove_dead(directory: Path = SHARED_MEMORY) -> list[Segment]:
    """Remove them; return those that this call has removed."""
    removed = []
    for segment in dead(directory):
        with suppress(OSError):  # another rank was faster
            segment.path.unlink()
            removed.append(segment)
    return removed


def describe(removed: list[Segment]) -> str:
    """Return in words what was removed."""
    return (
        f"{len(removed)} file{'s' * (len(removed) > 1)} of dead MPI jobs of this user removed from {SHARED_MEMORY} "
        f"({sum(segment.num_bytes for segment in removed) / 1e6:.1f} MB)"
    )


def _segments(directory: Path) -> Iterator[Segment]:
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return
    for name in names:
        match = OURS.fullmatch(name)
        if not match or match["uid"] not in (None, str(os.getuid())):
            continue
        with suppress(OSError):
            status = os.lstat(directory / name)
            if stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid():
                yield Segment(
                    directory / name, 512 * status.st_blocks, (status.st_dev, status.st_ino)
                )


def _sees_all_processes(directory: Path) -> bool:
    """Return whether every process that may hold a file there is in /proc.

    A container with processes of its own sees no others; its /dev/shm is its own, too, if its runtime has mounted one (by the
    name of shm), and that of the host if it is handed on (--ipc=host).
    """
    with suppress(OSError):
        if os.readlink(PROCESSES / "self/ns/pid") == HOSTS_OWN_PIDS:
            return True
        mounts = [line.split() for line in (PROCESSES / "self/mounts").read_text().splitlines()]
        return any(mount[0] == "shm" and mount[1] == str(directory) for mount in mounts)
    return False


def _held() -> set[tuple[int, int]] | None:
    """Return device and number of all files that processes have open or mapped; None if one of this user's hides them.

    Files of others are of no interest: a segment can be opened by its user alone. Open files come first: a segment that is
    being made is open before it is mapped.
    """
    held: set[tuple[int, int]] = set()
    for process in PROCESSES.iterdir():
        if not process.name.isdecimal():
            continue
        try:
            for descriptor in os.scandir(process / "fd"):
                with suppress(FileNotFoundError):
                    status = os.stat(descriptor.path)
                    held.add((status.st_dev, status.st_ino))
            for line in (process / "maps").read_bytes().splitlines():
                _, _, _, device, number, *_ = line.split(None, 5)
                major, minor = (int(part, 16) for part in device.split(b":"))
                held.add((os.makedev(major, minor), int(number)))
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        except PermissionError:
            if process.name != INIT and _user_of(process) in (os.getuid(), None):
                return None
    return held


def _user_of(process: Path) -> int | None:
    with suppress(OSError, ValueError, StopIteration):
        lines = (process / "status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Uid:")).split()[1])
    return None

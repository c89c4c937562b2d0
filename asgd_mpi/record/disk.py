"""How files of a run are written: through no link, whole or appended, and what is said when the disk refuses.

What a run writes is a regular file with one name. A symbolic link, or a second hard link, in a directory that came from somewhere
else would have the run write over a file of its user's; a FIFO would have it wait for ever. The run directory itself may be
reached by links: only what lies in it is looked at, before the run (`RunDir.demand_own`), and each file once more as it is
opened (`open_own`).
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import IO, Any

from asgd_mpi.errors import DiskRefuses, RunDirError

REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space (your quota is used up)",
    errno.EROFS: "have the file system made writable (it is mounted read-only)",
    errno.EACCES: "see that you may write there",
    errno.EPERM: "see that you may write there",
}


def unwritable(path: Path, error: OSError) -> DiskRefuses:
    """Return what to say when a file of a run cannot be written."""
    remedy = REMEDIES.get(error.errno or 0, "see what is wrong with that file system")
    return DiskRefuses(
        f"cannot write {path}: {error.strerror or error}. What it is to hold cannot be done without: {remedy}."
    )


def is_of_all(error: OSError) -> bool:
    """Return whether an error is of the disk, which all ranks share: then the first rank speaks for all."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def open_own(
    path: Path,
    mode: str,
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
) -> IO[Any]:
    """Open a file of a run to write it, as `open` does. Raises RunDirError for a link or what is no file, OSError."""
    return open(path, mode, buffering, encoding, errors, opener=_open_own)


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, never a part of it. Raises DiskRefuses."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        # exclusively: what is there by now is not ours
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # of a link the link itself
    except OSError as error:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:  # a file system that has become read-only
            pass
        raise unwritable(path, error) from error


def is_directory(path: Path) -> bool:
    """Return whether there is a directory, and no link to one."""
    return path.is_dir() and not path.is_symlink()


def make_directory(path: Path) -> None:
    """Make a directory of a run, if it is not there. Raises RunDirError for a link, OSError."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        if path.is_symlink():
            raise linked(path) from None
        if not path.is_dir():
            raise


def entries(directory: Path) -> list[Path]:
    """Return what lies in a directory; nothing if it is not there."""
    try:
        return [directory / name for name in sorted(os.listdir(directory))]
    except (FileNotFoundError, NotADirectoryError):
        return []


def demand_no_link(path: Path) -> None:
    """Raise RunDirError if `path` is a symbolic link, wherever it leads."""
    if path.is_symlink():
        raise linked(path)


def demand_one_name(path: Path) -> None:
    """Raise RunDirError if a file that would be written in place has other names."""
    if path.is_file() and path.stat().st_nlink > 1:
        raise linked(path)


def demand_writable(directory: Path) -> None:
    """Raise DiskRefuses if there is a directory, and nothing may be written in it."""
    if directory.is_dir() and not os.access(directory, os.W_OK | os.X_OK):
        is_read_only = os.statvfs(directory).f_flag & os.ST_RDONLY
        code = errno.EROFS if is_read_only else errno.EACCES
        raise unwritable(directory, OSError(code, os.strerror(code)))


def linked(path: Path) -> RunDirError:
    """Return what to say of a link where a run would write."""
    if path.is_symlink():
        what, remedy = f"a symbolic link to {os.readlink(path)}", "Remove the link"
    else:
        what = "a hard link: the same file has another name"
        remedy = f"Give this one a copy of its own (cp {path.name} new && mv new {path.name})"
    return RunDirError(
        f"{path} is {what}. A run writes through no link within its directory, so that one from elsewhere cannot have "
        f"it write over your files. {remedy}; to keep a run on another disk, let --run.dir be there, itself or "
        "by a link."
    )


def free_bytes(path: Path) -> int | None:
    """Return what may still be written on the disk of `path` or of its nearest parent that is there; None if it does not tell."""
    while True:
        try:
            found = os.statvfs(path)
            if found.f_blocks:
                return found.f_bavail * found.f_frsize
            return None
        except FileNotFoundError:
            if path == path.parent:
                return None
            path = path.parent
        except OSError:
            return None


def _open_own(path: str, flags: int) -> int:
    """Open without following a link or waiting for a reader; it is emptied only when it is known to be a file of its own."""
    try:
        descriptor = os.open(path, flags & ~os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and os.path.islink(path):
            raise linked(Path(path)) from None
        raise
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise RunDirError(
                f"{path} is no regular file, so a run does not write to it: remove it."
            )
        if found.st_nlink > 1:
            raise linked(Path(path))
        if flags & os.O_TRUNC:
            os.ftruncate(descriptor, 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor

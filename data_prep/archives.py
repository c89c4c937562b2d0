"""Reads archives in place: where the files of a tar lie, their bytes, and whether an official archive is whole.

In: paths. Out: members as (file, at, bytes, name), payloads by position, md5 sums. An archive is opened once a process and
stays open; listing one reads its headers alone, a KiB each, and seeks over what is between.
"""

import hashlib
import os
import resource
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from asgd_mpi.data.tree import readable
from asgd_mpi.errors import DataError

# A header is 512 bytes, and tarfile reads the byte before it. Python's own buffer is as large as a block of the file system:
# with 4 MiB of Lustre, listing would read the whole archive.
HEADER_BUFFER = 1024
MD5_PIECE = 1 << 24
OPEN_FILES = 2048  # archives that are kept open; webdataset's ImageNet has 1088


class Official(NamedTuple):
    md5: str
    num_bytes: int


# md5: torchvision/datasets/imagenet.py. Sizes: as image-net.org serves them.
OFFICIAL = {
    "ILSVRC2012_img_train.tar": Official("1d675b47d978889d74fa0da5fadfb00e", 147_897_477_120),
    "ILSVRC2012_img_val.tar": Official("29b22e2961454d5413ddabcf34fc5622", 6_744_924_160),
    "ILSVRC2012_devkit_t12.tar.gz": Official("fa75699e90414af021442c21a62c3abf", 2_568_145),
}


class Member(NamedTuple):
    file: str  # the archive
    at: int  # its first byte there
    num_bytes: int
    name: str  # with its directories


def members(archive: Path, begin: int = 0, num_bytes: int | None = None) -> list[Member]:
    """Return each file in a tar, which may lie inside another file; raise DataError if it is no tar or not whole."""
    what = f"{archive}, the archive at byte {begin}," if begin else str(archive)
    with (
        readable(archive),
        open(archive, "rb", buffering=HEADER_BUFFER, opener=_without_readahead) as file,
    ):
        end = begin + num_bytes if num_bytes is not None else os.fstat(file.fileno()).st_size
        file.seek(begin)
        try:
            # its offsets count from the start of `file`
            tar = tarfile.open(fileobj=file, mode="r:")
            found = [
                Member(str(archive), entry.offset_data, entry.size, entry.name)
                for entry in tar
                if entry.isfile()
            ]
            whole = (
                bool(found)
                and found[-1].at + found[-1].num_bytes <= end
                and tar.offset + 512 <= end
            )
        except tarfile.TarError as error:
            raise DataError(
                f"{what} is no tar or is cut off ({error}); get it again{right_size(archive)}"
            ) from error
    if not whole:
        raise DataError(f"{what} is cut off or empty: {len(found)} files, and no end mark in {end - begin} bytes; get it "
                        f"again{right_size(archive)}")  # fmt: skip
    return [member for member in found if member.at < end]


def right_size(archive: Path) -> str:
    """Return, for a message, the size that an archive should have."""
    official = OFFICIAL.get(archive.name)
    return (
        f": the official one has {official.num_bytes:,} bytes"
        if official
        else " and compare its size"
    )


def read_at(file: str, at: int, num_bytes: int) -> bytes:
    """Return bytes of a file that stays open; fewer if it ends before."""
    return os.pread(_descriptor(file), num_bytes, at)


def is_official(archive: Path) -> bool:
    """Return whether an archive has an official one's name and size, so that its md5 sum is known."""
    official = OFFICIAL.get(archive.name)
    return official is not None and archive.stat().st_size == official.num_bytes


def check_md5(archive: Path, count: Callable[[int], None]) -> None:
    """Read a whole archive; raise DataError if its md5 sum is not the published one. `count` is told of bytes."""
    digest = hashlib.md5(usedforsecurity=False)
    with readable(archive), open(archive, "rb", buffering=0) as file:
        while piece := file.read(MD5_PIECE):
            digest.update(piece)
            count(len(piece))
    right = OFFICIAL[archive.name].md5
    if digest.hexdigest() != right:
        raise DataError(f"{archive} has the right size, but its md5 sum is {digest.hexdigest()} and not {right}: it is damaged, and "
                        f"where, nobody can tell; get it again")  # fmt: skip


_open: dict[str, int] = {}  # path -> descriptor; the oldest first


def _descriptor(file: str) -> int:
    if file not in _open:
        if len(_open) >= _room():
            os.close(_open.pop(next(iter(_open))))
        _open[file] = _without_readahead(file, os.O_RDONLY)
    return _open[file]


def _room() -> int:
    """Return how many archives may be open, after asking for as many as we like to have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2 * OPEN_FILES:
        soft = 2 * OPEN_FILES if hard == resource.RLIM_INFINITY else min(2 * OPEN_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, soft // 2)


def _without_readahead(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    return descriptor

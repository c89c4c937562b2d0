"""A file that is read at any place by many threads, and that may be away for a moment.

In: a byte offset and a length. Out: uint8 (n,). A network file system may fail a read, lose a file and find it again, or
show it cut off while it is being copied back: the file is then opened again, after WAITS_S, before the read gives up.
Invariant: `read` returns as many bytes as were asked for, or raises. Whether they are the right ones, checksums say.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from asgd_mpi.errors import DataError

WAITS_S = (0.5, 2.0, 8.0)  # before each new attempt


class RetryingFile:
    """See the module. `on_retry` gets a message each time a read has to be repeated, from any thread."""

    def __init__(self, path: Path, on_retry: Callable[[str], None]):
        self.path = path
        self.on_retry = on_retry
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, at: int, num_bytes: int, what: str) -> np.ndarray:
        """Return the bytes at offset `at`; raise DataError, which says that `what` cannot be read."""
        data = np.empty(num_bytes, dtype=np.uint8)
        trouble = self._try_to_read(data, at)
        for wait_s in WAITS_S:
            if trouble is None:
                return data
            self.on_retry(
                f"{what} of {self.path} cannot be read: {trouble}; trying again in {wait_s:g} s"
            )
            time.sleep(wait_s)
            trouble = self._open_again() or self._try_to_read(data, at)
        if trouble is not None:
            raise DataError(
                f"{what} of shard {self.path} cannot be read: {trouble}, after {1 + len(WAITS_S)} attempts in "
                f"{sum(WAITS_S):g} s; restore the file from a good copy, check its disk, and start the run again"
            )
        return data

    def expect(self, at: int, num_bytes: int) -> None:
        """Tell the system of a read to come, so that the disk fetches it meanwhile."""
        with suppress(OSError):  # no more than a hint; the read itself will say what is wrong
            os.posix_fadvise(self._fd, at, num_bytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        os.close(self._fd)

    def _try_to_read(self, data: np.ndarray, at: int) -> str | None:
        """Fill `data`; return what went wrong, if anything did."""
        try:
            got = os.preadv(self._fd, [data], at)
        except OSError as error:
            return os.strerror(error.errno)
        if got == len(data):
            return None
        return f"it was truncated while in use, {got} of {len(data)} bytes at byte {at}"

    def _open_again(self) -> str | None:
        try:
            fresh = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            return os.strerror(error.errno)
        # at once, so other threads never see a closed file
        os.dup2(fresh, self._fd, inheritable=False)
        os.close(fresh)
        return None

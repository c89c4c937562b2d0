"""The metrics of a rank: events that a run can do without, so that what the disk refuses of them ends nothing.

Lines are collected and written a second later at most. What cannot be written is left out, counted and told once, unless the run
ends of the same disk before; when the disk takes lines again the first is a Note of how many are missing. The last of a disk is left to what a run cannot go on without, the
log of the pushes and the checkpoints: `keep_free` bytes are not written into.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import msgspec

from asgd_mpi.record import disk
from asgd_mpi.record.events import EventLog, Note, sealed

# lines are written so long after the first, or when there are so many
LOOK_S, MANY_BYTES = 1.0, 1 << 16
PATIENCE_S = 10.0  # from the first event that is refused until it is told


def to_all(
    listeners: Sequence[Callable[[msgspec.Struct], None]],
) -> Callable[[msgspec.Struct], None] | None:
    """Return what gives an event to all listeners; None without any."""
    if not listeners:
        return None

    def tell(event: msgspec.Struct) -> None:
        for listener in listeners:
            listener(event)

    return tell


class Metrics(EventLog):
    """Appends events to one file, as far as the disk takes them; from any thread. Raises RunDirError if the file is a link.

    also: gets every event, too. tell: gets the error and one line about it, when the disk refuses events.
    """

    def __init__(
        self,
        path: Path,
        also: Callable[[msgspec.Struct], None] | None = None,
        tell: Callable[[OSError, str], None] = lambda error, text: None,
    ):
        self._path, self.also, self._tell = path, also, tell
        self._encode = msgspec.json.Encoder().encode
        self._lines: list[bytes] = []
        self._num_bytes, self._since, self._lock = 0, 0.0, threading.RLock()
        self.keep_free, self.num_lost = 0, 0
        # events that no Note tells of yet, and when the first was due
        self._unsaid, self._first_lost = 0, 0.0
        self._is_torn = self._has_told = self._is_closed = False
        self._error: OSError | None = None  # the first
        self._out: IO[bytes] | None = None
        try:
            self._out = self._opened()
        except OSError as error:
            self._lose(0, error)

    def write(self, event: msgspec.Struct) -> None:
        with self._lock:
            if self._is_closed:
                raise ValueError(f"{self._path} is closed")
            if not self._lines:
                self._since = time.monotonic()
            self._lines.append(sealed(self._encode(event)) + b"\n")
            self._num_bytes += len(self._lines[-1])
            if self.also:
                self.also(event)
            if self._num_bytes >= MANY_BYTES or time.monotonic() - self._since > LOOK_S:
                self.flush()

    def flush(self) -> None:
        with self._lock:
            lines, self._lines, self._num_bytes = self._lines, [], 0
            if not lines:
                return
            try:
                self._append(self._note() + lines)
            except OSError as error:
                self._lose(len(lines), error)

    def sync(self) -> None:
        """Return when all that the disk takes is on it."""
        with self._lock:
            self.flush()
            if self._out:
                try:
                    os.fsync(self._out.fileno())
                except OSError as error:
                    self._lose(0, error)

    def close(self, tells: bool = True) -> None:
        with self._lock:
            self.flush()
            if self._error and tells:
                self._tell_once()
            if self._out:
                self._out.close()
            self._is_closed = True

    def _note(self) -> list[bytes]:
        """Return the line that tells what is missing before it, if anything is."""
        text = (
            f"{self._unsaid} events of this rank are missing, the first {time.time() - self._first_lost:.0f} s ago: the disk "
            "refused them"
        )
        if self._unsaid:
            return [sealed(self._encode(Note(time.time(), text))) + b"\n"]
        return []

    def _append(self, lines: list[bytes]) -> None:
        """Write lines, as far as there is room. Raises OSError: then none of them counts."""
        if self.keep_free:
            free = disk.free_bytes(self._path.parent)
            if free is not None and free < self.keep_free:
                raise OSError(errno.ENOSPC, "the space that is left is kept for checkpoints")
        if self._out is None:
            self._out = self._opened()
        content = b"".join(lines)
        if self._is_torn:
            content = b"\n" + content
        written = 0
        while written < len(content):
            written += self._out.write(content[written:])
            self._is_torn = content[written - 1 : written] != b"\n"
        self._unsaid = 0

    def _opened(self) -> IO[bytes]:
        disk.make_directory(self._path.parent)
        return disk.open_own(self._path, "ab", buffering=0)

    def _lose(self, count: int, error: OSError) -> None:
        if not self._unsaid:
            self._first_lost = time.time()
        self._error = self._error or error
        self.num_lost += count
        self._unsaid += count
        if time.time() - self._first_lost >= PATIENCE_S:
            self._tell_once()

    def _tell_once(self) -> None:
        if self._error and not self._has_told:
            self._has_told = True
            self._tell(
                self._error,
                f"cannot write {self._path}: {self._error.strerror}. The training goes on without {self.num_lost} events "
                "so far; a Note there counts what is missing, if it can be written again",
            )

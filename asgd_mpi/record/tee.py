"""What a rank prints, kept in a file of its own: `log/rank003.txt` in the run directory.

Everything still goes where it went (the terminal, the job's log). Both get whole lines only, each in one write, so that the
lines of many ranks do not mix; in the file every line has its time. A progress bar leaves its last state there. A run goes on
without these files, where the disk refuses them: all of it is printed, too.

What ended a rank is written once more, alone: `error.rank003.txt`, its first line the error in short.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, TextIO

from asgd_mpi.errors import printable
from asgd_mpi.process import ending
from asgd_mpi.record.disk import make_directory, open_own

SHORT = 2000  # characters of an error in short


def keep(path: Path, who: str) -> str:
    """From now on, keep what this process prints in `path`, after a line that says who it is.

    Returns why it is not kept, empty if it is. Raises RunDirError if the file is a link.
    """
    try:
        make_directory(path.parent)
        # written line by line; appended to after a restart
        file = open_own(path, "a", buffering=1, encoding="utf-8")
        file.write(f"{_now()} --- {who}, process {os.getpid()}{_job(os.environ)}\n")
    except OSError as error:
        return f"{path}: {error.strerror}"
    sys.stdout, sys.stderr = Lines(sys.stdout, file), Lines(sys.stderr, file)
    return ""


def write_error(path: Path, short: str, text: str) -> None:
    """Write what ended a rank; `text` holds all of it. Raises RunDirError if the file is a link, OSError."""
    with open_own(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{' '.join(short.split())[:SHORT]}\n\n{text}\n")


def read_error(path: Path) -> str:
    """Return what ended a rank in short, one line; empty if the disk refused it, or its file is not there."""
    try:
        with open(path, encoding="utf-8", errors="backslashreplace") as file:
            return printable(file.readline(SHORT).strip())
    except OSError:
        return ""


class Lines:
    """A text stream that passes whole lines on to `stream`, and to `file` with the time.

    A terminal gets everything at once.
    """

    def __init__(self, stream: TextIO, file: IO[str]):
        self._stream, self._file = stream, file
        self._at_once = stream.isatty()
        self._unfinished = ""
        self._lock = threading.Lock()

    def write(self, text: str) -> int:
        with self._lock:
            if self._at_once:
                self._pass_on(text)
            self._unfinished += text
            if text.endswith("\n"):  # a text of several lines stays together
                lines, self._unfinished = self._unfinished, ""
                if not self._at_once:
                    self._pass_on(lines)
                now = _now()
                # a full disk: what is printed still goes where it went
                with suppress(OSError):
                    self._file.write(
                        "".join(
                            f"{now} {line.rpartition(chr(13))[2]}\n"
                            for line in lines[:-1].split("\n")
                        )
                    )
        return len(text)

    def flush(self) -> None:
        self._pass_on("")

    def _pass_on(self, text: str) -> None:
        # a training does not end because its terminal has gone
        with suppress(OSError, ending.OutputRefused, ending.ReaderLeft):
            self._stream.write(text)
            self._stream.flush()

    def __getattr__(self, name: str) -> object:  # isatty, fileno, encoding, ...
        return getattr(self._stream, name)


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _job(environment: Mapping[str, str]) -> str:
    job = environment.get("SLURM_JOB_ID")
    if job:
        return f", job {job}, start {1 + int(environment.get('SLURM_RESTART_COUNT', 0))}"
    return ""

"""What a rank prints, kept in a file of its own: `log/rank003.txt` in the run directory.

Everything still goes where it went (the terminal, the job's log). Both get whole lines only, each in one write, so that the
lines of many ranks do not mix; in the file every line has its time. A progress bar leaves its last state there.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from asgd_mpi import ending
from asgd_mpi.record.rundir import unwritable


def keep(path: Path, who: str) -> None:
    """From now on, keep what this process prints in `path`, after a line that says who it is. Raises RunDirError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a", buffering=1, encoding="utf-8")     # written line by line; appended to after a restart
    except OSError as error:
        raise unwritable(path, error) from error
    file.write(f"{_now()} --- {who}, process {os.getpid()}{_job(os.environ)}\n")
    sys.stdout, sys.stderr = Lines(sys.stdout, file), Lines(sys.stderr, file)


class Lines:
    """A text stream that passes whole lines on to `stream`, and to `file` with the time.

    A terminal gets everything at once.
    """

    def __init__(self, stream: TextIO, file: TextIO):
        self._stream, self._file = stream, file
        self._at_once = stream.isatty()
        self._unfinished = ""
        self._lock = threading.Lock()

    def write(self, text: str) -> int:
        with self._lock:
            if self._at_once:
                self._pass_on(text)
            self._unfinished += text
            if text.endswith("\n"):                 # a text of several lines stays together
                lines, self._unfinished = self._unfinished, ""
                if not self._at_once:
                    self._pass_on(lines)
                now = _now()
                with suppress(OSError):             # a full disk: what is printed still goes where it went
                    self._file.write("".join(f"{now} {line.rpartition(chr(13))[2]}\n" for line in lines[:-1].split("\n")))
        return len(text)

    def flush(self) -> None:
        self._pass_on("")

    def _pass_on(self, text: str) -> None:
        with suppress(OSError, ending.OutputRefused, ending.ReaderLeft):      # a training does not end because its terminal has gone
            self._stream.write(text)
            self._stream.flush()

    def __getattr__(self, name: str) -> object:     # isatty, fileno, encoding, ...
        return getattr(self._stream, name)


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _job(environment: Mapping[str, str]) -> str:
    job = environment.get("SLURM_JOB_ID")
    return f", job {job}, start {1 + int(environment.get('SLURM_RESTART_COUNT', 0))}" if job else ""

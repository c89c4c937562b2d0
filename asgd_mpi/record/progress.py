"""The live line: images/s, loss, error, staleness, time left. A bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

FIRST_LINE_S, LONGEST_S = 5.0, 60.0   # between plain lines: 5 s, then ever longer up to a minute
REMEMBER = 0.05                       # weight of the newest push in the running means of loss and staleness


def terminal_is_attached() -> bool:
    """Whether a person is looking: under mpirun a rank writes into a pipe, and the launcher holds the terminal."""
    if sys.stderr.isatty():
        return True
    try:
        return str(Path(f"/proc/{os.getppid()}/fd/2").readlink()).startswith(("/dev/pts", "/dev/tty"))
    except OSError:
        return False


class Progress:
    """style: bar | lines | none | auto; `total` images, an epoch has `epoch_images`, `done` before this start."""

    def __init__(self, style: str, total: int, epoch_images: int, done: int = 0):
        if style == "auto":
            style = "bar" if terminal_is_attached() else "lines"
        self._bar = tqdm(total=total, initial=done, unit=" images", unit_scale=True, dynamic_ncols=True, mininterval=0.2,
                         file=sys.stderr if style == "bar" else open(os.devnull, "w"), disable=style == "none")
        self._lines = style == "lines"
        self._epoch_images = epoch_images
        self._loss: float | None = None
        self._staleness = 0.0
        self._error = ""
        self._next_line, self._pause = time.monotonic() + FIRST_LINE_S, FIRST_LINE_S

    def push(self, images: int, loss: float, staleness: int) -> None:
        """One applied push."""
        if self._loss is None:
            self._loss, self._staleness = loss, staleness
        self._loss += REMEMBER * (loss - self._loss)
        self._staleness += REMEMBER * (staleness - self._staleness)
        self._bar.set_postfix_str(self._state(), refresh=False)
        self._bar.update(images)
        if self._lines and time.monotonic() >= self._next_line:
            self._line()

    def validated(self, top1_error: float, epoch: float) -> None:
        """The score of a version has arrived, which had been made at `epoch`."""
        self._error = f", accuracy {100 * (1 - top1_error):.2f} % at epoch {epoch:.1f}"

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        self._bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        if self._lines:
            self._line()
        self._bar.close()

    def _state(self) -> str:
        epoch = self._bar.n / self._epoch_images
        loss = "" if self._loss is None else f", loss {self._loss:.3f}"
        return f"epoch {epoch:.1f}{loss}{self._error}, staleness {self._staleness:.1f}"

    def _line(self) -> None:
        rate = self._bar.format_dict["rate"] or (
            self._bar.n - self._bar.initial) / max(1e-9, self._bar.format_dict["elapsed"])
        left = tqdm.format_interval((self._bar.total - self._bar.n) / rate) if rate else "?"
        print(f"{self._bar.n / self._bar.total:4.0%} {rate:8.0f} images/s, {self._state()}, {left} left", flush=True)
        self._pause = min(LONGEST_S, 1.5 * self._pause)
        self._next_line = time.monotonic() + self._pause

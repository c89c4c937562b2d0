"""How far a task is: a bar where this process writes to a terminal itself, elsewhere whole lines every few seconds.

Under mpirun a rank writes into a pipe, and whole lines are all that a launcher passes on: carriage returns would arrive together at
the end, and stay in log files.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO, TypeVar

from tqdm import tqdm

# seconds between two lines: so many while somebody watches, else ever longer
LINE_S, LONGEST_S, LONGER = 5.0, 60.0, 1.5
# weight of the newest push in the running mean of the loss
REMEMBER = 0.05

Item = TypeVar("Item")


def is_watched() -> bool:
    """Return whether the launcher of this process writes to a terminal."""
    try:
        return str(Path(f"/proc/{os.getppid()}/fd/2").readlink()).startswith(
            ("/dev/pts", "/dev/tty")
        )
    except OSError:
        return False


def duration(seconds: float) -> str:
    """Return a time that is left, in two units at most: `12 s`, `3 min 05 s`, `1 h 05 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    if minutes:
        return f"{minutes} min {rest:02d} s"
    return f"{rest} s"


class Counter:
    """Counts what is done of `total`; style: bar | lines | none | auto, a bar if `file` (standard error) is a terminal.

    A task that is done before the first line is due prints none.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        label: str = "",
        style: str = "auto",
        done: int = 0,
        file: TextIO | None = None,
    ):
        self.n, self.total, self._unit, self._label = done, total, unit, label
        self.file = file or sys.stderr
        if style == "auto":
            style = "bar" if sys.stderr.isatty() else "lines"
        self.style, self.state = style, ""
        self._bar = None
        if style == "bar":
            self._bar = tqdm(
                total=total,
                initial=done,
                desc=label or None,
                unit=f" {unit}",
                unit_scale=True,
                dynamic_ncols=True,
                mininterval=0.2,
            )
        self._began = self._last = (time.monotonic(), done)
        self._grows = not is_watched()
        self._pause, self._next = LINE_S, self._began[0] + LINE_S

    def update(self, number: int = 1) -> None:
        self.n += number
        if self._bar is not None:
            self._bar.set_postfix_str(self.state, refresh=False)
            self._bar.update(number)
        elif self.style == "lines" and time.monotonic() >= self._next:
            self.line()

    def line(self) -> None:
        """Print a line now; its rate is that since the last one."""
        now = time.monotonic()
        rate = (self.n - self._last[1]) / max(1e-9, now - self._last[0])
        mean = (self.n - self._began[1]) / max(1e-9, now - self._began[0])
        share = self.n / self.total if self.total else 1.0
        left = ""
        if mean and self.n < self.total:
            left = f", {duration((self.total - self.n) / mean)} left"
        state = f", {self.state}" if self.state else ""
        name = f"{self._label} " if self._label else ""
        print(
            f"{name}{share:4.0%} {rate:7,.0f} {self._unit}/s{state}{left}",
            file=self.file,
            flush=True,
        )
        self._last = now, self.n
        if self._grows:
            self._pause = min(LONGEST_S, LONGER * self._pause)
        else:
            self._pause = LINE_S
        self._next = now + self._pause

    def say(self, text: str, file: TextIO | None = None) -> None:
        """Print a line of its own, above the bar."""
        file = file or sys.stderr
        if self._bar is not None:
            self._bar.write(text, file=file)
        else:
            print(text, file=file)
        file.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items, and count each when it is done."""
        with self:
            for item in items:
                yield item
                self.update()

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Progress:
    """A training: `total` samples, an epoch has `epoch_samples`, `done` before this start; lines go to standard output."""

    def __init__(
        self, style: str, total: int, epoch_samples: int, done: int = 0, unit: str = "images"
    ):
        self._counter = Counter(total, unit, style=style, done=done, file=sys.stdout)
        self._epoch_samples = epoch_samples
        self._loss: float | None = None
        self._score = ""

    def push(self, samples: int, loss: float) -> None:
        """Count one applied push."""
        if self._loss is None:
            self._loss = loss
        self._loss += REMEMBER * (loss - self._loss)
        epoch = (self._counter.n + samples) / self._epoch_samples
        self._counter.state = f"epoch {epoch:.1f}, loss {self._loss:.3f}{self._score}"
        self._counter.update(samples)

    def validated(self, result: str) -> None:
        """Show what the newest version that was validated scores, in words."""
        self._score = f", {result}"

    def say(self, text: str) -> None:
        """Print a line of its own, above the bar."""
        self._counter.say(text, sys.stdout)

    def close(self) -> None:
        if self._counter.style == "lines":
            self._counter.line()
        self._counter.close()

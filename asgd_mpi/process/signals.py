"""Signals that ask a run to end: the first lets it finish its step and write a checkpoint, a second ends it at once.

Installed before anything heavy is imported: a scheduler may send one while the ranks still start.
"""

from __future__ import annotations

import os
import signal
import time

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
SAME_S = 2.0  # a launcher and a scheduler may both deliver one and the same request

_name, _first = "", 0.0


def install() -> None:
    for number in HANDLED:
        signal.signal(number, _note)


def ignore() -> None:
    """From now on a signal must not spoil the status of a run that is over."""
    for number in HANDLED:
        signal.signal(number, signal.SIG_IGN)


def asked_to_leave() -> str:
    """Why the run is to end, or nothing."""
    return f"asked to end by {_name}" if _name else ""


def _note(number: int, _frame: object) -> None:
    global _name, _first
    if not _name:
        _name, _first = signal.Signals(number).name, time.monotonic()
    elif time.monotonic() - _first > SAME_S:
        # a checkpoint that is being written has not its name yet: the last one stays whole
        os._exit(128 + number)

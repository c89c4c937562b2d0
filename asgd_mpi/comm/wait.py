"""Every wait has a limit, and says who waited for whom.

Polling is also progress: an MPI library moves data only while somebody is inside it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from asgd_mpi.errors import DeadlineExceeded

T = TypeVar("T")

SPINS = 50  # polls without a pause: what arrives within microseconds is met at once
SHARE = 0.05  # then a pause of this share of the time waited so far,
LONGEST_S = 0.001  # and at most this: a waiting rank leaves its core to those who compute,
LOOKS = 20  # at a beat, within the time that it may stand still
BUSY_S = 0.00005  # ... unless data may be moving between hosts, a piece at every poll


@dataclass(frozen=True)
class Waiting:
    """What this process waits for, and since when (time.monotonic)."""

    what: str
    since: float


now: Waiting | None = None  # for the watchdog


def until(
    poll: Callable[[], T | None],
    timeout_s: float,
    who_waits_for_what: str,
    longest_s: float = LONGEST_S,
    beat: Callable[[], int] | None = None,
    meanwhile: Callable[[], object] | None = None,
) -> T:
    """Call `poll` until it returns something that is true, and return that; pause for `longest_s` at most.

    Raises DeadlineExceeded after `timeout_s` seconds. beat: a number that changes for as long as the one who is waited for
    lives; the seconds then count from its last change, so a wait that was ordered may last as long as the run.
    meanwhile: what to do each time that nothing has come; it may raise.
    """
    global now
    result = poll()
    if result:
        return result
    now = Waiting(who_waits_for_what, time.monotonic())
    if beat is None:
        result = for_a_while(poll, timeout_s, longest_s, meanwhile)
    else:
        result = _while_it_lives(poll, timeout_s, longest_s, beat, meanwhile)
    now = None
    if not result:
        nothing = "nothing came" if beat is None else "no sign of life came"
        raise DeadlineExceeded(
            f"{who_waits_for_what}: {nothing} within {timeout_s:g} s (--run.timeout_s). A rank that is "
            "named may be stuck or dead, or its step may take longer than the limit: see its metrics file, "
            "and raise the limit if it was only slow."
        )
    return result


def _while_it_lives(
    poll: Callable[[], T | None],
    timeout_s: float,
    longest_s: float,
    beat: Callable[[], int],
    meanwhile: Callable[[], object] | None,
) -> T | None:
    """Like `for_a_while`, but gives up only when `beat` has stood still for `timeout_s` seconds."""
    seen, since = beat(), time.monotonic()
    while not (result := for_a_while(poll, timeout_s / LOOKS, longest_s, meanwhile)):
        latest = beat()
        if latest != seen:
            seen, since = latest, time.monotonic()
        elif time.monotonic() - since > timeout_s:
            break
    return result


def for_a_while(
    poll: Callable[[], T | None],
    seconds: float,
    longest_s: float = LONGEST_S,
    meanwhile: Callable[[], object] | None = None,
) -> T | None:
    """Like `until`, but returns what `poll` returned last when the time is over."""
    started = time.monotonic()
    polls = 0
    while not (result := poll()):
        if meanwhile:
            meanwhile()
        polls += 1
        if polls > SPINS:
            waited = time.monotonic() - started
            if waited > seconds:
                break
            time.sleep(min(longest_s, SHARE * waited))
    return result


@contextmanager
def at_most(limit_s: float, message: str, status: int = 2) -> Iterator[None]:
    """Within, the MPI library may block: after `limit_s` seconds print `message`, and end this process with `status`.

    For the few calls that wait for other ranks and cannot be polled; they must leave the interpreter free, as mpi4py's
    collectives do.
    """
    is_over = threading.Event()

    def watch() -> None:
        if not is_over.wait(limit_s):
            print(message, file=sys.stderr, flush=True)
            os._exit(status)

    threading.Thread(target=watch, name="limit", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()

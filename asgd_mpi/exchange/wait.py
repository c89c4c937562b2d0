"""Every wait has a limit, and says who waited for whom.

Polling is also progress: an MPI library moves data only while somebody is inside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from asgd_mpi.errors import DeadlineExceeded

T = TypeVar("T")

SPINS = 50           # polls without a pause: what arrives within microseconds is met at once
SHARE = 0.05         # then a pause of this share of the time waited so far,
LONGEST_S = 0.001    # and at most this: a waiting rank leaves its core to those who compute,
BUSY_S = 0.00005     # ... unless data may be moving between hosts, a piece at every poll


@dataclass(frozen=True)
class Waiting:
    """What this process waits for, and since when (time.monotonic)."""

    what: str
    since: float


now: Waiting | None = None   # for the watchdog


def until(poll: Callable[[], T | None], timeout_s: float, who_waits_for_what: str, longest_s: float = LONGEST_S) -> T:
    """Call `poll` until it returns something that is true, and return that; pause for `longest_s` at most.

    Raises DeadlineExceeded after `timeout_s` seconds.
    """
    global now
    result = poll()
    if result:
        return result
    now = Waiting(who_waits_for_what, time.monotonic())
    result = for_a_while(poll, timeout_s, longest_s)
    now = None
    if not result:
        raise DeadlineExceeded(
            f"{who_waits_for_what}: nothing came within {timeout_s:g} s (--run.timeout_s). A rank that is "
            "named may be stuck or dead, or its step may take longer than the limit: see its metrics file, "
            "and raise the limit if it was only slow.")
    return result


def for_a_while(poll: Callable[[], T | None], seconds: float, longest_s: float = LONGEST_S) -> T | None:
    """Like `until`, but returns what `poll` returned last when the time is over."""
    started = time.monotonic()
    polls = 0
    while not (result := poll()):
        polls += 1
        if polls > SPINS:
            waited = time.monotonic() - started
            if waited > seconds:
                break
            time.sleep(min(longest_s, SHARE * waited))
    return result

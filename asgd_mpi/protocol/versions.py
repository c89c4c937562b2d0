"""How many samples had made a version, and when it was published: what the score of a validation is told with.

A validation takes a while, and other workers push meanwhile: when its score arrives the run is further than the version
validated, by more with more workers. Pure: no clock, no MPI.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from asgd_mpi.protocol.ledger import Ledger, LedgerError

LOOK = 1024  # versions, between two looks at which of them are still validated


class Made(NamedTuple):
    samples: int  # applied up to this version, over all starts
    # when it was published; of the version that a start goes on from: when the start began
    t: float


class Versions:
    """The versions that a validation under way may be of, from `ledger`'s present one on; `t`: see Made."""

    def __init__(self, ledger: Ledger, t: float):
        self._ledger = ledger
        self._first = ledger.version
        self._made = deque([Made(ledger.samples, t)])

    def add(self, positions: int, t: float) -> None:
        """Note the next version, which a push of so many samples has made."""
        self._made.append(Made(self._made[-1].samples + positions, t))
        if len(self._made) % LOOK == 0:
            while self._first < min(
                self._ledger.oldest_validated, self._first + len(self._made) - 1
            ):
                self._made.popleft()
                self._first += 1

    def of(self, version: int) -> Made:
        """Raises LedgerError if no validation can be of that version."""
        if not self._first <= version < self._first + len(self._made):
            raise LedgerError(
                f"a validation of version {version}: those that may be validated now are {self._first} to "
                f"{self._first + len(self._made) - 1}"
            )
        return self._made[version - self._first]

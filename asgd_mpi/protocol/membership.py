"""Packets that are not applied: what follows for them and for their senders is decided and worded here. Pure.

A run's server and the simulation ask here, and do what the answer says: write the refusal down, let the worker begin anew,
retire it.

    from a worker that is retired      refused; unless that is for good it is a member again, and begins anew
    not finite                         refused, its range is lent again; the third in a row retires its sender for good
    too late for the rule              refused, its range is lent again
    left, since it could not count     refused, its range is lent again
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from asgd_mpi.protocol.ledger import Ledger
from asgd_mpi.protocol.messages import Header, Kind, Verdict

GIVEN_UP = "left unfinished: the step was made without it"
GONE = "its process has ended"


@dataclass(frozen=True)
class Refused:
    """A packet that is not applied."""

    reason: str
    is_finite: bool = True
    # samples that are left out of the epoch, since their gradient was never finite
    given_up: int = 0
    # its sender is a member again, after it was retired
    is_back: bool = False
    # its sender forgets what it keeps, so that the log says so, too
    begins_anew: bool = False
    # why its sender is retired for good, if it is
    retires: str = ""


class Membership:
    """Ask the ledger, and say what follows. moves: workers move weights of their own, which a bad gradient spoils."""

    def __init__(self, ledger: Ledger, moves: bool):
        self._ledger, self._moves = ledger, moves

    def gradient(self, header: Header, now: float = 0.0) -> Verdict | Refused:
        """Judge a gradient, finite or not, which came `now`. Raises LedgerError if it cannot be one of this run's."""
        if header.worker not in self._ledger.members:
            return self.stray(header)
        if header.kind == Kind.NONFINITE or not math.isfinite(header.loss):
            return self._not_finite(header)
        verdict = self._ledger.judge(header, now)
        if verdict.dropped:
            return Refused(f"too late: {verdict.staleness} versions stale")
        return verdict

    def stray(self, header: Header) -> Refused:
        """Drop a packet that was on its way when its worker was retired. Raises LedgerError."""
        is_back = self._ledger.readmit(header)
        return Refused("it came from a retired worker", is_back=is_back, begins_anew=is_back)

    def left(self, header: Header) -> Refused:
        """Take a range back that a worker has left unfinished. Raises LedgerError."""
        self._ledger.give_back(header)
        return Refused(GIVEN_UP)

    def _not_finite(self, header: Header) -> Refused:
        given_up = sum(segment.stop - segment.start for segment in self._ledger.refuse(header))
        retires = ""
        if header.worker not in self._ledger.members:
            retires = (
                f"{self._ledger.plan.max_nonfinite} gradients in a row were not finite "
                f"(the last loss: {header.loss})"
            )
        reason = f"not finite: loss {header.loss}"
        return Refused(reason, False, given_up=given_up, begins_anew=self._moves, retires=retires)


def told_of_back(rank: int) -> str:
    """Say that a rank that was retired works again."""
    return f"rank {rank} is back, and begins again"


def told_of_loss(rank: int, version: int, held: int, reason: str) -> str:
    """Say that a rank is retired; held: samples."""
    return f"rank {rank} is retired at version {version}, the {held} samples that it held go back: {reason}"

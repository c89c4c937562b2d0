"""Who may go on, and which gradients make a step together: the part of the ledger that rules differ in. Pure.

Nobody waits for a worker that has nothing to train: one that is retired, idle, or validating. So no rule can wait for
ever, whoever dies or finishes early.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Pacing:
    """What a rule asks for."""

    # gradients that a step is the mean of; 0: one of each active worker, a round
    mean_of: int = 1
    # active workers that a round does not wait for; what they bring later is dropped
    backup: int = 0
    slack: float = math.inf  # steps that a worker may be ahead of the slowest active one
    max_staleness: float = math.inf  # gradients of this staleness or more are dropped

    @property
    def may_drop(self) -> bool:
        return not self.mean_of or math.isfinite(self.max_staleness)

    def staleness(self, version: int, read_version: int) -> int:
        """Return the staleness of a gradient, in steps of the weights; a version counts gradients."""
        if self.mean_of:
            return version // self.mean_of - read_version // self.mean_of
        return 0


class StepBarrier:
    """`held`: the workers that are to wait. `gathered`: gradients that wait for their step."""

    def __init__(self, pacing: Pacing, num_workers: int, version: int = 0, gathered: int = 0):
        self.pacing = pacing
        self.gathered = gathered
        self.held: set[int] = set()
        self._began = version  # the version that the round began with
        self._delivered: set[int] = set()  # in this round
        self._clocks = [0] * num_workers  # steps done
        self._active: set[int] = set()

    @property
    def is_free(self) -> bool:
        """Return whether nobody ever waits."""
        return bool(self.pacing.mean_of) and math.isinf(self.pacing.slack)

    @property
    def oldest(self) -> int:
        """The oldest version whose gradients a round still counts; of other rules every one, for as long as they say."""
        return 0 if self.pacing.mean_of else self._began

    def is_late(self, version: int, read_version: int) -> bool:
        """Return whether a gradient is to be dropped."""
        return version - read_version >= self.pacing.max_staleness or read_version < self.oldest

    def take(
        self, worker: int, version: int, active: Callable[[], Iterable[int]], is_last: bool
    ) -> int:
        """Count a gradient, which made `version`; how many a step is made of now, 0 if it waits for more."""
        self.gathered += 1
        self.pass_(worker)
        if not self.pacing.mean_of:
            due = self._round_is_complete(set(active()))
        else:
            # more of them, if a run goes on with fewer workers
            due = self.gathered >= self.pacing.mean_of
        if not due and not is_last:
            return 0
        gathered, self.gathered = self.gathered, 0
        self._delivered.clear()
        self._began = version
        return gathered

    def pass_(self, worker: int) -> None:
        """A worker has done its step, with or without a gradient that counts."""
        self._clocks[worker] += 1
        self._delivered.add(worker)

    def forget(self, worker: int) -> None:
        self._delivered.discard(worker)

    def update(self, active: Iterable[int]) -> set[int]:
        """Look who is active now; returns whose hold has changed.

        A round that is complete since a worker was lost begins again, on the same weights: its gradients count in the next.
        """
        active = set(active)
        # it does not have to make up for steps that it had no work for
        for worker in active - self._active:
            others = [self._clocks[other] for other in active & self._active]
            self._clocks[worker] = max([self._clocks[worker], *([min(others)] if others else [])])
        self._active = active
        if self._delivered and self._round_is_complete(active):
            self._delivered.clear()
        slowest = min((self._clocks[worker] for worker in active), default=0)
        held = {
            worker
            for worker, clock in enumerate(self._clocks)
            if active
            and clock - slowest > self.pacing.slack
            or not self.pacing.mean_of
            and worker in self._delivered
        }
        changed, self.held = held ^ self.held, held
        return changed

    def _round_is_complete(self, active: set[int]) -> bool:
        return len(active - self._delivered) <= self.pacing.backup

"""Whether the pushes of a run were applied exactly once, in one order, and used every sample exactly once.

In: the `Push` records of `pushes.log`, in their order. Out: an `Audit`. Memory grows with the epochs, not the pushes.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable

import msgspec

from asgd_mpi.record.events import Push


class EpochAudit(msgspec.Struct):
    epoch: int
    covered: int  # positions of the epoch's order used at least once
    repeated: int  # uses beyond the first
    # positions never used, of those to be used or else below the largest seen
    missing: int


class Audit(msgspec.Struct):
    """Whether every push was applied exactly once, in one order, and the staleness identity.

    With N workers and T versions, a worker's pushes and reads cut the versions 0..T-1 into pieces, so that
    age_applied + age_between + age_at_end = N T. The sum always comes out; the content is in the signs of its pieces:
    a negative one is a push applied before its read, or a read older than what the reader's own push had made.
    """

    num_workers: int
    num_pushes: int
    num_versions: int  # T: the last version made
    versions_repeated: int
    versions_missing: int
    age_applied: int  # sum over pushes of staleness + 1
    # versions that passed between a worker's push (or 0) and its next read
    age_between: int
    # versions made after a worker's last push, summed over the workers
    age_at_end: int
    epochs: list[EpochAudit]
    violations: list[str]


class _Coverage:
    """A set of integers as disjoint sorted ranges: a run that is nearly in order needs only a few."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        self.repeated = 0

    def add(self, start: int, stop: int) -> None:
        if start >= stop:
            return
        # the ranges that it touches
        low, high = bisect_left(self._stops, start), bisect_right(self._starts, stop)
        self.repeated += sum(
            max(0, min(stop, self._stops[i]) - max(start, self._starts[i]))
            for i in range(low, high)
        )
        self._starts[low:high] = [min([start, *self._starts[low:high]])]
        self._stops[low:high] = [max([stop, *self._stops[low:high]])]

    @property
    def covered(self) -> int:
        return sum(self._stops) - sum(self._starts)

    @property
    def end(self) -> int:
        return self._stops[-1] if self._stops else 0


def audit(
    pushes: Iterable[Push],
    num_samples: int = 0,
    total_samples: int = 0,
    num_workers: int = 0,
    reads_own_pushes: bool = True,
) -> Audit:
    """Check that every push was applied exactly once, in one order, and count how often each sample was used.

    Missing samples are counted but are no violation: they may have been lent, not yet applied, when the record ends.
    `num_samples` is the length of an epoch and `total_samples` that of the run (0: the largest position seen in each
    epoch); `num_workers` counts those that never pushed, too (0: up to the largest seen).
    """
    versions = _Coverage()
    epochs: dict[int, _Coverage] = defaultdict(_Coverage)
    # worker -> the version its last push made: what it cannot read behind
    held: dict[int, int] = {}
    # claim -> [pushes, version of the latest]
    broken: dict[str, list[int]] = defaultdict(lambda: [0, -1])
    num_pushes = age_applied = age_between = 0
    for push in pushes:
        num_pushes += 1
        gap = push.read_version - held.get(push.worker, 0)
        for claim, is_broken in (
            ("out of order: the same or a later version came before", push.version < versions.end),
            ("with a negative staleness: read after it was applied", push.staleness < 0),
            (
                "computed on a snapshot older than the worker's own previous push",
                reads_own_pushes and gap < 0,
            ),
        ):
            if is_broken:
                broken[claim] = [broken[claim][0] + 1, push.version]
        age_applied += push.staleness + 1
        age_between += gap
        held[push.worker] = push.version + 1
        versions.add(push.version, push.version + 1)
        for epoch, start, stop in push.segments:
            epochs[epoch].add(start, stop)

    def due(epoch: int) -> int:
        return min(num_samples, max(0, total_samples - epoch * num_samples))

    workers = max(num_workers, max(held, default=-1) + 1)
    violations = [
        f"{count} push{'es' * (count > 1)} {claim} (the latest at version {version})"
        for claim, (count, version) in broken.items()
    ]
    missing = versions.end - versions.covered
    if missing:
        violations.append(f"{missing} of the versions 0 to {versions.end - 1} missing")
    counts = [
        EpochAudit(epoch, seen.covered, seen.repeated, max(due(epoch), seen.end) - seen.covered)
        for epoch, seen in sorted(epochs.items())
    ]
    violations += [
        f"epoch {epoch.epoch}: {epoch.repeated} samples repeated"
        for epoch in counts
        if epoch.repeated
    ]
    return Audit(
        workers,
        num_pushes,
        versions.end,
        versions.repeated,
        missing,
        age_applied,
        age_between,
        workers * versions.end - sum(held.values()),
        counts,
        violations,
    )

"""Whether asynchronous training is worth it here: one sentence with its numbers, from runs side by side. Pure.

What counts is the time to an accuracy that is no worse than what one worker or synchronous training reach. Runs with the
same settings and other seeds count as their median. A difference below GAIN is taken for chance.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from asgd_mpi.report.measure import ACCURACY, Measure
from asgd_mpi.report.units import count, seconds

if TYPE_CHECKING:
    from asgd_mpi.report.compare import Entry

SYNC = "sync"  # the rule that waits for all workers
ASYNCHRONOUS = "with several asynchronous workers"
GAIN = 1.1  # times as fast, from which a difference is one
MIN_VALIDATIONS = 3  # of a run, for its time to an accuracy to mean something


class Verdict(msgspec.Struct):
    is_worth_it: bool | None  # None: it cannot be said
    text: str


def judge(
    entries: Sequence[Entry],
    target: float | None,
    measure: Measure = ACCURACY,
    unit: str = "images",
) -> Verdict | None:
    """Return the verdict on runs and their times to the `target` of a measure; None if no run is synchronous."""
    if not any(is_sync(entry) for entry in entries):
        return None
    kinds = {
        "with one worker": [entry for entry in entries if entry.num_workers == 1],
        "with several synchronous workers": [entry for entry in entries if is_sync(entry)],
        ASYNCHRONOUS: [entry for entry in entries if entry.num_workers > 1 and entry.rule != SYNC],
    }
    if not any(entry.num_validations for entry in entries):
        return _open(
            "no run was validated: give the data a validation split, a task of your own a val_set, or a shorter --run.validate_every"
        )
    missing = [
        name
        for name, runs in kinds.items()
        if max((run.num_validations for run in runs), default=0) < MIN_VALIDATIONS
    ]
    if missing or target is None:
        return _open(
            f"no run {' and none '.join(missing)} has {MIN_VALIDATIONS} validations: train for "
            "longer (--minutes), or validate more often (--run.validate_every 0.2)"
        )
    one, sync, several = (_fastest(runs, measure) for runs in kinds.values())
    if not several.reached:
        return _lost(one, sync, kinds[ASYNCHRONOUS], target, measure)
    if one.reached and one.reached.seconds < GAIN * several.reached.seconds:
        return _not(
            f"more workers gain nothing: one reached {measure.said(target)} in {seconds(one.reached.seconds)}, "
            f"{_who(several)} in {seconds(several.reached.seconds)}{_split(several, one, unit)}"
        )
    if sync.reached and sync.reached.seconds < several.reached.seconds / GAIN:
        return _not(
            f"synchronous training is faster: {_who(sync)} reached {measure.said(target)} in "
            f"{seconds(sync.reached.seconds)}, {_who(several)} asynchronously in {seconds(several.reached.seconds)}"
            f"{_split(several, sync, unit)}"
        )
    if sync.reached and sync.reached.seconds < GAIN * several.reached.seconds:
        return _not(
            f"it is not faster than synchronous training: {seconds(several.reached.seconds)} with {_who(several)} "
            f"against {seconds(sync.reached.seconds)} with {_who(sync)} to {measure.said(target)}, which may be chance"
        )
    return _worth(one, sync, several, target, measure, unit)


def is_sync(entry: Entry) -> bool:
    return entry.rule == SYNC and entry.num_workers > 1


def _worth(
    one: Entry, sync: Entry, several: Entry, target: float, measure: Measure, unit: str
) -> Verdict:
    text = f"{_who(several)} reached {measure.said(target)} in {seconds(several.reached.seconds)}"
    text += f", {_times(one, several)} as fast as one worker and {_times(sync, several)} as fast as synchronous training"
    split = _split(several, sync, unit) if sync.reached else ""
    text += (
        f" with {_who(sync)}{split}; the best {measure.name} is "
        f"{measure.cell(several.best)}, of one worker {measure.cell(one.best)}"
    )
    if one.reached:
        share = several.num_workers * several.reached.seconds / one.reached.seconds
        text += f". The way there takes {share:.2f} times the GPU time of one worker"
    return Verdict(True, f"Asynchronous training is worth it here, because {text}.")


def _lost(
    one: Entry, sync: Entry, several: Sequence[Entry], target: float, measure: Measure
) -> Verdict:
    best = min(several, key=lambda entry: measure.rank(entry.best))
    others = [
        f"{name} in {seconds(entry.reached.seconds)}"
        for name, entry in (("one worker", one), (f"synchronous training with {_who(sync)}", sync))
        if entry.reached
    ]
    if not others:
        return _open(
            f"no run reached {measure.said(target)}: train for longer (--minutes), or ask for less (--{measure.option})"
        )
    if best.mean_staleness is None:
        stale = ""
    else:
        stale = f", at a mean staleness of {best.mean_staleness:.1f}"
    return _not(
        f"{measure.name} is lost: asynchronously {_who(best)} came to {measure.cell(best.best, 1)} at best{stale}, while "
        f"{measure.said(target)} was reached by {' and '.join(others)}. A lower rate (--lr) or fewer workers may mend it"
    )


def _fastest(entries: Sequence[Entry], measure: Measure) -> Entry:
    """Return, of the median run of each kind, the one that is first at the target; the most accurate one if none gets there."""
    kinds = defaultdict(list)
    for entry in entries:
        kinds[entry.num_workers, entry.rule, entry.n_push, entry.warm_start_epochs].append(entry)

    def rank(entry: Entry) -> tuple[float, float]:
        return entry.reached.seconds if entry.reached else math.inf, measure.rank(entry.best)

    medians = [sorted(runs, key=rank)[(len(runs) - 1) // 2] for runs in kinds.values()]
    return min(medians, key=rank)


def _times(slower: Entry, faster: Entry) -> str:
    if slower.reached:
        return f"{slower.reached.seconds / faster.reached.seconds:.1f} times"
    return f"at least {(slower.seconds or 0.0) / faster.reached.seconds:.1f} times"


def _split(entry: Entry, other: Entry, unit: str) -> str:
    """Return what the ratio of two times is made of."""
    return (
        f" ({entry.reached.images_per_s / other.reached.images_per_s:.2f} times the {unit}/s, "
        f"{entry.reached.samples / other.reached.samples:.2f} times the samples)"
    )


def _who(entry: Entry) -> str:
    who = count(entry.num_workers, "worker")
    if entry.n_push != 1:
        who += f" and n_push {entry.n_push}"
    return who


def _not(reason: str) -> Verdict:
    return Verdict(False, f"Asynchronous training is not worth it here, because {reason}.")


def _open(reason: str) -> Verdict:
    return Verdict(
        None, f"It cannot be said whether asynchronous training is worth it here, because {reason}."
    )

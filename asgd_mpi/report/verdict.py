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

from asgd_mpi.report.units import count, percent, seconds

if TYPE_CHECKING:
    from asgd_mpi.report.compare import Entry

SYNC = "sync"         # the rule that waits for all workers
MARGIN = 0.01         # of top-1 accuracy, below the best of all runs, that counts as reached
GAIN = 1.1            # times as fast, from which a difference is one
MIN_VALIDATIONS = 3   # of a run, for its time to an accuracy to mean something


class Verdict(msgspec.Struct):
    is_worth_it: bool | None                   # None: it cannot be said
    text: str


def judge(entries: Sequence[Entry], target: float | None) -> Verdict | None:
    """The verdict on runs and their times to the accuracy `target`, 0..1; None if no run is synchronous."""
    if not any(is_sync(entry) for entry in entries):
        return None
    kinds = {"with one worker": [entry for entry in entries if entry.num_workers == 1],
             "synchronous, with several workers": [entry for entry in entries if is_sync(entry)],
             "asynchronous, with several workers": [
                 entry for entry in entries if entry.num_workers > 1 and entry.rule != SYNC]}
    missing = [name for name, runs in kinds.items()
               if max((run.num_validations for run in runs), default=0) < MIN_VALIDATIONS]
    if missing or target is None:
        return _open(f"no run {' and none '.join(missing)} has {MIN_VALIDATIONS} validations: train for "
                     "longer (--minutes), or validate more often (--run.validate_every 0.2)")
    one, sync, several = map(_fastest, kinds.values())
    if not several.reached:
        return _lost(one, sync, kinds["asynchronous, with several workers"], target)
    if one.reached and one.reached.seconds < GAIN * several.reached.seconds:
        return _not(f"more workers gain nothing: one reached {percent(target)} in {seconds(one.reached.seconds)}, "
                    f"{_who(several)} in {seconds(several.reached.seconds)}{_split(several, one)}")
    if sync.reached and sync.reached.seconds < several.reached.seconds / GAIN:
        return _not(f"synchronous training is faster: {_who(sync)} reached {percent(target)} in "
                    f"{seconds(sync.reached.seconds)}, {_who(several)} asynchronously in {seconds(several.reached.seconds)}"
                    f"{_split(several, sync)}")
    if sync.reached and sync.reached.seconds < GAIN * several.reached.seconds:
        return _not(f"it is not faster than synchronous training: {seconds(several.reached.seconds)} with {_who(several)} "
                    f"against {seconds(sync.reached.seconds)} with {_who(sync)} to {percent(target)}, which may be chance")
    return _worth(one, sync, several, target)


def is_sync(entry: Entry) -> bool:
    return entry.rule == SYNC and entry.num_workers > 1


def _worth(one: Entry, sync: Entry, several: Entry, target: float) -> Verdict:
    text = f"{_who(several)} reached {percent(target)} in {seconds(several.reached.seconds)}"
    text += f", {_times(one, several)} as fast as one worker and {_times(sync, several)} as fast as synchronous training"
    text += f" with {_who(sync)}{_split(several, sync) if sync.reached else ''}; the best accuracy is " \
            f"{percent(several.best_accuracy, 2)}, of one worker {percent(one.best_accuracy, 2)}"
    if one.reached:
        share = several.num_workers * several.reached.seconds / one.reached.seconds
        text += f". The way there takes {share:.2f} times the GPU time of one worker"
    return Verdict(True, f"Asynchronous training is worth it here, because {text}.")


def _lost(one: Entry, sync: Entry, several: Sequence[Entry], target: float) -> Verdict:
    best = max(several, key=lambda entry: entry.best_accuracy or 0.0)
    others = [f"{name} in {seconds(entry.reached.seconds)}" for name, entry in
              (("one worker", one), (f"synchronous training with {_who(sync)}", sync)) if entry.reached]
    if not others:
        return _open(f"no run reached {percent(target)}: train for longer (--minutes), or ask for less (--target-accuracy)")
    stale = "" if best.mean_staleness is None else f", at a mean staleness of {best.mean_staleness:.1f}"
    return _not(f"accuracy is lost: asynchronously {_who(best)} came to {percent(best.best_accuracy)} at best{stale}, while "
                f"{percent(target)} was reached by {' and '.join(others)}. A lower rate (--lr) or fewer workers may mend it")


def _fastest(entries: Sequence[Entry]) -> Entry:
    """Of the median run of each kind, the one that is first at the target; the most accurate one if none gets there."""
    kinds = defaultdict(list)
    for entry in entries:
        kinds[entry.num_workers, entry.rule, entry.n_push, entry.warm_start_epochs].append(entry)
    medians = [sorted(runs, key=_rank)[(len(runs) - 1) // 2] for runs in kinds.values()]
    return min(medians, key=_rank)


def _rank(entry: Entry) -> tuple[float, float]:
    return entry.reached.seconds if entry.reached else math.inf, -(entry.best_accuracy or 0.0)


def _times(slower: Entry, faster: Entry) -> str:
    if slower.reached:
        return f"{slower.reached.seconds / faster.reached.seconds:.1f} times"
    return f"at least {(slower.seconds or 0.0) / faster.reached.seconds:.1f} times"


def _split(entry: Entry, other: Entry) -> str:
    """What the ratio of two times is made of."""
    return (f" ({entry.reached.images_per_s / other.reached.images_per_s:.2f} times the images/s, "
            f"{entry.reached.samples / other.reached.samples:.2f} times the samples)")


def _who(entry: Entry) -> str:
    extra = "" if entry.n_push == 1 else f" and n_push {entry.n_push}"
    return f"{count(entry.num_workers, 'worker')}{extra}"


def _not(reason: str) -> Verdict:
    return Verdict(False, f"Asynchronous training is not worth it here, because {reason}.")


def _open(reason: str) -> Verdict:
    return Verdict(None, f"It cannot be said whether asynchronous training is worth it here, because {reason}.")

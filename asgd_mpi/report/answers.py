"""What a reader asks first: is it fast, is it right, what is to be changed. Pure: a `Summary` in, three answers out.

Fast is against something that was measured: the same workers, had they done nothing but compute. What one worker alone would
reach is not in the record of a run of several; `report A B` compares with one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from asgd_mpi.record.summary import Summary
from asgd_mpi.report import units
from asgd_mpi.report.advice import Advice, foremost, pieces, without_waits
from asgd_mpi.report.compare import Comparison, Entry
from asgd_mpi.report.cost import Cost
from asgd_mpi.report.measure import Measure, measures

FAST = 0.8  # share of what the workers could do without waiting, from which a run is fast,
SLOW = 0.5  # ... and below which it is not


IS_FAST, IS_RIGHT = "Is it fast?", "Is it right?"
CHANGE, TAKE = "What to change?", "Which to take?"


class Answer(msgspec.Struct):
    question: str
    short: str  # a number or a few words
    text: str
    state: Literal["good", "open", "bad"]

    @property
    def word(self) -> str:
        """Return the state in a word, for who does not see its colour; "" if the answer is no yes or no."""
        words = {"good": "yes", "open": "in part", "bad": "no"}
        if self.question in (IS_FAST, IS_RIGHT):
            return words[self.state]
        return ""


def answers(summary: Summary, cost: Cost | None = None) -> list[Answer]:
    """Return the three answers."""
    return [_fast(summary), _right(summary), _change(summary, pieces(summary, cost))]


def compared(comparison: Comparison, summaries: Sequence[Summary]) -> list[Answer]:
    """Return the answers of several runs; against one worker only if one was measured."""
    return [_faster(comparison), _as_right(comparison, summaries), _which(comparison)]


def _faster(comparison: Comparison) -> Answer:
    measured = [entry for entry in comparison.entries if entry.images_per_s]
    if not measured:
        return Answer(IS_FAST, units.NONE, f"No run has applied {comparison.unit}.", "open")
    best = max(measured, key=lambda entry: entry.images_per_s)
    text = f"{best.name} with {units.workers(best.crews)} is the fastest of {len(measured)}"
    if best.speedup is None:
        short = f"{units.number(best.images_per_s, 0)} {comparison.unit}/s"
        return Answer(
            IS_FAST, short, f"{text}; against one worker it cannot be told: no run had one.", "open"
        )
    if best.num_workers == 1:
        return Answer(
            IS_FAST,
            "One worker is fastest",
            f"{text}: more workers bring no more {comparison.unit}/s.",
            "bad",
        )
    return Answer(
        IS_FAST,
        f"{best.speedup:.2f} times one worker",
        f"{text}: {units.number(best.images_per_s, 0)} {comparison.unit}/s, an efficiency of {units.percent(best.efficiency, 0)}.",
        "good" if best.efficiency >= FAST else "bad" if best.efficiency < SLOW else "open",
    )


def _as_right(comparison: Comparison, summaries: Sequence[Summary]) -> Answer:
    violated = [summary.name for summary in summaries if summary.audit.violations]
    known = [entry for entry in comparison.entries if entry.best is not None]
    measure = comparison.measure
    short = "not validated"
    if known:
        best = min(known, key=lambda entry: measure.rank(entry.best))
        worst = max(known, key=lambda entry: measure.rank(entry.best))
        short = f"{measure.cell(best.best)} {measure.name}"
        text = _spread(best, worst, len(known), len(comparison.entries), measure)
    else:
        text = "No run was validated."
    if violated:
        return Answer(IS_RIGHT, short, f"The audit of {', '.join(violated)} is violated.", "bad")
    is_whole = len(known) == len(comparison.entries)
    apart = known and abs(best.best - worst.best) > measure.margin(best.best)
    text += f" The audits of all {len(summaries)} runs hold."
    return Answer(IS_RIGHT, short, text, "open" if apart or not is_whole else "good")


def _spread(best: Entry, worst: Entry, num_known: int, num_runs: int, measure: Measure) -> str:
    """Say what the validated ones of several runs came to."""
    if num_runs == 1:
        return f"{best.name} is the only run."
    if num_known == 1:
        return f"Only {best.name} of {num_runs} runs was validated."
    if best.best == worst.best:
        return f"The {num_known} validated runs came to the same."
    of = "" if num_known == num_runs else f" of the {num_known} validated runs"
    return (
        f"The best{of} is {best.name}; the worst, {worst.name}, came to {measure.cell(worst.best)}."
    )


def _which(comparison: Comparison) -> Answer:
    there = [entry for entry in comparison.entries if entry.reached]
    if not there:
        if comparison.verdict:
            text = comparison.verdict.text
        else:
            text = "No run reached the target."
        was_validated = any(entry.best is not None for entry in comparison.entries)
        short = "Train for longer" if was_validated else "Validate them"
        return Answer(TAKE, short, text, "open")
    first = min(there, key=lambda entry: entry.reached.seconds)
    if comparison.verdict:
        text = comparison.verdict.text
    else:
        text = (
            f"It was the first at {comparison.measure.said(comparison.target)} {comparison.measure.noun}, after "
            f"{units.seconds(first.reached.seconds)}, of {units.count(len(there), 'run')} that came there."
        )
    return Answer(TAKE, f"{first.name}: {units.workers(first.crews)}", text, "open")


def _fast(summary: Summary) -> Answer:
    question, rate, free = IS_FAST, summary.images_per_s, without_waits(summary)
    if rate is None:
        return Answer(question, units.NONE, f"No {summary.unit} have been applied.", "open")
    short = f"{units.number(rate, 0)} {summary.unit}/s"
    by = f"By {units.workers(summary.crews)}, in {units.seconds(summary.training_s)}"
    if not free:
        return Answer(question, short, f"{by}. Their waits are not on record.", "open")
    share = min(1.0, rate / free)
    if summary.crews == [1]:
        alone = "This is the run to compare others with."
    else:
        alone = "One worker was not measured here: report a run of one beside this."
    return Answer(
        question,
        short,
        f"{by}: {units.percent(share, 0)} of the {units.number(free, 0)} {summary.unit}/s that they would reach if they only computed. "
        f"{alone}",
        "good" if share >= FAST else "bad" if share < SLOW else "open",
    )


def _right(summary: Summary) -> Answer:
    question, best = IS_RIGHT, summary.best
    last = summary.validations[-1] if summary.validations else None
    measure = measures(summary.validations)[0]
    if last:
        short = f"{measure.cell(measure.of(last))} {measure.name}"
    else:
        short = "not validated"
    words = []
    if best and measure.of(best) != measure.of(last):
        words.append(f"The best was {measure.cell(measure.of(best))}.")
    found = summary.audit
    if found.violations:
        return Answer(question, short, f"The audit is violated: {found.violations[0]}.", "bad")
    if summary.status == "failed":
        return Answer(question, short, f"The run failed: {summary.reason}.", "bad")
    if not found.num_pushes:
        return Answer(question, short, "There is no applied push to audit.", "open")
    repeated, missing = sum(epoch.repeated for epoch in found.epochs), summary.missing_samples
    words.append(
        f"Audit: {units.count(found.num_pushes, 'push', 'pushes')}, each applied once; {repeated:,} samples repeated, "
        f"{missing:,} {'missing' if summary.status == 'finished' else 'still to come'}."
    )
    if lost := summary.skipped_images + summary.given_up:
        words.append(f"{lost:,} {summary.unit} were left out.")
    is_good = last is not None and summary.status == "finished" and not missing and not lost
    return Answer(question, short, " ".join(words), "good" if is_good else "open")


def _change(summary: Summary, found: list[Advice]) -> Answer:
    question, best = CHANGE, foremost(found)
    if best is None and not summary.audit.num_pushes:
        return Answer(
            question,
            "Cannot be told",
            "No push is on record, so nothing was measured. If the run has ended, see below what ended it, and go on with --resume.",
            "open",
        )
    if best is None:
        return Answer(
            question,
            "Nothing",
            "No wait is long and nobody is slow; see below for how many workers the server can serve.",
            "good",
        )
    if best.gain is not None:
        gain = f" Expected: up to +{units.percent(best.gain, 0)} {summary.unit}/s."
    else:
        gain = " What it gains cannot be told from this run."
    return Answer(
        question,
        best.change,
        best.text if best.is_alarm else f"{best.found}{gain}",
        "bad" if best.is_alarm else "open",
    )

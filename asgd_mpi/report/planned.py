"""What a plan says first: how many workers, how sure that is, what would move it. Pure.

How sure is measured on the runs themselves: the model, calibrated with them, is asked for each of them again. It is fitted
to the smallest and the largest one; those between show what it gets wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from asgd_mpi.offline.forecast import Costs, Observation, Outcome, as_set, simulate
from asgd_mpi.report.advice import FAR_OUT
from asgd_mpi.report.answers import Answer
from asgd_mpi.report.units import count, number, percent

WORTH_IT = 0.5  # of a lone worker's images/s, from which a worker is worth its GPU
CLOSE, FAR = 0.05, 0.15  # shares by which a model may miss its own runs


@dataclass(frozen=True)
class Miss:
    """One run that the model was calibrated with, and what the model says of it."""

    num_workers: int
    measured: float  # images/s
    predicted: float
    batch: float  # images

    @property
    def share(self) -> float:
        return self.predicted / self.measured - 1


def misses(calibrated: Costs, observations: Sequence[Observation]) -> list[Miss]:
    """Ask the calibrated model for the runs themselves."""
    return [
        Miss(
            one.num_workers,
            one.images_per_s,
            simulate(as_set(calibrated, one), one.num_workers).images_per_s,
            one.costs.batch,
        )
        for one in sorted(observations, key=lambda one: one.num_workers)
    ]


def answers(
    costs: Costs,
    outcomes: Sequence[Outcome],
    moves: Sequence[tuple[str, float, float]],
    found: Sequence[Miss],
    unit: str = "images",
) -> list[Answer]:
    """Return the three answers."""
    return [
        _how_many(costs, outcomes, unit),
        _how_sure(outcomes, found),
        _what_moves(outcomes, moves, unit),
    ]


def whose(costs: Costs) -> str:
    """Return what the limit is of."""
    if costs.slowest_s > costs.serve_s:
        return "link's"
    return "queue's: the update and what else is done one at a time"


def _how_many(costs: Costs, outcomes: Sequence[Outcome], unit: str) -> Answer:
    def share(outcome: Outcome) -> float:
        return outcome.images_per_s / costs.alone / outcome.num_workers

    last = outcomes[-1]
    good = [outcome for outcome in outcomes if share(outcome) >= WORTH_IT]
    best = good[-1] if good else outcomes[0]
    text = (
        f"{count(best.num_workers, 'worker reaches', 'workers reach')} {number(best.images_per_s, 0)} {unit}/s, {percent(share(best), 0)} of what "
        "each would reach alone."
    )
    if best is not last:
        text += f" With {last.num_workers:,} it is {number(last.images_per_s, 0)}, {percent(share(last), 0)} each."
    if math.isfinite(costs.limit) and costs.knee < last.num_workers:
        text += f" From about {count(round(costs.knee), 'worker')} on, {number(costs.limit, 0)} {unit}/s is the limit (the {whose(costs)})."
    short = f"Up to {best.num_workers:,}"
    if best is last:
        short += " and more"
    return Answer("How many workers?", short, text, "good" if good else "bad")


def _how_sure(outcomes: Sequence[Outcome], found: Sequence[Miss]) -> Answer:
    worst = max(found, key=lambda miss: abs(miss.share))
    told = "; ".join(
        f"{count(miss.num_workers, 'worker')}: {100 * miss.share:+.0f} %" for miss in found[:6]
    )
    sizes = {miss.num_workers for miss in found}
    text = f"What the model says of the runs that it was calibrated with is off by {told}."
    if len(sizes) == 1:
        text += " Runs of one size do not show what workers share: add one with more."
    batches = sorted({round(miss.batch) for miss in found})
    are_alike = batches[-1] <= (1 + CLOSE) * batches[0]
    if not are_alike:
        text += (
            f" Their batches are of {number(batches[0], 0)} to {number(batches[-1], 0)} samples: that a step takes as much longer is "
            "taken for granted; runs with one --batch-size would show it."
        )
    times = outcomes[-1].num_workers / max(sizes)
    if times > FAR_OUT:
        text += f" {outcomes[-1].num_workers:,} workers are {number(times, 0)} times as many as were measured: a guess."
    is_close = abs(worst.share) <= CLOSE and len(sizes) > 1 and times <= FAR_OUT and are_alike
    state = "open"
    if abs(worst.share) > FAR:
        state = "bad"
    elif is_close:
        state = "good"
    return Answer(
        "How sure is that?", f"Off by {percent(abs(worst.share), 0)} at worst", text, state
    )


def _what_moves(
    outcomes: Sequence[Outcome], moves: Sequence[tuple[str, float, float]], unit: str
) -> Answer:
    question, many = "What would move it?", count(outcomes[-1].num_workers, "worker")
    if not moves or moves[0][1] < CLOSE:
        return Answer(
            question, "Nothing that is known here", f"No change gains {many} 5 %.", "good"
        )
    name, gain, knee = moves[0]
    return Answer(
        question,
        name[0].upper() + name[1:],
        f"Expected: {100 * gain:+.0f} % {unit}/s with {many}; the knee is then at about {count(round(knee), 'worker')}.",
        "open",
    )

"""What versions of a run are judged by, and what its samples are called: accuracy of images, or a task's own metrics. Pure.

The first measure decides which version is the best. Accuracies are 0..1 and told in percent; a task's own metrics keep their
names and their unit, and say whether they are to be high.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from asgd_mpi.record.events import Validation, accuracy_of
from asgd_mpi.report import units

MARGIN = 0.01  # of accuracy, below the best of all runs, that counts as reached


@dataclass(frozen=True)
class Measure:
    """A metric of the task's own."""

    name: str
    maximize: bool = True

    is_accuracy = False
    option = "target"  # of the command line, which gives a value to compare runs at

    def of(self, score: Validation) -> float | None:
        """Return what a version came to; None if that is not finite or not known."""
        return score.metrics.get(self.name)

    def is_as_good(self, value: float, target: float) -> bool:
        return self.rank(value) <= self.rank(target) + 1e-9

    def rank(self, value: float | None) -> float:
        """Return what is the lower the better."""
        if value is None:
            return math.inf
        if self.maximize:
            return -value
        return value

    def best(self, scores: Sequence[Validation]) -> float | None:
        return min(map(self.of, scores), key=self.rank, default=None)

    def margin(self, best: float) -> float:
        """Return how far from the best a version may be and count as good."""
        return MARGIN * abs(best)

    def cell(self, value: float | None, digits: int = 2) -> str:
        """Return a value as it stands under the measure's name."""
        return units.rate(value)

    def said(self, value: float | None) -> str:
        """Return a value as it stands in a sentence, without `noun`."""
        return f"{self.name} {self.cell(value)}"

    @property
    def noun(self) -> str:
        """Return what follows a value that `said` gave: "97.0 % accuracy", but "rmse 0.12"."""
        return ""

    @property
    def axis(self) -> str:
        return self.name

    def drawn(self, value: float | None) -> float:
        """Return a value in the unit of the axis; NaN, which is a gap, for none."""
        return math.nan if value is None else value


@dataclass(frozen=True)
class Accuracy(Measure):
    """One less a field of Validation, told in percent."""

    error: str = "top1_error"

    is_accuracy = True
    option = "target-accuracy"

    def of(self, score: Validation) -> float | None:
        return accuracy_of(getattr(score, self.error))

    def margin(self, best: float) -> float:
        return MARGIN

    def cell(self, value: float | None, digits: int = 2) -> str:
        return units.percent(value, digits)

    def said(self, value: float | None) -> str:
        return units.percent(value)

    @property
    def noun(self) -> str:
        return self.name

    @property
    def axis(self) -> str:
        return f"{self.name} (%)"

    def drawn(self, value: float | None) -> float:
        return math.nan if value is None else 100 * value


@dataclass(frozen=True)
class Loss(Measure):
    """Of a task that measures nothing else."""

    def of(self, score: Validation) -> float | None:
        return score.loss


ACCURACY, TOP5 = Accuracy("accuracy"), Accuracy("top-5 accuracy", error="top5_error")
LOSS = Loss("validation loss", maximize=False)


def measures(scores: Sequence[Validation]) -> list[Measure]:
    """Return what a run was judged by, what decides first; accuracy of a run that was not validated."""
    if scores and scores[-1].metrics:
        first, *others = scores[-1].metrics
        return [Measure(first, maximize=scores[-1].maximize), *map(Measure, others)]
    if scores and scores[-1].top1_error is None:
        return [LOSS]
    return [ACCURACY, TOP5]

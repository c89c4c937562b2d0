"""The plan as a page: predicted images/s, staleness and server load against the workers, and the text."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.ticker import MaxNLocator

from asgd_mpi.offline.forecast import Costs, Observation, Outcome
from asgd_mpi.report.answers import Answer
from asgd_mpi.report.figures import Drawn, Numbers, canvas, in_thousands, legend, picture
from asgd_mpi.report.page import template
from asgd_mpi.report.palette import BLUE, PURPLE, RED
from asgd_mpi.report.svg import FAINT, SETTINGS


def page(
    costs: Costs,
    observations: Sequence[Observation],
    outcomes: Sequence[Outcome],
    answers: Sequence[Answer],
    lines: Sequence[str],
    unit: str = "images",
) -> str:
    """Return the page; `lines` is the plan as text."""
    with matplotlib.rc_context(SETTINGS):
        pictures = [
            picture(
                "speed",
                f"Predicted {unit} per second",
                "Dashed: without any queue. Dotted: the limit, and where the knee is. Squares: the runs "
                "that the model was calibrated with.",
                *_speed(costs, observations, outcomes, unit),
            ),
            picture(
                "busy",
                "Predicted load of the server",
                "The queue is busy with updates and with what else is done one at a time.",
                *_busy(costs, outcomes),
            ),
            picture(
                "staleness",
                "Predicted staleness",
                "Versions applied between a fetch and the push computed on it, in the mean.",
                *_staleness(costs, outcomes),
            ),
        ]
    return template("plan.html.j2").render(
        costs=costs, outcomes=outcomes, answers=answers, pictures=pictures, lines=lines, unit=unit
    )


def _speed(
    costs: Costs, observations: Sequence[Observation], outcomes: Sequence[Outcome], unit: str
) -> Drawn:
    figure, axes = canvas()
    counts = [outcome.num_workers for outcome in outcomes]
    predicted = [outcome.images_per_s for outcome in outcomes]
    ideal = [count * costs.alone for count in counts]
    axes.plot(counts, ideal, color=FAINT, linestyle="--", linewidth=1, label="no queue")
    axes.plot(counts, predicted, "o-", color=BLUE, markersize=3, label="predicted")
    axes.plot(
        [one.num_workers for one in observations],
        [one.images_per_s for one in observations],
        "s",
        color=RED,
        markersize=5,
        label="measured",
    )
    if costs.limit < ideal[-1]:
        axes.axhline(costs.limit, color=RED, linestyle=":", linewidth=1.2, label="limit")
        axes.set_ylim(top=1.6 * costs.limit)
    _against_workers(axes, costs, counts, f"{unit}/s")
    legend(axes, 2)
    rows = [[count, *pair] for count, *pair in zip(counts, predicted, ideal)]
    return figure, Numbers(["workers", f"predicted {unit}/s", f"{unit}/s without a queue"], rows)


def _busy(costs: Costs, outcomes: Sequence[Outcome]) -> Drawn:
    figure, axes = canvas()
    counts = [outcome.num_workers for outcome in outcomes]
    queue = [100 * outcome.queue_busy for outcome in outcomes]
    server = [100 * outcome.server_busy for outcome in outcomes]
    axes.plot(counts, queue, "o-", color=BLUE, markersize=3, label="queue")
    axes.plot(counts, server, "s--", color=RED, markersize=3, label="updates")
    _against_workers(axes, costs, counts, "busy (%)")
    axes.set_ylim(0, 105)
    legend(axes, 2)
    rows = [list(row) for row in zip(counts, queue, server)]
    return figure, Numbers(["workers", "queue busy (%)", "updates (%)"], rows)


def _staleness(costs: Costs, outcomes: Sequence[Outcome]) -> Drawn:
    figure, axes = canvas()
    counts = [outcome.num_workers for outcome in outcomes]
    stale = [outcome.staleness for outcome in outcomes]
    axes.plot(counts, stale, "o-", color=PURPLE, markersize=3)
    _against_workers(axes, costs, counts, "staleness (versions)")
    rows = [list(row) for row in zip(counts, stale)]
    return figure, Numbers(["workers", "mean staleness"], rows)


def _against_workers(axes, costs: Costs, counts: Sequence[int], label: str) -> None:
    """Lay out the axes, with the knee if the limit is within sight."""
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    in_thousands(axes.yaxis)
    if costs.limit < counts[-1] * costs.alone:
        axes.axvline(costs.knee, color=RED, linestyle=":", linewidth=0.8)
    axes.set_xlabel("workers")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if counts[-1] > 16:
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [f"{count:,}" for count in counts])

"""The plan as a page: predicted images/s, staleness and server load against the workers, and the text."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure

from asgd_mpi.offline.forecast import Costs, Observation, Outcome
from asgd_mpi.report.figures import BLUE, ORANGE, PURPLE, RED, Picture, canvas, in_thousands
from asgd_mpi.report.page import css, template
from asgd_mpi.report.svg import FAINT, SETTINGS, to_svg


def page(costs: Costs, observations: Sequence[Observation], outcomes: Sequence[Outcome], lines: Sequence[str]) -> str:
    """`lines` is the plan as text."""
    with matplotlib.rc_context(SETTINGS):
        title = "Predicted images/s, server load and staleness"
        picture = Picture(title, "Dashed: without any queue. Dotted: the limit, and where the knee is. Points: the runs "
                          "that the model was calibrated with.", to_svg(_draw(costs, observations, outcomes), "plan", title))
    return template("plan.html.j2").render(css=css(), picture=picture, lines=lines)


def _draw(costs: Costs, observations: Sequence[Observation], outcomes: Sequence[Outcome]) -> Figure:
    counts = [outcome.num_workers for outcome in outcomes]
    figure, (speed, busy, stale) = canvas(3, height=6.0, sharex=True)
    ideal = [count * costs.alone for count in counts]
    speed.plot(counts, ideal, color=FAINT, linestyle="--", linewidth=1, label="no queue")
    speed.plot(counts, [outcome.images_per_s for outcome in outcomes], color=BLUE, marker="o", markersize=3,
               label="predicted")
    speed.plot([one.num_workers for one in observations], [one.images_per_s for one in observations], "s", color=ORANGE,
               markersize=5, label="measured")
    if costs.limit < ideal[-1]:
        speed.axhline(costs.limit, color=RED, linestyle=":", linewidth=1.2, label="limit")
        for axes in (speed, busy, stale):
            axes.axvline(costs.knee, color=RED, linestyle=":", linewidth=0.8)
        speed.set_ylim(0, 1.6 * costs.limit)
    busy.plot(counts, [100 * outcome.queue_busy for outcome in outcomes], color=BLUE, marker="o", markersize=3,
              label="updates and what else is done one at a time")
    busy.plot(counts, [100 * outcome.server_busy for outcome in outcomes], color=ORANGE, marker="o", markersize=3,
              label="updates")
    stale.plot(counts, [outcome.staleness for outcome in outcomes], color=PURPLE, marker="o", markersize=3)
    for axes, label in ((speed, "images/s"), (busy, "busy (%)"), (stale, "staleness (versions)")):
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        in_thousands(axes.yaxis)
    stale.set_xlabel("workers")
    if counts[-1] > 16:
        stale.set_xscale("log", base=2)
        stale.set_xticks(counts, [f"{count:,}" for count in counts])
    busy.set_ylim(0, 105)
    for axes in (speed, busy):
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.1)
    return figure

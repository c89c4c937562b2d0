"""The comparison of several runs, laid out: figures, page and Markdown."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from asgd_mpi.record.summary import Summary
from asgd_mpi.report.compare import Comparison
from asgd_mpi.report.figures import BLUE, GREEN, ORANGE, PURPLE, RED, Picture, canvas, clock, from_zero, in_thousands
from asgd_mpi.report.page import css, template
from asgd_mpi.report.svg import FAINT, SETTINGS, to_svg

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, "#55b6d9", "#9b7440", "#8a8f98")
MAX_CURVES = len(COLOURS)               # runs with an accuracy curve of their own


def page(comparison: Comparison, summaries: Sequence[Summary]) -> str:
    """The page of several runs."""
    drawn = []
    with matplotlib.rc_context(SETTINGS):
        for name, title, caption, figure in (
                ("scaling", "Images per second against workers", "Dashed: the ideal, in proportion to the workers of the "
                 "smallest run. Solid: the fit, and its limit.", _scaling(comparison)),
                ("efficiency", "Efficiency and time to the target", "Left: images/s of a worker, against that in the smallest "
                 "run. Right: time to the target accuracy.", _efficiency(comparison)),
                ("curves", "Accuracy", f"Top-1, against time and against samples; at most {MAX_CURVES} runs are drawn.",
                 _curves(comparison, summaries))):
            if figure is not None:
                drawn.append(Picture(title, caption, to_svg(figure, name, title)))
    return template("comparison.html.j2").render(c=comparison, pictures=drawn, css=css())


def _scaling(comparison: Comparison) -> Figure | None:
    points = [(entry.num_workers, entry.images_per_s, entry.speedup) for entry in comparison.entries if entry.images_per_s]
    if not points:
        return None
    figure, axes = canvas()
    most = max(num_workers for num_workers, _, _ in points)
    one_worker = points[0][1] / points[0][2]
    axes.plot([0, most], [0, most * one_worker], color=FAINT, linestyle="--", linewidth=1, label="ideal")
    if comparison.fit:
        grid = [most * (i + 1) / 100 for i in range(120)]
        axes.plot(grid, [comparison.fit.images_per_s(n) for n in grid], color=BLUE, linewidth=1.2, label="fit")
        if comparison.fit.limit and comparison.fit.limit < 1.3 * most * one_worker:
            axes.axhline(comparison.fit.limit, color=RED, linestyle=":", linewidth=1.2, label="fitted limit")
    axes.plot([n for n, _, _ in points], [rate for _, rate, _ in points], "o", color=BLUE, markersize=5, label="measured")
    axes.set(xlabel="workers", ylabel="images/s")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    in_thousands(axes.yaxis)
    from_zero(axes)
    figure.legend(loc="outside upper left", ncols=4)
    return figure


def _efficiency(comparison: Comparison) -> Figure | None:
    points = [(entry.num_workers, 100 * entry.efficiency) for entry in comparison.entries if entry.efficiency]
    there = [(entry.num_workers, entry.reached.seconds) for entry in comparison.entries if entry.reached]
    if not points:
        return None
    figure, (efficiency, time) = canvas(1, 2)
    efficiency.plot([n for n, _ in points], [value for _, value in points], "o-", color=GREEN, markersize=4)
    efficiency.set(xlabel="workers", ylabel="efficiency (%)")
    scale, unit = clock(max((value for _, value in there), default=0.0))
    time.plot([n for n, _ in there], [value / scale for _, value in there], "o-", color=ORANGE, markersize=4)
    time.set(xlabel="workers", ylabel=f"time to the target ({unit})")
    for axes in (efficiency, time):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        from_zero(axes)
    return figure


def _curves(comparison: Comparison, summaries: Sequence[Summary]) -> Figure | None:
    shown = sorted((summary for summary in summaries if summary.validations and summary.started is not None),
                   key=lambda summary: summary.num_workers)[:MAX_CURVES]
    if not shown:
        return None
    scale, unit = clock(max(summary.validations[-1].t - summary.started for summary in shown))
    figure, (by_time, by_samples) = canvas(1, 2, sharey=True)
    for colour, summary in zip(COLOURS, shown):
        accuracy = [100 * (1 - score.top1_error) for score in summary.validations]
        by_time.plot([(score.t - summary.started) / scale for score in summary.validations], accuracy, color=colour,
                     label=f"{summary.num_workers} worker{'s' * (summary.num_workers != 1)}")
        by_samples.plot([score.samples for score in summary.validations], accuracy, color=colour)
    for axes in (by_time, by_samples):
        if comparison.target_accuracy is not None:
            axes.axhline(100 * comparison.target_accuracy, color=FAINT, linestyle="--", linewidth=0.9)
        axes.set_xlim(left=0)
    by_time.set(xlabel=f"time ({unit})", ylabel="top-1 accuracy (%)")
    by_samples.set(xlabel="samples applied")
    in_thousands(by_samples.xaxis, 4)
    figure.legend(loc="outside upper left", ncols=4)
    return figure

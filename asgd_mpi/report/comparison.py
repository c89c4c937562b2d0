"""The comparison of several runs, laid out: figures, page and Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator

from asgd_mpi.record.summary import Summary
from asgd_mpi.report.compare import Comparison, Entry
from asgd_mpi.report.figures import BLUE, GREEN, ORANGE, PURPLE, RED, Picture, canvas, clock, from_zero, in_thousands
from asgd_mpi.report.page import css, template
from asgd_mpi.report.svg import FAINT, SETTINGS, to_svg
from asgd_mpi.report.verdict import is_sync

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, "#55b6d9", "#9b7440", "#8a8f98")
MAX_CURVES = len(COLOURS)               # runs with an accuracy curve of their own
STYLES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
MARKS = "osv^D"


def page(comparison: Comparison, summaries: Sequence[Summary]) -> str:
    """The page of several runs."""
    drawn = []
    with matplotlib.rc_context(SETTINGS):
        for name, title, caption, figure in (
                ("scaling", "Images per second against workers", "Dashed: the ideal, in proportion to one worker. "
                 "Solid: the fit, and its limit.", _scaling(comparison)),
                ("efficiency", "Efficiency and time to the target", "Left: images/s of a worker, against one that is alone. "
                 "Right: time to the target accuracy.", _efficiency(comparison)),
                ("curves", "Accuracy", f"Top-1, against time and against samples; at most {MAX_CURVES} runs are drawn.",
                 _curves(comparison, summaries)),
                ("grid", "Workers x n_sync", "As in Paine et al. 2013: colours are workers, line styles batches in a push. "
                 "Above: the error over time. Below: time to the target accuracy. Cold starts left, warm ones right.",
                 _grid(comparison, summaries))):
            if figure is not None:
                drawn.append(Picture(title, caption, to_svg(figure, name, title)))
    return template("comparison.html.j2").render(c=comparison, pictures=drawn, css=css())


def _scaling(comparison: Comparison) -> Figure | None:
    entries = [entry for entry in comparison.entries if entry.images_per_s and len(entry.crews) == 1]
    if not entries:
        return None
    figure, axes = canvas()
    most = max(entry.num_workers for entry in entries)
    one_worker = next((entry.images_per_s / entry.speedup for entry in entries if entry.speedup), math.inf)
    if math.isfinite(one_worker):
        axes.plot([0, most], [0, most * one_worker], color=FAINT, linestyle="--", linewidth=1, label="ideal")
    if comparison.fit:
        grid = [most * (i + 1) / 100 for i in range(120)]
        axes.plot(grid, [comparison.fit.images_per_s(n) for n in grid], color=BLUE, linewidth=1.2, label="fit")
        if comparison.fit.limit and comparison.fit.limit < 1.3 * most * one_worker:
            axes.axhline(comparison.fit.limit, color=RED, linestyle=":", linewidth=1.2, label="fitted limit")
    for kind, colour in (("measured", BLUE), ("synchronous", ORANGE)):
        shown = [(entry.num_workers, entry.images_per_s) for entry in entries if is_sync(entry) == (kind == "synchronous")]
        if shown:
            axes.plot(*zip(*shown), "o", color=colour, markersize=5, label=kind)
    axes.set(xlabel="workers", ylabel="images/s")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    in_thousands(axes.yaxis)
    from_zero(axes)
    figure.legend(loc="outside upper left", ncols=4)
    return figure


def _efficiency(comparison: Comparison) -> Figure | None:
    if not any(entry.efficiency or entry.reached for entry in comparison.entries):
        return None
    figure, (efficiency, time) = canvas(1, 2)
    scale, unit = clock(max((entry.reached.seconds for entry in comparison.entries if entry.reached), default=0.0))
    for is_this, colour in ((False, BLUE), (True, ORANGE)):
        entries = [entry for entry in comparison.entries if is_sync(entry) == is_this and len(entry.crews) == 1]
        rows = ([(entry.num_workers, 100 * entry.efficiency) for entry in entries if entry.efficiency],
                [(entry.num_workers, entry.reached.seconds / scale) for entry in entries if entry.reached])
        for axes, points in zip((efficiency, time), rows):
            if points:
                is_line = len(dict(points)) == len(points)
                axes.plot(*zip(*points), "o-" if is_line else "o", color=colour, markersize=4)
    efficiency.set(xlabel="workers", ylabel="efficiency (%)")
    time.set(xlabel="workers", ylabel=f"time to the target ({unit})")
    for axes in (efficiency, time):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        from_zero(axes)
    if any(map(is_sync, comparison.entries)):
        figure.legend(handles=[Line2D([], [], color=colour, marker="o", markersize=4, label=label) for colour, label in
                               ((BLUE, "asynchronous"), (ORANGE, "synchronous"))], loc="outside upper left", ncols=2)
    return figure


def _curves(comparison: Comparison, summaries: Sequence[Summary]) -> Figure | None:
    shown = _with_curve(comparison, summaries)[:MAX_CURVES]
    if not shown:
        return None
    scale, unit = clock(max(summary.seconds_at(summary.validations[-1].when) for _, summary in shown))
    figure, (by_time, by_samples) = canvas(1, 2, sharey=True)
    for colour, (entry, summary) in zip(COLOURS, shown):
        accuracy = [100 * (1 - score.top1_error) for score in summary.validations]
        by_time.plot([summary.seconds_at(score.when) / scale for score in summary.validations], accuracy, color=colour,
                     linestyle=STYLES[is_sync(entry)], label=_label(entry, comparison))
        by_samples.plot([score.samples for score in summary.validations], accuracy, color=colour,
                        linestyle=STYLES[is_sync(entry)])
    for axes in (by_time, by_samples):
        if comparison.target_accuracy is not None:
            axes.axhline(100 * comparison.target_accuracy, color=FAINT, linestyle="--", linewidth=0.9)
        axes.set_xlim(left=0)
    by_time.set(xlabel=f"time ({unit})", ylabel="top-1 accuracy (%)")
    by_samples.set(xlabel="samples applied")
    in_thousands(by_samples.xaxis, 4)
    figure.legend(loc="outside upper left", ncols=4 if all(len(_label(entry, comparison)) < 12 for entry, _ in shown) else 2)
    return figure


def _with_curve(comparison: Comparison, summaries: Sequence[Summary]) -> list[tuple[Entry, Summary]]:
    """The runs whose accuracy over time is known, by workers."""
    ordered = sorted(summaries, key=lambda summary: (summary.num_workers, summary.name))      # as `compare` has them
    return [(entry, summary) for entry, summary in zip(comparison.entries, ordered)
            if summary.validations and summary.started is not None]


def _label(entry: Entry, comparison: Comparison) -> str:
    text = f"{entry.num_workers} worker{'s' * (entry.num_workers != 1)}"
    if len({other.n_push for other in comparison.entries}) > 1:
        text += f", n_push {entry.n_push}"
    if len({other.warm_start_epochs for other in comparison.entries}) > 1:
        text += ", warm" if entry.warm_start_epochs else ", cold"
    return text + (", sync" if is_sync(entry) else "")


def _grid(comparison: Comparison, summaries: Sequence[Summary]) -> Figure | None:
    """The paper's figure, if the runs differ in workers and in the batches of a push."""
    shown = [(entry, summary) for entry, summary in _with_curve(comparison, summaries) if not is_sync(entry)]
    counts, pushes = (sorted({getattr(entry, name) for entry, _ in shown}, key=_numbers_first)
                      for name in ("num_workers", "n_push"))
    if len(counts) < 2 or len(pushes) < 2:
        return None
    starts = sorted({entry.warm_start_epochs > 0 for entry, _ in shown})
    figure, panels = canvas(2, len(starts), height=5.2, sharex="row", sharey="row", squeeze=False)
    scale, unit = clock(max(summary.seconds_at(summary.validations[-1].when) for _, summary in shown))
    for warm, error, time in zip(starts, *panels):
        part = [(entry, summary) for entry, summary in shown if (entry.warm_start_epochs > 0) == warm]
        for entry, summary in part:
            error.plot([summary.seconds_at(score.when) / scale for score in summary.validations],
                       [100 * score.top1_error for score in summary.validations], linewidth=1.1,
                       color=COLOURS[counts.index(entry.num_workers) % len(COLOURS)],
                       linestyle=STYLES[pushes.index(entry.n_push) % len(STYLES)])
        for number, n_push in enumerate(pushes):
            there = [(entry.num_workers, entry.reached.seconds / scale) for entry, _ in part
                     if entry.n_push == n_push and entry.reached]
            if there:
                time.plot(*zip(*there), marker=MARKS[number % len(MARKS)], markersize=4, color=FAINT,
                          linestyle=STYLES[number % len(STYLES)])
        error.set_title("warm start" if warm else "cold start")
        error.set(xlabel=f"time ({unit})", yscale="log")
        error.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        error.yaxis.set_major_formatter("{x:g}")
        error.yaxis.set_minor_formatter("")
        time.set(xlabel="workers")
        time.xaxis.set_major_locator(MaxNLocator(integer=True))
        time.set_ylim(bottom=0)
    panels[0][0].set_ylabel("top-1 error (%)")
    panels[1][0].set_ylabel(f"time to the target ({unit})")
    keys = [Line2D([], [], color=COLOURS[number % len(COLOURS)], label=f"{count} worker{'s' * (count != 1)}")
            for number, count in enumerate(counts)]
    keys += [Line2D([], [], color=FAINT, linestyle=STYLES[number % len(STYLES)], marker=MARKS[number % len(MARKS)],
                    markersize=4, label=f"n_push {n_push}") for number, n_push in enumerate(pushes)]
    figure.legend(handles=keys, loc="outside upper left", ncols=4)
    return figure


def _numbers_first(value: int | str) -> tuple[bool, int | str]:
    return isinstance(value, str), value

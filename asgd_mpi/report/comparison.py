"""The comparison of several runs, laid out: figures, page and Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from asgd_mpi.record.summary import Summary
from asgd_mpi.report.answers import compared
from asgd_mpi.report.compare import Comparison, Entry
from asgd_mpi.report.figures import (
    WIDTH,
    Drawn,
    Numbers,
    canvas,
    clock,
    from_zero,
    in_thousands,
    legend,
    picture,
    stretch_to_100,
)
from asgd_mpi.report.measure import Measure
from asgd_mpi.report.page import template
from asgd_mpi.report.palette import BLUE, GREY, LINES, ORANGE, RED, SKY
from asgd_mpi.report.svg import FAINT, SETTINGS
from asgd_mpi.report.verdict import is_sync

COLOURS = (*LINES, ORANGE, SKY, GREY, "#5b3a1a")
MAX_CURVES = len(COLOURS)  # runs with an accuracy curve of their own
STYLES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
MARKS = "osv^D"


def page(comparison: Comparison, summaries: Sequence[Summary]) -> str:
    """Return the page of several runs."""
    drawn, name = [], comparison.measure.name
    measure = name[:1].upper() + name[1:]
    with matplotlib.rc_context(SETTINGS):
        for name, title, caption, found in (
            (
                "scaling",
                f"{comparison.unit.capitalize()} per second against workers",
                "Dashed: the ideal, in proportion to one worker."
                + (" Solid: the fit, and its limit." if comparison.fit else ""),
                _scaling(comparison),
            ),
            (
                "efficiency",
                "Efficiency",
                f"{comparison.unit.capitalize()}/s of a worker, against one that is alone.",
                _efficiency(comparison),
            ),
            (
                "target",
                "Time to the target",
                f"Until a version with the target ({comparison.measure.name}) or better was made.",
                _time_to_target(comparison),
            ),
            (
                "curves",
                f"{measure} over time",
                f"At most {MAX_CURVES} runs are drawn; dashed runs are synchronous.",
                _curves(comparison, summaries, by_time=True),
            ),
            (
                "samples",
                f"{measure} over samples",
                f"At most {MAX_CURVES} runs are drawn; dashed runs are synchronous.",
                _curves(comparison, summaries, by_time=False),
            ),
            (
                "grid",
                "Workers x n_sync",
                "As in Paine et al. 2013: colours are workers, line styles batches in a push. "
                "Above: what versions are judged by, over time. Below: time to the target. Cold starts left, warm ones right.",
                _grid(comparison, summaries),
            ),
        ):
            if found is not None:
                drawn.append(picture(name, title, caption, *found))
    return template("comparison.html.j2").render(
        c=comparison, answers=compared(comparison, summaries), pictures=drawn
    )


def _scaling(comparison: Comparison) -> Drawn | None:
    entries = [
        entry for entry in comparison.entries if entry.images_per_s and len(entry.crews) == 1
    ]
    if not entries:
        return None
    figure, axes = canvas()
    most = max(entry.num_workers for entry in entries)
    one_worker = next(
        (entry.images_per_s / entry.speedup for entry in entries if entry.speedup), math.inf
    )
    if math.isfinite(one_worker):
        axes.plot(
            [0, most],
            [0, most * one_worker],
            color=FAINT,
            linestyle="--",
            linewidth=1,
            label="ideal",
        )
    if comparison.fit:
        grid = [most * (i + 1) / 100 for i in range(120)]
        axes.plot(
            grid,
            [comparison.fit.images_per_s(n) for n in grid],
            color=BLUE,
            linewidth=1.2,
            label="fit",
        )
        if comparison.fit.limit and comparison.fit.limit < 1.3 * most * one_worker:
            axes.axhline(
                comparison.fit.limit, color=RED, linestyle=":", linewidth=1.2, label="limit"
            )
    for kind, colour, mark in (("measured", BLUE, "o"), ("synchronous", RED, "s")):
        shown = [
            (entry.num_workers, entry.images_per_s)
            for entry in entries
            if is_sync(entry) == (kind == "synchronous")
        ]
        if shown:
            axes.plot(*zip(*shown), mark, color=colour, markersize=5, label=kind)
    axes.set(xlabel="workers", ylabel=f"{comparison.unit}/s")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    in_thousands(axes.yaxis)
    from_zero(axes)
    figure.legend(loc="outside upper left", ncols=3)
    rows = [[entry.name, entry.num_workers, entry.images_per_s] for entry in entries]
    return figure, Numbers(["run", "workers", f"{comparison.unit}/s"], rows)


def _efficiency(comparison: Comparison) -> Drawn | None:
    return _by_workers(
        comparison,
        "efficiency (%)",
        lambda entry: 100 * entry.efficiency if entry.efficiency else None,
    )


def _time_to_target(comparison: Comparison) -> Drawn | None:
    scale, unit = clock(
        max((entry.reached.seconds for entry in comparison.entries if entry.reached), default=0.0)
    )
    return _by_workers(
        comparison,
        f"time to the target ({unit})",
        lambda entry: entry.reached.seconds / scale if entry.reached else None,
    )


def _by_workers(
    comparison: Comparison, label: str, value: Callable[[Entry], float | None]
) -> Drawn | None:
    """Draw one number of each run against its workers; None if no run has it."""
    entries = [entry for entry in comparison.entries if len(entry.crews) == 1]
    rows = [[entry.name, entry.num_workers, value(entry)] for entry in entries]
    if not any(number is not None for _, _, number in rows):
        return None
    figure, axes = canvas()
    for is_this, colour, mark, name in (
        (False, BLUE, "o", "asynchronous"),
        (True, RED, "s", "synchronous"),
    ):
        points = [
            (num_workers, number)
            for entry, (_, num_workers, number) in zip(entries, rows)
            if is_sync(entry) == is_this and number is not None
        ]
        if points:
            is_line = len(dict(points)) == len(points)
            style = f"{mark}-" if is_line else mark
            axes.plot(*zip(*points), style, color=colour, markersize=4, label=name)
    axes.set(xlabel="workers", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    from_zero(axes)
    if any(map(is_sync, comparison.entries)):
        legend(axes, 2)
    return figure, Numbers(["run", "workers", label], rows)


def _curves(comparison: Comparison, summaries: Sequence[Summary], by_time: bool) -> Drawn | None:
    shown = _with_curve(comparison, summaries)[:MAX_CURVES]
    if not shown:
        return None
    scale, unit = clock(
        max(summary.seconds_at(summary.validations[-1].when) for _, summary in shown)
    )
    label, measure = f"time ({unit})" if by_time else "samples applied", comparison.measure
    curves, rows = [], []
    for entry, summary in shown:
        points = [
            (
                summary.seconds_at(score.when) / scale if by_time else score.samples,
                measure.drawn(measure.of(score)),
            )
            for score in summary.validations
            if measure.of(score) is not None
        ]
        curves.append(points)
        rows += [[entry.name, *point] for point in points]
    figure, axes = canvas()
    _scale(axes, measure, [value for points in curves for _, value in points], shown)
    for colour, (entry, _), points in zip(COLOURS, shown, curves):
        axes.plot(
            *zip(*points),
            color=colour,
            linestyle=STYLES[is_sync(entry)],
            marker=MARKS[is_sync(entry)],
            markersize=2.5,
            clip_on=False,
            label=_label(entry, comparison),
        )
    if comparison.target is not None:
        axes.axhline(measure.drawn(comparison.target), color=FAINT, linestyle="--", linewidth=0.9)
    axes.set_xlim(left=0)
    axes.set(xlabel=label, ylabel=measure.axis)
    if not by_time:
        in_thousands(axes.xaxis, 4)
    figure.legend(loc="outside upper left", ncols=2)
    return figure, Numbers(["run", label, measure.axis], rows)


def _scale(
    axes, measure: Measure, values: Sequence[float], shown: Sequence[tuple[Entry, Summary]]
) -> None:
    """Stretch the axis of an accuracy; any other measure has a plain one."""
    if measure.is_accuracy:
        images = max(summary.validations[-1].num_images for _, summary in shown)
        stretch_to_100(axes, values, 50 / max(1, images))


def _with_curve(
    comparison: Comparison, summaries: Sequence[Summary]
) -> list[tuple[Entry, Summary]]:
    """Return the runs whose accuracy over time is known, by workers."""
    # as `compare` has them
    ordered = sorted(summaries, key=lambda summary: (summary.num_workers, summary.name))
    return [
        (entry, summary)
        for entry, summary in zip(comparison.entries, ordered)
        if summary.validations and summary.started is not None
    ]


def _label(entry: Entry, comparison: Comparison) -> str:
    text = f"{entry.num_workers} worker{'s' * (entry.num_workers != 1)}"
    if len({other.n_push for other in comparison.entries}) > 1:
        text += f", n_push {entry.n_push}"
    if len({other.warm_start_epochs for other in comparison.entries}) > 1:
        text += ", warm" if entry.warm_start_epochs else ", cold"
    return text + (", sync" if is_sync(entry) else "")


def _grid(comparison: Comparison, summaries: Sequence[Summary]) -> Drawn | None:
    """Draw the paper's figure, if the runs differ in workers and in the batches of a push."""
    shown = [
        (entry, summary)
        for entry, summary in _with_curve(comparison, summaries)
        if not is_sync(entry)
    ]
    measure = comparison.measure
    counts, pushes = (
        sorted({getattr(entry, name) for entry, _ in shown}, key=_numbers_first)
        for name in ("num_workers", "n_push")
    )
    if len(counts) < 2 or len(pushes) < 2:
        return None
    starts = sorted({entry.warm_start_epochs > 0 for entry, _ in shown})
    figure = Figure(figsize=(1.35 * WIDTH, 5.2), layout="constrained")
    panels = figure.subplots(2, len(starts), sharex="row", sharey="row", squeeze=False)
    scale, unit = clock(
        max(summary.seconds_at(summary.validations[-1].when) for _, summary in shown)
    )
    for warm, accuracy, time in zip(starts, *panels):
        part = [
            (entry, summary) for entry, summary in shown if (entry.warm_start_epochs > 0) == warm
        ]
        _scale(
            accuracy,
            measure,
            [measure.drawn(measure.of(one)) for _, run in shown for one in run.validations],
            shown,
        )
        for entry, summary in part:
            accuracy.plot(
                [summary.seconds_at(score.when) / scale for score in summary.validations],
                [measure.drawn(measure.of(score)) for score in summary.validations],
                linewidth=1.1,
                color=COLOURS[counts.index(entry.num_workers) % len(COLOURS)],
                linestyle=STYLES[pushes.index(entry.n_push) % len(STYLES)],
            )
        for number, n_push in enumerate(pushes):
            there = [
                (entry.num_workers, entry.reached.seconds / scale)
                for entry, _ in part
                if entry.n_push == n_push and entry.reached
            ]
            if there:
                time.plot(
                    *zip(*there),
                    marker=MARKS[number % len(MARKS)],
                    markersize=4,
                    color=FAINT,
                    linestyle=STYLES[number % len(STYLES)],
                )
        accuracy.set_title("warm start" if warm else "cold start")
        accuracy.set(xlabel=f"time ({unit})")
        time.set(xlabel="workers")
        time.xaxis.set_major_locator(MaxNLocator(integer=True))
        time.set_ylim(bottom=0)
    panels[0][0].set_ylabel(measure.axis)
    panels[1][0].set_ylabel(f"time to the target ({unit})")
    keys = [
        Line2D(
            [],
            [],
            color=COLOURS[number % len(COLOURS)],
            label=f"{count} worker{'s' * (count != 1)}",
        )
        for number, count in enumerate(counts)
    ]
    keys += [
        Line2D(
            [],
            [],
            color=FAINT,
            linestyle=STYLES[number % len(STYLES)],
            marker=MARKS[number % len(MARKS)],
            markersize=4,
            label=f"n_push {n_push}",
        )
        for number, n_push in enumerate(pushes)
    ]
    figure.legend(handles=keys, loc="outside upper left", ncols=4)
    rows = [
        [entry.name, entry.num_workers, entry.n_push, entry.reached and entry.reached.seconds]
        for entry, _ in shown
    ]
    return figure, Numbers(["run", "workers", "n_push", "time to the target (s)"], rows)


def _numbers_first(value: int | str) -> tuple[bool, int | str]:
    return isinstance(value, str), value

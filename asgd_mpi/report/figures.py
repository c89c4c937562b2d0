"""The figures of one run, from a `Summary`, each with the numbers that it is drawn from; a figure without data is not drawn.

Every axis carries its unit, every figure a sentence on how to read it. matplotlib is loaded here, and this module when the
first page is drawn. One figure has one pair of axes, so that a phone shows it with letters as large as those of the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from asgd_mpi.record.events import PHASES
from asgd_mpi.record.summary import Rank, Summary
from asgd_mpi.report import units
from asgd_mpi.report.measure import measures
from asgd_mpi.report.palette import (
    BLUE,
    GREEN,
    GREY,
    PHASE_COLOURS,
    PURPLE,
    RED,
    text_on,
)
from asgd_mpi.report.svg import FAINT, INK, PAPER, SETTINGS, to_svg

WIDTH, HEIGHT = 4.0, 2.9  # inches; on a page it fills its column
MAX_BARS = 16  # ranks with a bar of their own
MAX_NUMBERS = 130  # rows of the table under a figure
CHARACTER = 1.9  # percent of a time bar that a character of its text takes
HALF = 50.0  # best accuracy in percent, from which the axis is stretched towards 100 %


@dataclass(frozen=True)
class Numbers:
    """What a figure is drawn from: one list a row."""

    columns: list[str]
    rows: list[list[Any]]

    def shown(self) -> list[list[str]]:
        """Return at most MAX_NUMBERS rows, evenly, with six digits."""
        rows = self.rows
        if len(rows) > MAX_NUMBERS:
            step = (len(rows) - 1) / (MAX_NUMBERS - 1)
            rows = [rows[round(number * step)] for number in range(MAX_NUMBERS)]
        return [[_digits(value) for value in row] for row in rows]

    def ranges(self) -> str:
        """Return in words from where to where each column goes."""
        found = []
        for name, column in zip(self.columns, zip(*self.rows)):
            known = [v for v in column if isinstance(v, (int, float)) and v == v]  # no NaN
            if known:
                found.append(f"{name} from {_digits(min(known))} to {_digits(max(known))}")
        return "; ".join(found[:5])


def _digits(value: Any) -> str:
    if value is None or value != value:
        return units.NONE
    if isinstance(value, float):
        return f"{value:,.6g}"
    return f"{value}"


@dataclass(frozen=True)
class Picture:
    title: str
    caption: str
    svg: str
    numbers: Numbers


Drawn = tuple[Figure, Numbers]


@dataclass(frozen=True)
class Kind:
    """A figure that a report has: `draw` returns None if the run has no data for it."""

    name: str
    title: str
    caption: str
    draw: Callable[[Summary], Drawn | None]


def pictures(summary: Summary) -> tuple[list[Picture], list[str]]:
    """Draw the figures; returns them, and the titles of those that the run has no data for."""
    drawn, missing = [], []
    with matplotlib.rc_context(SETTINGS):
        for kind in KINDS:
            found = kind.draw(summary)
            title = _named(kind.title, summary)
            if found is None:
                missing.append(title)
            else:
                drawn.append(picture(kind.name, title, _named(kind.caption, summary), *found))
    return drawn, missing


def _named(text: str, summary: Summary) -> str:
    """Put what the samples and the measure are called into a title."""
    words = {"Unit": summary.unit.capitalize(), "Measure": measures(summary.validations)[0].name}
    words["Measure"] = words["Measure"][:1].upper() + words["Measure"][1:]
    return re.sub(r"\{(\w+)\}", lambda found: words[found[1]], text)


def picture(name: str, title: str, caption: str, figure: Figure, numbers: Numbers) -> Picture:
    """Turn a figure into SVG; who cannot see it is told its ranges."""
    svg = to_svg(figure, name, f"{title}: {numbers.ranges()}.")
    return Picture(title, caption, svg, numbers)


def canvas(height: float = HEIGHT) -> tuple[Figure, Any]:
    """Return an empty figure and its axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def clock(total_s: float) -> tuple[float, str]:
    """Return the unit for a time axis: seconds in it, and its name."""
    return next(
        (scale, name)
        for scale, name in ((1.0, "s"), (60.0, "min"), (3600.0, "h"))
        if total_s < 180 * scale or scale == 3600.0
    )


def from_zero(axes) -> None:
    """Begin both axes at 0, and leave room above the highest value."""
    axes.set_ylim(0, max(axes.get_ylim()[1], 1.06 * axes.dataLim.y1))
    axes.set_xlim(left=0)


def in_thousands(axis, num_ticks: int = 6) -> None:
    def told(value: float, _) -> str:
        if abs(value) >= 1000:
            return f"{value:,.0f}"
        return f"{value:.6g}"

    axis.set_major_formatter(FuncFormatter(told))
    axis.set_major_locator(MaxNLocator(num_ticks))


def legend(axes, columns: int = 3) -> None:
    """Put a legend above the axes, where it covers nothing."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=columns,
        borderaxespad=0.1,
        columnspacing=0.9,
        handlelength=1.4,
    )


def stretch_to_100(axes, percents: Sequence[float], finest: float) -> None:
    """Scale an axis of accuracies in percent by their errors, if the best is above HALF: 99 and 99.9 lie apart.

    `finest`: the smallest error in percent that is told from none, such as half an image.
    """
    best = max(percents, default=0.0)
    if best <= HALF:
        axes.set_ylim(0, 1.08 * best or 1.0)  # both: one alone would fix the other where it is
        return
    finest = max(1e-4, min(finest, 100 - HALF))
    axes.set_yscale(
        "function",
        functions=(
            lambda y: -np.log10(np.maximum(100 - np.asarray(y), finest)),
            lambda y: 100 - 10 ** -np.asarray(y),
        ),
    )
    low = min(percents)
    steps = [0, 50, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9, 99.95, 99.98, 99.99]
    highest = min(best + 0.7 * (100 - best), 100 - 1.8 * finest)
    shown = [step for step in steps if low - 10 <= step <= highest]
    if best > 100 - finest:
        shown.append(100)
    axes.yaxis.set_major_locator(FixedLocator(shown))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()


def _times(summary: Summary) -> tuple[list[float], float, str]:
    scale, unit = clock(summary.timeline.t[-1])
    return [t / scale for t in summary.timeline.t], scale, f"training time ({unit})"


def _table(label: str, t: Sequence[float], **columns: Sequence[Any]) -> Numbers:
    """Numbers over time; the names of the columns have blanks for underscores."""
    names = [label, *(name.replace("_", " ") for name in columns)]
    return Numbers(names, [list(row) for row in zip(t, *columns.values())])


def _total(summary: Summary) -> Drawn | None:
    line = summary.timeline
    if not line.t or not any(line.images_per_s) or not summary.images_per_s:
        return None
    t, scale, label = _times(summary)
    figure, axes = canvas()
    axes.step(t, line.images_per_s, where="mid", color=BLUE, label="all workers")
    axes.axhline(summary.images_per_s, color=FAINT, linewidth=0.9, linestyle="--", label="mean")
    _mark_events(axes, summary, scale)
    axes.set(xlabel=label, ylabel=f"{summary.unit}/s, total")
    from_zero(axes)
    in_thousands(axes.yaxis)
    legend(axes)
    return figure, _table(label, t, **{f"{summary.unit}/s": line.images_per_s})


def _each(summary: Summary) -> Drawn | None:
    line = summary.timeline
    if not line.t or not any(line.images_per_s) or not summary.images_per_s:
        return None
    t, _, label = _times(summary)
    figure, axes = canvas()
    if summary.num_workers > len(line.workers):
        axes.fill_between(
            t,
            line.worker_lowest,
            line.worker_highest,
            step="mid",
            color=GREY,
            alpha=0.3,
            linewidth=0,
            label="lowest to highest",
        )
    axes.step(
        t,
        line.worker_median,
        where="mid",
        color=INK,
        linewidth=1.8,
        label="median worker",
        zorder=3,
    )
    slow = [worker.rank for worker in summary.stragglers]
    for series in line.workers:
        if series.rank in slow:
            look = {"color": RED, "linestyle": "--", "linewidth": 1.4}
        else:
            look = {"color": BLUE, "linestyle": "-", "linewidth": 0.8}
        if series.rank in slow[:2]:
            look["label"] = f"rank {series.rank}, straggler"
        axes.step(t, series.images_per_s, where="mid", **look)
    axes.set(xlabel=label, ylabel=f"{summary.unit}/s, each worker")
    from_zero(axes)
    in_thousands(axes.yaxis)
    legend(axes, 2)
    each = {f"rank_{series.rank}": series.images_per_s for series in line.workers}
    return figure, _table(label, t, median=line.worker_median, **each)


def _mark_events(axes, summary: Summary, scale: float) -> None:
    """Draw failures, retired workers, restarts, ranks that fell silent before the others, and checkpoints."""
    lines = {
        "failed": (RED, "-", []),
        "retired": (RED, (0, (4, 2)), []),
        "restart": (INK, "-", []),
        "ended early": (PURPLE, "-.", []),
        "checkpoint": (GREEN, (0, (1, 2)), []),
    }
    latest = max((rank.last_t for rank in summary.ranks if rank.last_t is not None), default=0.0)
    quiet, present = max(5.0, 0.02 * (summary.training_s or 0.0)), summary.present
    for rank in summary.ranks:
        if rank.status == "failed":
            lines["failed"][2].append(rank.ended)
        elif rank in present and rank.last_t is not None and rank.last_t < latest - quiet:
            lines["ended early"][2].append(rank.last_t)
    lines["retired"][2].extend(loss.t for loss in summary.retirements[:20])
    lines["restart"][2].extend(start.started for start in summary.restarts[1:20])
    lines["checkpoint"][2].extend(checkpoint.t for checkpoint in summary.checkpoints[-20:])
    for name, (colour, style, times) in lines.items():
        for number, t in enumerate(times):
            axes.axvline(
                summary.seconds_at(t) / scale,
                color=colour,
                linestyle=style,
                linewidth=1.2,
                label=name if not number else None,
            )


def _split(summary: Summary) -> Drawn | None:
    rows = _bars(
        [rank for rank in summary.ranks if rank.seconds],
        {worker.rank: worker.images_per_s or 0.0 for worker in summary.workers},
    )
    if not rows:
        return None
    figure, axes = canvas(height=1.5 + 0.27 * len(rows))
    left = [0.0] * len(rows)
    for phase in PHASES:
        shares = [100 * phases[phase] / seconds for _, phases, seconds in rows]
        if max(shares) >= 0.05:
            colour = PHASE_COLOURS[phase]
            axes.barh(
                range(len(rows)),
                shares,
                left=left,
                color=colour,
                label=phase,
                height=0.8,
                edgecolor=PAPER,
                linewidth=0.6,
            )
            for row, (start, share) in enumerate(zip(left, shares)):
                words = [f"{phase} {share:.0f}", f"{share:.0f}"]
                text = next((word for word in words if CHARACTER * len(word) + 1 <= share), "")
                axes.text(
                    start + share / 2,
                    row,
                    text,
                    color=text_on(colour),
                    ha="center",
                    va="center",
                    fontsize=8,
                )
        left = [a + b for a, b in zip(left, shares)]
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the rank's time (%)")
    axes.grid(False)
    figure.legend(loc="outside upper left", ncols=4, handlelength=1.2, columnspacing=0.9)
    numbers = Numbers(
        ["rank", *(f"{phase} (%)" for phase in PHASES)],
        [
            [name, *(100 * phases[phase] / seconds for phase in PHASES)]
            for name, phases, seconds in rows
        ],
    )
    return figure, numbers


def _bars(
    ranks: list[Rank], images_per_s: dict[int, float]
) -> list[tuple[str, dict[str, float], float]]:
    """Return (name, phases, seconds) of each rank or, of many, of the servers, all workers, and the slowest and fastest."""

    def row(rank: Rank) -> tuple[str, dict[str, float], float]:
        name = f"rank {rank.rank}"
        if rank.role != "worker":
            name += f", {rank.role}"
        return name, rank.phases, rank.seconds

    workers, servers = (
        [rank for rank in ranks if rank.role == role] for role in ("worker", "server")
    )
    if len(ranks) <= MAX_BARS or not workers:
        return [row(rank) for rank in ranks[:MAX_BARS]]
    total = sum(rank.seconds for rank in workers)
    mean = {phase: sum(rank.phases[phase] for rank in workers) for phase in PHASES}
    by_speed = sorted(workers, key=lambda rank: images_per_s.get(rank.rank, 0.0))
    if len(workers) > 10:
        by_speed = by_speed[:5] + by_speed[-5:]
    return [
        *map(row, servers[:5]),
        (f"all {len(workers)} workers", mean, total),
        *map(row, by_speed),
    ]


def _staleness(summary: Summary) -> Drawn | None:
    line = summary.timeline
    if summary.staleness is None or not line.t:
        return None
    t, _, label = _times(summary)
    figure, axes = canvas()
    axes.step(t, _gaps(line.staleness_max), where="mid", color=GREY, linewidth=0.9, label="largest")
    axes.step(t, _gaps(line.staleness), where="mid", color=PURPLE, label="mean")
    if len(summary.crews) == 1:
        axes.axhline(
            summary.num_workers - 1, color=FAINT, linewidth=0.9, linestyle="--", label="workers - 1"
        )
    axes.set(xlabel=label, ylabel="staleness (versions)")
    from_zero(axes)
    legend(axes)
    return figure, _table(label, t, mean=line.staleness, largest=line.staleness_max)


def _histogram(summary: Summary) -> Drawn | None:
    if summary.staleness is None:
        return None
    bins = summary.staleness.histogram
    pushes = sum(bin.pushes for bin in bins)
    figure, axes = canvas()
    axes.bar(
        [(bin.low + bin.high) / 2 for bin in bins],
        [100 * bin.pushes / pushes for bin in bins],
        width=[0.9 * (bin.high - bin.low + 1) for bin in bins],
        color=PURPLE,
    )
    axes.set(xlabel="staleness (versions)", ylabel="pushes (%)")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    rows = [[bin.low, bin.high, bin.pushes] for bin in bins]
    return figure, Numbers(["staleness from", "to", "pushes"], rows)


def _gaps(values: list[float | None]) -> list[float]:
    """Return missing values as NaN: a gap in the line."""
    return [float("nan") if value is None else value for value in values]


def _accuracy(summary: Summary) -> Drawn | None:
    if not summary.validations or summary.started is None:
        return None
    scores = summary.validations
    scale, unit = clock(summary.seconds_at(scores[-1].when))
    times = [summary.seconds_at(score.when) / scale for score in scores]
    label = f"training time ({unit})"
    return _accuracy_against(summary, times, label), _table(label, times, **_curves(summary))


def _accuracy_by_epoch(summary: Summary) -> Drawn | None:
    if not summary.validations or summary.started is None:
        return None
    epochs, last = [score.epoch for score in summary.validations], summary.validations[-1]
    figure = _accuracy_against(summary, epochs, "epochs")
    if last.epoch and last.samples:
        per_epoch = last.samples / last.epoch
        above = figure.axes[0].secondary_xaxis(
            "top", functions=(lambda x: x * per_epoch, lambda x: x / per_epoch)
        )
        above.set_xlabel("samples applied")
        in_thousands(above.xaxis, 3)
    samples = [score.samples for score in summary.validations]
    return figure, _table("epochs", epochs, samples_applied=samples, **_curves(summary))


def _curves(summary: Summary) -> dict[str, list[float]]:
    """Return the values of each validation, in the unit of the axis, by the name of the measure."""
    return {
        measure.axis: [measure.drawn(measure.of(score)) for score in summary.validations]
        for measure in measures(summary.validations)
    }


def _accuracy_against(summary: Summary, x: Sequence[float], label: str) -> Figure:
    """Draw what decides which version is the best; top-5 accuracy, which has its unit, beside it."""
    figure, axes = canvas()
    first, *others = measures(summary.validations)
    curves = _curves(summary)
    values = curves[first.axis]
    if first.is_accuracy:
        second = curves[others[0].axis]
        stretch_to_100(axes, [*values, *second], 50 / max(1, summary.validations[-1].num_images))
        axes.plot(x, second, "--", linewidth=1, color=GREY, label=others[0].name, clip_on=False)
    best = f"{first.name}, best {first.cell(first.best(summary.validations))}"
    axes.plot(x, values, "o-", markersize=3, color=GREEN, label=best, clip_on=False)
    axes.set_xlim(left=0)
    axes.set(xlabel=label, ylabel=first.axis)
    figure.legend(loc="outside upper left", ncols=2)  # over what stands above the axes, too
    return figure


def _rate(summary: Summary) -> Drawn | None:
    line = summary.timeline
    if not any(value is not None for value in line.lr):
        return None
    t, _, label = _times(summary)
    figure, axes = canvas()
    axes.plot(t, _gaps(line.lr), color=RED)
    axes.set(xlabel=label, ylabel="learning rate")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    from_zero(axes)
    return figure, _table(label, t, learning_rate=line.lr)


def _loss(summary: Summary) -> Drawn | None:
    line = summary.timeline
    if not any(value is not None for value in line.loss):
        return None
    t, _, label = _times(summary)
    figure, axes = canvas()
    axes.plot(t, _gaps(line.loss), color=BLUE)
    axes.set(xlabel=label, ylabel="training loss")
    from_zero(axes)
    return figure, _table(label, t, training_loss=line.loss)


def _load(summary: Summary) -> Drawn | None:
    line = summary.timeline
    if not any(value is not None for value in line.server_busy):
        return None
    t, _, label = _times(summary)
    busy = [100 * share for share in _gaps(line.server_busy)]
    figure, axes = canvas()
    axes.step(t, busy, where="mid", color=BLUE)
    axes.axhline(100, color=RED, linewidth=0.9, linestyle="--")
    axes.set(xlabel=label, ylabel="server busy (%)")
    from_zero(axes)
    axes.set_ylim(0, 105)
    return figure, _table(label, t, **{"busy (%)": busy})


def _traffic(summary: Summary) -> Drawn | None:
    line = summary.timeline
    if not any([*line.pushed_bytes_per_s, *line.fetched_bytes_per_s]):
        return None
    t, _, label = _times(summary)
    figure, axes = canvas()
    rates = {
        "pushed": [value / 1e6 for value in line.pushed_bytes_per_s],
        "fetched": [value / 1e6 for value in line.fetched_bytes_per_s],
    }
    for (name, values), colour, style in zip(rates.items(), (RED, BLUE), ("-", "--")):
        axes.step(t, values, where="mid", color=colour, linestyle=style, label=name)
    axes.set(xlabel=label, ylabel="traffic (MB/s)")
    in_thousands(axes.yaxis)
    legend(axes, 2)
    from_zero(axes)
    return figure, _table(label, t, **{f"{name} (MB/s)": values for name, values in rates.items()})


KINDS = (
    Kind(
        "speed",
        "{Unit} per second",
        "{Unit} applied at the server, with failures, ranks that ended early and checkpoints.",
        _total,
    ),
    Kind(
        "workers",
        "{Unit} per second of each worker",
        "As applied at the server; of many workers, the slowest and the fastest.",
        _each,
    ),
    Kind(
        "split",
        "Where each rank's time went",
        "In percent of the time that the rank's intervals cover. push and fetch are waits; "
        "apply and checkpoint are the server's work.",
        _split,
    ),
    Kind(
        "accuracy",
        "{Measure} over time",
        "On the validation split, at the time when the version was made.",
        _accuracy,
    ),
    Kind(
        "epochs",
        "{Measure} over epochs",
        "On the validation split, against the epochs and samples that had made the version.",
        _accuracy_by_epoch,
    ),
    Kind("loss", "Training loss", "Of the pushes, in the order in which they were applied.", _loss),
    Kind(
        "staleness",
        "Staleness",
        "Versions applied between the fetch that a gradient was computed on and its own "
        "application. With equally fast workers the mean is just under workers - 1.",
        _staleness,
    ),
    Kind("histogram", "Pushes by staleness", "Over the whole run.", _histogram),
    Kind("rate", "Learning rate", "It follows the samples applied.", _rate),
    Kind(
        "load",
        "Server load",
        "Busy is apply and checkpoint. A server at 100 % is the limit of the run.",
        _load,
    ),
    Kind("traffic", "Traffic", "The sum over all workers.", _traffic),
)

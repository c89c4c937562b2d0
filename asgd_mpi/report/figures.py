"""The figures of one run, from a `Summary`; a figure without data is not drawn.

Every axis carries its unit, every figure a sentence on how to read it. matplotlib is loaded here, and this module when the
first page is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from asgd_mpi.record.events import PHASES
from asgd_mpi.record.summary import Rank, Summary
from asgd_mpi.report.svg import FAINT, INK, SETTINGS, to_svg

WIDTH, HEIGHT = 5.4, 2.9                # inches; on a page it fills its column
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#3b82c4", "#d97706", "#159a6c", "#d1434b", "#a862c4", "#8a8f98"
PHASE_COLOURS = {"data": ORANGE, "compute": GREEN, "push": RED, "fetch": PURPLE, "validate": "#55b6d9", "apply": BLUE, "servers": "#1f4e79",
                 "checkpoint": "#9b7440", "idle": GREY}
MAX_BARS = 16                           # ranks with a bar of their own


@dataclass(frozen=True)
class Picture:
    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Kind:
    """A figure that a report has: `draw` returns None if the run has no data for it."""

    name: str
    title: str
    caption: str
    draw: Callable[[Summary], Figure | None]


def pictures(summary: Summary) -> tuple[list[Picture], list[str]]:
    """The figures, and the titles of those that the run has no data for."""
    drawn, missing = [], []
    with matplotlib.rc_context(SETTINGS):
        for kind in KINDS:
            figure = kind.draw(summary)
            if figure is None:
                missing.append(kind.title)
            else:
                drawn.append(Picture(kind.title, kind.caption, to_svg(figure, kind.name, kind.title)))
    return drawn, missing


def canvas(rows: int = 1, columns: int = 1, height: float = HEIGHT, **options):
    """An empty figure and its axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def clock(total_s: float) -> tuple[float, str]:
    """The unit for a time axis: seconds in it, and its name."""
    return next((scale, name) for scale, name in ((1.0, "s"), (60.0, "min"), (3600.0, "h")) if total_s < 180 * scale
                or scale == 3600.0)


def from_zero(axes) -> None:
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)


def in_thousands(axis, num_ticks: int = 6) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"))
    axis.set_major_locator(MaxNLocator(num_ticks))


def _times(summary: Summary) -> tuple[list[float], float, str]:
    scale, unit = clock(summary.timeline.t[-1])
    return [t / scale for t in summary.timeline.t], scale, f"training time ({unit})"


def _speed(summary: Summary) -> Figure | None:
    line = summary.timeline
    if not line.t or not any(line.images_per_s) or not summary.images_per_s:
        return None
    t, scale, label = _times(summary)
    figure, (total, each) = canvas(2, height=4.4, sharex=True)
    total.step(t, line.images_per_s, where="mid", color=BLUE, label="all workers")
    total.axhline(summary.images_per_s, color=FAINT, linewidth=0.9, linestyle="--", label="mean")
    _mark_events(total, summary, scale)
    if summary.num_workers > len(line.workers):
        each.fill_between(t, line.worker_lowest, line.worker_highest, step="mid", color=GREY, alpha=0.3, linewidth=0,
                          label="lowest to highest")
    each.step(t, line.worker_median, where="mid", color=INK, linewidth=1.8, label="median worker", zorder=3)
    slow = [worker.rank for worker in summary.stragglers]
    for series in line.workers:
        is_slow = series.rank in slow
        each.step(t, series.images_per_s, where="mid", color=ORANGE if is_slow else BLUE, linewidth=1.4 if is_slow else 0.7,
                  alpha=1 if is_slow else 0.55, label=f"rank {series.rank}, straggler" if series.rank in slow[:2] else None)
    for axes, title in ((total, "images/s, total"), (each, "images/s, each worker")):
        axes.set_ylabel(title)
        from_zero(axes)
        in_thousands(axes.yaxis)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.1)
    each.set_xlabel(label)
    return figure


def _mark_events(axes, summary: Summary, scale: float) -> None:
    """Failures, retired workers, restarts, ranks that fell silent before the others, and checkpoints, on the time axis."""
    lines = {"failed": (RED, "-", []), "retired": (RED, (0, (4, 2)), []), "restart": (INK, "-", []),
             "ended early": (ORANGE, ":", []), "checkpoint": (GREEN, (0, (1, 2)), [])}
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
            axes.axvline(summary.seconds_at(t) / scale, color=colour, linestyle=style, linewidth=1.2,
                         label=name if not number else None)


def _split(summary: Summary) -> Figure | None:
    rows = _bars([rank for rank in summary.ranks if rank.seconds],
                 {worker.rank: worker.images_per_s or 0.0 for worker in summary.workers})
    if not rows:
        return None
    figure, axes = canvas(height=1.3 + 0.24 * len(rows))
    left = [0.0] * len(rows)
    for phase in PHASES:
        shares = [100 * phases[phase] / seconds for _, phases, seconds in rows]
        if max(shares) >= 0.05:
            axes.barh(range(len(rows)), shares, left=left, color=PHASE_COLOURS[phase], label=phase, height=0.75)
        left = [a + b for a, b in zip(left, shares)]
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the rank's time (%)")
    axes.grid(False)
    figure.legend(loc="outside upper left", ncols=5)
    return figure


def _bars(ranks: list[Rank], images_per_s: dict[int, float]) -> list[tuple[str, dict[str, float], float]]:
    """(name, phases, seconds) of each rank or, of many, of the servers, all workers, and the slowest and fastest."""
    def row(rank: Rank) -> tuple[str, dict[str, float], float]:
        return f"rank {rank.rank}" + ("" if rank.role == "worker" else f", {rank.role}"), rank.phases, rank.seconds

    workers, servers = ([rank for rank in ranks if rank.role == role] for role in ("worker", "server"))
    if len(ranks) <= MAX_BARS or not workers:
        return [row(rank) for rank in ranks[:MAX_BARS]]
    total = sum(rank.seconds for rank in workers)
    mean = {phase: sum(rank.phases[phase] for rank in workers) for phase in PHASES}
    by_speed = sorted(workers, key=lambda rank: images_per_s.get(rank.rank, 0.0))
    shown = by_speed if len(workers) <= 10 else [*by_speed[:5], *by_speed[-5:]]
    return [*map(row, servers[:5]), (f"all {len(workers)} workers", mean, total), *map(row, shown)]


def _staleness(summary: Summary) -> Figure | None:
    line = summary.timeline
    if summary.staleness is None or not line.t:
        return None
    t, _, label = _times(summary)
    figure, (over_time, histogram) = canvas(1, 2, sharey=False)
    over_time.step(t, _gaps(line.staleness_max), where="mid", color=GREY, linewidth=0.9, label="largest")
    over_time.step(t, _gaps(line.staleness), where="mid", color=PURPLE, label="mean")
    if len(summary.crews) == 1:
        over_time.axhline(summary.num_workers - 1, color=FAINT, linewidth=0.9, linestyle="--", label="workers - 1")
    over_time.set(xlabel=label, ylabel="staleness (versions)")
    from_zero(over_time)
    over_time.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.1, columnspacing=0.8,
                     handlelength=1.2)
    bins = summary.staleness.histogram
    pushes = sum(bin.pushes for bin in bins)
    histogram.bar([(bin.low + bin.high) / 2 for bin in bins], [100 * bin.pushes / pushes for bin in bins],
                  width=[0.9 * (bin.high - bin.low + 1) for bin in bins], color=PURPLE)
    histogram.set(xlabel="staleness (versions)", ylabel="pushes (%)")
    histogram.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    return figure


def _gaps(values: list[float | None]) -> list[float]:
    """Missing values as NaN: a gap in the line."""
    return [float("nan") if value is None else value for value in values]


def _accuracy(summary: Summary) -> Figure | None:
    scores = summary.validations
    if not scores or summary.started is None:
        return None
    scale, unit = clock(summary.seconds_at(scores[-1].when))
    figure, (by_time, by_epoch) = canvas(1, 2, sharey=True)
    for axes, x in ((by_time, [summary.seconds_at(score.when) / scale for score in scores]),
                    (by_epoch, [score.epoch for score in scores])):
        axes.plot(x, [100 * (1 - score.top1_error) for score in scores], "o-", markersize=2.5, color=GREEN, label="top-1")
        axes.plot(x, [100 * (1 - score.top5_error) for score in scores], "-", linewidth=1, color=GREY, label="top-5")
        axes.set_xlim(left=0)
    by_time.set(xlabel=f"training time ({unit})", ylabel="accuracy (%)")
    by_time.legend(loc="lower right")
    by_epoch.set(xlabel="epochs")
    last = scores[-1]
    if last.epoch and last.samples:
        per_epoch = last.samples / last.epoch
        above = by_epoch.secondary_xaxis("top", functions=(lambda x: x * per_epoch, lambda x: x / per_epoch))
        above.set_xlabel("samples applied")
        in_thousands(above.xaxis, 3)
    return figure


def _rate(summary: Summary) -> Figure | None:
    line = summary.timeline
    if not any(value is not None for value in line.lr):
        return None
    t, _, label = _times(summary)
    figure, (rate, loss) = canvas(1, 2)
    rate.plot(t, _gaps(line.lr), color=ORANGE)
    rate.set(xlabel=label, ylabel="learning rate")
    rate.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    loss.plot(t, _gaps(line.loss), color=BLUE)
    loss.set(xlabel=label, ylabel="training loss")
    from_zero(rate)
    from_zero(loss)
    return figure


def _load(summary: Summary) -> Figure | None:
    line = summary.timeline
    if not any(value is not None for value in line.server_busy):
        return None
    t, _, label = _times(summary)
    figure, (busy, traffic) = canvas(1, 2)
    busy.step(t, [100 * value for value in _gaps(line.server_busy)], where="mid", color=BLUE)
    busy.axhline(100, color=RED, linewidth=0.9, linestyle="--")
    busy.set(xlabel=label, ylabel="server busy (%)")
    from_zero(busy)
    busy.set_ylim(0, 105)
    traffic.step(t, [value / 1e6 for value in line.pushed_bytes_per_s], where="mid", color=RED, label="pushed")
    traffic.step(t, [value / 1e6 for value in line.fetched_bytes_per_s], where="mid", color=PURPLE, label="fetched")
    traffic.set(xlabel=label, ylabel="traffic (MB/s)")
    in_thousands(traffic.yaxis)
    traffic.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.1)
    from_zero(traffic)
    return figure


KINDS = (
    Kind("speed", "Images per second", "Above: images applied at the server, with failures, ranks that ended early and "
         "checkpoints on the time axis. Below: each worker; of many, the slowest and the fastest.", _speed),
    Kind("split", "Where each rank's time went", "Of the time that the rank's intervals cover. push and fetch are waits; "
         "apply and checkpoint are the server's work.", _split),
    Kind("staleness", "Staleness", "Versions applied between the fetch that a gradient was computed on and its own "
         "application. With equally fast workers the mean is just under workers - 1.", _staleness),
    Kind("accuracy", "Accuracy", "On the validation split: against the time when the version was made, and against the epochs and "
         "samples that had made it.",
         _accuracy),
    Kind("rate", "Learning rate and training loss", "As the server applied them: the rate follows the samples applied.",
         _rate),
    Kind("load", "Server load and traffic", "Busy is apply and checkpoint. A server at 100 % is the limit of the run. "
         "Traffic is the sum over all workers.", _load),
)

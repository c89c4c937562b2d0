"""What a run did over time, in a bounded number of equally wide bins, whatever the length of the run.

In: pushes (`add_push`) and the intervals of the metrics files (`add_interval`), in any order. Out: a `Timeline`, whose
lists have one entry a bin; None stands for a number that the bin does not give. The bins start fine; when the run
outgrows MAX_BINS of them their width doubles, so memory grows with the workers and never with the pushes.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from asgd_mpi.record.events import Interval, Push
from asgd_mpi.record.ratio import ratio
from asgd_mpi.record.starts import Restart, gaps_s

FINEST_S = 0.25
MAX_BINS = 128
# workers with a line of their own; of more, the slowest and the fastest half of that
MAX_SERIES = 12


class WorkerSeries(msgspec.Struct):
    rank: int
    images_per_s: list[float]


class Timeline(msgspec.Struct):
    """Times are training seconds, without those between the starts of a run; rates are per second over the bin."""

    width_s: float = FINEST_S
    t: list[float] = msgspec.field(default_factory=list)  # middle of the bin
    images_per_s: list[float] = msgspec.field(default_factory=list)
    staleness: list[float | None] = msgspec.field(default_factory=list)  # mean
    staleness_max: list[int | None] = msgspec.field(default_factory=list)
    # training loss, mean over images
    loss: list[float | None] = msgspec.field(default_factory=list)
    lr: list[float | None] = msgspec.field(default_factory=list)  # mean over pushes
    # 0..1 of the time covered by intervals
    server_busy: list[float | None] = msgspec.field(default_factory=list)
    pushed_bytes_per_s: list[float] = msgspec.field(default_factory=list)
    fetched_bytes_per_s: list[float] = msgspec.field(default_factory=list)
    # images/s of the slowest in the bin
    worker_lowest: list[float] = msgspec.field(default_factory=list)
    worker_median: list[float] = msgspec.field(default_factory=list)
    worker_highest: list[float] = msgspec.field(default_factory=list)
    workers: list[WorkerSeries] = msgspec.field(default_factory=list)


@dataclass
class _Bin:
    """Sums, so that two bins can be merged."""

    images: int = 0
    pushes: int = 0
    staleness: int = 0
    staleness_max: int = -1
    loss: float = 0.0  # times images
    lr: float = 0.0  # over pushes
    applied: Counter[int] = field(default_factory=Counter)  # worker, 0-based -> images
    # the same by the worker's own metrics
    trained: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    busy_s: float = 0.0  # of the server
    covered_s: float = 0.0  # by the server's intervals
    bytes_pushed: float = 0.0
    bytes_fetched: float = 0.0

    def take(self, other: _Bin) -> None:
        for name in (
            "images",
            "pushes",
            "staleness",
            "loss",
            "lr",
            "busy_s",
            "covered_s",
            "bytes_pushed",
            "bytes_fetched",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.staleness_max = max(self.staleness_max, other.staleness_max)
        self.applied.update(other.applied)
        for worker, images in other.trained.items():
            self.trained[worker] += images


@dataclass
class _Span:
    """A bin cut to what the run covers of it."""

    start: float
    stop: float
    low: float  # of the whole bin, whose sums these are: intervals may begin before the run, and end after its last push
    high: float
    sums: _Bin

    @property
    def seconds(self) -> float:
        return self.stop - self.start


class Bins:
    """Adds up a run by time; `timeline` reads the result. `starts`: of the run, whose pauses are left out."""

    def __init__(self, starts: Sequence[Restart] = ()) -> None:
        self._starts = starts
        self._width_s = FINEST_S
        # n -> the bin of [n, n + 1) widths, in Unix time less the pauses before
        self._bins: dict[int, _Bin] = {}
        self._low, self._high = math.inf, -math.inf
        # of the workers' intervals
        self._first, self._last = math.inf, -math.inf

    def add_push(self, push: Push) -> None:
        images, t = push.positions - push.skipped, self._at(push.t)
        self._reach(t)
        into = self._bin(math.floor(t / self._width_s))
        into.images += images
        into.pushes += 1
        into.staleness += push.staleness
        into.staleness_max = max(into.staleness_max, push.staleness)
        into.loss += push.loss * images
        into.lr += push.lr
        into.applied[push.worker] += images

    def add_interval(self, interval: Interval, rank: int, offset_s: float = 0.0) -> None:
        """Spread an interval evenly over the bins that it touches. `offset_s`: to add to this rank's times."""
        begin, end = self._at(interval.t0 + offset_s), self._at(interval.t1 + offset_s)
        length = interval.t1 - interval.t0
        if length <= 0:
            return
        self._reach(begin)
        self._reach(end)
        if rank:
            self._first, self._last = min(self._first, begin), max(self._last, end)
        busy_s = interval.apply + interval.checkpoint
        for number in range(math.floor(begin / self._width_s), math.floor(end / self._width_s) + 1):
            covered = min(end, (number + 1) * self._width_s) - max(begin, number * self._width_s)
            # written when rank 0 had ended: what is left goes where it ended
            if end - begin < length:
                covered += (length - (end - begin)) * (number == math.floor(end / self._width_s))
            into = self._bin(number)
            if rank == 0:
                into.busy_s += busy_s * covered / length
                into.covered_s += covered
            else:
                into.trained[rank - 1] += interval.images * covered / length
                into.bytes_pushed += interval.bytes_pushed * covered / length
                into.bytes_fetched += interval.bytes_fetched * covered / length

    def timeline(self, started: float | None, stopped: float, num_workers: int) -> Timeline:
        """Return the lists over [started, stopped], Unix seconds: the first Start to the last push or, without one, the end.

        Images are those applied or, if no push was recorded, those trained by the workers' metrics.
        """
        if started is None or not stopped > started:
            return Timeline()
        started, stopped = self._at(started), self._at(stopped)
        self._reach(started)
        self._reach(stopped)
        spans = _spans(self._bins, self._width_s, started, stopped)
        told = [max(0.0, min(s.high, self._last) - max(s.low, self._first)) for s in spans]
        if any(sums.pushes for sums in self._bins.values()):
            counts, seconds = "applied", [span.seconds for span in spans]
        else:
            counts, seconds = "trained", told
        workers = [
            [_per_s(getattr(span.sums, counts)[worker], s) for span, s in zip(spans, seconds)]
            for worker in range(num_workers)
        ]
        return Timeline(
            width_s=self._width_s,
            t=[(span.start + span.stop) / 2 - started for span in spans],
            images_per_s=[
                _per_s(sum(getattr(span.sums, counts).values()), s)
                for span, s in zip(spans, seconds)
            ],
            staleness=_means(spans, "staleness", "pushes"),
            staleness_max=[span.sums.staleness_max if span.sums.pushes else None for span in spans],
            loss=_means(spans, "loss", "images"),
            lr=_means(spans, "lr", "pushes"),
            server_busy=_means(spans, "busy_s", "covered_s"),
            pushed_bytes_per_s=[_per_s(span.sums.bytes_pushed, s) for span, s in zip(spans, told)],
            fetched_bytes_per_s=[
                _per_s(span.sums.bytes_fetched, s) for span, s in zip(spans, told)
            ],
            worker_lowest=[min(rates) for rates in zip(*workers)],
            worker_median=[statistics.median(rates) for rates in zip(*workers)],
            worker_highest=[max(rates) for rates in zip(*workers)],
            workers=_chosen(workers),
        )

    def _at(self, t: float) -> float:
        return t - gaps_s(self._starts, t)

    def _bin(self, number: int) -> _Bin:
        found = self._bins.get(number)
        if found is None:
            found = self._bins[number] = _Bin()
        return found

    def _reach(self, t: float) -> None:
        """Widen the bins until MAX_BINS of them reach from the earliest time to the latest."""
        if self._low <= t <= self._high:
            return
        self._low, self._high = min(self._low, t), max(self._high, t)
        while (
            math.floor(self._high / self._width_s) - math.floor(self._low / self._width_s)
            >= MAX_BINS
        ):
            self._width_s *= 2
            bins, self._bins = self._bins, {}
            for number, sums in bins.items():
                self._bin(number // 2).take(sums)


def _per_s(amount: float, seconds: float) -> float:
    return amount / seconds if seconds else 0.0


def _spans(bins: dict[int, _Bin], width_s: float, started: float, stopped: float) -> list[_Span]:
    """One span a bin between the two times; a piece of a bin at either end goes with its neighbour."""
    spans = []
    for number in range(math.floor(started / width_s), math.floor(stopped / width_s) + 1):
        low, high = number * width_s, (number + 1) * width_s
        start, stop = max(started, low), min(stopped, high)
        if stop > start:
            spans.append(_Span(start, stop, low, high, bins.get(number, _Bin())))
    for here in (0, -1):
        if len(spans) > 1 and spans[here].seconds < width_s / 2:
            short, beside = spans.pop(here), spans[here]
            beside.start, beside.stop = min(beside.start, short.start), max(beside.stop, short.stop)
            beside.low, beside.high = min(beside.low, short.low), max(beside.high, short.high)
            merged = _Bin()
            merged.take(beside.sums)
            merged.take(short.sums)
            beside.sums = merged
    return spans


def _means(spans: list[_Span], amount: str, weight: str) -> list[float | None]:
    return [ratio(getattr(span.sums, amount), getattr(span.sums, weight)) for span in spans]


def _chosen(workers: list[list[float]]) -> list[WorkerSeries]:
    """All workers or, of many, the slowest and the fastest."""
    numbers: Sequence[int] = range(len(workers))
    if len(workers) > MAX_SERIES:
        by_speed = sorted(numbers, key=lambda worker: sum(workers[worker]))
        numbers = sorted(by_speed[: MAX_SERIES // 2] + by_speed[-(MAX_SERIES // 2) :])
    return [WorkerSeries(worker + 1, workers[worker]) for worker in numbers]

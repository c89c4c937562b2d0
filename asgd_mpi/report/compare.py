"""Several runs side by side: what more workers bring in images/s, in time to an accuracy, and for the money. Pure.

Speed-up and efficiency are against the runs with one worker; without one there are none. The limit is fitted to three numbers
of workers or more: images/s X(N) = 1 / (c / N + b), with c a worker's seconds for an image and b the seconds that the shared
part (server, link, cores) needs for one; 1 / b is the limit. Least squares on the relative error: X_i c / N_i + X_i b = 1.
A run whose starts had different numbers of workers has no place on that line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from asgd_mpi.config.options import Config, options, settings
from asgd_mpi.record.events import Validation
from asgd_mpi.record.summary import CONFIG_KEYS, Summary
from asgd_mpi.report import cost as costs
from asgd_mpi.report.measure import ACCURACY, Measure, measures
from asgd_mpi.report.units import count, number, seconds, workers
from asgd_mpi.report.verdict import SYNC, Verdict, is_sync, judge

FEWEST_SIZES = 3  # numbers of workers to fit two numbers to: with two, any law would do
# what a rule brings along, unless it is given: a difference only between runs of one rule
OF_RULE = (
    "rule.momentum_at",
    "rule.staleness",
    "rule.max_drift",
    "schedule.lr",
    "exchange.overlap",
)
# columns of the comparison
VARIED = ("rule.name", "rule.warm_start_epochs", "exchange.n_push", "exchange.n_fetch")


class Reached(msgspec.Struct):
    """The first version with the target accuracy or better, of those that were validated."""

    seconds: float  # since the first Start, until that version was made
    samples: int
    epoch: float
    images_per_s: float  # samples / seconds, validations and start included
    cost: float | None


class Entry(msgspec.Struct):
    """One run of the comparison."""

    name: str
    status: str
    num_workers: int  # the most at a time,
    crews: list[int]  # ... and one start after the other
    rule: str
    n_push: int | str  # batches in a push, or auto
    warm_start_epochs: float  # 0: cold
    num_validations: int
    seconds: float | None  # of training
    images_per_s: float | None
    speedup: float | None  # over one worker
    efficiency: float | None  # speedup / workers
    mean_staleness: float | None
    server_busy: float | None
    best: float | None  # of the comparison's measure; accuracy 0..1
    reached: Reached | None
    cost: float | None  # of the whole run


class Fit(msgspec.Struct):
    """X(N) = 1 / (worker_s / N + shared_s)."""

    worker_s: float
    shared_s: float

    def images_per_s(self, num_workers: float) -> float:
        return 1 / (self.worker_s / num_workers + self.shared_s)

    @property
    def limit(self) -> float | None:
        """Images/s with any number of workers; None if the runs show none."""
        return 1 / self.shared_s if self.shared_s > 0 else None

    @property
    def half_gain_workers(self) -> float | None:
        """Return where a further worker adds half of what the first one does: the slope is worker_s / (worker_s + N shared_s)^2."""
        if self.shared_s > 0:
            return (math.sqrt(2) - 1) * self.worker_s / self.shared_s
        return None


class Comparison(msgspec.Struct):
    entries: list[Entry]  # by workers
    differences: dict[
        str, list[str]
    ]  # setting -> its values, if they differ beyond what is compared
    target: float | None  # of the measure; accuracy 0..1
    # of the runs that do not wait for each other, if they have one rule and n_push
    fit: Fit | None
    sentences: list[str]
    verdict: Verdict | None = None  # if synchronous and asynchronous runs are compared
    measure: Measure = ACCURACY  # what the versions are judged by
    unit: str = "images"  # what a sample is called
    options: dict[str, list[str]] = {}  # every setting that differs -> its value in each run


def compare(
    summaries: Sequence[Summary],
    target: float | None = None,
    price_per_gpu_hour: float | None = None,
) -> Comparison:
    """Put the runs side by side; without a target of the first run's measure it is `_default_target`."""
    summaries = sorted(summaries, key=lambda summary: (summary.num_workers, summary.name))
    measure = measure_of(summaries)
    unit = summaries[0].unit if summaries else "images"
    if target is None:
        target = _default_target(summaries, measure)
    base = _base(summaries)
    entries = [_entry(summary, base, measure, target, price_per_gpu_hour) for summary in summaries]
    options = _options(summaries)
    alike = [
        entry
        for entry in entries
        if entry.images_per_s and not is_sync(entry) and len(entry.crews) == 1
    ]
    if _are_of_one_kind(alike):
        found = fit([(entry.num_workers, entry.images_per_s) for entry in alike])
    else:
        found = None
    return Comparison(
        entries,
        _differences(entries, options),
        target,
        found,
        _sentences(entries, found, target, measure, unit),
        judge(entries, target, measure, unit),
        measure,
        unit,
        options,
    )


def measure_of(summaries: Sequence[Summary]) -> Measure:
    """Return what decides in the runs: that of the first one that was validated."""
    found = (measures(summary.validations)[0] for summary in summaries if summary.validations)
    return next(found, ACCURACY)


def _default_target(summaries: Sequence[Summary], measure: Measure) -> float | None:
    """Return the best that all runs reach, an accuracy to 0.1 %; with synchronous ones among them, a margin from the best of any.

    There a run that does not learn shall not lower what the others are measured at.
    """
    best = [measure.best(summary.validations) for summary in summaries]
    known = sorted((value for value in best if value is not None), key=measure.rank)
    if any(summary.config.get("rule.name") == SYNC for summary in summaries):
        if not known:
            return None
        margin = measure.margin(known[0])
        target = known[0] - margin if measure.maximize else known[0] + margin
    elif len(known) < len(best) or not known:
        return None
    else:
        target = known[-1]
    return max(0.0, math.floor(1000 * target + 1e-9) / 1000) if measure.is_accuracy else target


def fit(points: Sequence[tuple[int, float]]) -> Fit | None:
    """Fit the limit to (workers, images/s); None with fewer than FEWEST_SIZES different numbers of workers."""
    if len({num_workers for num_workers, _ in points}) < FEWEST_SIZES:
        return None
    rows = [(rate / num_workers, rate) for num_workers, rate in points]
    uu, uv, vv = (
        sum(a * b for a, b in pairs)
        for pairs in (
            [(u, u) for u, _ in rows],
            [(u, v) for u, v in rows],
            [(v, v) for _, v in rows],
        )
    )
    u1, v1 = sum(u for u, _ in rows), sum(v for _, v in rows)
    determinant = uu * vv - uv * uv
    worker_s, shared_s = (u1 * vv - v1 * uv) / determinant, (v1 * uu - u1 * uv) / determinant
    if worker_s <= 0:  # more workers brought nothing at all
        return Fit(0.0, v1 / vv)
    if shared_s > 0:
        return Fit(worker_s, shared_s)
    return Fit(u1 / uu, 0.0)


def _are_of_one_kind(entries: Sequence[Entry]) -> bool:
    return len({(entry.rule, entry.n_push) for entry in entries}) == 1


def first_at(
    scores: Sequence[Validation], target: float, measure: Measure = ACCURACY
) -> Validation | None:
    known = ((score, measure.of(score)) for score in scores)
    return next(
        (one for one, value in known if value is not None and measure.is_as_good(value, target)),
        None,
    )


def _base(summaries: Sequence[Summary]) -> float | None:
    """Images/s of one worker, the mean of the runs with one; None if none was measured."""
    rates = [
        summary.images_per_s
        for summary in summaries
        if summary.images_per_s and summary.crews == [1]
    ]
    return sum(rates) / len(rates) if rates else None


def _entry(
    summary: Summary,
    base: float | None,
    measure: Measure,
    target: float | None,
    price_per_gpu_hour: float | None,
) -> Entry:
    cost = None if price_per_gpu_hour is None else costs.price(summary, price_per_gpu_hour)
    is_on_the_line = summary.images_per_s and base and len(summary.crews) == 1
    speedup = summary.images_per_s / base if is_on_the_line else None
    score = first_at(summary.validations, target, measure) if target is not None else None
    elapsed = score and summary.seconds_at(score.when)
    reached = None
    if elapsed and elapsed > 0:
        reached = Reached(
            elapsed,
            score.samples,
            score.epoch,
            score.samples / elapsed,
            cost and costs.cost_until(cost, summary, score.when),
        )
    shown = summary.config
    return Entry(
        summary.name,
        summary.status,
        summary.num_workers,
        summary.crews,
        shown.get("rule.name", "asgd"),
        shown.get("exchange.n_push", 1),
        shown.get("rule.warm_start_epochs", 0.0),
        len(summary.validations),
        summary.training_s,
        summary.images_per_s,
        speedup,
        speedup and speedup / summary.num_workers,
        summary.staleness and summary.staleness.mean,
        summary.server_busy,
        measure.best(summary.validations),
        reached,
        cost and cost.total,
    )


def _options(summaries: list[Summary]) -> dict[str, list[str]]:
    """Return the settings that define a run or are shown, and are not the same in all: its value in each run."""
    # of an option that the record of an older version does not have
    defaults = settings(Config())
    values = {
        key: [
            _as_text(summary.settings.get(key, defaults.get(key)) if summary.settings else "n/a")
            for summary in summaries
        ]
        for key in dict.fromkeys([*CONFIG_KEYS, *options("defines")])
    }
    return {key: found for key, found in values.items() if len(set(found)) > 1}


def _differences(entries: list[Entry], found: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return the settings that differ beyond what is compared: whoever compares must know."""
    differences = {}
    for key, values in found.items():
        groups: dict[str, set[str]] = {}
        for entry, value in zip(entries, values):
            alike = entry.rule if key in OF_RULE else ""
            if key == "rule.max_drift" and entry.num_workers == 1:
                continue  # nobody else moves the weights: there is none
            groups.setdefault(alike, set()).add(value)
        if key not in VARIED and any(len(group) > 1 for group in groups.values()):
            differences[key] = list(dict.fromkeys(values))
    if "schedule.lr" in differences and _step_rates_agree(entries, found["schedule.lr"]):
        del differences["schedule.lr"]
    return differences


def _step_rates_agree(entries: list[Entry], rates: list[str]) -> bool:
    """Return whether synchronous runs have one rate of a step, which is a worker's times their number; others one rate."""
    try:
        steps = {
            round(float(rate) * entry.num_workers, 9)
            for entry, rate in zip(entries, rates)
            if is_sync(entry)
        }
    except ValueError:  # one is not on record
        return False
    others = {rate for entry, rate in zip(entries, rates) if not is_sync(entry)}
    return len(steps) == 1 and len(others) <= 1


def _as_text(value: object) -> str:
    """A setting; 2 and 2.0 are the same one."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _sentences(
    entries: list[Entry], found: Fit | None, target: float | None, measure: Measure, unit: str
) -> list[str]:
    """Return what the comparison says, with the numbers."""
    sentences = []
    measured = [entry for entry in entries if entry.images_per_s and len(entry.crews) == 1]
    if measured and not any(entry.speedup for entry in entries):
        sentences.append(
            "No run had one worker: what several gain over one was not measured, and is not told."
        )
    if mixed := [entry.name for entry in entries if len(entry.crews) > 1]:
        sentences.append(
            f"The starts of {', '.join(mixed)} had different numbers of workers: no speed-up is told of it, and no fit."
        )
    if found and found.limit:
        most = max(entry.num_workers for entry in entries)
        half = found.half_gain_workers
        sentences.append(
            f"More workers of this kind reach at most about {number(found.limit, 0)} {unit}/s; from "
            f"{count(max(1, round(half)), 'worker')} on, a further one adds less than half of what the first did"
            f"{'' if half <= most else f' (beyond the {most} measured: an extrapolation)'}."
        )
    elif found is None and len({entry.num_workers for entry in measured}) > 1:
        sentences.append(
            f"No limit is fitted: that takes runs of one rule and one n_push, with {FEWEST_SIZES} different numbers of workers or more."
        )
    elif found:
        sentences.append(
            f"Up to here {unit}/s grow in proportion to the workers: these runs show no limit."
        )
    there = [entry for entry in entries if entry.reached]
    if target is not None and there:
        fastest = min(there, key=lambda entry: entry.reached.seconds)
        sentences.append(
            f"{f'{measure.said(target)} {measure.noun}'.strip()} was reached first by {fastest.name} "
            f"({workers(fastest.crews)}), after {seconds(fastest.reached.seconds)}."
        )
        kept = [entry for entry in there if len(entry.crews) == 1]
        alike = [entry for entry in kept if not is_sync(entry)] or kept
        if alike and alike[-1].num_workers > alike[0].num_workers:
            first, last = alike[0], alike[-1]
            speed = last.reached.images_per_s / first.reached.images_per_s
            samples = last.reached.samples / first.reached.samples
            sentences.append(
                f"From {first.num_workers} to {last.num_workers} workers: {speed:.2f} times the {unit}/s, {samples:.2f} times "
                f"the samples to that {measure.name}, so {speed / samples:.2f} times as fast to it."
            )
        if all(entry.reached.cost is not None for entry in there):
            cheapest = min(there, key=lambda entry: entry.reached.cost)
            sentences.append(
                f"Cheapest to that {measure.name}: {cheapest.name} ({workers(cheapest.crews)}), "
                f"{cheapest.reached.cost:.4g}."
            )
    if short := [entry.name for entry in entries if target is not None and not entry.reached]:
        sentences.append(f"Not reached by {', '.join(short)}.")
    return sentences

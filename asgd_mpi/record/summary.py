"""From a run directory to a `Summary`: every number of the report, computed from the files alone.

In: `config.yaml`, `versions.json`, `metrics/rankNNN.jsonl`, `pushes.log`, any of the last three missing or damaged.
Out: one `Summary`, with what is missing or damaged named in `problems`. The files are read once, line by line, and
added up while they are read: memory grows with the ranks, the epochs and the validations, never with the pushes. No
text is laid out here (`report.py`), nothing is written, and neither MPI nor torch is needed.

Images are those applied at the server (`pushes.log`) or, without that file, those trained by the workers (metrics).
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

from asgd_mpi.record.audit import Audit, audit
from asgd_mpi.record.events import (PHASES, Checkpoint, End, Event, Interval, Note, Push, Start, Validation,
                                    read_events, read_pushes)
from asgd_mpi.record.rundir import RunDir

CONFIG_KEYS = ("model.name", "data.path", "data.batch_size", "run.epochs", "run.seed", "rule.name", "rule.momentum",
               "schedule.lr")
COUNTERS = ("images", "pushes", "fetches", "torn_reads", "skipped_images", "bytes_pushed", "bytes_fetched")
MAX_BINS = 20         # of the staleness histogram
MAX_NOTES = 50        # kept; the rest is counted
Status = Literal["finished", "failed", "unfinished"]


class Rank(msgspec.Struct):
    """One metrics file: the sums of its intervals."""

    rank: int
    role: str
    host: str = "unknown"
    device: str = "unknown"
    status: Status = "unfinished"
    reason: str = ""
    ended: float | None = None                 # Unix seconds of the End event
    seconds: float = 0.0                       # covered by intervals
    phases: dict[str, float] = msgspec.field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))  # seconds
    counts: dict[str, int] = msgspec.field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))


class Worker(msgspec.Struct):
    """What one worker contributed."""

    rank: int
    host: str
    device: str
    pushes: int
    images: int
    share: float | None                        # of all images, 0..1
    images_per_s: float | None
    mean_staleness: float | None
    is_straggler: bool                         # below half of the median images/s


class Epoch(msgspec.Struct):
    epoch: int
    pushes: int = 0
    images: int = 0
    mean_loss: float | None = None             # training loss, every image weighing the same


class Bin(msgspec.Struct):
    low: int                                   # staleness from low to high, both included
    high: int
    pushes: int


class Staleness(msgspec.Struct):
    mean: float
    max: int
    histogram: list[Bin]


class RankNote(msgspec.Struct):
    t: float
    rank: int
    text: str


class Summary(msgspec.Struct):
    """Everything in the report. None stands for a number that the files do not give."""

    name: str
    config: dict[str, Any]                     # those of CONFIG_KEYS that the run wrote down
    versions: dict[str, str]
    status: Status
    reason: str
    problems: list[str]                        # what is missing or damaged
    unreadable_lines: dict[str, int]           # file -> lines
    num_workers: int
    started: float | None                      # Unix seconds of the first Start, else of the first applied push
    duration_s: float | None                   # first Start to the last thing written
    training_s: float | None                   # first Start to the last applied push
    images: int
    images_per_s: float | None
    images_trained: int                        # by the workers' metrics: applied or not
    skipped_images: int
    epochs_done: float | None
    lr_first: float | None
    lr_last: float | None
    bytes_pushed: int
    bytes_pushed_per_s: float | None
    bytes_fetched: int
    bytes_fetched_per_s: float | None
    fetches: int
    torn_reads: int
    workers: list[Worker]
    ranks: list[Rank]
    staleness: Staleness | None
    epochs: list[Epoch]
    validations: list[Validation]
    checkpoints: list[Checkpoint]
    notes: list[RankNote]
    notes_left_out: int
    audit: Audit

    @property
    def stragglers(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.is_straggler]


class _Lines:
    """Reads files line by line; counts what cannot be read instead of stopping."""

    def __init__(self, run: RunDir):
        self._run = run
        self.problems: list[str] = []
        self.unreadable: dict[str, int] = {}

    def read(self, reader: Callable[[Path], Iterator[Any]], path: Path) -> Iterator[Any]:
        name, unreadable = str(path.relative_to(self._run.path)), 0
        try:
            for item in reader(path):
                if item is None:
                    unreadable += 1
                else:
                    yield item
        except (OSError, UnicodeError) as error:
            self.problems.append(f"{name} cannot be read to its end ({type(error).__name__}); the rest is left out.")
        if unreadable:
            self.unreadable[name] = unreadable
            self.problems.append(f"{name}: {unreadable} unreadable line{'s' * (unreadable > 1)} left out "
                                 "(cut off, damaged, or of a newer version).")


class _Metrics:
    """The sums over all metrics files."""

    def __init__(self) -> None:
        self.ranks: dict[int, Rank] = {}
        self.num_workers = self.num_samples = self.total_samples = 0   # samples: of an epoch, of the run
        self.reads_own_pushes = True
        self.started = math.inf
        self.last_t = -math.inf
        self.validations: list[Validation] = []
        self.checkpoints: list[Checkpoint] = []
        self.notes: list[RankNote] = []
        self.notes_left_out = 0

    def read(self, number: int, events: Iterable[Event]) -> None:
        rank = self.ranks[number] = Rank(number, "worker" if number else "server")
        for event in events:
            self._add(rank, event)

    def _add(self, rank: Rank, event: Event) -> None:
        self.last_t = max(self.last_t, event.t1 if isinstance(event, Interval) else event.t)
        match event:
            case Interval():
                rank.seconds += event.t1 - event.t0
                for phase in PHASES:
                    rank.phases[phase] += getattr(event, phase)
                for counter in COUNTERS:
                    rank.counts[counter] += getattr(event, counter)
            case Start():
                rank.role, rank.host, rank.device = event.role, event.host, event.device
                self.started = min(self.started, event.t)
                self.num_workers = max(self.num_workers, event.num_workers)
                self.reads_own_pushes = self.reads_own_pushes and event.reads_own_pushes
                self.num_samples = max(self.num_samples, event.num_samples)
                self.total_samples = max(self.total_samples, event.total_samples)
            case Validation():
                self.validations.append(event)
            case Checkpoint():
                self.checkpoints.append(event)
            case Note() if len(self.notes) < MAX_NOTES:
                self.notes.append(RankNote(event.t, rank.rank, event.text))
            case Note():
                self.notes_left_out += 1
            case End():
                rank.status, rank.reason, rank.ended = event.status, event.reason, event.t


class _Training:
    """The sums over `pushes.log`."""

    def __init__(self) -> None:
        self.first: Push | None = None
        self.last: Push | None = None
        self.last_t = -math.inf
        self.positions = self.images = self.skipped = 0
        self.staleness: Counter[int] = Counter()                        # staleness -> pushes
        self.by_worker: dict[int, Counter[str]] = defaultdict(Counter)  # 0-based -> pushes, images, staleness
        self.epochs: dict[int, Epoch] = {}

    def watch(self, pushes: Iterable[Push]) -> Iterator[Push]:
        """Add up the pushes on their way to somebody else."""
        for push in pushes:
            images = push.positions - push.skipped
            self.first, self.last = self.first or push, push
            self.last_t = max(self.last_t, push.t)
            self.positions += push.positions
            self.images += images
            self.skipped += push.skipped
            self.staleness[push.staleness] += 1
            worker = self.by_worker[push.worker]
            worker["pushes"] += 1
            worker["images"] += images
            worker["staleness"] += push.staleness
            epoch = self.epochs.setdefault(push.epoch, Epoch(push.epoch))
            epoch.pushes += 1
            if images:
                epoch.mean_loss = epoch.mean_loss or 0.0
                epoch.images += images
                epoch.mean_loss += (push.loss - epoch.mean_loss) * images / epoch.images
            yield push


def summarize(run: RunDir) -> Summary:
    """Compute the `Summary` of a run: finished, failed, killed or still going."""
    lines, metrics, training = _Lines(run), _Metrics(), _Training()
    for path in sorted(run.metrics.glob("rank*.jsonl")):
        number = path.stem.removeprefix("rank")
        if number.isdecimal():
            metrics.read(int(number), lines.read(read_events, path))
    num_workers = metrics.num_workers or max(metrics.ranks, default=0)
    checked = audit(training.watch(lines.read(read_pushes, run.pushes)), metrics.num_samples, metrics.total_samples,
                    num_workers, metrics.reads_own_pushes)

    ranks = [metrics.ranks[number] for number in sorted(metrics.ranks)]
    sent = {counter: sum(rank.counts[counter] for rank in ranks if rank.rank) for counter in COUNTERS}  # by the workers
    started = metrics.started if metrics.started < math.inf else training.first and training.first.t
    last_t = max(metrics.last_t, training.last_t)
    training_s = _elapsed(started, training.last_t if training.last else last_t)
    images = training.images if training.last else sent["images"]
    validations = sorted(metrics.validations, key=lambda validation: validation.t)
    settings, versions = _read_config(run, lines.problems), _read_versions(run, lines.problems)
    status, reason = _status(run, ranks)
    return Summary(
        name=run.path.resolve().name, config=settings, versions=versions, status=status, reason=reason,
        problems=_problems(run, metrics, checked.num_workers) + lines.problems, unreadable_lines=lines.unreadable,
        num_workers=checked.num_workers, started=started, duration_s=_elapsed(started, last_t), training_s=training_s,
        images=images, images_per_s=_ratio(images, training_s), images_trained=sent["images"],
        skipped_images=training.skipped if training.last else sent["skipped_images"],
        epochs_done=_ratio(training.positions, metrics.num_samples),
        lr_first=training.first and training.first.lr, lr_last=training.last and training.last.lr,
        bytes_pushed=sent["bytes_pushed"], bytes_pushed_per_s=_ratio(sent["bytes_pushed"], training_s),
        bytes_fetched=sent["bytes_fetched"], bytes_fetched_per_s=_ratio(sent["bytes_fetched"], training_s),
        fetches=sent["fetches"], torn_reads=sent["torn_reads"],
        workers=_workers(metrics, training, checked.num_workers, images, training_s), ranks=ranks,
        staleness=_staleness(training.staleness), epochs=[epoch for _, epoch in sorted(training.epochs.items())],
        validations=validations, checkpoints=sorted(metrics.checkpoints, key=lambda checkpoint: checkpoint.t),
        notes=sorted(metrics.notes, key=lambda note: note.t), notes_left_out=metrics.notes_left_out, audit=checked)


def _ratio(amount: float, whole: float | None) -> float | None:
    return amount / whole if whole else None


def _elapsed(start: float | None, stop: float) -> float | None:
    return stop - start if start is not None and stop > start else None


def _workers(metrics: _Metrics, training: _Training, num_workers: int, images: int,
             training_s: float | None) -> list[Worker]:
    workers = []
    for number in range(1, num_workers + 1):
        rank = metrics.ranks.get(number, Rank(number, "worker"))
        sums = training.by_worker.get(number - 1, Counter())
        if not training.last:
            sums = rank.counts
        workers.append(Worker(
            number, rank.host, rank.device, sums["pushes"], sums["images"], _ratio(sums["images"], images),
            _ratio(sums["images"], training_s), _ratio(sums["staleness"], sums["pushes"]) if training.last else None,
            is_straggler=False))
    median = statistics.median(worker.images for worker in workers) if workers else 0
    for worker in workers:
        worker.is_straggler = worker.images < median / 2
    return workers


def _staleness(counts: Counter[int]) -> Staleness | None:
    if not counts:
        return None
    low, high = min(0, *counts), max(counts)
    width = -(-(high - low + 1) // MAX_BINS)
    bins = [Bin(start, start + width - 1, 0) for start in range(low, high + 1, width)]
    for staleness, pushes in counts.items():
        bins[(staleness - low) // width].pushes += pushes
    return Staleness(sum(staleness * pushes for staleness, pushes in counts.items()) / counts.total(), high, bins)


def _status(run: RunDir, ranks: list[Rank]) -> tuple[Status, str]:
    """The earliest failure, if there is one; otherwise the server's word."""
    failed = [rank for rank in ranks if rank.status == "failed"]
    if failed:
        first = min(failed, key=lambda rank: rank.ended)
        return "failed", f"rank {first.rank}: {first.reason or 'no reason given'}"
    errors = sorted(path.name for path in run.path.glob("error.rank*.txt"))
    if errors:
        return "failed", f"see {_some(errors)}"
    if ranks and ranks[0].rank == 0 and ranks[0].status == "finished":
        return "finished", ""
    return "unfinished", "killed or still running"


def _problems(run: RunDir, metrics: _Metrics, num_workers: int) -> list[str]:
    """What the metrics lack."""
    problems = []
    if not metrics.ranks:
        problems.append("metrics/ holds no file: no rank got as far as writing one.")
    elif missing := [rank for rank in range(num_workers + 1) if rank not in metrics.ranks]:
        problems.append(f"metrics are missing for {len(missing)} of {num_workers + 1} ranks: {_some(missing)}.")
    if open_ranks := [rank.rank for rank in metrics.ranks.values() if rank.ended is None]:
        problems.append(f"no End event from rank {_some(sorted(open_ranks))}: killed or still running.")
    for rank in metrics.ranks.values():
        named = sum(rank.phases.values())
        if abs(named - rank.seconds) > 0.01 * rank.seconds:
            problems.append(f"rank {rank.rank}: its phases add up to {named:.1f} s, "
                            f"its intervals to {rank.seconds:.1f} s.")
    return problems


def _some(names: list[Any], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(str, names[:limit])) + more


def _read_config(run: RunDir, problems: list[str]) -> dict[str, Any]:
    try:
        sections = yaml.safe_load(run.config.read_bytes()) or {}
        found = {key: sections.get(key.split(".")[0], {}).get(key.split(".")[1]) for key in CONFIG_KEYS}
    except (OSError, yaml.YAMLError, AttributeError) as error:
        problems.append(f"config.yaml cannot be read ({type(error).__name__}): the settings are unknown.")
        return {}
    return {key: value for key, value in found.items() if value is not None}


def _read_versions(run: RunDir, problems: list[str]) -> dict[str, str]:
    try:
        return {key: _inline(value) for key, value in json.loads(run.versions.read_bytes()).items()}
    except (OSError, ValueError, AttributeError) as error:
        problems.append(f"versions.json cannot be read ({type(error).__name__}): packages and hosts are unknown.")
        return {}


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_inline(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_inline, value))
    return str(value)

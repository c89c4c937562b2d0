"""From a run directory to a `Summary`: every number of the report, computed from the files alone.

In: `config.yaml`, `versions.json`, `metrics/rankNNN.jsonl`, `pushes.log`, any of the last three missing or damaged.
Out: one `Summary`, with what is missing or damaged named in `problems`. The files are read once, line by line, and
added up while they are read (`aggregate`): memory grows with the ranks, the epochs and the validations, never with the
pushes. No text is laid out here (`report`), nothing is written, and neither MPI nor torch is needed.

Images are those applied at the server (`pushes.log`) or, without that file, those trained by the workers (metrics).
"""

from __future__ import annotations

import math
import os
import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any

import msgspec
import yaml

from asgd_mpi.config import plain
from asgd_mpi.config import rulebook
from asgd_mpi.errors import few, one_line, plural, printable
from asgd_mpi.record import history
from asgd_mpi.record.aggregate import (
    COUNTERS,
    Epoch,
    GpuUse,
    Lines,
    Metrics,
    Rank,
    RankNote,
    Status,
    Training,
)
from asgd_mpi.record.audit import Audit, audit
from asgd_mpi.record.bubble import Pipelines, pipelines
from asgd_mpi.record.events import Checkpoint, Push, Retirement, Validation, read_events
from asgd_mpi.record.ratio import ratio
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.starts import Restart, gaps_s, seconds_outside, starts_of
from asgd_mpi.record.timeline import Bins, Timeline
from asgd_mpi.record.validations import Validations
from asgd_mpi.untrusted import bounded

CONFIG_KEYS = (
    "model.name",
    "data.path",
    "data.batch_size",
    "run.epochs",
    "run.seed",
    "rule.name",
    "rule.momentum",
    "rule.warm_start_epochs",
    "schedule.lr",
    "exchange.n_push",
    "exchange.n_fetch",
    "exchange.overlap",
    "exchange.wire",
    "exchange.servers",
    "stages.number",
    "stages.cut",
    "compute.micro_batches",
)
MAX_BINS = 20  # of the staleness histogram
NAMED = 10  # ranks, files or settings in a problem


class Worker(msgspec.Struct):
    """What one worker contributed."""

    rank: int
    host: str
    device: str
    pushes: int
    images: int
    share: float | None  # of all images, 0..1
    images_per_s: float | None
    mean_staleness: float | None
    # below half of the median images/s while it trains, and not retired
    is_straggler: bool
    # of training, of the starts of the run in which it was a worker
    seconds: float | None = None


class Bin(msgspec.Struct):
    low: int  # staleness from low to high, both included
    high: int
    pushes: int


class Staleness(msgspec.Struct):
    mean: float
    max: int
    histogram: list[Bin]


class Summary(msgspec.Struct):
    """Everything in the report. None stands for a number that the files do not give."""

    name: str
    config: dict[str, Any]  # those of CONFIG_KEYS that the run wrote down
    versions: dict[str, str]
    status: Status
    reason: str
    problems: list[str]  # what is missing or damaged
    unreadable_lines: dict[str, int]  # file -> lines
    num_workers: int
    # Unix seconds of the first Start, else of the first applied push
    started: float | None
    duration_s: float | None  # first Start to the last thing written
    training_s: float | None  # first Start to the last applied push
    images: int
    images_per_s: float | None
    images_trained: int  # by the workers' metrics: applied or not
    skipped_images: int
    epochs_done: float | None
    lr_first: float | None
    lr_last: float | None
    bytes_pushed: int
    bytes_pushed_per_s: float | None
    bytes_fetched: int
    bytes_fetched_per_s: float | None
    fetches: int
    followed: int  # of the fetches: read while the server wrote the snapshot
    torn_reads: int
    workers: list[Worker]
    ranks: list[Rank]
    staleness: Staleness | None
    epochs: list[Epoch]
    validations: list[Validation]
    checkpoints: list[Checkpoint]
    notes: list[RankNote]
    notes_left_out: int
    retirements: list[Retirement]
    refusals: dict[str, int]  # reason -> pushes that were not applied
    # images left out since their gradient was never finite
    given_up: int
    restarts: list[Restart]  # every start of the run
    # applied after a checkpoint that the run then went on from,
    forgotten_pushes: int
    num_parameters: int
    apply_s: float | None  # the server's time for one update, mean
    # 0..1: apply and checkpoint, of the server's covered time
    server_busy: float | None
    timeline: Timeline
    audit: Audit
    num_samples: int = 0  # of an epoch; 0 if no Start says so
    total_samples: int = 0  # of the run
    unit: str = "images"  # what a sample is called
    alone: bool = False  # server and worker are one process
    cores: dict[
        str, int
    ] = {}  # host -> its cores; empty in records of before they were written down
    # every option that the run wrote down, of the latest start
    settings: dict[str, Any] = {}
    # applied after their worker had scaled them down (clip_norm, max_drift),
    scaled_pushes: int = 0
    mean_scale: float | None = None  # ... by this factor in the mean
    forgotten_validations: int = 0  # ... of versions that were forgotten with them
    read_retries: int = 0  # reads of shards that failed and were repeated
    gpus: list[GpuUse] = []  # those of which NVML told something
    # ranks on a GPU whose energy is not in `energy_kwh`, or not of every start
    without_energy: list[int] = []
    pipelines: Pipelines | None = None  # if networks are cut into stages
    # logs of starts that have pushed, and are not there: their pushes are in no number here
    lost_logs: list[str] = []
    # paths within the run directory of those that have not been removed
    checkpoints_there: list[str] = []

    @property
    def best(self) -> Validation | None:
        """The validation with the fewest errors, the first one of several: what the server keeps as the best."""
        known = [score for score in self.validations if score.counts]
        return min(known, key=lambda score: (score.error, score.t), default=None)

    @property
    def kept_checkpoints(self) -> list[Checkpoint]:
        """Those that are still on the disk."""
        there = set(self.checkpoints_there)
        return [checkpoint for checkpoint in self.checkpoints if checkpoint.path in there]

    @property
    def best_checkpoint(self) -> Checkpoint | None:
        """Return that of the best version, if it is still on the disk."""
        kept = reversed(self.kept_checkpoints)
        return next((one for one in kept if self.best and one.version == self.best.version), None)

    @property
    def outcome(self) -> str:
        """Return the status with its reason: `failed (rank 2: ...)`."""
        if not self.reason:
            return self.status
        return f"{self.status} ({self.reason})"

    @property
    def energy_kwh(self) -> float | None:
        """The energy of all GPUs together; None if no GPU counts it."""
        known = [gpu.energy_j for gpu in self.gpus if gpu.energy_j is not None]
        return sum(known) / 3.6e6 if known else None

    @property
    def missing_samples(self) -> int:
        """Samples that were due and never used, those of epochs that were never begun with them."""
        length, total = self.num_samples, self.total_samples
        begun = sum(
            max(0, min(length, total - epoch.epoch * length)) for epoch in self.audit.epochs
        )
        return sum(epoch.missing for epoch in self.audit.epochs) + max(0, total - begun)

    @property
    def overlap(self) -> float | None:
        """The share of the workers' push and fetch that lay behind the computation, 0..1; None if there was neither."""
        workers = [rank for rank in self.ranks if rank.rank]
        hidden = sum(rank.hidden for rank in workers)
        return ratio(
            hidden, hidden + sum(rank.phases["push"] + rank.phases["fetch"] for rank in workers)
        )

    def seconds_at(self, t: float) -> float | None:
        """Training time at `t`, Unix seconds: from the first Start, without the time between the starts of a resumed run."""
        if self.started is None:
            return None
        return t - self.started - gaps_s(self.restarts, t)

    @property
    def paused_s(self) -> float:
        """Seconds between the starts, of `duration_s`."""
        return gaps_s(self.restarts, math.inf)

    @property
    def present(self) -> list[Rank]:
        """The ranks of the latest start, as what they are in it."""
        return _latest(self.ranks)

    @property
    def crews(self) -> list[int]:
        """The numbers of workers, one start after the other, each as often as it changes."""
        counts = [start.num_workers for start in self.restarts if start.num_workers] or [
            self.num_workers
        ]
        return [
            count
            for number, count in enumerate(counts)
            if not number or count != counts[number - 1]
        ]

    @property
    def stragglers(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.is_straggler]


def summarize(run: RunDir) -> Summary:
    """Compute the `Summary` of a run: finished, failed, killed or still going."""
    starts = starts_of(run)
    lines, bins = Lines(run), Bins(starts)
    metrics, training = Metrics(bins), Training(bins)
    for number, restart, path in run.metrics_files:
        metrics.read(number, restart, lines.read(read_events, path))
    ranks = metrics.ranks
    _count_computing(starts, metrics.files)
    num_workers = metrics.num_workers or max((rank.rank for rank in ranks), default=0)
    forgotten: list[Push] = []
    scores = Validations(metrics.validations, history.lineage(run), metrics.num_samples)
    pushes = (push for push in history.pushes(run, lines.read, forgotten) if push)
    checked = audit(
        training.watch(pushes, scores.see),
        metrics.num_samples,
        metrics.total_samples,
        num_workers,
        metrics.reads_own_pushes,
    )

    # by the workers
    sent = {
        counter: sum(rank.counts[counter] for rank in ranks if rank.rank) for counter in COUNTERS
    }
    started = metrics.started if metrics.started < math.inf else training.started
    last_t = max(metrics.last_t, training.last_t)
    stopped, images, skipped = last_t, sent["images"], sent["skipped_images"]
    lr_first = lr_last = None
    if training.first and training.last:
        stopped, images, skipped = training.last_t, training.images, training.skipped
        lr_first, lr_last = training.first.lr, training.last.lr
    training_s = _elapsed(started, stopped)
    training_s = training_s and max(0.0, training_s - gaps_s(starts, stopped))
    server = _server(ranks) or Rank(0, "server")
    settings, versions = (
        _read_config(run, checked.num_workers, lines.problems),
        _read_versions(run, lines.problems),
    )
    status, reason = _status(run, ranks)
    lost_logs = _lost_logs(run, metrics.files)
    return Summary(
        name=printable(run.path.resolve().name),
        unit=one_line(metrics.unit),
        alone=metrics.alone,
        config=_important(settings),
        settings=settings,
        versions={key: _inline(value) for key, value in versions.items()},
        cores=_cores(versions),
        status=status,
        reason=reason,
        problems=_problems(run, ranks, checked.num_workers)
        + _missing_of_starts(run, starts, metrics.files)
        + lost_logs
        + lines.problems
        + scores.problems,
        lost_logs=lost_logs,
        unreadable_lines=lines.unreadable,
        num_workers=checked.num_workers,
        started=started,
        duration_s=_elapsed(started, last_t),
        training_s=training_s,
        images=images,
        images_per_s=ratio(images, training_s),
        images_trained=sent["images"],
        skipped_images=skipped,
        epochs_done=ratio(training.positions, metrics.num_samples),
        lr_first=lr_first,
        lr_last=lr_last,
        bytes_pushed=sent["bytes_pushed"],
        bytes_pushed_per_s=ratio(sent["bytes_pushed"], training_s),
        bytes_fetched=sent["bytes_fetched"],
        bytes_fetched_per_s=ratio(sent["bytes_fetched"], training_s),
        fetches=sent["fetches"],
        followed=sent["followed"],
        torn_reads=sent["torn_reads"],
        workers=_workers(
            metrics, training, checked.num_workers, images, training_s, starts, stopped
        ),
        ranks=ranks,
        staleness=_staleness(training.staleness),
        epochs=[epoch for _, epoch in sorted(training.epochs.items())],
        validations=scores.all(started),
        checkpoints=sorted(metrics.checkpoints, key=lambda checkpoint: checkpoint.t),
        notes=sorted(metrics.notes, key=lambda note: note.t),
        notes_left_out=metrics.notes_left_out,
        retirements=metrics.retirements,
        refusals=dict(metrics.refusals),
        given_up=metrics.given_up,
        restarts=starts,
        scaled_pushes=int(training.scales[0]),
        mean_scale=ratio(training.scales[1], training.scales[0]),
        forgotten_pushes=len(forgotten),
        forgotten_validations=scores.forgotten,
        num_parameters=metrics.num_parameters,
        apply_s=ratio(server.phases["apply"], server.counts["pushes"]),
        server_busy=ratio(server.phases["apply"] + server.phases["checkpoint"], server.seconds),
        timeline=bins.timeline(started, stopped, checked.num_workers),
        audit=checked,
        num_samples=metrics.num_samples,
        total_samples=metrics.total_samples,
        read_retries=sent["read_retries"],
        gpus=metrics.gpus,
        without_energy=metrics.without_energy,
        pipelines=pipelines(metrics.cuts, starts, metrics.files),
        checkpoints_there=[str(path.relative_to(run.path)) for path in run.checkpoints_by_name],
    )


def _elapsed(start: float | None, stop: float) -> float | None:
    return stop - start if start is not None and stop > start else None


def _count_computing(starts: list[Restart], files: list[Rank]) -> None:
    """Fill in the ranks that compute in each start; of workers without a metrics file, one each."""
    counts = Counter(file.starts[0] for file in files if file.role in ("worker", "stage"))
    for start in starts:
        start.num_computing = max(counts[start.restart], start.num_workers)


def _workers(
    metrics: Metrics,
    training: Training,
    num_workers: int,
    images: int,
    training_s: float | None,
    starts: list[Restart],
    stopped: float,
) -> list[Worker]:
    """A worker that was not there in all starts is as fast as it was while it was there."""
    ranks = {rank.rank: rank for rank in metrics.ranks if rank.role == "worker"}
    gone = {loss.rank for loss in metrics.retirements if loss.for_good}
    workers = []
    for number in range(1, num_workers + 1):
        rank = ranks.get(number, Rank(number, "worker", [start.restart for start in starts]))
        sums: Mapping[str, int] = rank.counts
        if training.last:
            sums = training.by_worker.get(number - 1, Counter())
        seconds = training_s and training_s - seconds_outside(starts, rank.starts, stopped)
        workers.append(
            Worker(
                number,
                rank.host,
                rank.device,
                sums["pushes"],
                sums["images"],
                ratio(sums["images"], images),
                ratio(sums["images"], seconds),
                ratio(sums["staleness"], sums["pushes"]) if training.last else None,
                is_straggler=False,
                seconds=seconds,
            )
        )
    speeds = [_speed(worker, ranks.get(worker.rank)) for worker in workers]
    median = statistics.median(speeds or [0])
    for worker, speed in zip(workers, speeds):
        worker.is_straggler = worker.rank not in gone and speed < median / 2
    return workers


def _speed(worker: Worker, rank: Rank | None) -> float:
    """Images/s while it had images to train on: without its validations, and its waits for a lease."""
    away = 0.0
    if rank and rank.seconds:
        away = (rank.phases["validate"] + rank.phases["idle"]) / rank.seconds
    if away >= 1:
        return 0.0
    return (worker.images_per_s or 0.0) / (1 - away)


def _staleness(counts: Counter[int]) -> Staleness | None:
    if not counts:
        return None
    low, high = min(0, *counts), max(counts)
    width = -(-(high - low + 1) // MAX_BINS)
    bins = [Bin(start, start + width - 1, 0) for start in range(low, high + 1, width)]
    for staleness, pushes in counts.items():
        bins[(staleness - low) // width].pushes += pushes
    return Staleness(
        sum(staleness * pushes for staleness, pushes in counts.items()) / counts.total(), high, bins
    )


def _server(ranks: list[Rank]) -> Rank | None:
    return ranks[0] if ranks and ranks[0].rank == 0 else None


def _status(run: RunDir, ranks: list[Rank]) -> tuple[Status, str]:
    """Return the server's word: a worker that failed was retired, and does not fail the run. Else the earliest failure."""
    server = _server(ranks)
    if server and server.status in ("finished", "left"):
        return server.status, server.reason
    failed = [rank for rank in _latest(ranks) if rank.status == "failed"]
    if failed:
        first = min(failed, key=lambda rank: rank.ended or 0.0)
        return "failed", f"rank {first.rank}: {first.reason or 'no reason given'}"
    errors = sorted(path.name for path in run.path.glob("error.rank*.txt"))
    if errors:
        return "failed", f"see {few(errors, NAMED)}"
    return "unfinished", "killed or still running"


def _latest(ranks: list[Rank]) -> list[Rank]:
    """Return the ranks of the latest start of the run, as what they are in it."""
    latest = max((restart for rank in ranks for restart in rank.starts), default=0)
    return [rank for rank in ranks if latest in rank.starts]


def _problems(run: RunDir, ranks: list[Rank], num_workers: int) -> list[str]:
    """Return what the metrics lack."""
    problems, numbers = [], {rank.rank for rank in ranks}
    if not ranks:
        problems.append("metrics/ holds no file: no rank got as far as writing one.")
    elif missing := [rank for rank in range(num_workers + 1) if rank not in numbers]:
        problems.append(
            f"metrics are missing for {len(missing)} of {num_workers + 1} ranks: {few(missing, NAMED)}."
        )
    if open_ranks := [rank.rank for rank in _latest(ranks) if rank.ended is None]:
        problems.append(
            f"no End event from rank {few(sorted(open_ranks), NAMED)}: killed or still running."
        )
    for rank in ranks:
        named = sum(rank.phases.values())
        if abs(named - rank.seconds) > 0.01 * rank.seconds:
            problems.append(
                f"rank {rank.rank}: its phases add up to {named:.1f} s, "
                f"its intervals to {rank.seconds:.1f} s."
            )
    return problems


def _missing_of_starts(run: RunDir, starts: list[Restart], files: list[Rank]) -> list[str]:
    """Return which files of a start are missing of ranks that have one of another start."""
    there = {(file.rank, start) for file in files for start in file.starts}
    known = {start.restart: start.num_workers for start in starts}
    needed = {(0, restart) for restart in run.restarts}
    needed |= {(rank, start) for start, count in known.items() for rank in range(count + 1)}
    ranks = {rank for rank, _ in there}
    missing = sorted((start, rank) for rank, start in needed - there if rank in ranks)
    if not missing:
        return []
    names = [f"metrics/{run.metrics_of(rank, start).name}" for start, rank in missing]
    told = few(names, NAMED)
    if any(rank == 0 for _, rank in missing):
        told += "; how such a start ended, its validations and its checkpoints are unknown"
    return [f"missing, or no plain file: {told}."]


def _lost_logs(run: RunDir, files: list[Rank]) -> list[str]:
    """Return, in a sentence each, the starts of which rank 0 has counted pushes and the log is not there."""
    counted = {
        start: file.counts["pushes"] for file in files if file.rank == 0 for start in file.starts
    }
    lost = []
    for start in sorted(counted.keys() - {0, *run.restarts}):
        path = run.pushes_of(start)
        if counted[start] or os.path.lexists(path):
            lost.append(
                f"{path.name} is missing, or no plain file, and start {start} has applied "
                f"{counted[start]} {plural(counted[start], 'push', 'pushes')}: no number of the pushes is of that start."
            )
    return lost


def _read_config(run: RunDir, num_workers: int, problems: list[str]) -> dict[str, Any]:
    """Every setting by its dotted name; what old records leave open as it was in force."""
    path = run.latest(run.config_of)
    try:
        sections = plain.sections(bounded.read(path, bounded.LARGEST_YAML).decode())
        found = {
            f"{section}.{name}": value
            for section, values in sections.items()
            for name, value in (values or {}).items()
        }
    except (OSError, ValueError, yaml.YAMLError, AttributeError) as error:
        problems.append(f"{path.name} cannot be read ({_why(error)}): the settings are unknown.")
        return {}
    if others := plain.of_other_kinds(found):
        problems.append(
            f"{path.name} holds {len(others)} settings of another kind than theirs, which are left out: {few(others, NAMED)}."
        )
        found = {name: value for name, value in found.items() if name not in others}
    if found.get("rule.max_drift", 0) is None and found.get("rule.name") in rulebook.RULEBOOK:
        if num_workers > 1:
            found["rule.max_drift"] = rulebook.RULEBOOK[found["rule.name"]].max_drift
        else:
            found["rule.max_drift"] = 0.0
    # of a run that cut its batches without a least size
    if found and found.get("data.min_batch") is None:
        found["data.min_batch"] = 1
    if found.get("rule.clip_norm", 0) is None:
        found["rule.clip_norm"] = 0.0
    if found.get("rule.groups", "") is None:
        found["rule.groups"] = ""
    return found


def _read_versions(run: RunDir, problems: list[str]) -> dict[str, Any]:
    try:
        return bounded.decode_json(
            bounded.read(run.latest(run.versions_of)), msgspec.json.Decoder(dict[str, Any])
        )
    except (OSError, ValueError) as error:
        problems.append(
            f"versions.json cannot be read ({_why(error)}): packages and hosts are unknown."
        )
        return {}


def _important(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a report shows first."""
    found = {key: settings[key] for key in CONFIG_KEYS if settings.get(key) is not None}
    if settings.get("data.source") in ("task", "script"):  # what these bring has no path
        found.pop("data.path", None)
    return found


def _cores(versions: dict[str, Any]) -> dict[str, int]:
    """Return the cores of each host, as its ranks wrote them down; what is of another kind is left out."""
    ranks = versions.get("ranks")
    if not isinstance(ranks, list):
        return {}
    found = [rank for rank in ranks if isinstance(rank, dict)]
    return {
        one_line(rank["host"]): rank["host_cores"]
        for rank in found
        if isinstance(rank.get("host"), str) and type(rank.get("host_cores")) is int
    }


def _why(error: Exception) -> str:
    """Return in a few words why a file was not read: FileNotFoundError, or what is out of bounds."""
    is_told = (
        isinstance(error, (bounded.OutOfBounds, msgspec.DecodeError)) or type(error) is ValueError
    )
    if is_told:
        return getattr(error, "strerror", None) or str(error)
    return type(error).__name__


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_inline(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_inline, value))
    return str(value)

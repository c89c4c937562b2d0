"""What is read from the files of a run directory, added up while it is read: ranks, events, pushes.

Damaged lines and files are counted and named (`Lines`), never fatal. Memory grows with the ranks, the epochs and the
validations, never with the pushes or the intervals.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from asgd_mpi.record.events import (
    PHASES,
    Checkpoint,
    Cut,
    End,
    Event,
    Gpu,
    Interval,
    Note,
    Push,
    Refusal,
    Retirement,
    Start,
    Validation,
    written_at,
)
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.timeline import Bins
from asgd_mpi.untrusted.plausible import MAX_EPOCHS, MAX_WORKERS

COUNTERS = (
    "images",
    "pushes",
    "fetches",
    "followed",
    "torn_reads",
    "skipped_images",
    "bytes_pushed",
    "bytes_fetched",
    "refused_pushes",
    "read_retries",
)
LARGEST = 1e15  # of any number in a line: seconds, samples, bytes
MAX_NOTES = 50  # kept; the rest is counted
Status = Literal["finished", "failed", "left", "unfinished"]


class Rank(msgspec.Struct):
    """What a rank did in one role: the sums of its intervals, over the starts of the run in which it had that role."""

    rank: int
    role: str
    starts: list[int] = []  # 0 for the first
    host: str = "unknown"
    device: str = "unknown"
    status: Status = "unfinished"
    reason: str = ""
    # Unix seconds of the End event of the latest of these starts,
    ended: float | None = None
    last_t: float | None = None  # ... and of the last thing it wrote
    num_threads: int = 1
    seconds: float = 0.0  # covered by intervals
    # seconds
    phases: dict[str, float] = msgspec.field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    hidden: float = 0.0  # seconds of push and fetch behind the computation
    passes: float = 0.0  # seconds, as in Interval,
    pipelined: float = 0.0  # ... likewise
    counts: dict[str, int] = msgspec.field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))


class Epoch(msgspec.Struct):
    epoch: int
    pushes: int = 0
    images: int = 0
    mean_loss: float | None = None  # training loss, every image weighing the same


class GpuUse(msgspec.Struct):
    """What NVML said of one GPU, over the run; whoever else used it is in it."""

    id: str
    host: str
    ranks: list[int] = []  # that drive it
    readings: int = 0
    utilisation: float | None = None  # 0..1, mean
    memory_bytes: int | None = None  # the most that was in use,
    memory_total: int | None = None  # ... of so much
    # between the first and the last reading of each start
    energy_j: float | None = None


class RankNote(msgspec.Struct):
    t: float
    rank: int
    text: str


class Lines:
    """Reads files line by line; counts what cannot be read instead of stopping."""

    def __init__(self, run: RunDir):
        self._run = run
        self.problems: list[str] = []
        self.unreadable: dict[str, int] = {}

    def read(self, reader: Callable[[Path], Iterator[Any]], path: Path) -> Iterator[Any]:
        name, unreadable = str(path.relative_to(self._run.path)), 0
        try:
            for item in reader(path):
                if item is None or not _is_possible(item):
                    unreadable += 1
                else:
                    yield item
        except (OSError, UnicodeError) as error:
            self.problems.append(
                f"{name} cannot be read to its end ({type(error).__name__}); the rest is left out."
            )
        if unreadable:
            self.unreadable[name] = unreadable
            self.problems.append(
                f"{name}: {unreadable} unreadable line{'s' * (unreadable > 1)} left out "
                "(cut off, damaged, or of a newer version)."
            )


def _is_possible(item: Event | Push) -> bool:
    """Return whether the numbers of a line can be those of a run: a flipped bit may leave a line that reads well."""
    numbers = [
        value
        for name, value in msgspec.structs.asdict(item).items()
        if isinstance(value, (int, float)) and not (isinstance(item, Push) and name == "loss")
    ]
    if not all(-LARGEST < value < LARGEST for value in numbers):
        return False
    match item:
        case Push():
            return (
                math.isfinite(item.loss)
                and 0 <= item.worker < MAX_WORKERS
                and 0 <= item.skipped <= item.positions
                and 0 < item.scale <= 1
            )
        case Start():
            return 0 < item.num_workers <= MAX_WORKERS and item.total_samples <= MAX_EPOCHS * max(
                1, item.num_samples
            )
        case Interval():
            return min(numbers) >= 0 and item.t1 >= item.t0
        case Cut():
            return (
                1 < item.num_stages <= MAX_WORKERS and 0 < item.num_parts and 0 <= item.bubble < 1
            )
    return True


def joined(files: Iterable[Rank]) -> list[Rank]:
    """Add up the files, which are in the order of (rank, start), of the same rank in the same role."""
    found: dict[tuple[int, str], Rank] = {}
    for file in files:
        before = found.get((file.rank, file.role))
        if before is None:
            found[file.rank, file.role] = file
        else:
            found[file.rank, file.role] = msgspec.structs.replace(
                file,
                starts=[*before.starts, *file.starts],
                **{
                    name: getattr(before, name) + getattr(file, name)
                    for name in ("seconds", "hidden", "passes", "pipelined")
                },
                phases={phase: before.phases[phase] + file.phases[phase] for phase in PHASES},
                counts={
                    counter: before.counts[counter] + file.counts[counter] for counter in COUNTERS
                },
            )
    return list(found.values())


class Metrics:
    """The sums over all metrics files; times are on the clock of rank 0."""

    def __init__(self, bins: Bins) -> None:
        self._bins = bins
        self.files: list[Rank] = []  # each of one start
        # samples: of an epoch, of the run
        self.num_workers = self.num_samples = 0
        self._totals: dict[int, int] = {}  # start -> samples of the run, as it was asked for
        self.unit = "images"
        self.num_parameters = 0
        self.reads_own_pushes = True
        self.alone = False
        self.started = math.inf
        self.last_t = -math.inf
        self.validations: list[tuple[int, Validation]] = []  # with the start of the run
        self.checkpoints: list[Checkpoint] = []
        self.cuts: dict[int, Cut] = {}  # by start
        self.notes: list[RankNote] = []
        self.notes_left_out = 0
        self.retirements: list[Retirement] = []
        self.refusals: Counter[str] = Counter()  # reason -> pushes
        # positions left out of their epoch
        self.given_up = 0
        self._gpus: dict[str, GpuUse] = {}
        # GPU, start -> lowest and highest count, and how often it was read
        self._energy: dict[tuple[str, int], tuple[float, float, int]] = {}
        self._driven: dict[tuple[int, int], set[str]] = defaultdict(set)  # rank, start -> GPUs

    @property
    def ranks(self) -> list[Rank]:
        """By number; a rank that had another role in another start is there once for each."""
        return joined(self.files)

    @property
    def total_samples(self) -> int:
        """Return those of the run, as its latest start was asked for: a resume may ask for more epochs, or fewer."""
        return self._totals[max(self._totals)] if self._totals else 0

    @property
    def gpus(self) -> list[GpuUse]:
        """Every GPU of which there is a reading; two ranks that share one count it once."""
        for use in self._gpus.values():
            spent = [
                high - low
                for (gpu, _), (low, high, readings) in self._energy.items()
                if gpu == use.id and readings > 1
            ]
            if spent:
                use.energy_j = sum(spent)
        return sorted(self._gpus.values(), key=lambda use: use.ranks)

    @property
    def without_energy(self) -> list[int]:
        """The ranks on a GPU whose energy is not known of every start in which they computed."""
        counted = {key for key, (_, _, readings) in self._energy.items() if readings > 1}
        return sorted(
            {
                file.rank
                for file in self.files
                for start in file.starts
                if file.device.startswith("cuda") and file.role != "server"
                if not any((gpu, start) in counted for gpu in self._driven[file.rank, start])
            }
        )

    def read(self, number: int, restart: int, events: Iterable[Event]) -> None:
        """Add up one metrics file: what a rank did in one start of the run."""
        role = "worker" if number else "server"
        for file in self.files:
            if file.rank == number:
                role = file.role
        rank, offset_s = Rank(number, role, [restart]), 0.0
        self.files.append(rank)
        for event in events:
            if isinstance(event, Start):
                offset_s = event.clock_offset_s
            self._add(rank, event, offset_s)
            if isinstance(event, Gpu):
                self._measure(rank, restart, event)
            elif isinstance(event, Validation):
                self.validations.append((restart, event))
            elif isinstance(event, Cut):
                self.cuts[restart] = event

    def _measure(self, rank: Rank, restart: int, reading: Gpu) -> None:
        use = self._gpus.setdefault(reading.id, GpuUse(reading.id, rank.host))
        self._driven[rank.rank, restart].add(reading.id)
        if rank.rank not in use.ranks:
            use.ranks = [*use.ranks, rank.rank]
        if reading.utilisation is not None:
            use.readings += 1
            use.utilisation = (use.utilisation or 0.0) + (
                reading.utilisation - (use.utilisation or 0.0)
            ) / use.readings
        if reading.memory_bytes is not None:
            use.memory_bytes, use.memory_total = (
                max(use.memory_bytes or 0, reading.memory_bytes),
                reading.memory_total,
            )
        if reading.energy_j is not None:
            low, high, readings = self._energy.get((reading.id, restart), (math.inf, -math.inf, 0))
            self._energy[reading.id, restart] = (
                min(low, reading.energy_j),
                max(high, reading.energy_j),
                readings + 1,
            )

    def _add(self, rank: Rank, event: Event, offset_s: float) -> None:
        t = written_at(event) + offset_s
        self.last_t = max(self.last_t, t)
        rank.last_t = t if rank.last_t is None else max(rank.last_t, t)
        match event:
            case Interval():
                rank.seconds += event.t1 - event.t0
                rank.hidden += event.hidden
                rank.passes += event.passes
                rank.pipelined += event.pipelined
                for phase in PHASES:
                    rank.phases[phase] += getattr(event, phase)
                for counter in COUNTERS:
                    rank.counts[counter] += getattr(event, counter)
                self._bins.add_interval(event, rank.rank, offset_s)
            case Start():
                rank.role, rank.host, rank.device = event.role, event.host, event.device
                rank.num_threads = event.threads
                self.num_parameters = max(self.num_parameters, event.num_parameters)
                self.started = min(self.started, t)
                self.num_workers = max(self.num_workers, event.num_workers)
                self.reads_own_pushes = self.reads_own_pushes and event.reads_own_pushes
                self.num_samples = max(self.num_samples, event.num_samples)
                self.unit = event.unit
                self.alone = event.alone
                start = rank.starts[-1]
                self._totals[start] = max(self._totals.get(start, 0), event.total_samples)
            case Checkpoint():
                self.checkpoints.append(event)
            case Note() if len(self.notes) < MAX_NOTES:
                self.notes.append(RankNote(t, rank.rank, event.text))
            case Note():
                self.notes_left_out += 1
            case Retirement():
                self.retirements.append(event)
            case Refusal():
                self.refusals[event.reason.partition(":")[0]] += 1
                self.given_up += event.given_up
            case End():
                rank.status, rank.reason, rank.ended = event.status, event.reason, t


class Training:
    """The sums over `pushes.log`."""

    def __init__(self, bins: Bins) -> None:
        self._bins = bins
        self.first: Push | None = None
        self.last: Push | None = None
        self.last_t = -math.inf
        self.positions = self.images = self.skipped = 0
        # pushes that were scaled down, sum of their factors
        self.scales: list[float] = [0, 0.0]
        self.staleness: Counter[int] = Counter()  # staleness -> pushes
        # 0-based -> pushes, images, staleness
        self.by_worker: dict[int, Counter[str]] = defaultdict(Counter)
        self.epochs: dict[int, Epoch] = {}

    @property
    def started(self) -> float | None:
        """Unix seconds of the first push."""
        return self.first.t if self.first else None

    def watch(self, pushes: Iterable[Push], also: Callable[[Push], None]) -> Iterator[Push]:
        """Add up the pushes on their way to somebody else."""
        for push in pushes:
            also(push)
            images = push.positions - push.skipped
            self._bins.add_push(push)
            self.first, self.last = self.first or push, push
            self.last_t = max(self.last_t, push.t)
            self.positions += push.positions
            self.images += images
            self.skipped += push.skipped
            if push.scale < 1:
                self.scales = [self.scales[0] + 1, self.scales[1] + push.scale]
            self.staleness[push.staleness] += 1
            worker = self.by_worker[push.worker]
            worker["pushes"] += 1
            worker["images"] += images
            worker["staleness"] += push.staleness
            self._add_to_epochs(push)
            yield push

    def _add_to_epochs(self, push: Push) -> None:
        """A push counts in the epoch that it begins in, each of its images in its own; those left out are taken first."""
        self.epochs.setdefault(push.epoch, Epoch(push.epoch)).pushes += 1
        skipped = push.skipped
        for number, start, stop in push.segments:
            epoch = self.epochs.setdefault(number, Epoch(number))
            images = max(0, stop - start - skipped)
            skipped -= stop - start - images
            if images:
                epoch.mean_loss = epoch.mean_loss or 0.0
                epoch.images += images
                epoch.mean_loss += (push.loss - epoch.mean_loss) * images / epoch.images

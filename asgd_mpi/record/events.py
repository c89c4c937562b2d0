"""What a run writes down: typed events as JSON lines, one file a rank, and the order of the applied pushes.

Every line of `metrics/rankNNN.jsonl` is one of the structs in `Event`, told apart by its `event` field; every line of
`pushes.log` is one `Push` (a JSON array) or one of the structs in `Turn` (a JSON object). A resumed run begins files of
its own, `rankNNN.r1.jsonl` and `pushes.r1.log` for the first restart (see `history`).
Times are Unix seconds on the writing rank's clock, durations seconds, sizes bytes. Fields
may be added with a default, never renamed: an old run directory stays readable.
"""

from __future__ import annotations

import math
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, Union

import msgspec

from asgd_mpi.record.disk import make_directory, open_own, unwritable
from asgd_mpi.untrusted import bounded

if TYPE_CHECKING:
    from asgd_mpi.protocol.ledger import Plan
    from asgd_mpi.protocol.messages import Header, Score, Verdict
    from asgd_mpi.protocol.versions import Made

FORMAT = 1
Line = TypeVar("Line", bound=msgspec.Struct)
# where a rank's time goes
PHASES = ("data", "compute", "push", "fetch", "validate", "apply", "servers", "checkpoint", "idle")


class Start(msgspec.Struct, tag_field="event", tag="start", omit_defaults=True):
    """A rank is ready to work."""

    t: float
    rank: int
    # a worker is stage 0 of its replica; stage: another one
    role: Literal["server", "worker", "stage"]
    host: str
    device: str
    num_workers: int
    num_parameters: int
    num_samples: int = 0  # of an epoch
    total_samples: int = 0  # of the run
    # a snapshot holds all pushes of the worker that fetched it: no overlap
    reads_own_pushes: bool = True
    threads: int = 1
    format: int = FORMAT
    unit: str = "images"  # what a sample is called
    clock_offset_s: float = 0.0  # to add to this rank's times to get those of rank 0,
    clock_error_s: float = 0.0  # known to that
    alone: bool = False  # server and worker are one process, without MPI


class Interval(msgspec.Struct, tag_field="event", tag="interval", omit_defaults=True):
    """Where one rank's time went between `t0` and `t1`; the phases add up to `t1 - t0`, the rest being `idle`.

    On a worker: `data` waits for a batch, `compute` is forward and backward, `push` hands a gradient to MPI and waits
    for the server to have judged it, `fetch` reads the snapshot, `idle` waits for a lease. On the server: `apply` is
    the update, `checkpoint` a write to disk, `idle` the wait for a push.
    """

    t0: float
    t1: float
    data: float = 0.0
    compute: float = 0.0
    push: float = 0.0
    fetch: float = 0.0
    validate: float = 0.0
    apply: float = 0.0
    servers: float = 0.0  # rank 0's wait for the servers of other slices to have applied theirs
    checkpoint: float = 0.0
    idle: float = 0.0
    hidden: float = 0.0  # push and fetch behind the computation: not part of the sum
    # of a stage of a cut network: forward and backward passes, part of `compute`,
    passes: float = 0.0
    # ... and of its leader: from the beginning of batches until all stages were done, part of it, too
    pipelined: float = 0.0
    images: int = 0  # trained (worker) or applied (server)
    pushes: int = 0  # sent (worker) or applied (server)
    fetches: int = 0
    # of them: read while the server wrote the snapshot; their time is that of the push
    followed: int = 0
    torn_reads: int = 0  # a snapshot changed while it was read: read again
    skipped_images: int = 0  # damaged images left out because the user asked for it
    bytes_pushed: int = 0
    bytes_fetched: int = 0
    refused_pushes: int = 0  # on the server: see Refusal
    read_retries: int = 0  # reads of a shard that failed and were repeated


class Span(msgspec.Struct, tag_field="event", tag="span"):
    """One stretch of a phase; the first `record.spans` of a rank are written."""

    t: float  # its beginning
    phase: str  # one of PHASES
    seconds: float


class Fetch(msgspec.Struct, tag_field="event", tag="fetch"):
    """One fetched snapshot and its hash; written with `record.hash_snapshots` only."""

    t: float
    version: int
    pushes: int  # sent by this worker before the fetch
    hash: str


class Publish(msgspec.Struct, tag_field="event", tag="publish"):
    """One published snapshot and its hash; written with `record.hash_snapshots` only."""

    t: float
    version: int
    hash: str


class Validation(msgspec.Struct, tag_field="event", tag="validation"):
    """The error of one version on the validation split."""

    t: float
    version: int
    # that had made this version; in logs before `made` was written: when the score arrived
    samples: int
    epoch: float  # ... the same in epochs
    num_images: int
    top1_error: float | None  # 0..1; of image classification
    top5_error: float | None
    loss: float | None  # None if it is not finite
    final: bool = False
    # with the batch-norm statistics that the workers had, if that was tried
    stored_top1_error: float | None = None
    # when this version was published; `t`: when its score had arrived
    made: float | None = None
    metrics: dict[str, float | None] = {}  # of other tasks, by name; None if not finite
    maximize: bool = False  # the first of them is to be high

    @classmethod
    def of(cls, t: float, score: Score, made: Made, plan: Plan) -> Validation:
        return cls(
            t,
            score.version,
            made.samples,
            made.samples / plan.num_samples,
            score.num_images,
            score.top1_error,
            score.top5_error,
            _finite(score.loss),
            score.final,
            score.stored_top1_error,
            made.t,
            {name: _finite(value) for name, value in score.metrics.items()},
            plan.maximize,
        )

    @property
    def named(self) -> dict[str, float | None]:
        """Return all that was measured, by name, the loss aside."""
        return self.metrics or {"top1_error": self.top1_error, "top5_error": self.top5_error}

    @property
    def error(self) -> float:
        """Return what is low in a good version: the top-1 error, or the first metric, with its sign changed if that is to be high."""
        value = next(iter(self.metrics.values())) if self.metrics else self.top1_error
        if value is None:
            return math.inf
        return -value if self.maximize else value

    @property
    def accuracy(self) -> float | None:
        """Return the top-1 accuracy, 0..1, of image classification."""
        return accuracy_of(self.top1_error)

    @property
    def top5_accuracy(self) -> float | None:
        return accuracy_of(self.top5_error)

    @property
    def counts(self) -> bool:
        """Return whether this can be the best version: one whose loss, or whose first metric, is not finite never is."""
        return math.isfinite(self.error) and (bool(self.metrics) or self.loss is not None)

    @property
    def result(self) -> str:
        """Return what decides which version is the best, in words."""
        if self.metrics:
            name, value = next(iter(self.metrics.items()))
            if value is None:
                return f"{name} not finite"
            return f"{name} {value:.4g}"
        if self.accuracy is None:
            return ""
        return f"accuracy {100 * self.accuracy:.2f} %"

    @property
    def when(self) -> float:
        """The time to draw it at: that of its version, as far as it is known."""
        return self.t if self.made is None else self.made


class Checkpoint(msgspec.Struct, tag_field="event", tag="checkpoint"):
    t: float
    version: int
    path: str  # within the run directory
    seconds: float
    num_bytes: int
    # ranks that were to save their momentum, and did not: they begin without after a resume
    without: list[int] = []


class Cut(msgspec.Struct, tag_field="event", tag="cut"):
    """The replicas' network is cut into stages, each on a rank of its own."""

    t: float
    num_stages: int
    num_parts: int  # micro-batches of a batch
    schedule: str  # of SCHEDULES in stages.schedule, or columns
    # 0..1: share of the time in which the stages are expected to wait for each other
    bubble: float
    begins: list[str]  # the first module of each stage


class Note(msgspec.Struct, tag_field="event", tag="note"):
    """Something worth a line in the report: a skipped image, a shared GPU."""

    t: float
    text: str


class Logged(msgspec.Struct, tag_field="event", tag="logged"):
    """Numbers that a user's loop records, by name."""

    t: float
    values: dict[str, float]

    @classmethod
    def now(cls, values: dict[str, float]) -> Logged:
        return cls(time.time(), values)


class End(msgspec.Struct, tag_field="event", tag="end"):
    t: float
    status: Literal["finished", "failed", "left"]  # left: saved on a signal, to be resumed
    reason: str = ""


class Retirement(msgspec.Struct, tag_field="event", tag="retirement"):
    """A worker that gets no more work, for good or until it is heard of again."""

    t: float
    rank: int
    version: int
    positions: int  # that it held: they are lent again
    reason: str
    for_good: bool
    error: str = ""  # what it failed of, type and message, if it told


class Refusal(msgspec.Struct, tag_field="event", tag="refusal"):
    """A push that was not applied: not finite, too late, left unfinished, from a retired worker, or malformed."""

    t: float
    rank: int
    version: int
    reason: str
    given_up: int = 0  # positions that were tried too often and are left out of the epoch


class Gpu(msgspec.Struct, tag_field="event", tag="gpu", omit_defaults=True):
    """What the driver says of a worker's GPU, whoever else uses it; None where it does not know."""

    t: float
    id: str  # its UUID
    # 0..1: share of the last second or less in which a kernel ran
    utilisation: float | None = None
    memory_bytes: int | None = None  # in use,
    memory_total: int | None = None  # ... of so much
    # a counter: only differences within one start of the run mean something
    energy_j: float | None = None


Event = Union[
    Start,
    Interval,
    Span,
    Gpu,
    Fetch,
    Publish,
    Validation,
    Checkpoint,
    Cut,
    Note,
    Logged,
    End,
    Retirement,
    Refusal,
]


class Push(msgspec.Struct, array_like=True, frozen=True):
    """One judged push, in the order in which the server judged them: enough to replay the run.

    The push turned version `version` into `version + 1`; its staleness is `version - read_version`.
    """

    t: float
    version: int
    worker: int  # 0-based, rank - 1
    read_version: int  # the snapshot the gradient was computed on
    epoch: int
    start: int  # computed on positions [start, stop) of the epoch's order,
    stop: int
    lr: float
    loss: float  # mean over its batches
    skipped: int = 0  # damaged images left out
    # ... and of these (epoch, start, stop), if it goes on in another lease
    more: list[tuple[int, int, int]] = []
    # gradients that the step made with it is the mean of; 0: it waits for more of them
    mean_of: int = 1
    # the snapshot that its worker's own weights began with, if it moves them
    base: int = -1
    # what its worker has multiplied it by, to keep to clip_norm and max_drift
    scale: float = 1.0

    @classmethod
    def of(cls, t: float, header: Header, verdict: Verdict) -> Push:
        first, *more = ((part.epoch, part.start, part.stop) for part in verdict.segments)
        return cls(
            t,
            verdict.version,
            header.worker,
            header.read_version,
            *first,
            verdict.lr,
            header.loss,
            header.skipped,
            more,
            verdict.mean_of,
            header.base,
            header.scale,
        )

    @property
    def staleness(self) -> int:
        return self.version - self.read_version

    @property
    def segments(self) -> list[tuple[int, int, int]]:
        """All (epoch, start, stop) that the gradient was computed on."""
        return [(self.epoch, self.start, self.stop), *self.more]

    @property
    def positions(self) -> int:
        return sum(stop - start for _, start, stop in self.segments)


class Resume(msgspec.Struct, tag_field="entry", tag="resume", frozen=True):
    """The first line of a resumed run's log: what it goes on from."""

    t: float
    restart: int  # 1 for the first
    parent: int  # the restart that wrote the checkpoint
    version: int
    samples: int
    num_workers: int
    # for each worker the version that its last push in its momentum had made; -1 for none
    momenta: list[int]


class Member(msgspec.Struct, tag_field="entry", tag="member", frozen=True):
    """A worker that had been retired is a member again, and begins without momentum."""

    t: float
    version: int
    worker: int


Turn = Union[Resume, Member]


# who follows a run sees it at most so much late, and so much a kill may lose
FLUSHED_S = 1.0


class EventLog:
    """Appends events to one file; a line is written whole, or the reader leaves it out and counts it.

    `also` gets every event, too. Raises RunDirError when the file cannot be written, and from then on always: what was
    refused once may have left a hole, however well the disk takes the next line.
    """

    def __init__(self, path: Path, also: Callable[[msgspec.Struct], None] | None = None):
        self._path, self.also = path, also
        self._encode = msgspec.json.Encoder().encode
        self._flushed_at = time.monotonic()
        self._failed: OSError | None = None
        with self._explained():
            make_directory(path.parent)
            self._file = open_own(path, "ab", buffering=1 << 16)

    def write(self, event: msgspec.Struct) -> None:
        with self._explained():
            self._file.write(sealed(self._encode(event)) + b"\n")
            if self.also:
                self.also(event)
            now = time.monotonic()
            if now - self._flushed_at > FLUSHED_S:
                self._file.flush()
                self._flushed_at = now

    def flush(self) -> None:
        with self._explained():
            self._file.flush()

    def sync(self) -> None:
        """Return when all that was written is on the disk."""
        with self._explained():
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._failed is None:
            with self._explained():
                self._file.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            if self._failed:
                raise self._failed
            yield
        except OSError as error:
            self._failed = error
            raise unwritable(self._path, error) from error


_SEALS = {b"]": b',"crc32:%08x"]', b"}": b',"crc32":"%08x"}'}  # of arrays and of objects


def written_at(entry: Event | Push | Turn) -> float:
    """Return the Unix seconds of a line; of an interval, those of its end."""
    return entry.t1 if isinstance(entry, Interval) else entry.t


def accuracy_of(error: float | None) -> float | None:
    """Return 1 - error, 0..1; None if it is not known."""
    return None if error is None else 1 - error


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def sealed(line: bytes) -> bytes:
    """Return a JSON array or object with the CRC-32 of it as its last element: what has changed since is damaged."""
    return line[:-1] + _SEALS[line[-1:]] % zlib.crc32(line)


def _is_whole(line: bytes) -> bool:
    """Return whether a line is as it was sealed; one without a seal, of an older version, is taken as it is."""
    line = line.rstrip(b"\n")
    at = line.rfind(b',"crc32')
    if at < max(0, len(line) - 20):
        return True
    return line[-1:] in _SEALS and sealed(line[:at] + line[-1:]) == line


def read_events(path: Path, tail_bytes: int | None = None) -> Iterator[Event | None]:
    """Yield the events of one metrics file; None for a line that cannot be read (cut off, or of a newer version).

    tail_bytes: only those of the whole lines in the last so many bytes.
    """
    decoder = msgspec.json.Decoder(Event)
    yield from _read_lines(path, lambda line: bounded.decode_json(line, decoder), tail_bytes)


def read_log(path: Path, tail_bytes: int | None = None) -> Iterator[Push | Turn | None]:
    """Yield the lines of a `pushes.log`, as `read_events` does; None for a line that cannot be read."""
    push, turn = msgspec.json.Decoder(Push), msgspec.json.Decoder(Turn)
    yield from _read_lines(
        path,
        lambda line: bounded.decode_json(line, turn if line.startswith(b"{") else push),
        tail_bytes,
    )


def read_pushes(path: Path) -> Iterator[Push | None]:
    """Yield the pushes of a `pushes.log`; None for a line that cannot be read."""
    return (entry for entry in read_log(path) if entry is None or isinstance(entry, Push))


def _read_lines(
    path: Path, decode: Callable[[bytes], Line], tail_bytes: int | None = None
) -> Iterator[Line | None]:
    for line in bounded.lines(path, tail_bytes):
        if line is None or not _is_whole(line):
            yield None
            continue
        try:
            yield decode(line)
        except ValueError:
            yield None

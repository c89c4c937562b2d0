"""What travels: the header of a packet (worker -> server) and the mail of a worker (server -> window -> worker).

Both are fixed records of little-endian 64-bit words; no pickle. Pure: bytes in, dataclasses out.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field, replace
from enum import IntEnum

MAGIC = 0x41534744_4D504931  # "ASGDMPI1"


class Work(IntEnum):
    TRAIN = 1
    VALIDATE = 2  # the latest snapshot, on the way
    FINAL = 3  # the last version, by all workers


class Orders(IntEnum):
    """What a worker is to do beside its leases."""

    GO_ON = 0
    STOP = 1  # the run is finished
    LEAVE = 2  # save what is to be saved: the run will be resumed
    REST = 3  # retired for good: wait for one of the two above
    REPORT = 4  # retired for now: any packet makes it a member again


@dataclass(frozen=True)
class Lease:
    """A range lent to a worker: positions [start, stop) of an epoch's order, or of the validation split."""

    number: int  # 1 for a worker's first lease, then counting up
    work: Work
    epoch: int
    start: int
    stop: int


@dataclass(frozen=True)
class Mail:
    """What a worker reads beside the snapshot."""

    judged: int  # packets of this worker that the server is done with
    version: int  # the latest version when the last of them was
    orders: Orders = Orders.GO_ON
    # packets of this worker that came when it had been retired; it is a new member then
    dropped: int = 0
    # number of the latest checkpoint that the worker is to save its own state for
    save: int = 0
    best: int = 0  # the version with the lowest error so far; -1: none was validated
    # gradients of this worker that were too late: their images are lent again
    refused: int = 0
    hold: bool = False  # wait for the others before the next step
    leases: tuple[Lease, ...] = ()
    # the oldest version whose gradients can still count: others are not worth finishing
    oldest: int = 0
    read: int = -1  # the snapshot that the server keeps as what this worker computes on; -1: none
    # that each of its next pushes is to hold, if that goes by its speed; 0: as many as its options say
    batches: int = 0


@dataclass(frozen=True)
class Segment:
    """Positions [start, stop) of an epoch's order, or of the validation split."""

    epoch: int
    start: int
    stop: int


@dataclass(frozen=True)
class Verdict:
    """What becomes of a gradient: it turns `version` into `version + 1`, unless it is dropped."""

    lr: float  # its own
    version: int = 0
    staleness: int = 0  # in versions
    worker: int = 0
    segments: tuple[Segment, ...] = ()  # what it was computed on
    rate: float = 0.0  # that a gradient without staleness would have
    # gradients that the step made with it is the mean of; 0: it waits for more
    mean_of: int = 1
    dropped: bool = False  # it was too late
    # what its worker has multiplied it by; with Adam, what the rate is multiplied by in its place
    scale: float = 1.0
    # the number of the step that is made with it, 1 for the first one that the optimizer's state knows of
    step: int = 1
    samples: int = 0  # applied before it
    count: int = 0  # of its own samples


@dataclass(frozen=True)
class Score:
    """The validation of one version, whole."""

    version: int
    num_images: int
    loss: float  # mean
    top1_error: float | None  # of image classification
    top5_error: float | None
    final: bool
    # with the batch-norm statistics that the workers had, if that was tried
    stored_top1_error: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)  # of other tasks, by name: means

    @property
    def named(self) -> dict[str, float | None]:
        """Return all that was measured, by name, the loss aside."""
        if self.metrics:
            return dict(self.metrics)
        return {"top1_error": self.top1_error, "top5_error": self.top5_error}

    @property
    def finite_metrics(self) -> dict[str, float]:
        return {name: value for name, value in self.metrics.items() if math.isfinite(value)}

    def error(self, maximize: bool) -> float:
        """Return what is to be low in the best version: the first metric, with its sign changed if that is to be high."""
        if not self.metrics:
            return math.nan if self.top1_error is None else self.top1_error
        first = next(iter(self.metrics.values()))
        return -first if maximize else first


class Kind(IntEnum):
    GRADIENT = 1  # payload: the flat gradient, (P,), in the run's wire format (see codec)
    # payload: the flat float buffers of the network (batch-norm statistics), float32
    VALIDATION = 2
    STATISTICS = 10  # payload: those of the batches of the gradient that follows
    # without a payload:
    NONFINITE = 3  # the gradient of this range is not finite
    # the worker has left this range unfinished: its gradient could not count any more
    GIVEN_UP = 11
    SAVED = 4  # the worker has written its own state for the checkpoint that was asked for
    BEST = 8  # the worker has written the model of `read_version`, which it has validated
    SIGNAL = 5  # the worker has been asked to end by a signal
    FAILED = 6  # the worker cannot go on; it rests until the run ends
    GOODBYE = 7  # the worker's last words
    READ = 12  # `read_version` is what the worker computes on from now: the server is to keep it
    HERE = 9  # a retired worker that holds nothing is heard of again


@dataclass(frozen=True)
class Header:
    """What the server must know of a packet; sent in front of the payload, in one message."""

    kind: Kind
    worker: int  # 0-based, rank - 1
    packet: int  # 1 for a worker's first packet, then counting up
    read_version: int  # the snapshot that the payload was computed on
    lease: int  # number of the worker's first lease that it covers
    # the first position that it covers, in that lease's epoch or in the validation split
    start: int
    count: int  # how many it covers; they may go on into the worker's next leases
    skipped: int = 0  # damaged images left out of them
    loss: float = 0.0  # mean over the batches; sum over the range of a validation
    top1: int = 0  # of a validation: images whose first guess is right,
    top5: int = 0  # ... whose first five guesses hold the right one
    # of a gradient: the snapshot that the worker's own weights began with, if it moves them
    base: int = -1
    # of the final validation: top1 with the batch-norm statistics that the worker had; -1: not tried
    stored_top1: int = -1
    # of a gradient: what max_drift and clip_norm have multiplied it by, above 0 and at most 1
    scale: float = 1.0
    # ... and how many numbers of every chunk its payload holds, if that is to be told (see vector_format)
    kept: int = 0
    # of a validation of another task: sum and weight of each metric, in the order of the run
    metrics: tuple[float, ...] = ()


MAX_METRICS = 8
_HEADER = struct.Struct(f"<9qd4qdqq{2 * MAX_METRICS}d")
HEADER_BYTES = 320


def pack_header(header: Header) -> bytes:
    """HEADER_BYTES bytes."""
    words = _HEADER.pack(
        MAGIC,
        header.kind,
        header.worker,
        header.packet,
        header.read_version,
        header.lease,
        header.start,
        header.count,
        header.skipped,
        header.loss,
        header.top1,
        header.top5,
        header.base,
        header.stored_top1,
        header.scale,
        header.kept,
        len(header.metrics),
        *header.metrics,
        *[0.0] * (2 * MAX_METRICS - len(header.metrics)),
    )
    return words.ljust(HEADER_BYTES, b"\0")


def unpack_header(packet: bytes | memoryview) -> Header:
    """Read the header of a packet. Raises ValueError if it is not one."""
    magic, kind, *words = _HEADER.unpack_from(packet)
    *fields, count = words[: -2 * MAX_METRICS]
    numbers = tuple(words[-2 * MAX_METRICS :])
    if magic != MAGIC:
        raise ValueError(
            f"a packet begins with {magic:#x} in place of {MAGIC:#x}: it is not one of asgd_mpi's"
        )
    if not 0 <= count <= len(numbers):
        raise ValueError(f"a header with {count} numbers of metrics: 0 to {len(numbers)} fit in")
    return replace(Header(Kind(kind), *fields), metrics=numbers[:count])


MAIL_WORDS = 24
_MAIL_FIELDS = 11  # before the leases
_LEASE_WORDS = 5


def pack_mail(mail: Mail) -> list[int]:
    """MAIL_WORDS words; the last one is a check over the others, so that half-written mail is told from mail."""
    words = [
        mail.judged,
        mail.version,
        mail.orders,
        mail.dropped,
        mail.save,
        mail.best,
        mail.refused,
        mail.hold,
        mail.oldest,
        mail.read,
        mail.batches,
    ]
    for lease in mail.leases:
        words += [lease.number, lease.work, lease.epoch, lease.start, lease.stop]
    words += [0] * (MAIL_WORDS - 1 - len(words))
    return words + [_check(words)]


def unpack_mail(words: list[int]) -> Mail | None:
    """Return the mail in MAIL_WORDS words; None if it was being written while it was read."""
    if words[-1] != _check(words[:-1]):
        return None
    judged, version, orders, dropped, save, best, refused, hold, oldest, read, batches = words[
        :_MAIL_FIELDS
    ]
    leases = []
    for at in range(_MAIL_FIELDS, MAIL_WORDS - _LEASE_WORDS, _LEASE_WORDS):
        number, work, epoch, first, last = words[at : at + _LEASE_WORDS]
        if number:
            leases.append(Lease(number, Work(work), epoch, first, last))
    return Mail(
        judged,
        version,
        Orders(orders),
        dropped,
        save,
        best,
        refused,
        bool(hold),
        tuple(leases),
        oldest,
        read,
        batches,
    )


def _check(words: list[int]) -> int:
    check = 0x5DEECE66D
    for word in words:
        check = (check * 31 + word + 1) & 0x7FFF_FFFF_FFFF_FFFF
    return check

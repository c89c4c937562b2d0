"""The server's decisions: which push counts, what it was worth, who works on what next, when the run is over.

Pure: no MPI, no clock, no torch. Headers go in (`judge`, `tally`), verdicts and mail come out; the run, the tests and
a simulation drive the same ledger. It owns the versions, the sample clock and the leases, and checks its own
invariants: every push is applied exactly once, in a total order; every sample of every epoch is lent exactly once.

    lend -> (worker computes) -> judge -> lend ... -> all samples applied -> validate the final version -> finished
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asgd_mpi.exchange.wire import Header

LEASES_AHEAD = 2  # one to work on, one for the loader to read ahead


class Work(IntEnum):
    TRAIN = 1
    VALIDATE = 2     # the latest snapshot, on the way
    FINAL = 3        # the last version, by all workers


@dataclass(frozen=True)
class Lease:
    """A range lent to a worker: positions [start, stop) of an epoch's order, or of the validation split."""

    number: int               # 1 for a worker's first lease, then counting up
    work: Work
    epoch: int
    start: int
    stop: int


@dataclass(frozen=True)
class Mail:
    """What a worker reads beside the snapshot."""

    judged: int               # packets of this worker that the server is done with
    version: int              # the latest version when the last of them was
    stop: bool
    leases: tuple[Lease, ...]


@dataclass(frozen=True)
class Segment:
    """Positions [start, stop) of an epoch's order, or of the validation split."""

    epoch: int
    start: int
    stop: int


@dataclass(frozen=True)
class Verdict:
    """What becomes of a gradient: it turns `version` into `version + 1`."""

    version: int
    staleness: int
    lr: float
    segments: tuple[Segment, ...]   # what it was computed on


@dataclass(frozen=True)
class Score:
    """The validation of one version, whole."""

    version: int
    num_images: int
    loss: float               # mean
    top1_error: float
    top5_error: float
    final: bool


@dataclass(frozen=True)
class Plan:
    """The run as numbers."""

    num_workers: int
    num_samples: int          # of an epoch
    num_validation: int
    total_samples: int        # of the run
    batch_size: int
    lease_batches: int
    validate_every: float     # epochs


class LedgerError(RuntimeError):
    """A packet that contradicts what the ledger knows: a fault of ours, or a damaged message."""


@dataclass
class _Account:
    """What the ledger knows of one worker."""

    judged: int = 0
    made: int = 0             # the version after its last judged packet
    read: int = 0             # the version that packet was computed on
    lent: int = 0             # leases so far
    cursor: int = 0           # of the first lease: what is delivered of it
    leases: deque[Lease] = field(default_factory=deque)


class Ledger:
    """See the module. `lr_at(samples, staleness)` is the schedule."""

    def __init__(self, plan: Plan, lr_at: Callable[[int, int], float]):
        self.plan = plan
        self.version = 0
        self.samples = 0                                    # applied
        self._lr_at = lr_at
        self._lent = 0                                      # samples lent, over all epochs
        self._validations_due = 0                           # not yet lent
        self._final_lent = False
        self._partial: list[Header] = []                    # of the final validation
        self._news: set[int] = set(range(plan.num_workers)) # workers whose mail has changed
        self._accounts = [_Account() for _ in range(plan.num_workers)]
        for _ in range(LEASES_AHEAD):                       # in turn, so that a small epoch reaches everybody
            for worker in range(plan.num_workers):
                self._lend(worker)

    @property
    def trained(self) -> bool:
        return self.samples == self.plan.total_samples

    @property
    def finished(self) -> bool:
        return self._final_lent and not any(account.leases for account in self._accounts)

    def judge(self, header: Header) -> Verdict:
        """Take a gradient into account. Raises LedgerError if it cannot be one of this run's."""
        segments = self._settle(header, {Work.TRAIN})
        staleness = self.version - header.read_version
        verdict = Verdict(self.version, staleness, self._lr_at(self.samples, staleness), segments)
        before = self._epochs_validated(self.samples)
        self.version += 1
        self.samples += header.count
        self._accounts[header.worker].made = self.version
        if self._epochs_validated(self.samples) > before and not self.trained:
            self._validations_due = 1
        self._relend(header.worker)
        return verdict

    def tally(self, header: Header) -> Score | None:
        """Take a validated range into account; the score, once it is whole. Raises LedgerError."""
        work = self._accounts[header.worker].leases[0].work if self._accounts[header.worker].leases else None
        self._settle(header, {Work.VALIDATE, Work.FINAL})
        self._accounts[header.worker].made = self.version
        self._relend(header.worker)
        if work == Work.VALIDATE:
            return _score([header], final=False)
        self._partial.append(header)
        return _score(self._partial, final=True) if self.finished else None

    def take_news(self) -> Iterator[tuple[int, Mail]]:
        """Each worker whose mail has changed since the last call, and its mail."""
        news, self._news = self._news, set()
        for worker in sorted(news if not self.finished else range(self.plan.num_workers)):
            account = self._accounts[worker]
            yield worker, Mail(account.judged, account.made, self.finished, tuple(account.leases))

    def outstanding(self) -> str:
        """Who holds what, for a message: `worker 0 (rank 1): lease 3, epoch 1 [64, 128), 0 of 64 delivered`."""
        return "; ".join(
            f"worker {worker} (rank {worker + 1}): lease {lease.number}, epoch {lease.epoch} "
            f"[{lease.start}, {lease.stop}), {account.cursor - lease.start} of {lease.stop - lease.start} delivered"
            for worker, account in enumerate(self._accounts) for lease in list(account.leases)[:1]) or "nobody"

    def _settle(self, header: Header, works: set[Work]) -> tuple[Segment, ...]:
        """Check a packet against what its worker was lent and move the worker's cursor; returns what it covers."""
        def demand(holds: bool, claim: str) -> None:
            if not holds:
                raise LedgerError(f"version {self.version}: {claim}; packet {header}; outstanding: {self.outstanding()}")

        demand(0 <= header.worker < self.plan.num_workers, "there is no such worker")
        account = self._accounts[header.worker]
        demand(header.packet == account.judged + 1, f"packet {account.judged + 1} of this worker is due")
        demand(account.read <= header.read_version <= self.version,
               f"the worker may have read a version from {account.read} to {self.version}")
        demand(bool(account.leases), "the worker holds no lease")
        demand(header.lease == account.leases[0].number, f"the worker works on lease {account.leases[0].number}")
        demand(header.start == account.cursor, f"position {account.cursor} of the lease is due")
        demand(header.count > 0, "a packet covers 1 position or more")

        segments, left, at = [], header.count, account.cursor
        for position, lease in enumerate(account.leases):
            at = lease.start if position else at
            demand(lease.work in works, f"lease {lease.number} is one to {lease.work.name.lower()}")
            segments.append(Segment(lease.epoch, at, min(at + left, lease.stop)))
            left -= segments[-1].stop - at
            if not left:
                break
        demand(not left, f"{left} positions more than the worker was lent")
        account.judged += 1
        account.read = header.read_version
        account.cursor = segments[-1].stop
        for _ in segments[:-1]:
            account.leases.popleft()
        self._news.add(header.worker)
        return tuple(segments)

    def _relend(self, worker: int) -> None:
        """Replace the leases that the worker has done with."""
        account = self._accounts[worker]
        if account.cursor == account.leases[0].stop:
            account.leases.popleft()
            if account.leases:
                account.cursor = account.leases[0].start
        for _ in range(LEASES_AHEAD - len(account.leases)):
            self._lend(worker)
        if self.trained and not self._final_lent and not any(other.leases for other in self._accounts):
            self._lend_final()

    def _lend(self, worker: int) -> None:
        """Lend the next range to `worker`, if anything is left."""
        plan = self.plan
        if self._validations_due and plan.num_validation:
            self._validations_due = 0
            self._grant(worker, Work.VALIDATE, 0, 0, plan.num_validation)
        elif self._lent < plan.total_samples:
            epoch, start = divmod(self._lent, plan.num_samples)
            left = min(plan.num_samples - start, plan.total_samples - self._lent)
            stop = start + min(plan.lease_batches * plan.batch_size, left)
            self._lent += stop - start
            self._grant(worker, Work.TRAIN, epoch, start, stop)

    def _lend_final(self) -> None:
        """Share the validation split out among all workers: nobody pushes any more, so all read the last version."""
        self._final_lent = True
        count, workers = self.plan.num_validation, self.plan.num_workers
        for worker in range(workers):
            start, stop = worker * count // workers, (worker + 1) * count // workers
            if start < stop:
                self._grant(worker, Work.FINAL, 0, start, stop)

    def _grant(self, worker: int, work: Work, epoch: int, start: int, stop: int) -> None:
        account = self._accounts[worker]
        account.lent += 1
        if not account.leases:
            account.cursor = start
        account.leases.append(Lease(account.lent, work, epoch, start, stop))
        self._news.add(worker)

    def _epochs_validated(self, samples: int) -> int:
        return int(samples / (self.plan.num_samples * self.plan.validate_every))


def _score(parts: list[Header], final: bool) -> Score:
    """Sum up the parts; images left out as damaged do not count."""
    seen = sum(part.count - part.skipped for part in parts)
    return Score(version=parts[0].read_version, num_images=seen, loss=sum(part.loss for part in parts) / seen,
                 top1_error=1 - sum(part.top1 for part in parts) / seen,
                 top5_error=1 - sum(part.top5 for part in parts) / seen, final=final)

"""The server's decisions: which push counts, what it was worth, who works on what next, when the run is over.

Pure: no MPI, no clock (the time is told), no torch. Headers go in (`judge`, `tally`, `refuse`, ...), verdicts and mail come out; the run,
the tests and a simulation drive the same ledger. It owns the versions, the sample clock, the leases and the membership
of the workers, and checks its own invariants: every push is applied exactly once, in a total order; every sample of
every epoch is used exactly once, whoever is retired on the way and however often the run is resumed (`state`).

    lend -> (worker computes) -> judge -> lend ... -> all samples applied -> validate the final version -> finished
              retired, refused: the range goes back and is lent again
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from asgd_mpi.protocol import claims
from asgd_mpi.protocol.barrier import Pacing, StepBarrier
from asgd_mpi.protocol.messages import Header, Lease, Mail, Orders, Score, Segment, Verdict, Work
from asgd_mpi.protocol.speeds import Speeds

LEASES_AHEAD = 2  # one to work on, one for the loader to read ahead
MAX_TRIES = 3  # of a range whose gradient is not finite; then it is given up, and counted


@dataclass(frozen=True)
class Plan:
    """The run as numbers."""

    num_workers: int
    num_samples: int  # of an epoch
    num_validation: int
    total_samples: int  # of the run
    batch_size: int
    lease_batches: int
    validate_every: float  # epochs
    max_nonfinite: int = 3  # of a worker's gradients in a row, until it is retired
    warm_start: int = 0  # samples that are lent to one worker alone
    pacing: Pacing = Pacing()
    # a lease holds as much as so many pushes like its worker's last one, if that is more
    lease_pushes: int = 0
    # workers keep weights of their own from one push to the next (an elastic rule)
    moves_own: bool = False
    smallest: int = 1  # images of a batch: no lease leaves less of an epoch
    metrics: tuple[str, ...] = ()  # that validations measure; none for image classification
    maximize: bool = False  # the first of them is to be high in the best version
    signed_loss: bool = False  # losses may be negative
    keeps_reads: bool = False  # the server keeps the snapshot that each worker computes on
    # batches of a push of the fastest worker, where the others make fewer, by their speed; 0: all make as many
    by_speed: int = 0

    @property
    def last_epoch(self) -> int:
        return max(0, self.total_samples - 1) // self.num_samples


class LedgerError(RuntimeError):
    """A packet that contradicts what the ledger knows: a fault of ours, or a damaged message."""


@dataclass
class _Account:
    """What the ledger knows of one worker."""

    judged: int = 0
    made: int = 0  # the version after its last judged packet
    read: int = 0  # the version that packet was computed on
    # the version at which it began, or began anew: it has read none before
    begun: int = 0
    kept: int = -1  # the snapshot that the server keeps as what it computes on; -1: none
    lent: int = 0  # leases so far
    cursor: int = 0  # of the first lease: what is delivered of it
    pushed: int = 0  # samples of the last gradient
    leases: deque[Lease] = field(default_factory=deque)
    dropped: int = 0
    refused: int = 0
    nonfinite: int = 0  # in a row
    is_member: bool = True  # lent to
    may_return: bool = True  # a retired worker is a member again with its next packet
    is_gone: bool = False  # has said goodbye, or its process is dead

    def undelivered(self) -> list[tuple[Work, Segment]]:
        return [
            (lease.work, Segment(lease.epoch, lease.start if number else self.cursor, lease.stop))
            for number, lease in enumerate(self.leases)
        ]


class Ledger:
    """See the module. `lr_at(samples, staleness)` is the schedule; `state` is that of a ledger to go on from."""

    def __init__(self, plan: Plan, lr_at: Callable[[int, int], float], state: dict | None = None):
        self.plan = plan
        self.version = 0
        self.samples = 0  # applied
        self.steps = 0  # of the weights, since the optimizer's state was zero
        self.best: Score | None = None
        self.save = 0  # the latest checkpoint asked for
        self.given_up: list[Segment] = []
        self._lr_at = lr_at
        # samples lent for the first time, over all epochs
        self._lent = 0
        self._returned: deque[tuple[Work, Segment]] = deque()  # to be lent before anything new,
        self._later: deque[Segment] = deque()  # ... and at the end of an epoch
        self._tries: Counter[Segment] = Counter()  # of those
        self._validations_due = 0  # not yet lent
        self._final_lent = False
        self._partial: list[Header] = []  # of the final validation
        self._is_leaving = False
        self._news: set[int] = set(range(plan.num_workers))  # workers whose mail has changed
        self._accounts = [_Account() for _ in range(plan.num_workers)]
        self._speeds = Speeds(plan.num_workers, plan.by_speed)
        if state:
            self._restore(state)
        self._pace = StepBarrier(
            plan.pacing, plan.num_workers, self.version, state.get("gathered", 0) if state else 0
        )
        self._lend_to_all()
        self._keep_pace()

    @property
    def trained(self) -> bool:
        return (
            self.samples + sum(segment.stop - segment.start for segment in self.given_up)
            == self.plan.total_samples
        )

    @property
    def finished(self) -> bool:
        return (
            self._final_lent
            and not self._returned
            and not any(account.leases for account in self._accounts)
        )

    @property
    def members(self) -> list[int]:
        """The workers that are lent to."""
        return [worker for worker, account in enumerate(self._accounts) if account.is_member]

    @property
    def present(self) -> list[int]:
        """The workers that have not said goodbye, and whose process is not known to be dead."""
        return [worker for worker, account in enumerate(self._accounts) if not account.is_gone]

    @property
    def held(self) -> set[int]:
        """The workers that are to wait for the others."""
        return self._pace.held

    @property
    def in_debt(self) -> list[int]:
        """The workers that hold a lease."""
        return [worker for worker, account in enumerate(self._accounts) if account.leases]

    @property
    def oldest_validated(self) -> int:
        """The oldest version that a validation which is lent may be of; the present one if none is."""
        return min(
            (
                account.read
                for account in self._accounts
                if any(lease.work != Work.TRAIN for lease in account.leases)
            ),
            default=self.version,
        )

    def begin(self, now: float) -> None:
        """Take note that those who have work begin with it; `now`: seconds, of the clock of `judge`."""
        for worker in self.in_debt:
            self._speeds.begin(worker, now)

    def judge(self, header: Header, now: float = 0.0) -> Verdict:
        """Take a gradient into account, which came `now`. Raises LedgerError if it cannot be one of this run's."""
        self._demand_possible(
            header, "" if math.isfinite(header.loss) else "its loss is not finite"
        )
        segments = self._settle(header, {Work.TRAIN})
        version, samples, account = self.version, self.samples, self._accounts[header.worker]
        rate = self._lr_at(samples, 0)
        lr = self._lr_at(samples, self.plan.pacing.staleness(version, header.read_version))
        dropped, mean_of = self._pace.is_late(version, header.read_version), 0
        if dropped:
            self._returned.extend((Work.TRAIN, segment) for segment in segments)
            account.refused += 1
        else:
            self.version += 1
            self.samples += header.count
        account.made, account.pushed = self.version, header.count
        account.nonfinite = 0
        self._speeds.pushed(header.worker, header.count, now)
        if (
            self._epochs_validated(self.samples) > self._epochs_validated(samples)
            and not self.trained
            and self.plan.num_validation
        ):
            self._validations_due = 1
        self._relend(header.worker)
        if samples < self.plan.warm_start <= self.samples:
            self._lend_to_all()
        if not dropped:
            mean_of = self._pace.take(header.worker, self.version, self._active, self.trained)
            self.steps += mean_of > 0
        if mean_of and self.plan.pacing.backup:
            self._news.update(self.members)  # who is late begins the next step
        self._keep_pace()
        if not account.leases:
            self._speeds.pause(header.worker)
        return Verdict(
            lr,
            version,
            version - header.read_version,
            header.worker,
            segments,
            rate,
            mean_of,
            dropped,
            header.scale,
            self.steps,
            samples,
            header.count,
        )

    def tally(self, header: Header) -> Score | None:
        """Take a validated range into account; the score, once it is whole. Raises LedgerError."""
        self._settle(header, {Work.VALIDATE, Work.FINAL})
        work = self._accounts[header.worker].leases[0].work
        self._accounts[header.worker].made = self.version
        self._speeds.pause(header.worker)
        self._relend(header.worker)
        self._keep_pace()
        score: Score | None = None
        if work == Work.VALIDATE:
            score = _score(self.plan, [header], final=False)
        else:
            self._partial.append(header)
            if self.finished:
                score = _score(self.plan, self._partial, final=True)
        if score and self._is_better(score):
            self.best = score
        return score

    def _is_better(self, score: Score) -> bool:
        """Return whether a score is better than the best so far; one with a loss that is not finite never is."""
        error = score.error(self.plan.maximize)
        if not math.isfinite(error) or not (score.metrics or math.isfinite(score.loss)):
            return False
        return self.best is None or error < self.best.error(self.plan.maximize)

    def refuse(self, header: Header) -> list[Segment]:
        """Take a gradient that is not finite into account: its range is lent again at the end of the epoch.

        Returns what is given up since it was tried MAX_TRIES times. A worker with `max_nonfinite` of them in a row is
        retired for good. Raises LedgerError.
        """
        given_up = []
        for segment in self._settle(header, {Work.TRAIN}):
            self._tries[segment] += 1
            if self._tries[segment] < MAX_TRIES:
                self._later.append(segment)
            else:
                given_up.append(segment)
        self.given_up += given_up
        account = self._accounts[header.worker]
        # own weights would be spoilt: it begins anew
        account.made = account.begun = self.version
        account.nonfinite += 1
        self._speeds.pause(header.worker)
        self._relend(header.worker)
        self._pace.pass_(header.worker)
        self._keep_pace()
        if account.nonfinite >= self.plan.max_nonfinite:
            self.retire(header.worker, for_good=True)
        return given_up

    def give_back(self, header: Header) -> None:
        """Take note that a worker has left a range unfinished, since its gradient could not count: it is lent again.

        Raises LedgerError.
        """
        if not self._pace.is_late(self.version, header.read_version):
            raise LedgerError(
                f"version {self.version}: a gradient was left that could still count; packet {header}"
            )
        segments = self._settle(header, {Work.TRAIN})
        self._accounts[header.worker].made = self.version
        # something else, if there is anything: it may be the slowest
        self._relend(header.worker)
        self._returned.extend((Work.TRAIN, segment) for segment in segments)
        self._lend_to_all()
        self._keep_pace()

    def acknowledge(self, header: Header) -> None:
        """Take a packet that covers no range into account. Raises LedgerError."""
        account = self._demand_turn(header)
        self._demand_possible(header, claims.of_note(header))
        account.judged = header.packet
        account.made = self.version
        self._news.add(header.worker)

    def keep(self, header: Header, is_there: bool) -> None:
        """Take note of the snapshot that a worker computes on, which is kept if it `is_there` still. Raises LedgerError."""
        self._demand_possible(
            header, "" if self.plan.keeps_reads else "nobody keeps what workers read"
        )
        self.acknowledge(header)
        if is_there:
            self._accounts[header.worker].kept = header.read_version

    def retire(self, worker: int, for_good: bool, is_gone: bool = False) -> int:
        """Lend to this worker no more; what it held goes back. Returns the positions that it held."""
        account = self._accounts[worker]
        held = account.undelivered()
        account.leases.clear()
        account.is_member = False
        account.may_return = account.may_return and not for_good
        account.is_gone = account.is_gone or is_gone
        self._returned.extend(held)
        self._news.add(worker)
        self._speeds.forget(worker)
        self._lend_to_all()
        self._pace.forget(worker)
        self._keep_pace()
        return sum(segment.stop - segment.start for _, segment in held)

    def readmit(self, header: Header) -> bool:
        """Drop a packet of a retired worker, and make it a member again unless it is retired for good; whether it is.

        Raises LedgerError.
        """
        account = self._demand_turn(header)
        account.judged = header.packet
        account.made = self.version
        self._news.add(header.worker)
        account.dropped += 1
        if account.may_return:
            account.read = account.begun = self.version
            account.kept = -1
        account.is_member = account.may_return
        self._lend_to_all()
        self._keep_pace()
        return account.is_member

    def reject(self, worker: int) -> None:
        """Count a packet that makes no sense: its worker must not wait for it."""
        self._accounts[worker].judged += 1
        self._accounts[worker].dropped += 1
        self._news.add(worker)

    def goodbye(self, header: Header) -> None:
        """Let a worker go. Raises LedgerError if nobody has sent it home: it is still waited for, and goes on working."""
        if not (self.finished or self._is_leaving):
            raise LedgerError(
                f"version {self.version}: a goodbye, though the run goes on; packet {header}; "
                f"outstanding: {self.outstanding()}"
            )
        self.acknowledge(header)
        self._accounts[header.worker].is_gone = True

    def leave(self) -> None:
        """Lend nothing more, and send everybody home: the run will be resumed."""
        self._is_leaving = True
        self._news.update(self.present)

    def ask_to_save(self) -> int:
        """Ask every worker to save its own state for the next checkpoint; returns the number of that."""
        self.save += 1
        self._news.update(self.present)
        return self.save

    def take_news(self) -> Iterator[tuple[int, Mail]]:
        """Each worker whose mail has changed since the last call, and its mail."""
        news, self._news = self._news, set()
        for worker in sorted(news if not self.finished else range(self.plan.num_workers)):
            account = self._accounts[worker]
            if self.finished:
                orders = Orders.STOP
            elif self._is_leaving:
                orders = Orders.LEAVE
            elif account.is_member:
                orders = Orders.GO_ON
            elif account.may_return:
                orders = Orders.REPORT
            else:
                orders = Orders.REST
            yield (
                worker,
                Mail(
                    account.judged,
                    account.made,
                    orders,
                    account.dropped,
                    self.save,
                    self.best.version if self.best else -1,
                    account.refused,
                    worker in self._pace.held,
                    tuple(account.leases),
                    self._pace.oldest,
                    account.kept,
                    self._speeds.batches(worker, self.members),
                ),
            )

    def outstanding(self) -> str:
        """Who holds what, for a message: `worker 0 (rank 1): lease 3, epoch 1 [64, 128), 0 of 64 delivered`."""
        return (
            "; ".join(
                f"worker {worker} (rank {worker + 1}): lease {lease.number}, epoch {lease.epoch} "
                f"[{lease.start}, {lease.stop}), {account.cursor - lease.start} of {lease.stop - lease.start} delivered"
                for worker, account in enumerate(self._accounts)
                for lease in list(account.leases)[:1]
            )
            or "nobody"
        )

    def state(self) -> dict:
        """Return what another ledger needs to go on from here, as JSON: what is lent and not delivered is to be lent again."""
        held = [account.undelivered() for account in self._accounts]
        by_turn = [
            leases[turn] for turn in range(LEASES_AHEAD) for leases in held if turn < len(leases)
        ]
        todo = [
            (int(work), segment.epoch, segment.start, segment.stop)
            # that one begins again
            for work, segment in [*by_turn, *self._returned]
            if work != Work.FINAL
        ]
        return {
            "version": self.version,
            "samples": self.samples,
            "steps": self.steps,
            "lent": self._lent,
            "todo": todo,
            "later": [
                (part.epoch, part.start, part.stop, self._tries[part]) for part in self._later
            ],
            "given_up": [(part.epoch, part.start, part.stop) for part in self.given_up],
            "validations_due": self._validations_due,
            "finished": self.finished,
            "gathered": self._pace.gathered,
            "best": None
            if self.best is None
            else [
                self.best.version,
                self.best.num_images,
                self.best.loss,
                self.best.top1_error,
                self.best.top5_error,
            ],
            "best_metrics": self.best.finite_metrics if self.best else {},
        }

    def _restore(self, state: dict) -> None:
        self.version, self.samples, self._lent = state["version"], state["samples"], state["lent"]
        # not told by a run of before Adam, whose optimizers do not count them
        self.steps = state.get("steps", 0)
        self._returned.extend((Work(work), Segment(*segment)) for work, *segment in state["todo"])
        for *segment, tries in state["later"]:
            self._later.append(Segment(*segment))
            self._tries[Segment(*segment)] = tries
        self.given_up = [Segment(*segment) for segment in state["given_up"]]
        self._validations_due = state["validations_due"]
        if state["best"]:
            version, num_images, loss, top1_error, top5_error = state["best"]
            metrics = state.get("best_metrics", {})
            self.best = Score(
                version, num_images, loss, top1_error, top5_error, final=False, metrics=metrics
            )
        if wrong := self._impossible(state.get("gathered", 0)):
            raise LedgerError(f"the saved ledger says {wrong}")
        waiting = [segment for work, segment in self._returned if work == Work.TRAIN] + [
            *self._later,
            *self.given_up,
        ]
        held = [(part, self.plan.num_samples) for part in waiting]
        held += [
            (part, self.plan.num_validation)
            for work, part in self._returned
            if work == Work.VALIDATE
        ]
        for part, length in held:
            if not (
                0 <= part.start < part.stop <= length and 0 <= part.epoch <= self.plan.last_epoch
            ):
                raise LedgerError(
                    f"the saved ledger holds positions [{part.start}, {part.stop}) of epoch {part.epoch}, and this run has "
                    f"{length} to epoch {self.plan.last_epoch}"
                )
        claimed = self.samples + sum(segment.stop - segment.start for segment in waiting)
        if claimed != self._lent or self._lent > self.plan.total_samples:
            raise LedgerError(
                f"the saved ledger does not add up: {self.samples} samples applied, {claimed - self.samples} to do again, "
                f"{self._lent} lent in all, {self.plan.total_samples} in this run"
            )
        if twice := _overlap(waiting):
            raise LedgerError(
                f"the saved ledger holds position {twice.start} of epoch {twice.epoch} twice: its sample would be used twice"
            )
        for account in self._accounts:
            account.read = account.made = account.begun = self.version

    def _impossible(self, gathered: int) -> str:
        """Return what of the saved numbers no run has, in words."""
        if self.steps > self.version:
            return f"that {self.steps} steps were made of {self.version} pushes"
        if gathered > self.version:
            return f"that {gathered} of {self.version} pushes wait for a step"
        best = self.best
        if best is None:
            return ""
        if best.version > self.version:
            return f"that the best version is {best.version}, and it is of version {self.version}"
        errors = () if best.metrics else (best.top1_error, best.top5_error)
        for error in errors:
            if error is None or not 0 <= error <= 1:
                return f"that the best version has an error of {error}; it is 0 to 1"
        return ""

    def _settle(self, header: Header, works: set[Work]) -> tuple[Segment, ...]:
        """Check a packet against what its worker was lent and move the worker's cursor; returns what it covers."""

        def demand(holds: bool, claim: str) -> None:
            self._demand_possible(header, "" if holds else claim)

        account = self._demand_turn(header, covers_range=True)
        demand(bool(account.leases), "the worker holds no lease")
        lease = account.leases[0]
        demand(header.lease == lease.number, f"the worker works on lease {lease.number}")
        demand(header.start == account.cursor, f"position {account.cursor} of the lease is due")
        if Work.TRAIN in works:
            self._demand_possible(
                header, claims.of_gradient(header, self.plan.moves_own, self.plan.signed_loss)
            )
            demand(
                not self.plan.keeps_reads or header.read_version == account.kept,
                f"version {account.kept} is kept as what the worker computes on",
            )
            demand(
                not self.plan.moves_own or header.base >= account.begun,
                f"the worker began at version {account.begun}",
            )
        else:
            self._demand_possible(
                header,
                claims.of_validation(header, lease.work == Work.FINAL, len(self.plan.metrics)),
            )
            demand(
                header.count == lease.stop - lease.start,
                f"all of [{lease.start}, {lease.stop}) is to be validated",
            )
            demand(
                lease.work != Work.FINAL or header.read_version == self.version,
                "the last version is to be validated",
            )

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

    def _demand_turn(self, header: Header, covers_range: bool = False) -> _Account:
        """Return the account of the sender, whose next packet this is. Raises LedgerError."""
        if not 0 <= header.worker < self.plan.num_workers:
            self._demand_possible(header, "there is no such worker")
        account = self._accounts[header.worker]
        due, oldest = account.judged + 1, account.read if covers_range else 0
        self._demand_possible(
            header, "" if header.packet == due else f"packet {due} of this worker is due"
        )
        contradiction = ""
        if not oldest <= header.read_version <= self.version:
            contradiction = f"the worker may have read a version from {oldest} to {self.version}"
        self._demand_possible(header, contradiction)
        return account

    def _demand_possible(self, header: Header, contradiction: str) -> None:
        """Raise LedgerError if there is a contradiction."""
        if contradiction:
            raise LedgerError(
                f"version {self.version}: {contradiction}; packet {header}; outstanding: {self.outstanding()}"
            )

    def _relend(self, worker: int) -> None:
        """Replace the leases that the worker has done with."""
        account = self._accounts[worker]
        if account.cursor == account.leases[0].stop:
            account.leases.popleft()
            if account.leases:
                account.cursor = account.leases[0].start
        while len(account.leases) < LEASES_AHEAD and self._lend(worker):
            pass
        if self._returned or self._later:
            self._lend_to_all()  # others may be idle
        self._lend_final_if_due()

    def _lend_to_all(self) -> None:
        """Lend in turn, so that a small epoch reaches everybody."""
        for ahead in range(LEASES_AHEAD):
            for worker in self.members:
                if len(self._accounts[worker].leases) <= ahead:
                    self._lend(worker)
        self._lend_final_if_due()

    def _lend(self, worker: int) -> bool:
        """Lend the next range to `worker`, if anything is left; whether there was."""
        plan = self.plan
        if self._is_leaving or self.samples < plan.warm_start and worker != self.members[0]:
            return False
        if self._returned:
            work, segment = self._returned.popleft()
            self._grant(worker, work, segment)
        elif self._validations_due and plan.num_validation:
            self._validations_due = 0
            self._grant(worker, Work.VALIDATE, Segment(0, 0, plan.num_validation))
        elif self._later and (
            self._lent % plan.num_samples == 0 or self._lent == plan.total_samples
        ):
            self._grant(worker, Work.TRAIN, self._later.popleft())
        elif self._lent < plan.total_samples:
            epoch, start = divmod(self._lent, plan.num_samples)
            left = min(plan.num_samples - start, plan.total_samples - self._lent)
            length = min(self._length_of_lease(worker), left)
            stop = start + (left if left - length < plan.smallest else length)
            self._lent += stop - start
            self._grant(worker, Work.TRAIN, Segment(epoch, start, stop))
        else:
            return False
        return True

    def _length_of_lease(self, worker: int) -> int:
        """Samples: if pushes grow, near the end of the run no more than an even share of what is left, so that all end together."""
        plan, size = self.plan, self.plan.batch_size
        if plan.by_speed:
            return max(plan.lease_batches, self._speeds.batches(worker, self.members)) * size
        share = (plan.total_samples - self._lent) // plan.num_workers
        pushes = min(plan.lease_pushes * self._accounts[worker].pushed, share)
        return max(plan.lease_batches, -(-pushes // size)) * size

    def _lend_final_if_due(self) -> None:
        """Share the validation split out among all members: nobody pushes any more, so all read the last version."""
        if (
            not self.trained
            or self._final_lent
            or self._is_leaving
            or self.in_debt
            or not self.members
        ):
            return
        self._final_lent = True
        # a validation on the way that nobody has begun
        self._returned.clear()
        count, members = self.plan.num_validation, self.members
        for turn, worker in enumerate(members):
            start, stop = turn * count // len(members), (turn + 1) * count // len(members)
            if start < stop:
                self._grant(worker, Work.FINAL, Segment(0, start, stop))

    def _grant(self, worker: int, work: Work, segment: Segment) -> None:
        account = self._accounts[worker]
        account.lent += 1
        if not account.leases:
            account.cursor = segment.start
        account.leases.append(Lease(account.lent, work, segment.epoch, segment.start, segment.stop))
        self._news.add(worker)

    def _active(self) -> list[int]:
        """Return the members that have something to train."""
        return [
            worker
            for worker, account in enumerate(self._accounts)
            if account.is_member and account.leases and account.leases[0].work == Work.TRAIN
        ]

    def _keep_pace(self) -> None:
        """Tell those that are to wait from now on, and those that need not any more."""
        if not self._pace.is_free:
            self._news |= self._pace.update(self._active())

    def _epochs_validated(self, samples: int) -> int:
        return int(samples / (self.plan.num_samples * self.plan.validate_every))


def _overlap(segments: Iterable[Segment]) -> Segment | None:
    """Return the beginning of what two segments have in common; None if none do."""
    ordered = sorted(segments, key=lambda segment: (segment.epoch, segment.start))
    for before, after in zip(ordered, ordered[1:]):
        if before.epoch == after.epoch and after.start < before.stop:
            return after
    return None


def _score(plan: Plan, parts: list[Header], final: bool) -> Score:
    """Sum up the parts; images left out as damaged do not count."""
    seen = max(1, sum(part.count - part.skipped for part in parts))
    loss = sum(part.loss for part in parts) / seen
    if plan.metrics:
        sums = [sum(numbers) for numbers in zip(*(part.metrics for part in parts))]
        metrics = {
            name: total / weight if weight else math.nan
            for name, total, weight in zip(plan.metrics, sums[::2], sums[1::2])
        }
        loss = metrics.get("loss", math.nan)
        return Score(parts[0].read_version, seen, loss, None, None, final, metrics=metrics)
    was_tried = all(part.stored_top1 >= 0 for part in parts)
    return Score(
        version=parts[0].read_version,
        num_images=seen,
        loss=loss,
        top1_error=1 - sum(part.top1 for part in parts) / seen,
        top5_error=1 - sum(part.top5 for part in parts) / seen,
        final=final,
        stored_top1_error=1 - sum(part.stored_top1 for part in parts) / seen if was_tried else None,
    )

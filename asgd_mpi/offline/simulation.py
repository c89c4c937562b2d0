"""A training on a virtual clock, in one process, without MPI.

The ledger, the rule, the schedule and the replicas are those of a run, and so is every number that they compute; only time
is made up. A worker is a generator that does what the worker's loop does, and yields the seconds that each step of it takes:

    compute a batch -> push -> the server's turn, one push after the other -> (held by the rule) -> fetch -> compute ...

The same options give the same log, to the byte. What is left out: ranks that share cores, torn reads, the wait for data,
and a server that applies several waiting pushes in one pass. A validation takes a third of a step for each batch.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from asgd_mpi.config import rulebook
from asgd_mpi.config.options import ExchangeConfig
from asgd_mpi.data.loader import ranges
from asgd_mpi.errors import TOO_FAST, ConfigError, TrainingDiverged, WorkersLost
from asgd_mpi.offline import forecast
from asgd_mpi.offline.trainer import SingleProcessTrainer, Snapshot
from asgd_mpi.protocol.ledger import Ledger, Plan
from asgd_mpi.protocol.messages import Header, Kind, Lease, Mail, Orders, Score, Work
from asgd_mpi.protocol.versions import Versions
from asgd_mpi.record.events import GIVEN_UP, PHASES, Interval, Member, Push, Refusal, Retirement, Validation
from asgd_mpi.record.progress import Progress
from asgd_mpi.runtime import fault_injection
from asgd_mpi.task import Task
from asgd_mpi.vector import codec

VALIDATION = 1 / 3        # of a step: no backward pass
FEW_LOST = 3              # workers whose loss is told as it happens
FAILURES = ("slow", "kill", "raise")

Process = Iterator[float | None]    # yields the seconds that pass, or None to sleep until its worker is woken


@dataclass(frozen=True)
class Times:
    """Seconds, of an exchange without queues."""

    step_s: float             # a batch, on a worker: log-normal, with this mean
    push_s: float             # from the end of a step to the server's turn
    apply_s: float            # of the server's time, for a push
    fetch_s: float
    spread: float = 0.0       # standard deviation of a step over its mean


@dataclass
class _Sum:
    """The batches whose gradients a push sums up."""

    lease: int
    snapshot: Snapshot                    # that they are computed on,
    fetched: Snapshot | None              # ... None if the replica has it already
    batches: list[tuple[int, int, int]] = field(default_factory=list)      # epoch, start, stop
    centre: Snapshot | None = None        # fetched after them, for an elastic rule


@dataclass
class RoundTrip:
    """To the server and back; see `runtime.client`."""

    started: float
    mail: Mail | None = None
    snapshot: Snapshot | None = None
    fetch_s: float = 0.0
    seconds: float = 0.0
    is_over: bool = False


@dataclass
class _Worker:
    number: int
    mail: Mail
    step_s: Callable[[], float]
    dies_at_step: int = 0                 # 0: never
    steps: int = 0
    sent: int = 0                         # packets
    done: int = 0                         # the last lease that was worked on
    since_fetch: int = 0                  # batches
    snapshot: Snapshot | None = None
    is_fresh: bool = False                # fetched, and nothing computed on it yet
    sum: _Sum | None = None
    trip: RoundTrip | None = None
    is_dead: bool = False
    process: Process | None = None        # its loop,
    alarm: int = -1                       # ... the number of the event that ends its sleep,
    is_computing: bool = False            # ... and whether it may be woken before that

    @property
    def next_lease(self) -> Lease | None:
        return next((lease for lease in self.mail.leases if lease.number > self.done), None)


class Book:
    """The intervals of one rank, on the virtual clock; what no phase covers is idle."""

    def __init__(self, interval_s: float):
        self.events: list[msgspec.Struct] = []
        self._interval_s, self._now = interval_s, Interval(0.0, 0.0)

    def add(self, t: float, **amounts: float) -> None:
        """Add to fields of Interval what has been over at time `t`, seconds or counts."""
        for name, amount in amounts.items():
            setattr(self._now, name, getattr(self._now, name) + amount)
        if t - self._now.t0 >= self._interval_s:
            self.close(t)

    def close(self, t: float) -> None:
        now = self._now
        now.t1 = max(t, now.t0)
        now.idle = max(0.0, now.t1 - now.t0 - sum(getattr(now, phase) for phase in PHASES))
        self.events.append(now)
        self._now = Interval(now.t1, 0.0)


class Simulation:
    """The event loop, and what it leaves behind: `pushes`, and the events of each rank in `books`.

    `computation` does the arithmetic; `moves`: how the rule's workers move their own weights (rulebook). Pure otherwise.
    """

    def __init__(self, plan: Plan, exchange: ExchangeConfig, computation: SingleProcessTrainer, times: Times, moves: str = "",
                 seed: int = 0, failures: Sequence[fault_injection.Failure] = (), progress: Progress | None = None,
                 interval_s: float = 1.0):
        self.ledger = Ledger(plan, computation.schedule)
        self.plan, self.exchange, self.computation, self.times, self.moves = plan, exchange, computation, times, moves
        self.progress = progress or Progress("none", plan.total_samples, plan.num_samples)
        self.pushes: list[Push | Member] = []
        self.books = [Book(interval_s) for _ in range(plan.num_workers + 1)]
        self.scores: list[Validation] = []
        self._versions = Versions(self.ledger, 0.0)
        self.num_dropped = 0              # pushes that came too late, or were not finite
        self._num_lost = 0                # workers
        self.latest = computation.first
        self._num_bytes = codec.num_bytes(len(self.latest.weights), exchange.wire)
        self.now = self._server_free_at = 0.0
        self._mail = dict(self.ledger.take_news())
        self._heap: list[tuple[float, int, _Worker | None, Process]] = []
        self._order = itertools.count()   # of events at the same time
        self._asleep: dict[int, list[Process]] = {}
        self._void: set[int] = set()      # events that do not take place: their worker was woken before
        slow = {failure.rank: failure.amount for failure in failures if failure.kind == "slow"}
        dies = {failure.rank: failure.step for failure in failures if failure.kind != "slow" and failure.step}
        self.workers = [_Worker(number, self._mail[number], _steps(times, slow.get(number + 1, 1.0), f"{seed}:{number}"),
                                dies.get(number + 1, 0)) for number in range(plan.num_workers)]
        for worker in self.workers:
            worker.process = self._work(worker)
            self._spawn(worker, worker.process)
        for failure in failures:
            if failure.kind != "slow" and not failure.step:
                self._spawn(None, self._die(self.workers[failure.rank - 1], failure.t or 0.0))

    def run(self) -> None:
        """Play the training to its end. Raises TrainingDiverged, WorkersLost."""
        while not self.ledger.finished:
            if not self._heap:
                raise RuntimeError(f"nothing happens any more at {self.now} s: {self.ledger.outstanding()}")
            now, number, worker, process = heapq.heappop(self._heap)
            if number in self._void:
                self._void.discard(number)
                continue
            self.now = now
            if worker is None or not worker.is_dead:
                self._go_on(worker, process)
        for book in self.books:
            book.close(self.now)
        self.progress.close()

    @property
    def is_degraded(self) -> bool:
        return len(self.ledger.members) < self.plan.num_workers

    # ---- the clock

    def _spawn(self, worker: _Worker | None, process: Process) -> None:
        heapq.heappush(self._heap, (self.now, next(self._order), worker, process))

    def _go_on(self, worker: _Worker | None, process: Process) -> None:
        try:
            pause = next(process)
        except StopIteration:
            return
        if pause is None:
            self._asleep.setdefault(worker.number, []).append(process)
        else:
            number = next(self._order)
            if worker is not None and process is worker.process:
                worker.alarm = number
            heapq.heappush(self._heap, (self.now + pause, number, worker, process))

    def _wake(self, number: int) -> None:
        for process in self._asleep.pop(number, []):
            self._spawn(self.workers[number], process)

    # ---- a worker: what runtime.worker does

    def _work(self, me: _Worker) -> Process:
        yield from self._refresh(me)
        while True:
            if me.next_lease is None:
                yield from self._refresh(me)                 # the answer to the last push may bring it
            if me.next_lease is None and me.mail.orders == Orders.GO_ON:
                me.mail = self._mail[me.number]
                while me.next_lease is None and me.mail.orders == Orders.GO_ON:
                    yield None
                    me.mail = self._mail[me.number]
                if me.next_lease:
                    yield from self._refresh(me)             # others have moved the weights in the meantime
            if me.mail.orders != Orders.GO_ON:
                return
            lease = me.next_lease
            if lease is not None:
                yield from self._train(me, lease) if lease.work == Work.TRAIN else self._validate(me, lease)
                me.done = lease.number

    def _train(self, me: _Worker, lease: Lease) -> Process:
        for _, start, stop in ranges(lease.epoch, lease.start, lease.stop, self.plan.batch_size, self.plan.smallest):
            seconds, began = me.step_s(), self.now
            me.is_computing = True
            yield seconds                                    # or less: see _post
            me.is_computing = False
            me.steps += 1                                    # finished or not
            if me.steps == me.dies_at_step:
                return self._lose(me)
            if me.sum is None:
                me.sum, me.is_fresh = _Sum(lease.number, me.snapshot, me.snapshot if me.is_fresh else None), False
            me.sum.batches.append((lease.epoch, start, stop))
            is_overtaken = self._is_overtaken(me, me.sum.snapshot)
            self.books[me.number + 1].add(self.now, compute=self.now - began, images=0 if is_overtaken else stop - start)
            if is_overtaken:
                yield from self._give_up(me)
            elif self._is_due(me):
                yield from self._push(me)
            if me.mail.orders != Orders.GO_ON:
                return

    def _is_overtaken(self, me: _Worker, snapshot: Snapshot) -> bool:
        """Return whether a gradient on this snapshot cannot count any more."""
        return bool(self.plan.pacing.backup) and snapshot.version < self._mail[me.number].oldest

    def _give_up(self, me: _Worker) -> Process:
        done, me.sum = me.sum, None
        yield from self._start(me, lambda: self._give_back(me, done))
        me.since_fetch = 0
        yield from self._take(me)

    def _is_due(self, me: _Worker) -> bool:
        if self.exchange.n_push == "auto":
            return me.trip is None or me.trip.is_over
        return len(me.sum.batches) == self.exchange.n_push

    def _push(self, me: _Worker) -> Process:
        done, me.sum = me.sum, None
        if self.moves == "elastic":
            yield from self._start(me)
        yield from self._take(me)
        if self.moves == "elastic":
            done.centre = me.snapshot
        me.since_fetch += len(done.batches)
        fetch = self.moves != "elastic" and me.since_fetch >= self.exchange.n_fetch
        me.since_fetch = 0 if fetch else me.since_fetch
        self.books[me.number + 1].add(self.now, pushes=1, bytes_pushed=self._num_bytes)
        yield from self._start(me, lambda: self._judge(me, done), fetch, is_gradient=True)
        if not self.exchange.overlap:
            yield from self._take(me)

    def _refresh(self, me: _Worker) -> Process:
        if me.sum:
            yield from self._push(me)
        yield from self._take(me)
        yield from self._start(me)
        yield from self._take(me)
        me.since_fetch = 0

    def _validate(self, me: _Worker, lease: Lease) -> Process:
        yield from self._refresh(me)
        seconds = VALIDATION * me.step_s() * (lease.stop - lease.start) / self.plan.batch_size
        yield seconds
        self.books[me.number + 1].add(self.now, validate=seconds)
        yield from self._start(me, lambda: self._tally(me, lease), fetch=False)
        yield from self._take(me)
        yield from self._refresh(me)

    def _start(self, me: _Worker, deliver: Callable[[], bool] | None = None, fetch: bool = True,
               is_gradient: bool = False) -> Process:
        """Set out for the server, whose turn `deliver` is; on the spot, or behind what comes next."""
        me.trip = RoundTrip(self.now)
        journey = self._go(me, me.trip, deliver, fetch, is_gradient)
        if self.exchange.overlap:
            self._spawn(me, journey)
        else:
            yield from journey

    def _go(self, me: _Worker, trip: RoundTrip, deliver: Callable[[], bool] | None, fetch: bool, is_gradient: bool) -> Process:
        if deliver:
            me.sent += 1
            yield self.times.push_s
            self._server_free_at = max(self.now, self._server_free_at) + (self.times.apply_s if is_gradient else 0.0)
            yield self._server_free_at - self.now
            fetch = deliver() or fetch
            self._post()
            while is_gradient and self._mail[me.number].hold and self._mail[me.number].orders == Orders.GO_ON:
                yield None
        trip.mail = self._mail[me.number]
        if fetch:
            trip.snapshot, trip.fetch_s = self.latest, self.times.fetch_s
            yield trip.fetch_s
        trip.seconds, trip.is_over = self.now - trip.started, True
        self._wake(me.number)

    def _take(self, me: _Worker) -> Process:
        """Wait for the trip to end, and take what it brought."""
        if me.trip is None:
            return
        started, book = self.now, self.books[me.number + 1]
        while not me.trip.is_over:
            yield None
        trip, me.trip = me.trip, None
        if self.exchange.overlap:
            book.add(self.now, push=self.now - started, hidden=trip.seconds - (self.now - started))
        else:
            book.add(self.now, push=trip.seconds - trip.fetch_s, fetch=trip.fetch_s)
        me.mail = trip.mail
        if trip.snapshot is not None:
            me.snapshot, me.is_fresh = trip.snapshot, True
            book.add(self.now, fetches=1, bytes_fetched=self._num_bytes)

    # ---- the server: what runtime.server does

    def _judge(self, me: _Worker, done: _Sum) -> bool:
        """The turn of a push; whether its worker must fetch, since its own weights are spoilt."""
        computation = self.computation
        loss, skipped, is_finite, scale = computation.compute_(me.number, done.batches, done.fetched, done.centre)
        positions = sum(stop - start for _, start, stop in done.batches)
        header = Header(
            Kind.GRADIENT if is_finite else Kind.NONFINITE, me.number, me.sent, (done.centre or done.snapshot).version,
            done.lease, done.batches[0][1], positions, skipped, loss, base=computation.replicas[me.number].base,
            scale=scale)
        self.books[0].add(self.now, apply=self.times.apply_s)
        if self._is_of_nobody(me, header):
            return False
        if not is_finite:
            return self._refuse(me, header)
        verdict = self.ledger.judge(header)
        if verdict.dropped:
            computation.undo_(me.number)
            self._drop(me, f"too late: {verdict.staleness} versions stale")
            return False
        self.latest = computation.applied(self.latest, verdict, positions)
        self.pushes.append(Push.of(self.now, header, verdict))
        self._versions.add(positions, self.now)
        self.books[0].add(self.now, pushes=1, images=positions, skipped_images=skipped)
        self.progress.push(positions, loss, verdict.staleness)
        return False

    def _give_back(self, me: _Worker, done: _Sum) -> bool:
        header = Header(Kind.GIVEN_UP, me.number, me.sent, done.snapshot.version, done.lease, done.batches[0][1],
                        sum(stop - start for _, start, stop in done.batches))
        if not self._is_of_nobody(me, header):
            self.ledger.give_back(header)
            self._drop(me, GIVEN_UP)
        return False

    def _is_of_nobody(self, me: _Worker, header: Header) -> bool:
        """Whether a packet was on its way when its worker was retired; it is then dropped."""
        if me.number in self.ledger.members:
            return False
        self.ledger.readmit(header)
        self._drop(me, "it came from a retired worker")
        return True

    def _refuse(self, me: _Worker, header: Header) -> bool:
        given_up = sum(segment.stop - segment.start for segment in self.ledger.refuse(header))
        self._drop(me, f"not finite: loss {header.loss}", given_up)
        if self.moves:
            self.computation.begin_anew_(me.number, self.latest)
            self.pushes.append(Member(self.now, self.ledger.version, me.number))
            me.since_fetch = 0
        if me.number not in self.ledger.members:
            limit = self.plan.max_nonfinite
            self._note_loss(me, f"{limit} gradients in a row were not finite (the last loss: {header.loss})", 0)
            if not self.ledger.members:
                raise TrainingDiverged(
                    f"the loss or the gradient of every worker is no longer finite at version {self.ledger.version}, epoch "
                    f"{self.ledger.samples / self.plan.num_samples:.1f}. {TOO_FAST}")
        return bool(self.moves)

    def _tally(self, me: _Worker, lease: Lease) -> bool:
        snapshot = me.snapshot
        errors = self.computation.validate_(snapshot, lease.start, lease.stop, me.number)
        header = Header(
            Kind.VALIDATION, me.number, me.sent, snapshot.version, lease.number, lease.start, lease.stop - lease.start,
            errors.skipped, errors.loss, errors.top1, errors.top5)
        if not self._is_of_nobody(me, header):
            self._announce(self.ledger.tally(header))
        return False

    def _announce(self, score: Score | None) -> None:
        if score is None:
            return
        event = Validation.of(self.now, score, self._versions.of(score.version), self.plan.num_samples)
        self.scores.append(event)
        self.books[0].events.append(event)
        self.progress.validated(score.top1_error, event.epoch)

    def _drop(self, me: _Worker, reason: str, given_up: int = 0) -> None:
        self.num_dropped += 1
        self.books[0].events.append(Refusal(self.now, me.number + 1, self.ledger.version, reason, given_up))
        self.books[0].add(self.now, refused_pushes=1)

    def _die(self, me: _Worker, after_s: float) -> Process:
        yield after_s
        if not me.is_dead:
            self._lose(me)

    def _lose(self, me: _Worker) -> None:
        """A worker dies: whatever it has under way never arrives."""
        me.is_dead = True
        self._note_loss(me, "its process has ended", self.ledger.retire(me.number, for_good=True, is_gone=True))
        self._post()
        if not self.ledger.members:
            raise WorkersLost(f"no worker is left at version {self.ledger.version}, {self.now:.3f} s: let fewer of them "
                              "fail.")

    def _note_loss(self, me: _Worker, reason: str, positions: int) -> None:
        self.books[0].events.append(Retirement(self.now, me.number + 1, self.ledger.version, positions, reason, True))
        self._num_lost += 1
        if self._num_lost <= FEW_LOST:
            self.progress.say(f"rank {me.number + 1} is retired at version {self.ledger.version}: {reason}")
        elif self._num_lost == FEW_LOST + 1:
            self.progress.say("more workers are retired; the run directory (--out) names each")

    def _post(self) -> None:
        for number, mail in self.ledger.take_news():
            self._mail[number] = mail
            self._wake(number)
        for worker in self.workers if self.plan.pacing.backup else ():
            if worker.is_computing and not worker.is_dead and self._is_overtaken(worker, (worker.sum or worker).snapshot):
                worker.is_computing = False
                self._void.add(worker.alarm)
                self._spawn(worker, worker.process)


def _steps(times: Times, factor: float, seed: str) -> Callable[[], float]:
    """A worker's own step times, in seconds."""
    return forecast.steps(factor * times.step_s, times.spread, random.Random(seed))


def prepare(task: Task, num_workers: int, times: Times, progress: Progress | None = None) -> Simulation:
    """A training to `run`; `config.run.inject` names stragglers and failures. Raises ConfigError."""
    config = task.config
    rulebook.check(config, num_workers)
    return Simulation(
        task.plan(num_workers), config.exchange, SingleProcessTrainer(task, num_workers), times,
        rulebook.RULEBOOK[config.rule.name].moves, config.run.seed, _failures(config.run.inject, num_workers), progress,
        config.record.interval_s)


def simulate(task: Task, num_workers: int, times: Times, progress: Progress | None = None) -> Simulation:
    """Train on the virtual clock. Raises UserError."""
    simulation = prepare(task, num_workers, times, progress)
    try:
        simulation.run()
    finally:
        simulation.computation.close()
    return simulation


def _failures(text: str, num_workers: int) -> list[fault_injection.Failure]:
    failures = fault_injection.parse(text)
    for failure in failures:
        if failure.kind not in FAILURES:
            raise ConfigError(f"--run.inject {failure.kind}: a simulation knows {', '.join(FAILURES)} only; rehearse the "
                              "others in a run.")
        if not 1 <= failure.rank <= num_workers:
            raise ConfigError(f"--run.inject {failure.kind}@rank{failure.rank}: the workers are ranks 1 to {num_workers}, "
                              "and the server of a simulation does not fail.")
    return failures

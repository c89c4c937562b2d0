"""A training on a virtual clock, in one process, without MPI.

The protocol on both sides, the rule, the schedule and the replicas are those of a run, and so is every number that they
compute; only time is made up. A worker is a generator that does what `protocol.client` says, and yields the seconds that it takes:

    compute a batch -> push -> the server's turn, one push after the other -> (held by the rule) -> fetch -> compute ...

The same options give the same log, to the byte. What is left out: ranks that share cores, torn reads, the wait for data,
and a server that applies several waiting pushes in one pass. A validation takes a third of a step for each batch.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import torch

from asgd_mpi.config import exchange_choice, rulebook
from asgd_mpi.config.failures import Failure
from asgd_mpi.config.failures import parse as parse_failures
from asgd_mpi.config.options import ExchangeConfig
from asgd_mpi.data.loader import ranges
from asgd_mpi.errors import TOO_FAST, ConfigError, TrainingDiverged, WorkersLost
from asgd_mpi.offline import forecast
from asgd_mpi.offline.trainer import Computed, SingleProcessTrainer, Snapshot
from asgd_mpi.optim.formats import kept_at
from asgd_mpi.optim.objective import Tally, measured
from asgd_mpi.optim.stability import LossWatch
from asgd_mpi.protocol import client as protocol
from asgd_mpi.protocol.ledger import Ledger, Plan
from asgd_mpi.protocol.messages import Header, Kind, Lease, Mail, Orders, Score
from asgd_mpi.protocol.membership import GONE, Membership, Refused, told_of_loss
from asgd_mpi.protocol.versions import Versions
from asgd_mpi.record.events import (
    PHASES,
    Interval,
    Member,
    Note,
    Push,
    Refusal,
    Retirement,
    Validation,
)
from asgd_mpi.record.progress import Progress
from asgd_mpi.task import OpenedTask

VALIDATION = 1 / 3  # of a step: no backward pass
FEW_LOST = 3  # workers whose loss is told as it happens
FAILURES = ("slow", "kill", "raise")

# yields the seconds that pass, or None to sleep until its worker is woken; returns the answer to an action
Process = Generator[float | None, None, Any]


@dataclass(frozen=True)
class Times:
    """Seconds, of an exchange without queues."""

    step_s: float  # a batch, on a worker: log-normal, with this mean
    push_s: float  # from the end of a step to the server's turn
    apply_s: float  # of the server's time, for a push
    fetch_s: float
    spread: float = 0.0  # standard deviation of a step over its mean


@dataclass(frozen=True)
class Machines:
    """The machines that are made up: how long things take on them, and which of them fail. Workers are ranks 1, 2, ..."""

    times: Times
    seed: int = 0  # of the workers' step times
    failures: Sequence[Failure] = ()

    def steps_of(self, worker: int) -> Callable[[], float]:
        """Return what draws a worker's own step times, in seconds."""
        slow = {one.rank: one.amount for one in self.failures if one.kind == "slow"}
        mean_s = slow.get(worker + 1, 1.0) * self.times.step_s
        return forecast.steps(mean_s, self.times.spread, random.Random(f"{self.seed}:{worker}"))

    def dying_step_of(self, worker: int) -> int:
        """Return the step that a worker dies at; 0 for none."""
        dies = {one.rank: one.step for one in self.failures if one.kind != "slow" and one.step}
        return dies.get(worker + 1, 0)

    def dying_times(self) -> Iterator[tuple[int, float]]:
        """Yield (worker, seconds after the start) of those that die at a time, whatever they do then."""
        for one in self.failures:
            if one.kind != "slow" and not one.step:
                yield one.rank - 1, one.t or 0.0


@dataclass
class _Computed:
    """A push that is under way: its gradient is computed at the server's turn, from this."""

    snapshot: Snapshot  # the batches are computed on,
    fetched: Snapshot | None  # ... None if the replica has it already
    batches: list[tuple[int, int, int]] = field(default_factory=list)  # epoch, start, stop
    centre: Snapshot | None = None  # fetched after them, for an elastic rule


@dataclass
class RoundTrip:
    """To the server and back; see `runtime.client`."""

    started: float
    mail: Mail
    snapshot: Snapshot | None = None
    fetch_s: float = 0.0
    seconds: float = 0.0
    is_finite: bool = True  # what was pushed
    is_over: bool = False


@dataclass
class _Worker:
    number: int
    mail: Mail
    step_s: Callable[[], float]
    dies_at_step: int = 0  # 0: never
    steps: int = 0
    sent: int = 0  # packets
    made: int = 0  # the version that its last push made
    snapshot: Snapshot | None = None
    is_fresh: bool = False  # fetched, and nothing computed on it yet
    computed: _Computed | None = None
    trip: RoundTrip | None = None
    is_dead: bool = False
    process: Process | None = None  # its loop,
    alarm: int = -1  # ... the number of the event that ends its sleep,
    is_computing: bool = False  # ... and whether it may be woken before that

    def is_back(self) -> bool:
        """Return whether nothing is under way."""
        return self.trip is None or self.trip.is_over


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
    `interval_s`: of what is noted in the books.
    """

    def __init__(
        self,
        plan: Plan,
        exchange: ExchangeConfig,
        computation: SingleProcessTrainer,
        machines: Machines,
        moves: str = "",
        progress: Progress | None = None,
        interval_s: float = 1.0,
        loss_watch: LossWatch | None = None,
    ):
        self.ledger = Ledger(plan, computation.schedule)
        self.plan, self.exchange, self.computation = plan, exchange, computation
        self.times = machines.times
        self.habits = protocol.Habits(
            n_push=exchange.n_push,
            n_fetch=exchange.n_fetch,
            overlap=exchange.overlap,
            moves=moves,
            tells_reads=plan.keeps_reads,
        )
        self.loss_watch = loss_watch or LossWatch()
        self.progress = progress or Progress("none", plan.total_samples, plan.num_samples)
        self.pushes: list[Push | Member] = []
        self.books = [Book(interval_s) for _ in range(plan.num_workers + 1)]
        self.scores: list[Validation] = []
        self._versions = Versions(self.ledger, 0.0)
        self._membership = Membership(self.ledger, bool(moves))
        self.num_dropped = 0  # pushes that came too late, or were not finite
        self._num_lost = 0  # workers
        self.latest = computation.first
        # of the running mean of the weights at the end, if one is kept
        self.of_mean: Tally | None = None
        self._fetched_bytes = computation.fetched.num_bytes()
        self.now = self._server_free_at = 0.0
        self.ledger.begin(self.now)
        self._mail = dict(self.ledger.take_news())
        self._heap: list[tuple[float, int, _Worker | None, Process]] = []
        self._order = itertools.count()  # of events at the same time
        self._asleep: dict[int, list[Process]] = {}
        # events that do not take place: their worker was woken before
        self._void: set[int] = set()
        self.workers = [
            _Worker(
                number,
                self._mail[number],
                machines.steps_of(number),
                machines.dying_step_of(number),
            )
            for number in range(plan.num_workers)
        ]
        for worker in self.workers:
            worker.process = self._work(worker)
            self._spawn(worker, worker.process)
        for number, after_s in machines.dying_times():
            self._spawn(None, self._die(self.workers[number], after_s))

    def run(self) -> None:
        """Play the training to its end. Raises TrainingDiverged, WorkersLost."""
        while not self.ledger.finished:
            if not self._heap:
                raise RuntimeError(
                    f"nothing happens any more at {self.now} s: {self.ledger.outstanding()}"
                )
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

    # ---- a worker: what runtime.worker does over MPI

    def _work(self, me: _Worker) -> Process:
        """Do what the protocol says, until the worker dies."""
        actions = protocol.Client(self.habits, self._cut, me.is_back).work()
        answer: object = None
        while not me.is_dead:
            action = actions.send(answer)
            match action:
                case protocol.Compute():
                    answer = yield from self._compute(me, action)
                case protocol.Push():
                    answer = yield from self._push(me, action)
                case protocol.Take():
                    answer = yield from self._take(me)
                case protocol.Fetch():
                    answer = yield from self._start(me)
                case protocol.GiveUp():
                    answer = yield from self._give_up(me, action)
                case protocol.Validate(lease):
                    answer = yield from self._validate(me, lease)
                case protocol.Await(until):
                    answer = yield from self._await(me, until)
                case protocol.Say(Kind.READ, version):
                    answer = self._keep(me, version)
                case protocol.Undo():
                    answer = self.computation.undo_(me.number)
                case protocol.BeginAnew():
                    me.computed = None
                    answer = self.computation.begin_anew_(me.number)
                case protocol.SaveBest() | protocol.TakeWritten():
                    answer = ()  # its disk holds nothing before the end
                case _:
                    raise AssertionError(f"a simulated worker is never told to {action}")

    def _cut(self, lease: Lease) -> list[tuple[int, int, int]]:
        return ranges(
            lease.epoch, lease.start, lease.stop, self.plan.batch_size, self.plan.smallest
        )

    def _compute(self, me: _Worker, action: protocol.Compute) -> Process:
        """Let a step pass; returns whether its gradient counts. The arithmetic is done at the server's turn."""
        seconds, began = me.step_s(), self.now
        me.is_computing = True
        yield seconds  # or less: see _post
        me.is_computing = False
        me.steps += 1  # finished or not
        if me.steps == me.dies_at_step:
            self._lose(me)
            return False
        if me.computed is None:
            me.computed = _Computed(me.snapshot, me.snapshot if me.is_fresh else None)
            me.is_fresh = False
        me.computed.batches.append((action.lease.epoch, action.start, action.stop))
        counts = not self._is_overtaken(me)
        self.books[me.number + 1].add(
            self.now, compute=self.now - began, images=action.stop - action.start if counts else 0
        )
        return counts

    def _is_overtaken(self, me: _Worker) -> bool:
        """Return whether the gradient that is being computed cannot count any more."""
        snapshot = (me.computed or me).snapshot
        return bool(self.plan.pacing.backup) and snapshot.version < self._mail[me.number].oldest

    def _push(self, me: _Worker, push: protocol.Push) -> Process:
        done, me.computed = me.computed, None
        if self.habits.moves == "elastic":
            done.centre = me.snapshot
        kept = kept_at(self.exchange, done.snapshot.samples, self.plan.num_samples)
        self.books[me.number + 1].add(
            self.now, pushes=1, bytes_pushed=self.computation.pushed.num_bytes(kept)
        )
        # where weights of its own may be spoilt, its worker knows before it goes on
        ahead = None
        if self.exchange.overlap and self.habits.moves:
            ahead = self._finish(me, done), self.computation.flat.gradient.clone()
        yield from self._start(
            me, lambda: self._judge(me, push, done, ahead), push.fetch, is_gradient=True
        )
        return ahead is not None and not ahead[0].is_finite

    def _finish(self, me: _Worker, done: _Computed) -> Computed:
        """Compute what is pushed; it is in the network's gradient then."""
        lacks_push = done.snapshot.version < me.made
        return self.computation.compute_(
            me.number, done.batches, done.fetched, done.centre, lacks_push
        )

    def _give_up(self, me: _Worker, action: protocol.GiveUp) -> Process:
        me.computed = None
        yield from self._start(me, lambda: self._give_back(me, action))

    def _validate(self, me: _Worker, lease: Lease) -> Process:
        seconds = VALIDATION * me.step_s() * (lease.stop - lease.start) / self.plan.batch_size
        yield seconds
        self.books[me.number + 1].add(self.now, validate=seconds)
        yield from self._start(me, lambda: self._tally(me, lease), fetch=False)

    def _await(self, me: _Worker, until: Callable[[Mail], bool]) -> Process:
        """Sleep until there is mail of which `until` holds; returns it."""
        me.mail = self._mail[me.number]
        while not until(me.mail):
            yield None
            me.mail = self._mail[me.number]
        return me.mail

    def _start(
        self,
        me: _Worker,
        deliver: Callable[[], bool] | None = None,
        fetch: bool = True,
        is_gradient: bool = False,
    ) -> Process:
        """Set out for the server, whose turn `deliver` is; on the spot, or behind what comes next."""
        me.trip = RoundTrip(self.now, me.mail)
        journey = self._go(me, me.trip, deliver, fetch, is_gradient)
        if self.exchange.overlap:
            self._spawn(me, journey)
        else:
            yield from journey

    def _go(
        self,
        me: _Worker,
        trip: RoundTrip,
        deliver: Callable[[], bool] | None,
        fetch: bool,
        is_gradient: bool,
    ) -> Process:
        if deliver:
            me.sent += 1
            yield self.times.push_s
            self._server_free_at = max(self.now, self._server_free_at) + (
                self.times.apply_s if is_gradient else 0.0
            )
            yield self._server_free_at - self.now
            fetch = deliver() or fetch
            self._post()
            while (
                is_gradient
                and self._mail[me.number].hold
                and self._mail[me.number].orders == Orders.GO_ON
            ):
                yield None
        trip.mail = self._mail[me.number]
        if fetch:
            trip.snapshot, trip.fetch_s = self.latest, self.times.fetch_s
            yield trip.fetch_s
        trip.seconds, trip.is_over = self.now - trip.started, True
        self._wake(me.number)

    def _take(self, me: _Worker) -> Process:
        """Wait for the trip to end; returns what it brought."""
        if me.trip is None:
            return protocol.Taken(me.mail)
        started, book = self.now, self.books[me.number + 1]
        while not me.trip.is_over:
            yield None
        trip, me.trip = me.trip, None
        if self.exchange.overlap:
            book.add(self.now, push=self.now - started, hidden=trip.seconds - (self.now - started))
        else:
            book.add(self.now, push=trip.seconds - trip.fetch_s, fetch=trip.fetch_s)
        me.mail = trip.mail
        if trip.snapshot is None:
            return protocol.Taken(me.mail, None, trip.is_finite)
        me.snapshot, me.is_fresh = trip.snapshot, True
        book.add(self.now, fetches=1, bytes_fetched=self._fetched_bytes)
        return protocol.Taken(me.mail, me.snapshot.version, trip.is_finite)

    def _keep(self, me: _Worker, version: int) -> Mail:
        """Keep the snapshot that a worker computes on, which takes no time here; returns what it is told of that."""
        if me.number in self.ledger.members:
            me.sent += 1
            self.ledger.keep(Header(Kind.READ, me.number, me.sent, version, 0, 0, 0), True)
        return replace(me.mail, read=version)

    # ---- the server: what runtime.server does

    def _judge(
        self,
        me: _Worker,
        push: protocol.Push,
        done: _Computed,
        ahead: tuple[Computed, torch.Tensor] | None = None,
    ) -> bool:
        """Return the turn of a push; whether its worker must fetch, since its own weights are spoilt."""
        computation = self.computation
        if ahead is None:
            computed = self._finish(me, done)
        else:
            computed, pushed = ahead
            computation.flat.gradient.copy_(pushed)
        loss, skipped, is_finite, scale, kept = computed
        me.trip.is_finite, positions = is_finite, push.sum.count
        header = self._header(
            Kind.GRADIENT if is_finite else Kind.NONFINITE,
            me,
            push.read_version,
            push.sum,
            skipped=skipped,
            loss=loss,
            base=computation.replicas[me.number].base,
            scale=scale,
            kept=kept if is_finite else 0,
        )
        self.books[0].add(self.now, apply=self.times.apply_s)
        verdict = self._membership.gradient(header, self.now)
        if isinstance(verdict, Refused):
            return self._refuse(me, verdict)
        self.latest = computation.applied(self.latest, verdict, positions)
        me.made = self.latest.version
        self.pushes.append(Push.of(self.now, header, verdict))
        self._versions.add(positions, self.now)
        self.books[0].add(self.now, pushes=1, images=positions, skipped_images=skipped)
        self.progress.push(positions, loss)
        stale = self.plan.pacing.staleness(verdict.version, header.read_version)
        if self.loss_watch.add(loss, stale):
            warning = self.loss_watch.warning(verdict.lr)
            self.books[0].events.append(Note(self.now, warning))
            self.progress.say(warning)
        return False

    def _header(
        self, kind: Kind, me: _Worker, read_version: int, of: protocol.Sum, **more: Any
    ) -> Header:
        covers = of.lease, of.start, of.count
        return Header(kind, me.number, me.sent, read_version, *covers, **more)

    def _give_back(self, me: _Worker, action: protocol.GiveUp) -> bool:
        header = self._header(Kind.GIVEN_UP, me, action.read_version, action.sum)
        if me.number in self.ledger.members:
            return self._refuse(me, self._membership.left(header))
        return self._refuse(me, self._membership.stray(header))

    def _refuse(self, me: _Worker, refused: Refused) -> bool:
        """Do what follows from a packet that is not applied; returns whether its worker needs newer weights for that."""
        self.num_dropped += 1
        self.books[0].events.append(
            Refusal(self.now, me.number + 1, self.ledger.version, refused.reason, refused.given_up)
        )
        self.books[0].add(self.now, refused_pushes=1)
        if refused.begins_anew:
            self.computation.begin_anew_(me.number)
            me.made = 0
            self.pushes.append(Member(self.now, self.ledger.version, me.number))
        if refused.retires:
            self._note_loss(me, refused.retires, 0)
            if not self.ledger.members:
                raise TrainingDiverged(
                    f"the loss or the gradient of every worker is no longer finite at version {self.ledger.version}, epoch "
                    f"{self.ledger.samples / self.plan.num_samples:.1f}. {TOO_FAST}"
                )
        return refused.begins_anew

    def _tally(self, me: _Worker, lease: Lease) -> bool:
        snapshot = me.snapshot
        tally = self.computation.validate_(snapshot, lease.start, lease.stop, me.number)
        header = self._header(
            Kind.VALIDATION,
            me,
            snapshot.version,
            protocol.Sum(lease.number, lease.start, lease.stop - lease.start),
            skipped=tally.skipped,
            **measured(tally, self.plan.metrics),
        )
        if me.number not in self.ledger.members:
            return self._refuse(me, self._membership.stray(header))
        self._announce(self.ledger.tally(header))
        return False

    def _announce(self, score: Score | None) -> None:
        if score is None:
            return
        event = Validation.of(self.now, score, self._versions.of(score.version), self.plan)
        self.scores.append(event)
        self.books[0].events.append(event)
        self.progress.validated(event.result)

    def _die(self, me: _Worker, after_s: float) -> Process:
        yield after_s
        if not me.is_dead:
            self._lose(me)

    def _lose(self, me: _Worker) -> None:
        """A worker dies: whatever it has under way never arrives."""
        me.is_dead = True
        self._note_loss(me, GONE, self.ledger.retire(me.number, for_good=True, is_gone=True))
        self._post()
        if not self.ledger.members:
            raise WorkersLost(
                f"no worker is left at version {self.ledger.version}, {self.now:.3f} s: let fewer of them "
                "fail."
            )

    def _note_loss(self, me: _Worker, reason: str, positions: int) -> None:
        self.books[0].events.append(
            Retirement(self.now, me.number + 1, self.ledger.version, positions, reason, True)
        )
        self._num_lost += 1
        if self._num_lost <= FEW_LOST:
            self.progress.say(told_of_loss(me.number + 1, self.ledger.version, positions, reason))
        elif self._num_lost == FEW_LOST + 1:
            self.progress.say("more workers are retired; the run directory (--out) names each")

    def _post(self) -> None:
        for number, mail in self.ledger.take_news():
            self._mail[number] = mail
            self._wake(number)
        for worker in self.workers if self.plan.pacing.backup else ():
            if worker.is_computing and not worker.is_dead and self._is_overtaken(worker):
                worker.is_computing = False
                self._void.add(worker.alarm)
                self._spawn(worker, worker.process)


def prepare(
    task: OpenedTask, num_workers: int, times: Times, progress: Progress | None = None
) -> Simulation:
    """A training to `run`; `config.run.inject` names stragglers and failures. Raises ConfigError."""
    config = task.config
    if exchange_choice.is_open(config):
        raise ConfigError(
            f"--exchange.wire {config.exchange.wire} and --exchange.n_push {config.exchange.n_push} are chosen by links, which a "
            "simulation does not have: give a format and a number of batches."
        )
    rulebook.check(config, num_workers)
    return Simulation(
        task.plan(num_workers),
        config.exchange,
        SingleProcessTrainer(task, num_workers),
        Machines(times, config.run.seed, _failures(config.run.inject, num_workers)),
        rulebook.RULEBOOK[config.rule.name].moves,
        progress,
        config.record.interval_s,
        LossWatch(*rulebook.momentum_of(config.rule), rulebook.momentum_option(config.rule)),
    )


def simulate(
    task: OpenedTask, num_workers: int, times: Times, progress: Progress | None = None
) -> Simulation:
    """Train on the virtual clock. Raises UserError."""
    simulation = prepare(task, num_workers, times, progress)
    try:
        simulation.run()
        simulation.of_mean = simulation.computation.validate_mean_(
            simulation.latest, simulation.plan.num_validation
        )
    finally:
        simulation.computation.close()
    return simulation


def _failures(text: str, num_workers: int) -> list[Failure]:
    failures = parse_failures(text)
    for failure in failures:
        if failure.kind not in FAILURES:
            raise ConfigError(
                f"--run.inject {failure.kind}: a simulation knows {', '.join(FAILURES)} only; rehearse the "
                "others in a run."
            )
        if not 1 <= failure.rank <= num_workers:
            raise ConfigError(
                f"--run.inject {failure.kind}@rank{failure.rank}: the workers are ranks 1 to {num_workers}, "
                "and the server of a simulation does not fail; name a worker."
            )
    return failures

"""The server: take a packet, let the ledger judge it, apply it to the next snapshot, publish, answer.

Between packets it looks around: who is dead or has fallen behind, is a checkpoint due, was the job asked to end. If there
are servers of further slices they do what is done here to the weights, in the same order (see `slice server`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import xxhash

from asgd_mpi.comm.arrival import WEIGHTS, Applied, Arrival, Command
from asgd_mpi.config.options import CheckpointConfig, FailureConfig
from asgd_mpi.errors import DeadlineExceeded, DiskRefuses
from asgd_mpi.model import batchnorm
from asgd_mpi.optim.rules import Rule, advance_
from asgd_mpi.optim.stability import LossWatch
from asgd_mpi.protocol.ledger import Ledger, LedgerError
from asgd_mpi.protocol.membership import GONE, Membership, Refused, told_of_back, told_of_loss
from asgd_mpi.protocol.messages import Header, Kind, Score, Verdict, Work
from asgd_mpi.protocol.versions import Made, Versions
from asgd_mpi.record.events import (
    Checkpoint,
    EventLog,
    Member,
    Note,
    Publish,
    Push,
    Refusal,
    Retirement,
    Validation,
)
from asgd_mpi.record.meter import Meter
from asgd_mpi.record.progress import Progress
from asgd_mpi.runtime import losses
from asgd_mpi.runtime.checkpointer import Checkpointer
from asgd_mpi.vector import finite
from asgd_mpi.vector.partition import pieces

# what a retired worker may not send; it is a member again with it
FROM_MEMBERS = (Kind.VALIDATION, Kind.NONFINITE, Kind.GIVEN_UP, Kind.READ, Kind.HERE)

if TYPE_CHECKING:  # a run in one process has none of MPI
    from asgd_mpi.comm.packets import Inbox
    from asgd_mpi.comm.server_group import ServerGroup
    from asgd_mpi.comm.server_window import ServerWindow

LOOK_S = 0.1  # between two looks around
ROOM_LOOK_S = 1.0  # ... and at the room that the disk has


class Links(NamedTuple):
    """The memory and the packets that join a server with its workers."""

    window: ServerWindow
    inbox: Inbox
    group: ServerGroup | None = None  # the servers of further slices


class ServerBooks(NamedTuple):
    """What rank 0 writes down."""

    meter: Meter
    log: EventLog
    pushes: EventLog
    progress: Progress
    checkpointer: Checkpointer


@dataclass(frozen=True)
class ServerHabits:
    """A server's part of the options, beside what its ledger and its rule know of them."""

    timeout_s: float
    failure: FailureConfig
    checkpoint: CheckpointConfig
    hash_snapshots: bool = False
    averages_statistics: bool = False  # the running mean over all pushes
    workers_keep_momentum: bool = False
    workers_move: bool = False  # their own weights, between two fetches


class Incidents(NamedTuple):
    """What a server is told from outside of the run, and what may be done to it."""

    # the signal that came, in words, if one did
    asked_to_leave: Callable[[], str] = lambda: ""
    at_every_pass: Callable[[], None] = lambda: None  # failures that are rehearsed
    # type and message of what a rank failed of
    error_of: Callable[[int], str] = lambda rank: ""


class Server:
    """Everything rank 0 holds; `run` is its loop.

    statistics: of batch norm, of the last validated version, or, by `habits`, their running mean; None if there are none.
    """

    def __init__(
        self,
        links: Links,
        ledger: Ledger,
        rule: Rule,
        books: ServerBooks,
        habits: ServerHabits,
        statistics: torch.Tensor | None = None,
        loss_watch: LossWatch | None = None,
        incidents: Incidents = Incidents(),
    ):
        self.window, self.inbox, self.group = links
        self.ledger, self.rule = ledger, rule
        self.meter, self.log, self.pushes, self.progress, self.checkpointer = books
        self.timeout_s, self.failure, self.checkpoint = (
            habits.timeout_s,
            habits.failure,
            habits.checkpoint,
        )
        self.hash_snapshots = habits.hash_snapshots
        self.statistics, self.averages_statistics = statistics, habits.averages_statistics
        self.workers_keep_momentum = habits.workers_keep_momentum
        self.loss_watch = loss_watch or LossWatch()
        self.asked_to_leave, self.at_every_pass, self.error_of = incidents
        self.final_score: Score | None = None
        self.latest_score: Score | None = None
        self.left_because = ""  # a signal: the run is to be resumed
        self.losses: list[Retirement] = []
        now = time.monotonic()
        self._heard = [now] * self.ledger.plan.num_workers  # when each worker was last heard of
        self._looked = self._saved_at = self._room_looked = now
        self._saved_samples = self.ledger.samples
        self._versions = Versions(self.ledger, time.time())
        self._membership = Membership(self.ledger, habits.workers_move)
        self._best_made: Made | None = None
        self._last_save = 0  # number of the checkpoint that the workers save for as they leave
        # why the run is left, if the disk is nearly full
        self._full: DiskRefuses | None = None

    def publish_first(self, weights: torch.Tensor) -> None:
        """Publish the (P,) float32 `weights` as the version that the ledger begins with, and the first leases."""
        self._tell(Command("publish", self.ledger.version, self.ledger.samples))
        with self.window.next_snapshot(self.ledger.version, self.ledger.samples) as fresh:
            self._lookout = finite.Lookout(len(fresh))
            for piece in pieces(len(fresh)):
                fresh[piece].copy_(weights[piece])
                self.window.show(piece)
            self._await_group("publish the first version")
        self._hash()
        self._answer()

    def run(self) -> None:
        """Serve until the run is finished, or was left: then `left_because` says why. Raises UserError."""
        self.ledger.begin(time.monotonic())
        while not self.is_over:
            self.turn()
        self.send_home()
        deadline = time.monotonic() + self.failure.grace_s
        while self.ledger.present and time.monotonic() < deadline:
            self.turn()
        self.save_last()
        if self._full and not self.ledger.finished:
            raise self._full

    def save(self) -> None:
        """Write a checkpoint of the run as it is now, and wait for it; none in the midst of a pass, or of weights that overflowed."""
        if self.window.version != self.ledger.version or not finite.is_finite(self.window.latest):
            return
        self._finish_saving()
        if self.checkpointer.saved_version == self.ledger.version:
            return
        if not self.checkpointer.is_busy:
            self._begin_to_save(self.ledger.save + 1, set())
            self._finish_saving()

    @property
    def is_degraded(self) -> bool:
        """Return whether the run goes on, or ended, with fewer workers than it began with."""
        return len(self.ledger.members) < self.ledger.plan.num_workers

    def turn(self) -> None:
        """Take what has come, act on it, look around, and answer."""
        # waits inside MPI
        arrivals = self.inbox.take(LOOK_S)
        now = time.monotonic()
        for arrival in arrivals:
            self._heard[arrival.worker] = now
        gradients, reads, others = _by_turn(arrivals)
        for arrival in reads:  # before the pass that writes over the oldest snapshot
            self._take_note(arrival)
        self._apply(gradients)
        for arrival in others:
            self._take_note(arrival)
        for arrival in arrivals:
            self.inbox.release(arrival)
        if not arrivals or now - self._looked > LOOK_S:
            self._looked = now
            self._look_around(now)
        self._answer()
        self.meter.tick()

    @property
    def is_over(self) -> bool:
        """Return whether nothing more is to be trained: the workers are to be sent home."""
        return self.ledger.finished or bool(self.left_because)

    def send_home(self) -> None:
        """Let the workers deliver what they hold, save what they keep, and say goodbye."""
        if self.left_because:
            if not self._full:
                self.progress.say(
                    f"{self.left_because}: finishing the steps under way, then a checkpoint. If the launcher ends this "
                    f"job sooner (mpirun does, within a second of Ctrl-C), the run goes on from {self.checkpointer.newest}."
                )
            self.ledger.leave()
            if self.workers_keep_momentum:
                self._last_save = self.ledger.save + 1
                self.checkpointer.announce(self._last_save)
                self.ledger.ask_to_save()
        self._answer()

    def save_last(self) -> None:
        """Write the last checkpoint, when all have said goodbye, or were waited for long enough."""
        if self.ledger.present:
            self._say(
                f"no goodbye from rank {', '.join(str(worker + 1) for worker in self.ledger.present)} within "
                f"{self.failure.grace_s:g} s (--failure.grace_s)"
            )
        self._finish_saving()
        self._begin_to_save(self._last_save or self.ledger.save + 1, set())
        self._finish_saving()

    def _apply(self, arrivals: list[Arrival]) -> None:
        """Apply the gradients one after the other, in one pass over the vectors."""
        judged = [(arrival, verdict) for arrival in arrivals if (verdict := self._judge(arrival))]
        if self.group and arrivals:
            self._tell_what_to_apply(arrivals, judged)
        if not judged:
            return
        self.at_every_pass()
        with (
            self.meter.phase("apply") as others,
            self.window.next_snapshot(
                # publishes on exit
                self.ledger.version,
                self.ledger.samples,
            ) as weights,
        ):
            for arrival, _ in judged:
                self.window.promise(arrival.worker, arrival.header.packet)
            advance_(
                weights,
                self.window.latest,
                self.rule,
                [(arrival.gradient, verdict) for arrival, verdict in judged],
                self.window.show,
                self.inbox.poll,
                self._lookout.look,
            )
            if self.group:
                began = time.perf_counter()
                self._await_group(f"apply version {self.ledger.version}")
                others["servers"] = time.perf_counter() - began
        self._hash()
        for arrival, verdict in judged:
            self._record(arrival.header, verdict)

    def _judge(self, arrival: Arrival) -> Verdict | None:
        """Return the verdict on a gradient; None if it is not to be applied, which is then recorded."""
        try:
            found = self._membership.gradient(arrival.header, time.monotonic())
        except LedgerError as error:
            self._expel(arrival.worker, str(error))
            return None
        if isinstance(found, Refused):
            self._refuse(arrival.header, found)
            return None
        return found

    def _take_note(self, arrival: Arrival) -> None:
        """Act on a packet that is no gradient."""
        header, worker = arrival.header, arrival.worker
        try:
            if header is None:
                self._expel(worker, arrival.fault)
            elif header.kind in FROM_MEMBERS and worker not in self.ledger.members:
                self._refuse(header, self._membership.stray(header))
            elif header.kind == Kind.READ:
                self._keep(header)
            elif header.kind == Kind.VALIDATION:
                self._score(arrival)
            elif header.kind == Kind.STATISTICS and not self.averages_statistics:
                self._expel(worker, "batch-norm statistics, which nobody averages in this run")
            elif header.kind == Kind.STATISTICS:
                self.ledger.acknowledge(header)
                self._average(arrival)
            elif header.kind == Kind.NONFINITE:
                self._judge(arrival)
            elif header.kind == Kind.GIVEN_UP:
                self._refuse(header, self._membership.left(header))
            elif header.kind == Kind.GOODBYE:
                self.ledger.goodbye(header)
            else:
                self.ledger.acknowledge(header)
                self._listen(header)
        except LedgerError as error:
            self._expel(worker, str(error))

    def _listen(self, header: Header) -> None:
        """Take note of what a worker says of itself."""
        match header.kind:
            case Kind.SAVED:
                self.checkpointer.saved(header.worker)
            case Kind.BEST:
                best = self.ledger.best
                if best and self._best_made and best.version == header.read_version:
                    self.checkpointer.keep_best(
                        header.worker, header.read_version, best, self._best_made.samples
                    )
            case Kind.SIGNAL:
                self.left_because = (
                    self.left_because or f"rank {header.worker + 1} was asked to end by a signal"
                )
            case Kind.FAILED:
                error = self.error_of(header.worker + 1)
                where = f"error.rank{header.worker + 1:03d}.txt"
                if error:
                    reason = f"see {where}: {error}"
                else:
                    reason = f"{where} could not be written; its output says why"
                self._retire(header.worker, f"it failed: {reason}", for_good=True, error=error)

    def _look_around(self, now: float) -> None:
        parting = self.ledger.finished or self.left_because
        for worker in self.inbox.dead & set(self.ledger.present):
            self._retire(worker, GONE, for_good=True, is_gone=True)
        self._log_saved(self.checkpointer.poll(self._best))
        if parting:
            return
        self.left_because = self.asked_to_leave() or (self.group.left_because if self.group else "")
        in_debt = set(self.ledger.in_debt)
        for worker, heard in enumerate(self._heard):
            if (
                worker not in in_debt or worker in self.ledger.held
            ) and worker in self.ledger.members:
                # nothing is due from it
                self._heard[worker] = now
            elif worker in in_debt and now - heard > self.failure.retire_after_s:
                self._retire(
                    worker,
                    f"nothing has come from it for {now - heard:.0f} s (--failure.retire_after_s)",
                    for_good=False,
                )
        self._demand_workers(now)
        is_due = self._checkpoint_is_due(now)
        if is_due or now - self._room_looked > ROOM_LOOK_S:
            self._look_for_room(now)
        if is_due and not self._full:
            self._saved_at, self._saved_samples = now, self.ledger.samples
            waits_for = set(self.ledger.members) if self.workers_keep_momentum else set()
            self._begin_to_save(self.ledger.save + 1, waits_for)

    def _look_for_room(self, now: float) -> None:
        """Leave the run while the disk still takes a last checkpoint."""
        self._room_looked = now
        if full := self.checkpointer.why_no_room():
            self._full = DiskRefuses(full)
            self.left_because = self.left_because or full

    def _demand_workers(self, now: float) -> None:
        """Raises UserError if there is nobody left to train."""
        if self.ledger.members:
            return
        may_return = [
            worker
            for worker in self.ledger.present
            if worker not in {loss.rank - 1 for loss in self.losses if loss.for_good}
        ]
        if not may_return:
            raise losses.explain(self.losses, self.ledger.version)
        if now - max(self._heard) > self.timeout_s:
            raise DeadlineExceeded(
                f"rank 0 has heard of no worker for {self.timeout_s:g} s (--run.timeout_s):\n{losses.told(self.losses)}\n"
                "See stalls/ in the run directory for where they stand."
            )

    def _checkpoint_is_due(self, now: float) -> bool:
        every = self.checkpoint
        by_time = bool(every.every_s) and now - self._saved_at >= every.every_s
        by_samples = (
            bool(every.every_samples)
            and self.ledger.samples - self._saved_samples >= every.every_samples
        )
        return (
            (by_time or by_samples)
            and not self.checkpointer.is_busy
            and self.ledger.samples > self._saved_samples
        )

    def _begin_to_save(self, number: int, waits_for: set[int]) -> None:
        if waits_for:
            self.checkpointer.announce(number)
            self.ledger.ask_to_save()
        with self.meter.phase("checkpoint"):
            self.checkpointer.begin(
                number, self._freeze, self.ledger, self.statistics, self.latest_score, waits_for
            )

    def _finish_saving(self) -> None:
        with self.meter.phase("checkpoint"):
            self._log_saved(self.checkpointer.finish(self._best, self.timeout_s, self.inbox.poll))

    def _freeze(self, weights: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        """Copy the latest weights and the rule's state, (P,) float32 each, from all servers."""
        own = slice(0, len(self.window.latest))
        weights[own].copy_(self.window.latest)
        for name, vector in state.items():
            vector[own].copy_(self.rule.state[name])
        if self.group:
            self.group.gather_({WEIGHTS: weights, **state}, self.inbox.poll)

    def _log_saved(self, whole: list[Checkpoint]) -> None:
        for event in whole:
            self.log.write(event)
            if without := [rank for rank in event.without if rank - 1 in self.ledger.members]:
                self._say(
                    f"{event.path} is whole, but without the momentum of rank {', '.join(map(str, without))}, which could not be "
                    "written in time: resumed from there they begin without"
                )

    @property
    def _best(self) -> int:
        return self.ledger.best.version if self.ledger.best else -1

    def _keep(self, header: Header) -> None:
        """Keep the snapshot that a worker computes on, if the ring still holds it; else its mail says to fetch another."""
        snapshot = self.window.snapshot(header.read_version)
        self.ledger.keep(header, is_there=snapshot is not None)
        if snapshot is not None:
            self._tell(Command("read", header.read_version, worker=header.worker))
            with self.meter.phase("apply"):
                self.rule.read_(header.worker, snapshot)

    def _refuse(self, header: Header, refused: Refused) -> None:
        """Do what follows from a packet that is not applied. Raises TrainingDiverged if no gradient can be finite any more."""
        if not refused.is_finite:
            finite.demand(self.window.latest, f"version {self.ledger.version}: the weights")
        worker = header.worker
        self._record_refusal(worker, refused.reason, refused.given_up)
        if refused.is_back:
            self._say(told_of_back(worker + 1))
        if refused.begins_anew:
            self.pushes.write(Member(time.time(), self.ledger.version, worker))
        if refused.given_up:
            self._say(
                f"{refused.given_up} images are left out of the epoch: their gradient was not finite, however often tried"
            )
        if refused.retires:
            self._retire(worker, refused.retires, for_good=True)

    def _expel(self, worker: int, fault: str) -> None:
        """Refuse a packet that makes no sense, and trust its sender no more."""
        self.ledger.reject(worker)
        self._record_refusal(worker, fault)
        if not any(loss.rank == worker + 1 and loss.for_good for loss in self.losses):
            self._retire(worker, f"it sent a packet that makes no sense: {fault}", for_good=True)

    def _retire(
        self, worker: int, reason: str, for_good: bool, is_gone: bool = False, error: str = ""
    ) -> None:
        held = self.ledger.retire(worker, for_good, is_gone)
        event = Retirement(
            time.time(), worker + 1, self.ledger.version, held, reason, for_good, error
        )
        self.losses.append(event)
        self.log.write(event)
        self.checkpointer.saved(worker)
        self._say(told_of_loss(worker + 1, self.ledger.version, held, reason))

    def _record_refusal(self, worker: int, reason: str, given_up: int = 0) -> None:
        self.log.write(Refusal(time.time(), worker + 1, self.ledger.version, reason, given_up))
        self.meter.add(refused_pushes=1)

    def _say(self, text: str) -> None:
        self.log.write(Note(time.time(), text))
        self.progress.say(text)

    def _score(self, arrival: Arrival) -> None:
        made = self._versions.of(arrival.header.read_version)
        score = self.ledger.tally(arrival.header)
        if self.statistics is not None and not self.averages_statistics:
            self.statistics.copy_(arrival.statistics)
        if score is not None:
            self._announce(score, made)

    def _average(self, arrival: Arrival) -> None:
        """Take the statistics of a push into the running mean; what is not finite would stay in it for ever."""
        if arrival.statistics.isfinite().all():
            self.statistics.lerp_(
                arrival.statistics, batchnorm.ema_weight(self.ledger.plan.num_workers)
            )
        else:
            self._record_refusal(arrival.worker, "batch-norm statistics that are not finite")

    def _announce(self, score: Score, made: Made) -> None:
        self.log.write(event := Validation.of(time.time(), score, made, self.ledger.plan))
        self.progress.validated(event.result)
        if score is self.ledger.best:
            self._best_made = made
        self.latest_score = score
        if score.final:
            self.final_score = score

    def _answer(self) -> None:
        for worker, mail in self.ledger.take_news():
            if self.averages_statistics and any(lease.work != Work.TRAIN for lease in mail.leases):
                self.window.show_statistics(self.statistics)
            self.window.post(worker, mail)

    def _record(self, header: Header, verdict: Verdict) -> None:
        now = time.time()
        self.pushes.write(Push.of(now, header, verdict))
        self._versions.add(header.count, now)
        self.meter.add(images=header.count, pushes=1, skipped_images=header.skipped)
        self.progress.push(header.count, header.loss)
        steps = self.ledger.plan.pacing.staleness(verdict.version, header.read_version)
        if self.loss_watch.add(header.loss, steps):
            self._say(self.loss_watch.warning(verdict.lr))

    def _hash(self) -> None:
        if self.hash_snapshots:
            weights = self.window.latest
            if self.group:
                weights = torch.empty(self.checkpointer.num_floats)
                self._freeze(weights, {})
            arrives = self.window.whole.fetched.rounded(weights)
            digest = xxhash.xxh3_64_hexdigest(arrives.numpy())
            self.log.write(Publish(time.time(), self.window.version, digest))

    def _tell(self, command: Command) -> None:
        if self.group:
            self.group.tell(command)

    def _tell_what_to_apply(
        self, arrivals: list[Arrival], judged: list[tuple[Arrival, Verdict]]
    ) -> None:
        applied = [
            Applied(arrival.header.packet, replace(verdict, segments=()))
            for arrival, verdict in judged
        ]
        refused = {arrival.worker for arrival in arrivals} - {
            verdict.worker for _, verdict in judged
        }
        self._tell(
            Command("apply", self.ledger.version, self.ledger.samples, applied, sorted(refused))
        )

    def _await_group(self, what: str) -> None:
        if self.group:
            self.group.await_done(self.inbox.poll, what)


def _by_turn(arrivals: list[Arrival]) -> tuple[list[Arrival], list[Arrival], list[Arrival]]:
    """Return the gradients, the notes of what was read, and all others."""
    gradients, reads, others = [], [], []
    for arrival in arrivals:
        kind = arrival.header and arrival.header.kind
        turn = gradients if kind == Kind.GRADIENT else reads if kind == Kind.READ else others
        turn.append(arrival)
    return gradients, reads, others

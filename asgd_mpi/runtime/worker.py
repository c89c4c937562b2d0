"""A worker over MPI: what `protocol.client` says, done with the network, the loader, the disk and the client of the server."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import xxhash

from asgd_mpi.config.resolved import Resolved
from asgd_mpi.config.rulebook import RULEBOOK, pacing
from asgd_mpi.data.loader import Loader, Range, ReadAhead, ranges
from asgd_mpi.model import batchnorm
from asgd_mpi.optim.objective import Batch, Objective, Tally, measured, passes
from asgd_mpi.optim.replica import Replica
from asgd_mpi.optim.step import validate
from asgd_mpi.protocol import client as protocol
from asgd_mpi.protocol.messages import Header, Kind, Lease, Mail, Work
from asgd_mpi.record.events import EventLog, Fetch
from asgd_mpi.record.meter import Meter
from asgd_mpi.runtime.worker_checkpointer import WorkerCheckpointer

if TYPE_CHECKING:  # a run in one process has none of MPI
    from asgd_mpi.runtime.client import ServerClient
    from asgd_mpi.runtime.stages import LeadStage

# batches that are read before they are needed; more, if there are more threads to read them
AHEAD = 8


class _Overtaken(Exception):
    """The step was made without the gradient that is being computed."""


@dataclass
class _Computed:
    """Losses and counts of the batches that have been summed up for the next push."""

    loss: float = 0.0  # sum
    seen: int = 0  # batches that have samples
    skipped: int = 0


class Subject(NamedTuple):
    """What a worker is to learn, and how that is measured."""

    objective: Objective
    train: Loader
    val: Loader
    metrics: Sequence[str] = ()


class Books(NamedTuple):
    """What a worker writes down."""

    meter: Meter  # where its time goes
    checkpointer: WorkerCheckpointer
    # of every fetched snapshot's hash, if asked for
    hashes: EventLog | None = None


class Disturbances(NamedTuple):
    """What may come in between, from outside of the run."""

    # returns the signal that asked this process to end; "" while there was none
    asked_to_leave: Callable[[], str] = lambda: ""
    # what to do to a gradient that has been computed, to rehearse failures
    at_every_batch: Callable[[torch.Tensor], None] | None = None


class Worker:
    """Everything a worker holds; `run` is its loop.

    lead: what computes in place of `replica.flat`, if the network is cut into stages.
    """

    def __init__(
        self,
        number: int,
        client: ServerClient,
        replica: Replica,
        subject: Subject,
        config: Resolved,
        books: Books,
        lead: LeadStage | None = None,
        disturbances: Disturbances = Disturbances(),
    ):
        self.number = number
        self.client = client
        self.replica, self.flat = replica, replica.flat
        self.network = lead or replica.flat  # the whole of it
        # of the stages that compute, if there are several
        self.lead = lead
        self.objective, self.train_loader, self.val_loader, self.metrics = subject
        self.batch_size, self.smallest = config.data.batch_size, config.data.min_batch or 1
        # how they come about
        self.statistics = config.model.batchnorm if self.network.measured else "none"
        self.meter, self.checkpointer, self.hashes = books
        self.at_every_batch = disturbances.at_every_batch
        self._ahead = ReadAhead(self.train_loader, max(AHEAD, config.data.threads + 2))
        # the last lease that the loader has heard of
        self._last_ahead = 0
        # the lease that is worked on, and what is left of its batches
        self._lease, self._batches = 0, iter(())
        self._computed: _Computed | None = None  # None: nothing yet
        self._is_finite = True  # the last push
        self._may_be_overtaken = bool(pacing(config.rule, num_workers=1).backup)
        if self._may_be_overtaken:
            replica.watch(self._demand_use)
        self.protocol = protocol.Client(
            protocol.Habits(
                n_push=config.exchange.n_push,
                n_fetch=config.exchange.n_fetch,
                overlap=config.exchange.overlap,
                moves=replica.moves,
                saves=replica.keeps_state,
                tells_reads=RULEBOOK[config.rule.name].keeps_reads,
            ),
            self._cut,
            client.is_back,
            disturbances.asked_to_leave,
        )

    def run(self) -> None:
        """Work until the run is finished or left, with a task that has a loss of its own."""
        for _ in self._work(is_driven=False):
            raise AssertionError("what is computed here needs no loop of a user's")

    def driven(self) -> Generator[Any, float, None]:
        """Yield the inputs of each batch to a loop that computes its gradient into the network's, and sends the loss."""
        return self._work(is_driven=True)

    def _work(self, is_driven: bool) -> Generator[Any, float, None]:
        turns = self.batches()
        batch = next(turns, None)
        while batch is not None:
            loss: float | None
            try:
                if is_driven:
                    loss = yield from self.replica.driven(batch, self.objective)
                else:
                    loss = self.replica.add(batch, self.objective)
                if self.at_every_batch:
                    self.at_every_batch(self.flat.gradient)
                if self._may_be_overtaken:
                    self._demand_use()
            except _Overtaken:
                loss = None
            try:
                batch = turns.send(loss)
            except StopIteration:
                batch = None

    def batches(self) -> Generator[Batch, float | None, None]:
        """Yield every batch that this worker is to train, until the run is finished or left.

        Whoever drives it computes the gradient, between `replica.begin_` and `replica.end_`, and sends the loss; None if the
        step was made without it, so that the gradient was not finished. Pushes, fetches and validations are made in here.
        """
        return self._do_all(self.protocol.work())

    def rest(self) -> None:
        """After a failure: give all work back, wait for the end of the run, and take part in that."""
        with suppress(Exception):  # the trip that failed
            self.client.wait()
        # a stage may be dead
        for _ in self._do_all(self.protocol.rest(saves=not self.lead)):
            raise AssertionError("a worker that rests computes nothing")

    def _do_all(self, actions: protocol.Actions) -> Generator[Batch, float | None, None]:
        """Do what the protocol says, but for the gradients: their batches are yielded."""
        answer: object = None
        while True:
            try:
                action = actions.send(answer)
            except StopIteration:
                return
            if isinstance(action, protocol.Compute):
                batch = self._next_batch(action.lease)
                # -> flat.gradient (P,)
                with self.meter.phase("compute"):
                    loss = yield batch
                answer = loss is not None
                if loss is not None:
                    self._count(batch, loss)
            else:
                answer = self._do(action)

    def _do(self, action: protocol.Action) -> object:
        """Do what is no gradient; returns the answer to it."""
        match action:
            case protocol.Push():
                return self._push(action)
            case protocol.Take():
                is_fresh = self._take_snapshot()
                version = self.client.version if is_fresh else None
                return protocol.Taken(self._read_ahead(), version, self._is_finite)
            case protocol.Fetch(whole, is_torn):
                if is_torn:
                    self.meter.add(torn_reads=1)
                self.client.start(None, lambda payload: 0, whole=whole)
            case protocol.TakeWritten(wait):
                return self.checkpointer.take_done(wait)
            case protocol.GiveUp():
                self._give_up(action)
            case protocol.Validate(lease):
                self._validate(lease)
            case protocol.Say(kind, read_version):
                self.client.say(self._header(kind, read_version))
                return self._read_ahead()
            case protocol.Await(until, for_what):
                self.client.await_mail(until, for_what)
                return self._read_ahead()
            case protocol.Undo():
                self.replica.undo_()
            case protocol.BeginAnew():
                self._computed = None
                self.replica.load_({})
            case protocol.Save(number, made):
                with self._gathering() as is_copy:
                    self.checkpointer.save(number, made, self.replica.state, is_copy)
            case protocol.SaveBest(version):
                # the snapshot, which an elastic worker's own weights are not
                with self._on_the_snapshot(), self._gathering() as is_copy:
                    self.checkpointer.save_best(version, self.network.state_dict(), is_copy)
            case protocol.Leave():
                self.checkpointer.close()
                self.client.say(self._header(Kind.GOODBYE))
                self.client.close()
        return None

    def _next_batch(self, lease: Lease) -> Batch:
        self.meter.tick()
        if lease.number != self._lease:
            self._lease, self._batches = lease.number, self._ahead.take(lease.number)
        with self.meter.phase("data"):
            batch = next(self._batches)
        if self._computed is None:
            self._computed = _Computed()
            if self.statistics == "server_ema":
                batchnorm.begin_anew_(self.flat.measured)
        return batch

    def _count(self, batch: Batch, loss: float) -> None:
        """Take note of a batch whose gradient counts."""
        assert self._computed is not None  # since the batch was taken
        self._computed.loss += loss
        self._computed.seen += batch.size > 0
        self._computed.skipped += batch.skipped
        self.meter.add(images=batch.stop - batch.start, skipped_images=batch.skipped)

    def _demand_use(self) -> None:
        """Raises _Overtaken if the gradient that is being computed cannot count any more."""
        if self.client.is_overtaken():
            raise _Overtaken

    def _push(self, push: protocol.Push) -> bool:
        """Finish the sum, and send the client with it; returns whether the own weights are spoilt."""
        done, self._computed = self._computed, None
        with self.meter.phase("compute"):
            self._is_finite = is_finite = self.replica.finish()
        is_spoilt = push.moves and not is_finite
        if is_spoilt:
            self.replica.load_({})
        if is_finite and self.statistics == "server_ema" and done.seen:
            self.client.start(self._header(Kind.STATISTICS), self._fill_statistics, fetch=False)
            self.client.wait()
        header = self._header(
            Kind.GRADIENT if is_finite else Kind.NONFINITE,
            push.read_version,
            push.sum,
            skipped=done.skipped,
            loss=done.loss / max(1, done.seen),
            base=self.replica.base,
            scale=self.replica.scale,
            kept=self.replica.kept if is_finite else 0,
        )
        if is_finite:
            num_bytes = self.client.push_gradient(header, push.fetch, self.replica.code)
            self.meter.add(pushes=1, bytes_pushed=num_bytes)
        else:
            self.client.start(header, lambda payload: 0, push.fetch or is_spoilt)
        return is_spoilt

    def _give_up(self, action: protocol.GiveUp) -> None:
        self._computed = None
        self.replica.give_up()
        header = self._header(Kind.GIVEN_UP, action.read_version, action.sum)
        self.client.start(header, lambda payload: 0)

    def _take_snapshot(self) -> bool:
        """Wait for the client, and take the weights that it brought, if it did; whether it did."""
        if not self.client.wait():
            return False
        self.replica.fetched_(
            self.client.version,
            self.client.samples,
            self.client.fetched,
            lacks_push=self.replica.batches > 0,
        )
        if self.hashes:
            with self._gathering():
                weights = self.lead.gathered("weights") if self.lead else self.client.fetched
                arrived = self.client.format.rounded(weights)
                digest = xxhash.xxh3_64_hexdigest(arrived.cpu().numpy())
            self.hashes.write(Fetch(time.time(), self.client.version, self.client.sent, digest))
        return True

    @contextmanager
    def _gathering(self) -> Iterator[bool]:
        """Within, what stages put together may be asked for; whether it stays as it is until this is entered again."""
        if self.lead:
            # which may still read the last such thing
            self.checkpointer.settle()
        yield self.lead is not None

    def _header(
        self, kind: Kind, read_version: int = 0, of: protocol.Sum | None = None, **more: Any
    ) -> Header:
        """Return the header of the next packet; `of`: what it covers."""
        covers = (of.lease, of.start, of.count) if of else (0, 0, 0)
        return Header(kind, self.number, self.client.sent + 1, read_version, *covers, **more)

    def _validate(self, lease: Lease) -> None:
        """Validate a lease, and send the client with what was measured."""
        self.replica.show_carried_()
        with self.meter.phase("validate"), self._on_the_snapshot():
            stored = -1
            if self.statistics == "recalibrate":
                if lease.work == Work.FINAL and not self.metrics:
                    stored = round(self._tally(lease).sums["top1"])
                self._recalibrate()
            elif self.statistics == "server_ema":
                self.flat.load_statistics_(self.client.read_statistics())
            tally = self._tally(lease)
        header = self._header(
            Kind.VALIDATION,
            self.client.version,
            protocol.Sum(lease.number, lease.start, lease.stop - lease.start),
            skipped=tally.skipped,
            stored_top1=stored,
            **measured(tally, self.metrics),
        )
        self.client.start(header, self._fill_statistics, fetch=False)
        self.meter.add(bytes_pushed=4 * self.network.num_statistics)
        self.meter.tick()

    @contextmanager
    def _on_the_snapshot(self) -> Iterator[None]:
        """Let the network hold what was fetched, for an elastic rule, too."""
        aside = self.client.fetched is not self.flat.weights
        if aside:
            self.flat.swap_weights_()
        yield
        if aside:
            self.flat.swap_weights_()

    def _read_ahead(self) -> Mail:
        """Let the loader begin with the leases that have come; returns the mail that they came with."""
        for lease in self.client.mail.leases:
            if lease.number > self._last_ahead:
                self._last_ahead = lease.number
                if lease.work == Work.TRAIN:
                    self._ahead.ask(lease.number, self._cut(lease))
        return self.client.mail

    def _fill_statistics(self, payload: torch.Tensor) -> int:
        self.network.save_statistics(payload.view(torch.float32))
        return 4 * self.network.num_statistics

    def _tally(self, lease: Lease) -> Tally:
        return validate(self.network, self.objective, self.val_loader.batches(self._cut(lease)))

    def _cut(self, lease: Lease) -> list[Range]:
        return ranges(lease.epoch, lease.start, lease.stop, self.batch_size, self.smallest)

    def _recalibrate(self) -> None:
        """Measure the batch-norm statistics of the fetched snapshot, on the first training images of epoch 0."""
        last = batchnorm.positions(self.train_loader.order.num_samples, self.batch_size)
        batches = (
            self.train_loader.batch(*one)
            for one in ranges(0, 0, last, self.batch_size, self.smallest)
        )
        forward = passes(self.objective, batches, self.network.device)
        if self.lead:
            self.lead.recalibrate_(forward)
        else:
            batchnorm.recalibrate_(self.flat.module, forward, self.flat.measured)

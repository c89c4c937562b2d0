"""A worker: take a lease, compute the gradients of its batches, and send the client with them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
import xxhash

from asgd_mpi.config.options import Config
from asgd_mpi.config.rulebook import pacing
from asgd_mpi.data.loader import Batch, Loader, Range, ReadAhead, ranges
from asgd_mpi.model import batchnorm
from asgd_mpi.optim.replica import Replica
from asgd_mpi.optim.step import Errors, Normalise, validate
from asgd_mpi.protocol.messages import Header, Kind, Lease, Mail, Orders, Work
from asgd_mpi.record.events import EventLog, Fetch
from asgd_mpi.record.meter import Meter
from asgd_mpi.runtime.client import ServerClient
from asgd_mpi.runtime.stages import LeadStage
from asgd_mpi.runtime.worker_checkpointer import WorkerCheckpointer
from asgd_mpi.vector import codec

AHEAD = 8     # batches that are read before they are needed; more, if there are more threads to read them


class _Overtaken(Exception):
    """The step was made without the gradient that is being computed."""


class _Sum:
    """The gradients that have been summed up for the next push."""

    def __init__(self, lease: Lease, batch: Batch):
        self.lease, self.start = lease.number, batch.start
        self.batches = self.count = self.skipped = self.seen = 0
        self.loss = 0.0

    def add(self, batch: Batch, loss: float) -> None:
        self.batches += 1
        self.count += batch.stop - batch.start
        self.skipped += batch.skipped
        self.seen += len(batch.labels) > 0
        self.loss += loss

    @property
    def mean_loss(self) -> float:
        """Over the batches that have images; 0 if none has."""
        return self.loss / max(1, self.seen)


class Worker:
    """Everything a worker holds; `run` is its loop. `loaders` are those of the train and the val split.

    at_every_batch: what to do to a gradient that has been computed; failures are rehearsed with it. leader: what computes in
    place of `replica.flat`, if the network is cut into stages.
    """

    def __init__(self, number: int, client: ServerClient, replica: Replica, normalise: Normalise,
                 loaders: tuple[Loader, Loader], config: Config, meter: Meter, checkpointer: WorkerCheckpointer, log: EventLog | None = None,
                 asked_to_leave: Callable[[], str] = lambda: "",
                 at_every_batch: Callable[[torch.Tensor], None] = lambda gradient: None, lead: LeadStage | None = None):
        self.number = number
        self.client = client
        self.replica, self.flat = replica, replica.flat
        self.network = lead or replica.flat                  # the whole of it
        self.lead = lead                                   # of the stages that compute, if there are several
        self.normalise = normalise
        self.train_loader, self.val_loader = loaders
        self.batch_size, self.smallest = config.data.batch_size, config.data.min_batch or 1
        self.exchange = config.exchange
        self.statistics = config.model.batchnorm if self.network.measured else "none"   # how they come about
        self.meter = meter
        self.checkpointer = checkpointer
        self.log = log                                         # of every fetched snapshot's hash, if asked for
        self.asked_to_leave, self.at_every_batch = asked_to_leave, at_every_batch
        self._sum: _Sum | None = None
        self._since_fetch = 0                                  # batches
        self._ahead = ReadAhead(self.train_loader, max(AHEAD, config.data.threads + 2))
        self._last_ahead = 0                                   # the last lease that the loader has heard of
        self._done = 0                                         # the last lease that was worked on
        self._pushed = False                                   # a gradient is under way,
        self._made = -1                                        # ... the version that the last one made
        self._dropped = self._refused = 0                      # packets, as far as this worker knows
        self._saved = 0                                        # the last checkpoint that the momentum was saved for
        self._told_of_signal = False
        self._may_be_overtaken = bool(pacing(config.rule, num_workers=1).backup)
        if self._may_be_overtaken:
            replica.watch(self._demand_use)

    def run(self) -> None:
        """Work until the run is finished or left."""
        self._refresh()
        self._made = self.client.version
        for lease in self._leases():
            if lease.work == Work.TRAIN:
                self._train(lease)
            else:
                self._validate(lease)
            self._done = lease.number
        self.part()

    def rest(self) -> None:
        """After a failure: give all work back, wait for the end of the run, and take part in that."""
        self.replica.keeps_state = self.replica.keeps_state and not self.lead      # a stage may be dead
        with suppress(Exception):                              # the trip that failed
            self.client.wait()
        self.client.say(self._header(Kind.FAILED))
        self._await_end()
        self.part()

    def part(self) -> None:
        """Save what the next start needs, and say goodbye."""
        self._take()
        if self.client.mail.orders == Orders.LEAVE:
            self._save_if_asked()
        self._tell_of_saved(wait=True)
        self.checkpointer.close()
        self.client.say(self._header(Kind.GOODBYE))
        self.client.close()

    def _train(self, lease: Lease) -> None:
        membership = self._dropped
        for batch in self._batches(lease):
            if self._sum is None and self.statistics == "server_ema":
                batchnorm.begin_anew_(self.flat.measured)
            with self.meter.phase("compute"):                                  # -> flat.gradient (P,)
                loss = self._compute(batch)
            self._sum = self._sum or _Sum(lease, batch)
            self._sum.add(batch, math.nan if loss is None else loss)
            if loss is None:
                self._give_up()
            else:
                self.meter.add(images=batch.stop - batch.start, skipped_images=batch.skipped)
                if self._is_due(self._sum):
                    self._push()
            self.meter.tick()
            if self._is_interrupted() or self._dropped != membership:
                return

    def _compute(self, batch: Batch) -> float | None:
        """The loss of a batch; None if the step has been made without it, so that it was not finished."""
        try:
            loss = self.replica.add(batch, self.normalise)
            self.at_every_batch(self.flat.gradient)
            self._demand_use()
        except _Overtaken:
            return None
        return loss

    def _demand_use(self) -> None:
        """Raises _Overtaken if the gradient that is being computed cannot count any more."""
        if self._may_be_overtaken and self.client.is_overtaken():
            raise _Overtaken

    def _give_up(self) -> None:
        """Give back what was to be pushed, and begin the next step."""
        done, self._sum = self._sum, None
        self.replica.give_up()
        self.client.start(
            self._header(Kind.GIVEN_UP, read_version=self.client.version, lease=done.lease, start=done.start, count=done.count),
            lambda payload: 0)
        self._since_fetch = 0
        self._take()
        self._lost_membership()

    def _is_due(self, done: _Sum) -> bool:
        """Whether to push now; n_push auto sums on while the client is under way."""
        return self.client.is_back() if self.exchange.n_push == "auto" else done.batches == self.exchange.n_push

    def _is_interrupted(self) -> bool:
        """Whether to leave the lease as it is: the run is left, or this worker has lost it."""
        if self.asked_to_leave() and not self._told_of_signal:
            self._told_of_signal = True
            self._take()
            self.client.say(self._header(Kind.SIGNAL))
            self._await_end()                                                  # what is summed up is trained again
        return self.client.mail.orders not in (Orders.GO_ON, Orders.REPORT) or self._lost_membership()

    def _lost_membership(self) -> bool:
        """Whether a packet was dropped since this worker had been retired: then it begins again, as a new one."""
        mail = self.client.mail
        if mail.dropped == self._dropped:
            return False
        self._dropped = mail.dropped
        self._sum = None
        self.replica.load_({})
        self._made = mail.version
        self._refresh()
        return True

    def _push(self) -> None:
        """Send the client with the sum; go on with the weights that the last trip brought, or this one without overlap."""
        version, done, self._sum = self.client.version, self._sum, None
        elastic = self.replica.moves == "elastic"
        if elastic:
            self.client.start(None, lambda payload: 0)
        self._take()
        if self._lost_membership():
            return
        version = self.client.version if elastic else version
        self._since_fetch += done.batches
        with self.meter.phase("compute"):
            is_finite = self.replica.finish()
        fetch = not elastic and self._since_fetch >= self.exchange.n_fetch
        if not is_finite and self.replica.moves:               # its own weights are spoilt
            self.replica.load_({})
            fetch = True
        self._since_fetch = 0 if fetch else self._since_fetch
        if is_finite and self.statistics == "server_ema" and done.seen:
            self.client.start(self._header(Kind.STATISTICS), self._fill_statistics, fetch=False)
            self.client.wait()
        header = self._header(
            Kind.GRADIENT if is_finite else Kind.NONFINITE, read_version=version, lease=done.lease, start=done.start,
            count=done.count, skipped=done.skipped, loss=done.mean_loss, base=self.replica.base,
            scale=self.replica.scale)
        if is_finite:
            self.client.push_gradient(header, fetch)
            self._pushed = True
            self.meter.add(pushes=1, bytes_pushed=codec.num_bytes(self.network.num_floats, self.exchange.wire))
        else:
            self.client.start(header, lambda payload: 0, fetch)
        if not self.exchange.overlap:
            self._take()
            self._lost_membership()

    def _take(self) -> None:
        """Wait for the client; new weights, new leases."""
        if self.client.wait():
            self.replica.fetched_(self.client.version, self.client.samples, self.client.fetched)
            if self.log:
                with self._gathering():
                    weights = self.lead.gathered("weights") if self.lead else self.client.fetched
                    digest = xxhash.xxh3_64_hexdigest(codec.rounded(weights, self.exchange.wire).cpu().numpy())
                self.log.write(Fetch(time.time(), self.client.version, self.client.sent, digest))
        if self.client.mail.refused != self._refused:
            self._refused = self.client.mail.refused
            self.replica.undo_()
        elif self._pushed and self.client.mail.dropped == self._dropped:
            self._made = self.client.mail.version
        self._pushed = False
        if self.client.mail.orders != Orders.LEAVE:           # then all pushes are waited for first
            self._save_if_asked()
        self._tell_of_saved()
        self._read_ahead()

    def _save_if_asked(self) -> None:
        """Begin to write the momentum, if a checkpoint waits for it."""
        if self.replica.keeps_state and self.client.mail.save > self._saved:
            self._saved = self.client.mail.save
            with self._gathering() as is_copy:
                self.checkpointer.save(self._saved, self._made, self.replica.state, is_copy)

    @contextmanager
    def _gathering(self) -> Iterator[bool]:
        """Within, what stages put together may be asked for; whether it stays as it is until this is entered again."""
        if self.lead:
            self.checkpointer.settle()                               # which may still read the last such thing
        yield self.lead is not None

    def _tell_of_saved(self, wait: bool = False) -> None:
        for kind, version in self.checkpointer.take_done(wait):
            self.client.say(self._header(kind, read_version=version))

    def _await_end(self) -> None:
        self.client.await_mail(lambda mail: mail.orders in (Orders.STOP, Orders.LEAVE), "end the run")

    def _header(self, kind: Kind, **fields: float) -> Header:
        return Header(kind, self.number, self.client.sent + 1, **{"read_version": 0, "lease": 0, "start": 0, "count": 0, **fields})

    def _refresh(self, whole: bool = False) -> None:
        """Deliver what there is, and fetch the latest weights; `whole`: in float32, whatever travels otherwise."""
        if self._sum:
            self._push()
        self._take()
        self.client.start(None, lambda payload: 0, whole=whole)
        self._take()
        self._since_fetch = 0

    def _validate(self, lease: Lease) -> None:
        self._refresh(whole=True)                              # what a checkpoint of this version holds
        self.replica.show_carried_()
        with self.meter.phase("validate"), self._on_the_snapshot():
            stored = self._errors(lease).top1 if self.statistics == "recalibrate" and lease.work == Work.FINAL else -1
            if self.statistics == "recalibrate":
                self._recalibrate()
            elif self.statistics == "server_ema":
                self.flat.load_statistics_(self.client.read_statistics())
            errors = self._errors(lease)
        self.client.start(
            self._header(Kind.VALIDATION, read_version=self.client.version, lease=lease.number, start=lease.start,
                         count=lease.stop - lease.start, skipped=errors.skipped, loss=errors.loss, top1=errors.top1,
                         top5=errors.top5, stored_top1=stored), self._fill_statistics, fetch=False)
        self.meter.add(bytes_pushed=4 * self.network.num_statistics)
        self._take()
        if lease.work == Work.VALIDATE and self.client.mail.best == self.client.version:
            with self._gathering() as is_copy:
                self.checkpointer.save_best(self.client.version, self.network.state_dict(), is_copy)
        self._lost_membership()
        self._refresh()
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

    def _leases(self) -> Iterator[Lease]:
        """The leases granted to this worker, in order, until the run is over."""
        while True:
            if self._next_lease() is None:
                self._refresh()                          # the answer to the last push may bring it
            if self._next_lease() is None and not self._is_interrupted():
                self._tell_of_saved(wait=True)           # idle: all is lent, and others still work on theirs
                self.client.await_mail(self._is_news, "grant it a lease")
                self._save_if_asked()
                self._read_ahead()
                if self._next_lease():
                    self._refresh()                      # others have moved the weights in the meantime
            if self.client.mail.orders == Orders.REST:
                self._await_end()
            if self.client.mail.orders == Orders.REPORT and self._next_lease() is None:
                self.client.say(self._header(Kind.HERE))
                self._lost_membership()
                continue
            if self.client.mail.orders != Orders.GO_ON:
                return
            lease = self._next_lease()
            if lease is not None:
                yield lease

    def _next_lease(self) -> Lease | None:
        return next((lease for lease in self.client.mail.leases if lease.number > self._done), None)

    def _is_news(self, mail: Mail) -> bool:
        """Whether mail is worth an idle worker's time."""
        return (mail.orders != Orders.GO_ON or any(lease.number > self._done for lease in mail.leases)
                or self.replica.keeps_state and mail.save > self._saved
                or bool(self.asked_to_leave()) and not self._told_of_signal)

    def _read_ahead(self) -> None:
        """Let the loader begin with the leases that have come."""
        for lease in self.client.mail.leases:
            if lease.number > self._last_ahead:
                self._last_ahead = lease.number
                if lease.work == Work.TRAIN:
                    self._ahead.ask(lease.number, self._cut(lease))

    def _batches(self, lease: Lease) -> Iterator[Batch]:
        batches = self._ahead.take(lease.number)
        while True:
            with self.meter.phase("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _fill_statistics(self, payload: torch.Tensor) -> int:
        self.network.save_statistics(payload.view(torch.float32))
        return 4 * self.network.num_statistics

    def _errors(self, lease: Lease) -> Errors:
        return validate(self.network, self.normalise, self.val_loader.batches(self._cut(lease)))

    def _cut(self, lease: Lease) -> Iterator[Range]:
        return ranges(lease.epoch, lease.start, lease.stop, self.batch_size, self.smallest)

    def _recalibrate(self) -> None:
        """Measure the batch-norm statistics of the fetched snapshot, on the first training images of epoch 0."""
        last = batchnorm.positions(self.train_loader.shards.num_samples, self.batch_size)
        batches = (self.train_loader.batch(*one) for one in ranges(0, 0, last, self.batch_size, self.smallest))
        images = (self.normalise(batch.on(self.network.device)) for batch in batches if len(batch.labels))
        self.lead.recalibrate_(images) if self.lead else batchnorm.recalibrate_(self.flat.module, images, self.flat.measured)

"""A worker: take a lease, compute the gradients of its batches, and send the courier with them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future

import torch
import xxhash

from asgd_mpi.config import Config
from asgd_mpi.data.loader import Batch, Loader
from asgd_mpi.exchange.wire import Header, Kind
from asgd_mpi.model import batchnorm
from asgd_mpi.model.flat import FlatModel
from asgd_mpi.record.events import EventLog, Fetch
from asgd_mpi.record.meter import Meter
from asgd_mpi.server.ledger import Lease, Work
from asgd_mpi.worker.courier import Courier
from asgd_mpi.worker.momentum import Momentum
from asgd_mpi.worker.step import Normalise, compute_gradient_, validate

READ_AHEAD = 4  # batches of a validation


class _Sum:
    """The gradients that have been summed up for the next push."""

    def __init__(self, lease: Lease, batch: Batch):
        self.lease, self.start = lease.number, batch.start
        self.batches = self.count = self.skipped = 0
        self.loss = 0.0

    def add(self, batch: Batch, loss: float) -> None:
        self.batches += 1
        self.count += batch.stop - batch.start
        self.skipped += batch.skipped
        self.loss += loss


class Worker:
    """Everything a worker holds; `run` is its loop. `loaders` are those of the train and the val split."""

    def __init__(self, number: int, courier: Courier, flat: FlatModel, normalise: Normalise,
                 loaders: tuple[Loader, Loader], config: Config, meter: Meter, log: EventLog | None = None):
        self.number = number
        self.courier = courier
        self.flat = flat
        self.normalise = normalise
        self.train_loader, self.val_loader = loaders
        self.batch_size = config.data.batch_size
        self.seed = config.run.seed
        self.exchange = config.exchange
        self.momentum = Momentum(config.rule, flat.weights)
        self.meter = meter
        self.log = log                                         # of every fetched snapshot's hash, if asked for
        self._sum: _Sum | None = None
        self._since_fetch = 0                                  # batches
        self._ahead: dict[int, deque[Future[Batch]]] = {}      # batches under way, by lease
        self._last_ahead = 0                                   # the last lease that the loader has heard of

    def run(self) -> None:
        self._refresh()
        for lease in self._leases():
            if lease.work == Work.TRAIN:
                self._train(lease)
            else:
                self._validate(lease)
        self.courier.close()

    def _train(self, lease: Lease) -> None:
        for batch in self._batches(lease):
            with self.meter.phase("compute"):                                  # -> flat.gradient (P,)
                loss = compute_gradient_(self.flat, self.normalise, batch, self.seed, accumulate=self._sum is not None)
            self._sum = self._sum or _Sum(lease, batch)
            self._sum.add(batch, loss)
            self.meter.add(images=batch.stop - batch.start, skipped_images=batch.skipped)
            if self._is_due(self._sum):
                self._push()
            self.meter.tick()

    def _is_due(self, done: _Sum) -> bool:
        """Whether to push now; n_push auto sums on while the courier is under way."""
        return self.courier.is_back() if self.exchange.n_push == "auto" else done.batches == self.exchange.n_push

    def _push(self) -> None:
        """Send the courier with the sum; go on with the weights that the last trip brought, or this one without overlap."""
        version, done, self._sum = self.courier.version, self._sum, None
        self._take()
        with self.meter.phase("compute"):
            self.momentum.push_(self.flat.gradient)
        self._since_fetch += done.batches
        fetch = self._since_fetch >= self.exchange.n_fetch
        self._since_fetch = 0 if fetch else self._since_fetch
        self.courier.push_gradient(
            Header(Kind.GRADIENT, self.number, self.courier.sent + 1, version, done.lease, done.start, done.count,
                   done.skipped, done.loss / done.batches), fetch)
        self.meter.add(pushes=1, bytes_pushed=4 * self.flat.num_floats)
        if not self.exchange.overlap:
            self._take()

    def _take(self) -> None:
        """Wait for the courier; new weights, new leases."""
        if self.courier.wait() and self.log:
            digest = xxhash.xxh3_64_hexdigest(self.flat.weights.cpu().numpy())
            self.log.write(Fetch(time.time(), self.courier.version, self.courier.sent, digest))
        self._read_ahead()

    def _refresh(self) -> None:
        """Deliver what there is, and fetch the latest weights."""
        if self._sum:
            self._push()
        self._take()
        self.courier.start(None, lambda payload: 0)
        self._take()
        self._since_fetch = 0

    def _validate(self, lease: Lease) -> None:
        self._refresh()
        with self.meter.phase("validate"):
            self._recalibrate()
            errors = validate(self.flat, self.normalise, self._in_order(lease))

        def fill(payload: torch.Tensor) -> int:
            self.flat.save_statistics(payload)
            return self.flat.num_statistics

        self.courier.start(
            Header(Kind.VALIDATION, self.number, self.courier.sent + 1, self.courier.version, lease.number, lease.start,
                   lease.stop - lease.start, errors.skipped, errors.loss, errors.top1, errors.top5), fill)
        self.meter.add(bytes_pushed=4 * self.flat.num_statistics)
        self._take()
        self.meter.tick()

    def _leases(self) -> Iterator[Lease]:
        """The leases granted to this worker, in order, until the run is over."""
        number = 1
        while True:
            if not self._granted(number):
                self._refresh()                          # the answer to the last push may bring it
            if not self._granted(number):
                self.courier.await_lease(number)         # idle: all is lent, and others still work on theirs
                self._read_ahead()
            lease = self._granted(number)
            if lease is None:
                return
            yield lease
            number += 1

    def _granted(self, number: int) -> Lease | None:
        return next((lease for lease in self.courier.mail.leases if lease.number == number), None)

    def _read_ahead(self) -> None:
        """Let the loader begin with the leases that have come."""
        for lease in self.courier.mail.leases:
            if lease.number > self._last_ahead:
                self._last_ahead = lease.number
                if lease.work == Work.TRAIN:
                    self._ahead[lease.number] = deque(
                        self.train_loader.submit(lease.epoch, start, min(start + self.batch_size, lease.stop))
                        for start in range(lease.start, lease.stop, self.batch_size))

    def _batches(self, lease: Lease) -> Iterator[Batch]:
        futures = self._ahead.pop(lease.number)
        while futures:
            with self.meter.phase("data"):
                batch = futures.popleft().result()
            yield batch

    def _in_order(self, lease: Lease) -> Iterator[Batch]:
        """The validation images of a lease, read a few batches ahead."""
        ahead: deque[Future[Batch]] = deque()
        for start in range(lease.start, lease.stop, self.batch_size):
            ahead.append(self.val_loader.submit(lease.epoch, start, min(start + self.batch_size, lease.stop)))
            if len(ahead) > READ_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _recalibrate(self) -> None:
        """Measure the batch-norm statistics of the fetched snapshot, on the first training images of epoch 0."""
        if batchnorm.layers(self.flat.module):
            last = min(batchnorm.NUM_BATCHES * self.batch_size, self.train_loader.shards.num_samples)
            batches = (self.train_loader.batch(0, start, min(start + self.batch_size, last))
                       for start in range(0, last, self.batch_size))
            batchnorm.recalibrate_(
                self.flat.module, (self.normalise(batch.on(self.flat.device)) for batch in batches))

"""A worker: take a lease, and for each of its batches fetch the weights, compute, and push the gradient."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future

import torch
import xxhash

from asgd_mpi.data.loader import Batch, Loader
from asgd_mpi.exchange.link import Outbox
from asgd_mpi.exchange.window import Snapshot, WorkerWindow
from asgd_mpi.exchange.wire import Header, Kind
from asgd_mpi.model import batchnorm
from asgd_mpi.model.flat import FlatModel
from asgd_mpi.record.events import EventLog, Fetch
from asgd_mpi.record.meter import Meter
from asgd_mpi.server.ledger import Lease, Mail, Work
from asgd_mpi.worker.step import Normalise, compute_gradient_, validate

READ_AHEAD = 4  # batches of a validation


class Worker:
    """Everything a worker holds; `run` is its loop. `loaders` are those of the train and the val split."""

    def __init__(self, number: int, window: WorkerWindow, outbox: Outbox, flat: FlatModel, normalise: Normalise,
                 loaders: tuple[Loader, Loader], batch_size: int, seed: int, meter: Meter, log: EventLog | None = None):
        self.number = number
        self.window = window
        self.outbox = outbox
        self.flat = flat
        self.normalise = normalise
        self.train_loader, self.val_loader = loaders
        self.batch_size = batch_size
        self.seed = seed
        self.meter = meter
        self.log = log                                         # of every fetched snapshot's hash, if asked for
        self._mail = Mail(judged=0, version=0, stop=False, leases=())
        self._ahead: dict[int, deque[Future[Batch]]] = {}      # batches under way, by lease
        self._host_weights = flat.weights if flat.device.type == "cpu" else torch.empty(flat.num_floats, pin_memory=True)

    def run(self) -> None:
        for lease in self._leases():
            if lease.work == Work.TRAIN:
                self._train(lease)
            else:
                self._validate(lease)
            self.meter.tick()

    def _train(self, lease: Lease) -> None:
        for batch in self._batches(lease):
            snapshot = self._fetch(lease)                                      # -> flat.weights (P,), one whole version
            with self.meter.phase("compute"):
                loss = compute_gradient_(self.flat, self.normalise, batch, self.seed)    # -> flat.gradient (P,)
                self.outbox.payload[:self.flat.num_floats].copy_(self.flat.gradient)
            self._push(Header(Kind.GRADIENT, self.number, self.outbox.sent + 1, snapshot.version, lease.number,
                              batch.start, batch.stop, batch.skipped, loss), self.flat.num_floats)
            self.meter.count(images=batch.stop - batch.start, pushes=1, skipped_images=batch.skipped)
            self.meter.tick()

    def _validate(self, lease: Lease) -> None:
        snapshot = self._fetch(lease)
        with self.meter.phase("validate"):
            self._recalibrate()
            errors = validate(self.flat, self.normalise, self._in_order(lease))
            self.flat.save_statistics(self.outbox.payload)
        self._push(Header(Kind.VALIDATION, self.number, self.outbox.sent + 1, snapshot.version, lease.number, lease.start,
                          lease.stop, errors.skipped, errors.loss, errors.top1, errors.top5), self.flat.num_statistics)

    def _leases(self) -> Iterator[Lease]:
        """The leases granted to this worker, in order, until the run is over."""
        number = 1
        while True:
            if not self._granted(number):
                with self.meter.phase("push"):          # the answer to the last push may bring it
                    self._await_mail()
            if not self._granted(number):
                self._await_mail(with_lease=number)     # idle: all is lent, and others still work on theirs
            lease = self._granted(number)
            if lease is None:
                return
            yield lease
            number += 1

    def _granted(self, number: int) -> Lease | None:
        return next((lease for lease in self._mail.leases if lease.number == number), None)

    def _await_mail(self, with_lease: int | None = None) -> None:
        self._mail = self.window.await_mail(self.outbox.sent, with_lease)
        for lease in self._mail.leases:              # let the loader read ahead
            if lease.work == Work.TRAIN and lease.number not in self._ahead:
                self._ahead[lease.number] = deque(
                    self.train_loader.submit(lease.epoch, start, min(start + self.batch_size, lease.stop))
                    for start in range(lease.start, lease.stop, self.batch_size))

    def _fetch(self, lease: Lease) -> Snapshot:
        """The weights after this worker's last push, or newer."""
        with self.meter.phase("push"):
            self._await_mail()
        with self.meter.phase("fetch"):
            snapshot = self.window.fetch(self._host_weights, at_least=self._mail.version)
            if self._host_weights is not self.flat.weights:
                self.flat.weights.copy_(self._host_weights, non_blocking=True)
        self.meter.count(fetches=1, torn_reads=snapshot.torn_reads, bytes_fetched=4 * self.flat.num_floats)
        if self.log:
            digest = xxhash.xxh3_64_hexdigest(self._host_weights.numpy())
            self.log.write(Fetch(time.time(), snapshot.version, self.outbox.sent, digest))
        return snapshot

    def _push(self, header: Header, num_floats: int) -> None:
        with self.meter.phase("push"):
            self.outbox.send(header, num_floats)
            self.outbox.wait()
        self.meter.count(bytes_pushed=4 * num_floats)

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
                self.flat.module, (self.normalise(batch.images.to(self.flat.device)) for batch in batches))

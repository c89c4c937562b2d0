"""Everything of a run that is arithmetic, in one process: what the replay and the simulation share.

One network, on which the replicas of all workers take turns, and the server's rule. Who computes on which snapshot, and when
it is applied, is the caller's to say: the log of a run, or a virtual clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from asgd_mpi.data.loader import ranges
from asgd_mpi.model import batchnorm
from asgd_mpi.optim.replica import Replica
from asgd_mpi.optim.rules import make_rule
from asgd_mpi.optim.step import Errors, validate
from asgd_mpi.protocol.messages import Verdict
from asgd_mpi.task import Task
from asgd_mpi.vector import codec
from asgd_mpi.vector.flat import FlatModel
from asgd_mpi.vector.partition import pieces


class Snapshot(NamedTuple):
    version: int
    samples: int              # applied so far
    weights: torch.Tensor     # (P,) float32; never changed


class Computed(NamedTuple):
    """What a push was computed to be; the payload itself is in flat.gradient."""

    loss: float               # mean over its batches
    skipped: int              # damaged images left out
    is_finite: bool
    scale: float = 1.0        # what it was multiplied by, to keep to max_drift and clip_norm


class SingleProcessTrainer:
    """`first`: the snapshot with the first weights. Memory: one (P,) for each snapshot that somebody holds, those that the
    rule keeps (`rulebook.vectors`), and one more for each worker that moves its own weights."""

    def __init__(self, task: Task, num_workers: int, first: Snapshot | None = None):
        self.task = task
        self.flat = FlatModel(task.first_module(), torch.device("cpu"), carried=task.carried(task.build_module()))
        self.first = first or Snapshot(0, 0, self.flat.weights.clone())
        self.schedule, self.loader, self.normalise = task.schedule(num_workers), task.train_loader(), task.normalise
        self.rule = make_rule(self.flat.num_floats, task.config.rule, num_workers)
        self.replicas = [Replica(self.flat, task.config, num_workers, self.schedule, shares=True)
                         for _ in range(num_workers)]
        for worker in range(num_workers):
            self.rule.begin_(worker, self.first.weights)

    def compute_(self, worker: int, segments: Iterable[tuple[int, int, int]], fetched: Snapshot | None,
                 centre: Snapshot | None = None) -> Computed:
        """Let a worker compute what it pushes, on all (epoch, start, stop).

        `fetched`: what it fetched before, None if it goes on where it was; `centre`: what it fetches after the batches, if
        the rule is elastic.
        """
        replica, loss, skipped, num_batches = self.replicas[worker], 0.0, 0, 0
        if fetched is not None:
            replica.fetched_(*self._on_the_wire(fetched))
        for batch in self._batches(segments):
            loss += replica.add(batch, self.normalise)
            skipped += batch.skipped
            num_batches += len(batch.labels) > 0
        if centre is not None:
            replica.fetched_(*self._on_the_wire(centre))
        return Computed(loss / max(1, num_batches), skipped, replica.finish(), replica.scale)

    def applied(self, latest: Snapshot, verdict: Verdict, positions: int) -> Snapshot:
        """The snapshot that what was computed last makes of the latest one."""
        weights = latest.weights.clone()
        for piece in pieces(len(weights)):
            self.rule.apply_(weights, self.flat.gradient, verdict, piece)
        return Snapshot(latest.version + 1, latest.samples + positions, weights)

    def begin_anew_(self, worker: int, latest: Snapshot) -> None:
        """A worker begins again, without what it kept."""
        self.replicas[worker].load_({})
        self.rule.begin_(worker, latest.weights)

    def undo_(self, worker: int) -> None:
        """What a worker computed last has been dropped."""
        self.replicas[worker].undo_()

    def validate_(self, snapshot: Snapshot, start: int, stop: int, worker: int = 0) -> Errors:
        """The errors of a snapshot on positions [start, stop) of the validation split; `flat` holds it then.

        worker: whose carried buffers it is validated with.
        """
        task, size = self.task, self.task.config.data.batch_size
        self.flat.weights.copy_(snapshot.weights)
        self.replicas[worker].show_carried_()
        if self.flat.measured:
            last = batchnorm.positions(task.train.num_samples, size)
            images = (self.normalise(batch.images) for batch in self._batches([(0, 0, last)]) if len(batch.labels))
            batchnorm.recalibrate_(self.flat.module, images, self.flat.measured)
        loader = task.val_loader()
        errors = validate(self.flat, self.normalise, loader.batches(ranges(0, start, stop, size, task.smallest)))
        loader.close()
        return errors

    def _on_the_wire(self, snapshot: Snapshot) -> Snapshot:
        """As a worker reads it."""
        return snapshot._replace(weights=codec.rounded(snapshot.weights, self.task.config.exchange.wire))

    def close(self) -> None:
        self.loader.close()

    def _batches(self, segments: Iterable[tuple[int, int, int]]):
        """The batches of a push, cut as the worker cuts them."""
        size = self.task.config.data.batch_size
        for epoch, start, stop in segments:
            for one in ranges(epoch, start, stop, size, self.task.smallest):
                yield self.loader.batch(*one)

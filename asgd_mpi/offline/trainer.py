"""Everything of a run that is arithmetic, in one process: what the replay and the simulation share.

One network, on which the replicas of all workers take turns, and the server's rule. Who computes on which snapshot, and when
it is applied, is the caller's to say: the log of a run, or a virtual clock.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any, NamedTuple, TypeVar

import torch

from asgd_mpi.data.loader import ranges
from asgd_mpi.model import batchnorm
from asgd_mpi.optim.formats import fetch_format, push_format
from asgd_mpi.optim.objective import Tally, passes
from asgd_mpi.optim.replica import Replica
from asgd_mpi.optim.rules import EMA, make_rule
from asgd_mpi.optim.step import validate
from asgd_mpi.protocol.messages import Verdict
from asgd_mpi.task import OpenedTask
from asgd_mpi.vector.flat import FlatModel
from asgd_mpi.vector.partition import pieces


Result = TypeVar("Result")


def finished(turns: Generator[Any, float, Result]) -> Result:
    """Run to its end what a task with a loss of its own computes, so that it yields nothing; returns what it returns."""
    while True:
        try:
            next(turns)
        except StopIteration as end:
            return end.value


class Snapshot(NamedTuple):
    version: int
    samples: int  # applied so far
    weights: torch.Tensor  # (P,) float32; never changed


class Computed(NamedTuple):
    """What a push was computed to be; the payload itself is in flat.gradient."""

    loss: float  # mean over its batches
    skipped: int  # damaged images left out
    is_finite: bool
    scale: float = 1.0  # what it was multiplied by, to keep to max_drift and clip_norm
    kept: int = 0  # numbers of a chunk that are sent (topk)


class SingleProcessTrainer:
    """`first`: the snapshot with the first weights. Memory: one (P,) for each snapshot that somebody holds, those that the
    rule keeps (`rulebook.vectors`), and one more for each worker that moves its own weights."""

    def __init__(self, task: OpenedTask, num_workers: int, first: Snapshot | None = None):
        self.task = task
        self.flat = FlatModel(
            task.first_module(), torch.device("cpu"), carried=task.carried(task.build_module())
        )
        self.first = first or Snapshot(0, 0, self.flat.weights.clone())
        self.schedule, self.loader, self.objective = (
            task.schedule(num_workers),
            task.train_loader(),
            task.objective,
        )
        self.pushed = push_format(task.config.exchange, self.flat.module)
        self.fetched = fetch_format(task.config.exchange.fetch_wire, self.flat.module)
        groups = task.groups(self.flat.module)
        self.rule = make_rule(self.flat.num_floats, task.config.rule, num_workers, groups)
        self.replicas = [
            Replica(
                self.flat,
                task.config,
                num_workers,
                self.schedule,
                shares=True,
                groups=groups,
                kept_at=task.kept_at,
            )
            for _ in range(num_workers)
        ]

    def compute_(
        self,
        worker: int,
        segments: Iterable[tuple[int, int, int]],
        fetched: Snapshot | None,
        centre: Snapshot | None = None,
        lacks_push: bool = False,
    ) -> Computed:
        """Let a worker compute what it pushes; see `computing_`."""
        return finished(self.computing_(worker, segments, fetched, centre, lacks_push))

    def computing_(
        self,
        worker: int,
        segments: Iterable[tuple[int, int, int]],
        fetched: Snapshot | None,
        centre: Snapshot | None = None,
        lacks_push: bool = False,
    ) -> Generator[Any, float, Computed]:
        """Let a worker compute what it pushes, on all (epoch, start, stop).

        `fetched`: what it fetched before, None if it goes on where it was; `lacks_push`: that is from before its last push;
        `centre`: what it fetches after the batches, if the rule is elastic.
        """
        replica, loss, skipped, num_batches = self.replicas[worker], 0.0, 0, 0
        if fetched is not None:
            self.rule.read_(worker, fetched.weights)
            replica.fetched_(*self._on_the_wire(fetched), lacks_push=lacks_push)
        for batch in self._batches(segments):
            if self.task.computes:
                loss += replica.add(batch, self.objective)
            else:
                loss += yield from replica.driven(batch, self.objective)
            skipped += batch.skipped
            num_batches += batch.size > 0
        if centre is not None:
            replica.fetched_(*self._on_the_wire(centre))
        is_finite = replica.finish()
        return Computed(loss / max(1, num_batches), skipped, is_finite, replica.scale, replica.kept)

    def applied(self, latest: Snapshot, verdict: Verdict, positions: int) -> Snapshot:
        """Return the snapshot that what was computed last makes of the latest one."""
        weights = latest.weights.clone()
        for piece in pieces(len(weights)):
            self.rule.apply_(weights, self.flat.gradient, verdict, piece)
            self.rule.average_(weights, verdict, piece)
        return Snapshot(latest.version + 1, latest.samples + positions, weights)

    def begin_anew_(self, worker: int) -> None:
        """A worker begins again, without what it kept."""
        self.replicas[worker].load_({})

    def undo_(self, worker: int) -> None:
        """Go back to before what a worker computed last, which has been dropped."""
        self.replicas[worker].undo_()

    def validate_(self, snapshot: Snapshot, start: int, stop: int, worker: int = 0) -> Tally:
        """Return what a snapshot scores on positions [start, stop) of the validation split; `flat` holds it then.

        worker: whose carried buffers it is validated with.
        """
        task, size = self.task, self.task.config.data.batch_size
        self.flat.weights.copy_(snapshot.weights)
        self.replicas[worker].show_carried_()
        if self.flat.measured:
            last = batchnorm.positions(task.train.num_samples, size)
            forward = passes(self.objective, self._batches([(0, 0, last)]), self.flat.device)
            batchnorm.recalibrate_(self.flat.module, forward, self.flat.measured)
        loader = task.val_loader()
        tally = validate(
            self.flat, self.objective, loader.batches(ranges(0, start, stop, size, task.smallest))
        )
        loader.close()
        return tally

    def validate_mean_(self, latest: Snapshot, stop: int) -> Tally | None:
        """Return what the running mean of the weights scores on the validation split; None if none is kept."""
        mean = self.rule.state.get(EMA)
        return None if mean is None else self.validate_(latest._replace(weights=mean), 0, stop)

    def _on_the_wire(self, snapshot: Snapshot) -> Snapshot:
        """Return a snapshot as a worker reads it."""
        return snapshot._replace(weights=self.fetched.rounded(snapshot.weights))

    def close(self) -> None:
        self.loader.close()

    def _batches(self, segments: Iterable[tuple[int, int, int]]):
        """Yield the batches of a push, cut as the worker cuts them."""
        size = self.task.config.data.batch_size
        for epoch, start, stop in segments:
            for one in ranges(epoch, start, stop, size, self.task.smallest):
                yield self.loader.batch(*one)

"""What a worker computes between two exchanges: gradients, and what is pushed. No MPI, no clock.

The worker's loop, the replay and the simulation all use it. Momentum on the server is the main trap of asynchronous
SGD: n workers push it the same way n times before the first of them sees the effect. At m = 0.9 and n = 8 a quadratic of
curvature c is stable up to lr c = 0.0158 with heavy ball on the server, 0.0279 with a velocity per worker, 0.0971 with
DANA, 0.209 without momentum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from asgd_mpi.config.options import Config
from asgd_mpi.config.rulebook import RULEBOOK, is_kept_by_workers, longest_push
from asgd_mpi.data.loader import Batch
from asgd_mpi.optim.carried import Carried
from asgd_mpi.optim.local_state import SpreadVectors, Vectors
from asgd_mpi.optim.step import Normalise, ScaledLoss
from asgd_mpi.record import checkpoint
from asgd_mpi.vector.flat import FlatModel, norm_of


class Stages(Protocol):
    """The stages that a network is cut into, as one of them leads them."""

    spread: SpreadVectors
    compute_gradient_: Callable[..., float]        # as step.compute_gradient_


class Replica:
    """A worker's network and what belongs to it alone. `rate_at(samples)`: the schedule of the run.

    fetched_ -> add -> add ... -> finish -> flat.gradient is what is pushed        (elastic: fetched_ again before finish)

    A worker sums gradients up on the snapshot that it fetched, and pushes the sum. Two kinds of rules let it move its own
    weights instead, at the rate of the snapshot's sample clock:
    descends  x_i <- x_i - lr u after each batch, and the sum of the u is pushed; a fetch sets x_i to the snapshot
              (Downpour, Dean et al. 2012, algorithm 1). Memory: (P,) float32 for the sum.
    elastic   x_i <- x_i - lr u, for as long as it lives; with the last batch of a push x_i <- x_i - d - lr u instead, where
              d = alpha (x_i - x) is pushed, x is the latest snapshot, and gradient and d are both of the x_i before (Zhang,
              Choromanska, LeCun 2015, algorithm 1). With momentum u is Nesterov's (algorithm 2), in the form of
              torch.optim.SGD: the own weights are the point that looks ahead, and d is still of x_i. Memory: (P,) float32
              for x.
    `stages`: those that compute, if the network is cut; `flat` is then that of the leader's own part.
    Weight decay is part of each batch's gradient, wd times the weights that it was computed on (rulebook.decays_at_workers).
    What is pushed is rounded to the run's wire format here, whatever host the worker is on; the snapshots that come have been
    rounded by the server.
    `shares`: several replicas take turns on one network, and each keeps its own weights.
    """

    def __init__(self, flat: FlatModel, config: Config, num_workers: int, rate_at: Callable[[int], float], shares: bool = False,
                 stages: Stages | None = None):
        rule = config.rule
        self.flat, self._rate_at, self._rule, self._seed, self._shares = flat, rate_at, rule, config.run.seed, shares
        self.moves = RULEBOOK[rule.name].moves
        self._loss = ScaledLoss(config.compute, stages.compute_gradient_ if stages else None, config.data.min_batch or 1)
        self._vectors: Vectors | SpreadVectors = stages.spread if stages else Vectors(flat, config, num_workers)
        self._gradient: FlatModel | SpreadVectors = stages.spread if stages else flat
        self._carried = Carried(flat)
        self.keeps_state = not self.moves and bool(is_kept_by_workers(rule) or self._carried.state)     # for a checkpoint
        if config.compute.compile:
            flat.module.compile()
        self._alpha = rule.alpha or 0.9 / num_workers
        self._share = longest_push(rule, num_workers) / (config.exchange.n_push if self.moves else 1)
        self._longest = math.inf
        self._snapshot = self._own = flat.weights
        self._rate, self._samples, self._batches = 0.0, 0, 0
        self._last_rate = 0.0     # of the last step of its own weights
        self._is_finite = True    # the loss of every batch since the last push
        self.scale = 1.0          # what the last push was multiplied by, to keep to clip_norm and max_drift
        self.base = -1            # the snapshot that its own weights began with, if a fetch does not replace them

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps of it, (P,) float32 each, and what is carried, by name; nothing if it moves its own weights: then it begins anew."""
        return {**self._vectors.state, **self._carried.state} if self.keeps_state else {}

    def load_(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from another one's `state`; begin anew, with an empty one."""
        self._vectors.load_(state)
        self._carried.load_(state)
        self._batches, self.base = 0, -1

    def restore_(self, path: Path) -> None:
        """Go on from a `state` in a file. Raises RunDirError."""
        self._vectors.restore_(str(path))
        if self._carried.state:
            self._carried.load_(checkpoint.read_tensors(path))

    def fetched_(self, version: int, samples: int, snapshot: torch.Tensor) -> None:
        """A snapshot has come, (P,) float32; unless the rule is elastic or the network shared, it is flat.weights."""
        self._snapshot, self._samples = snapshot, samples
        if self.moves == "elastic" and self.base != -1:
            return                # it goes on at its rate until it has pushed
        self._rate = self._rate_at(samples)
        if self.moves != "elastic":
            self._own = snapshot.clone() if self.moves and self._shares else snapshot
        else:
            self._own = snapshot.clone() if self._shares else self.flat.weights.copy_(snapshot)
            self.base = version

    def add(self, batch: Batch, normalise: Normalise) -> float:
        """Compute the gradient of a batch; returns its loss, 0 for one without images."""
        is_first, self._batches = self._batches == 0, self._batches + 1
        if self.moves == "elastic" and not is_first:
            self._move_(False)    # by the gradient before this one: the last one of a push moves with the pull, in `finish`
        if self._shares:
            self.flat.weights.copy_(self._own)
        if is_first:
            self._carried.begin_()
        accumulate = not (is_first or self.moves)
        if not accumulate:                             # when a push is finished, other weights may have been fetched
            if isinstance(self._vectors, Vectors):
                self._vectors.own = self._own
            self._longest = self._longest_here()
        if len(batch.labels):
            loss = self._loss.compute_gradient_(self._gradient, normalise, batch, self._seed, accumulate)
        else:                                          # all of its images are left out: a step of a gradient of zero
            loss = 0.0
            if not accumulate:
                self._gradient.zero_gradient_()
        self._is_finite = math.isfinite(loss) and (is_first or self._is_finite)
        if self.moves == "descends":
            self._move_(is_first)
        return loss

    def watch(self, look: Callable[[], None]) -> None:
        """Call this between two passes of a batch; if it raises, `add` does, and `give_up` is to follow."""
        self._loss.watch(look)

    def give_up(self) -> None:
        """Forget the batches since the last push."""
        self._batches = 0

    def finish(self) -> bool:
        """Turn flat.gradient, (P,) float32, into what is pushed; whether it and the losses are finite.

        If not, the next gradient begins anew; so must, by `load_`, one that moves its own weights, which are spoilt.
        """
        batches, self._batches = self._batches, 0
        factor = 1.0
        if self.moves == "descends":
            self._vectors.take_sum_()
        if not self._is_finite or not self._gradient.is_finite():
            return False
        if self.moves == "elastic":
            self._exchange_()
            if not self._gradient.is_finite():
                return False
        elif not self.moves:
            factor = self.scale = self._clip(batches)
        self._vectors.finish_(factor, 0 if self.moves else batches)
        self._carried.finish_()
        return True

    def show_carried_(self) -> None:
        """Let the network hold what this worker's last push has left of what it carries: to validate."""
        self._carried.begin_()

    def undo_(self) -> None:
        """What was pushed last has been dropped: its images will be trained again, so the velocity must not hold them."""
        self._vectors.undo_()
        self._carried.undo_()

    def _move_(self, is_first: bool) -> None:
        self._vectors.move_(self._clip(), self._rate, is_first)
        self._last_rate = self._rate

    def _exchange_(self) -> None:
        self._vectors.exchange_(self._snapshot, self._alpha, self._clip(), self._rate, self._last_rate)
        self._last_rate, self._rate = self._rate, self._rate_at(self._samples)

    def _clip(self, batches: int = 1) -> float:
        """What brings the gradient, a sum over batches, down to `clip_norm` for each of them, and to `max_drift` in all."""
        longest = min(batches * (self._rule.clip_norm or math.inf), self._longest)
        if math.isinf(longest):
            return 1.0
        norm = norm_of(self._gradient.norms())
        return longest / norm if norm > longest else 1.0

    def _longest_here(self) -> float:
        """The norm that `max_drift` leaves to a gradient on the weights that it is computed on."""
        if math.isinf(self._share) or not self._rate:
            return math.inf
        return self._share * norm_of(self._vectors.weight_norms()) / self._rate or math.inf      # from zero, any step is far

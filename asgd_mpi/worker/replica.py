"""What a worker computes between two exchanges: gradients, and what is pushed. No MPI, no clock.

The worker's loop, the replay and the simulation all use it. Momentum on the server is the main trap of asynchronous
SGD: n workers push it the same way n times before the first of them sees the effect. At m = 0.9 and n = 8 a quadratic of
curvature c is stable up to lr c = 0.0158 with heavy ball on the server, 0.0279 with a velocity per worker, 0.0971 with
DANA, 0.209 without momentum.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from asgd_mpi.config import Config
from asgd_mpi.data.loader import Batch
from asgd_mpi.exchange import codec
from asgd_mpi.model.flat import FlatModel
from asgd_mpi.server.rulebook import RULEBOOK, clip_norm, pacing
from asgd_mpi.worker.momentum import Momentum
from asgd_mpi.worker.step import Normalise, ScaledLoss


class Replica:
    """A worker's network and what belongs to it alone. `rate_at(samples)`: the schedule of the run.

    fetched_ -> add -> add ... -> finish -> flat.gradient is what is pushed        (elastic: fetched_ again before finish)

    A worker sums gradients up on the snapshot that it fetched, and pushes the sum. Two kinds of rules let it move its own
    weights instead, at the rate of the snapshot's sample clock:
    descends  x_i <- x_i - lr u after each batch, and the sum of the u is pushed; a fetch sets x_i to the snapshot
              (Downpour, Dean et al. 2012, algorithm 1). Memory: (P,) float32 for the sum.
    elastic   x_i <- x_i - lr u, for as long as it lives; then d = alpha (x_i - x), x_i <- x_i - d, and d is pushed, where x
              is the latest snapshot (EASGD, Zhang et al. 2015, algorithm 1). With momentum u is Nesterov's, in the form of
              torch.optim.SGD, where x_i is the point that looks ahead. Memory: (P,) float32 for x.
    `gradient_of`: what computes the gradient of a batch, if it is not this process alone.
    Weight decay is the server's, but for elastic rules, where it is added to the gradient here. What is pushed is rounded to
    the run's wire format here, whatever host the worker is on; the snapshots that come have been rounded by the server.
    `shares`: several replicas take turns on one network, and each keeps its own weights.
    """

    def __init__(self, flat: FlatModel, config: Config, num_workers: int, rate_at: Callable[[int], float], shares: bool = False,
                 gradient_of: Callable[..., float] | None = None):
        rule = config.rule
        self.flat, self._rate_at, self._rule, self._seed, self._shares = flat, rate_at, rule, config.run.seed, shares
        self.moves = RULEBOOK[rule.name].moves
        self._loss, self._wire = ScaledLoss(config.compute, gradient_of), config.exchange.wire
        if config.compute.compile:
            flat.module.compile()
        self._alpha = rule.alpha or 0.9 / num_workers
        self._longest = clip_norm(rule, num_workers)
        self._momentum = Momentum(rule, flat.weights, keeps_last=pacing(rule, num_workers).may_drop)
        self._sum = torch.zeros_like(flat.weights) if self.moves == "descends" else None
        self._snapshot = self._own = flat.weights
        self._rate, self._samples, self._batches = 0.0, 0, 0
        self._is_finite = True    # the loss of every batch since the last push
        self.base = -1            # the snapshot that its own weights began with, if a fetch does not replace them

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps of it, (P,) float32 each; nothing if it moves its own weights: then it begins anew."""
        return {} if self.moves else self._momentum.state

    def load_(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from another one's `state`; begin anew, with an empty one."""
        self._momentum.load_(state)
        self._batches, self.base = 0, -1

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
        """Compute the gradient of a batch; returns its loss."""
        is_first, self._batches = self._batches == 0, self._batches + 1
        if self._shares:
            self.flat.weights.copy_(self._own)
        loss = self._loss.compute_gradient_(self.flat, normalise, batch, self._seed, accumulate=not (is_first or self.moves))
        self._is_finite = math.isfinite(loss) and (is_first or self._is_finite)
        if self.moves:
            self._move_(is_first)
        return loss

    def finish(self) -> bool:
        """Turn flat.gradient, (P,) float32, into what is pushed; whether it and the losses are finite.

        If not, nothing has been changed, and the next gradient begins anew.
        """
        batches, self._batches = self._batches, 0
        flat = self.flat
        if self.moves == "elastic":
            torch.sub(self._own, self._snapshot, out=flat.gradient).mul_(self._alpha)
        elif self.moves == "descends":
            flat.gradient.copy_(self._sum)
        if not self._is_finite or not flat.gradient.sum().isfinite():
            return False
        if self.moves == "elastic":
            self._own.sub_(flat.gradient)
            self._rate = self._rate_at(self._samples)
        elif not self.moves:
            self._clip_(batches)
            self._momentum.push_(flat.gradient)
        codec.round_(flat.gradient, self._wire)
        return True

    def undo_(self) -> None:
        """What was pushed last has been dropped: its images will be trained again, so the velocity must not hold them."""
        self._momentum.undo_()

    def _move_(self, is_first: bool) -> None:
        gradient, weights = self.flat.gradient, self._own
        if self.moves == "elastic":
            gradient.add_(weights, alpha=self._rule.weight_decay)
        self._clip_()
        self._momentum.push_(gradient)
        if self._sum is not None:
            self._sum.copy_(gradient) if is_first else self._sum.add_(gradient)
        weights.sub_(gradient, alpha=self._rate)

    def _clip_(self, batches: int = 1) -> None:
        """Scale the gradient, a sum over batches, to a norm of `clip_norm` for each of them at most; 0: leave it as it is."""
        if self._longest:
            norm, longest = self.flat.gradient.norm().item(), batches * self._longest
            if norm > longest:
                self.flat.gradient.mul_(longest / norm)

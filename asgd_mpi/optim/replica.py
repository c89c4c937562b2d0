"""What a worker computes between two exchanges: gradients, and what is pushed. No MPI, no clock.

The worker's loop, the replay and the simulation all use it. Momentum on the server is the main trap of asynchronous
SGD: n workers push it the same way n times before the first of them sees the effect. At m = 0.9 and n = 8 a quadratic of
curvature c is stable up to lr c = 0.0158 with heavy ball on the server, 0.0279 with a velocity per worker, 0.0971 with
DANA, 0.209 without momentum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from asgd_mpi.config.resolved import Resolved
from asgd_mpi.config.rulebook import (
    RULEBOOK,
    begins_anew,
    is_adaptive,
    longest_push,
    workers_keep_state,
)
from asgd_mpi.optim import formats
from asgd_mpi.optim.carried import Carried
from asgd_mpi.optim.local_state import SpreadVectors, Vectors
from asgd_mpi.optim.objective import Batch, Objective
from asgd_mpi.optim.step import ScaledLoss, seed_
from asgd_mpi.record import checkpoint
from asgd_mpi.vector.flat import FlatModel, norm_of
from asgd_mpi.vector.groups import ParameterGroup


class Stages(Protocol):
    """The stages that a network is cut into, as one of them leads them."""

    spread: SpreadVectors
    num_floats: int  # P, of the whole network
    compute_gradient_: Callable[..., float]  # as step.compute_gradient_


class Replica:
    """A worker's network and what belongs to it alone. `rate_at(samples)`: the schedule of the run.

    fetched_ -> add -> add ... -> finish -> flat.gradient is what is pushed        (elastic: fetched_ again before finish)

    A worker sums gradients up on the snapshot that it fetched, and pushes the sum. Three kinds of rules let it move its own
    weights instead, at the rate of the snapshot's sample clock:
    descends  x_i <- x_i - lr u after each batch, and the sum of the u is pushed; a fetch sets x_i to the snapshot
              (Downpour, Dean et al. 2012, algorithm 1). Memory: (P,) float32 for the sum.
    local     x_i <- x_i - lr u after each batch, as torch.optim.SGD would alone (or Adam, see optim.optimizers), at the rate of the
              snapshot's clock and the own batches since; the way that they went, x - x_i, is pushed, and a fetch sets x_i to the
              snapshot. The optimizer's state goes on (DiLoCo, Douillard et al. 2023, algorithm 1). Memory: (P,) float32 for x.
              With overlap the snapshot that comes lacks the last push, D, which has just set out: x_i becomes what the server will
              make of both, x - e D / N (eager updates, Kale, Douillard, Donchev 2025, arXiv:2502.12996).
    elastic   x_i <- x_i - lr u, for as long as it lives; with the last batch of a push x_i <- x_i - d - lr u instead, where
              d = alpha (x_i - x) is pushed, x is the latest snapshot, and gradient and d are both of the x_i before (Zhang,
              Choromanska, LeCun 2015, algorithm 1). With momentum u is Nesterov's (algorithm 2), in the form of
              torch.optim.SGD: the own weights are the point that looks ahead, and d is still of x_i. Memory: (P,) float32
              for x.
    `stages`: those that compute, if the network is cut; `flat` is then that of the leader's own part.
    Weight decay is part of each batch's gradient, wd times the weights that it was computed on (rulebook.decays_at_workers).
    Where a step of the server does not grow with what is pushed (rulebook.is_adaptive), a mean over the batches is pushed, and
    `max_drift` limits the rate: a step of Adam is as long as lr sqrt(P) at most, but for sparse gradients.
    What is pushed is rounded to the run's wire format here, whatever host the worker is on, and what a compressed format leaves
    out is kept for the next push; the snapshots that come have been rounded by the server.
    `kept_at(samples)`: how many numbers of a chunk topk sends.
    `shares`: several replicas take turns on one network, and each keeps its own weights.
    `groups`: of the whole vector; those of `stages` each stage has.
    """

    def __init__(
        self,
        flat: FlatModel,
        config: Resolved,
        num_workers: int,
        rate_at: Callable[[int], float],
        shares: bool = False,
        stages: Stages | None = None,
        groups: Sequence[ParameterGroup] = (),
        kept_at: Callable[[int], int] | None = None,
    ):
        rule = config.rule
        self.flat, self._rate_at, self._rule, self._seed, self._shares = (
            flat,
            rate_at,
            rule,
            config.run.seed,
            shares,
        )
        self.moves = RULEBOOK[rule.name].moves
        self._vectors: Vectors | SpreadVectors
        self._gradient: FlatModel | SpreadVectors
        if stages:
            gradient_of, num_trained = stages.compute_gradient_, stages.num_floats
            self._vectors = self._gradient = stages.spread
        else:
            gradient_of, num_trained = None, flat.num_floats
            self._vectors, self._gradient = Vectors(flat, config, num_workers, groups), flat
        self._loss = ScaledLoss(config.compute, gradient_of, config.data.min_batch or 1)
        self._num_trained = num_trained
        self._carried = Carried(flat) if flat.carried else None
        # for a checkpoint
        self.keeps_state = (
            workers_keep_state(config) or self._carried is not None and not begins_anew(rule)
        )
        self._kept_at = kept_at or partial(formats.kept_at, config.exchange, samples_per_epoch=0)
        self._is_sparse = config.exchange.wire == "topk"
        # of the last push: numbers of every chunk, if it is sparse
        self.kept = 0
        if config.compute.compile:
            flat.module.compile()
        self._alpha = rule.alpha or 0.9 / num_workers
        self._share = longest_push(rule, num_workers)
        if self.moves:
            n_push = config.exchange.n_push
            # auto overlaps, which the rules that move weights refuse
            assert isinstance(n_push, int)
            self._share /= n_push
        self._is_limited = not math.isinf(self._share)  # by max_drift
        self._is_adaptive = is_adaptive(rule)
        self._longest_step = math.inf  # over the rate
        self._highest_factor = max((group.settings.rate for group in groups), default=1.0)
        self._snapshot = self._own = flat.weights
        self._rate, self._samples = 0.0, 0
        # since the last push: a rule may have moved the velocity with them
        self.batches = 0
        self._batch_size = config.data.batch_size or 0
        self._last_rate = 0.0  # of the last step of its own weights
        self._is_finite = True  # the loss of every batch since the last push
        # what the last push was multiplied by, to keep to clip_norm and max_drift; of Adam: what its rate is, for max_drift
        self.scale = 1.0
        # the snapshot that its own weights began with, if a fetch does not replace them
        self.base = -1
        # that its own weights begin with lacks its last push
        self._lacks_push = False

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint keeps of it, (P,) float32 each, and what is carried, by name; nothing if it moves its own weights: then it begins anew."""
        if not self.keeps_state:
            return {}
        carried = self._carried.state if self._carried else {}
        return {**self._vectors.state, **carried}

    @property
    def code(self) -> torch.Tensor | None:
        """The bytes of the last push, uint8, if it is compressed; otherwise flat.gradient tells it."""
        return self._vectors.code

    def load_(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from another one's `state`; begin anew, with an empty one."""
        self._vectors.load_(state)
        if self._carried:
            self._carried.load_(state)
        self.batches, self.base, self._lacks_push = 0, -1, False

    def restore_(self, path: Path) -> None:
        """Go on from a `state` in a file. Raises RunDirError."""
        self._vectors.restore_(str(path))
        if self._carried:
            self._carried.load_(checkpoint.read_tensors(path))

    def fetched_(
        self, version: int, samples: int, snapshot: torch.Tensor, lacks_push: bool = False
    ) -> None:
        """A snapshot has come, (P,) float32; unless the rule is elastic or the network shared, it is flat.weights.

        lacks_push: it was made before this worker's last push, or the one that is about to be finished, arrived.
        """
        self._lacks_push = lacks_push and self.moves == "local"
        self._snapshot, self._samples = snapshot, samples
        if self.moves == "elastic" and self.base != -1:
            return  # it goes on at its rate until it has pushed
        if self.moves or self._is_limited:
            self._rate = self._rate_at(samples)
        if self.moves != "elastic":
            self._own = snapshot
            if self.moves and self._shares:
                self._own = snapshot.clone()
        else:
            if self._shares:
                self._own = snapshot.clone()
            else:
                self._own = self.flat.weights.copy_(snapshot)
            self.base = version

    def add(self, batch: Batch, objective: Objective) -> float:
        """Compute the gradient of a batch; returns its loss, 0 for one without samples."""
        accumulate, loss = self.begin_(), 0.0
        if batch.size:
            loss = self._loss.compute_gradient_(
                self._gradient, objective, batch, self._seed, accumulate
            )
        elif not accumulate:  # all of its samples are left out: a step of a gradient of zero
            self._gradient.zero_gradient_()
        self.end_(loss)
        return loss

    def driven(self, batch: Batch, objective: Objective) -> Generator[Any, float, float]:
        """Let a loop of the user's compute the gradient of a batch, from the inputs that this yields; returns the loss that it sends."""
        if not self.begin_():
            self._gradient.zero_gradient_()
        inputs = objective.prepare(batch, self.flat.device)
        seed_(self.flat.device, self._seed, batch.epoch, batch.start)
        loss = yield inputs
        self.end_(loss)
        return loss

    def begin_(self) -> bool:
        """Let the network hold what the next batch is computed on; returns whether its gradient is to be added."""
        is_first, self.batches = self.batches == 0, self.batches + 1
        if self.moves == "elastic" and not is_first:
            # by the gradient before this one: the last one of a push moves with the pull, in `finish`
            self._move_(False)
        if is_first and self._lacks_push:
            # overlap is refused with stages
            assert isinstance(self._vectors, Vectors)
            self._vectors.anticipate_(self._own)
            self._lacks_push = False
        if self._shares:
            self.flat.weights.copy_(self._own)
        if is_first and self._carried:
            self._carried.begin_()
        if is_first and self._is_sparse:
            # now: when the push is finished, a newer snapshot may have come
            self.kept = self._kept_at(self._samples)
        accumulate = not (is_first or self.moves)
        if not accumulate:  # when a push is finished, other weights may have been fetched
            if isinstance(self._vectors, Vectors):
                self._vectors.own = self._own
            if self._is_limited:
                self._longest_step = self._longest_here()
        return accumulate

    def end_(self, loss: float) -> None:
        """Take note that the gradient of a batch with this loss has been computed."""
        is_first = self.batches == 1
        self._is_finite = math.isfinite(loss) and (is_first or self._is_finite)
        if self.moves == "local":
            own = (self.batches - 1) * self._batch_size
            self._rate = self._rate_at(self._samples + own)
        if self.moves in ("descends", "local"):
            self._move_(is_first)

    def watch(self, look: Callable[[], None]) -> None:
        """Call this between two passes of a batch; if it raises, `add` does, and `give_up` is to follow."""
        self._loss.watch(look)

    def give_up(self) -> None:
        """Forget the batches since the last push."""
        self.batches = 0

    def finish(self) -> bool:
        """Turn flat.gradient, (P,) float32, into what is pushed; whether it and the losses are finite.

        If not, the next gradient begins anew; so must, by `load_`, one that moves its own weights, which are spoilt.
        """
        batches, self.batches = self.batches, 0
        factor = 1.0
        if self.moves in ("descends", "local"):
            self._vectors.take_sum_()
        if not self._is_finite or not self._gradient.is_finite():
            return False
        if self.moves == "elastic":
            self._exchange_()
            if not self._gradient.is_finite():
                return False
        elif self._is_adaptive and not self.moves:
            factor = self._clip(batches) / batches
            self.scale = min(1.0, self._longest_step / math.sqrt(self._num_trained))
        elif not self.moves:
            factor = self.scale = self._clip(batches)
        self._vectors.finish_(factor, 0 if self.moves else batches, self.kept)
        if self._carried:
            self._carried.finish_()
        return True

    def show_carried_(self) -> None:
        """Let the network hold what this worker's last push has left of what it carries: to validate."""
        if self._carried:
            self._carried.begin_()

    def undo_(self) -> None:
        """Go back to before the last push, which has been dropped: its images will be trained again, so the velocity must not hold them."""
        self._vectors.undo_()
        if self._carried:
            self._carried.undo_()

    def _move_(self, is_first: bool) -> None:
        self._vectors.move_(self._clip(), self._rate, is_first)
        self._last_rate = self._rate

    def _exchange_(self) -> None:
        assert isinstance(self._vectors, Vectors)  # an elastic rule is not cut into stages
        self._vectors.exchange_(
            self._snapshot, self._alpha, self._clip(), self._rate, self._last_rate
        )
        self._last_rate, self._rate = self._rate, self._rate_at(self._samples)

    def _clip(self, batches: int = 1) -> float:
        """Return what brings the gradient, a sum over batches, down to `clip_norm` for each of them, and to `max_drift` in all."""
        longest = batches * (self._rule.clip_norm or math.inf)
        if not self._is_adaptive:
            longest = min(longest, self._longest_step)
        if math.isinf(longest):
            return 1.0
        norm = norm_of(self._gradient.norms())
        return longest / norm if norm > longest else 1.0

    def _longest_here(self) -> float:
        """Return the norm that `max_drift` leaves to a step, over the rate, on the weights that its gradient is computed on."""
        if not self._rate:
            return math.inf
        # from zero, any step is far
        fastest = self._rate * self._highest_factor
        return self._share * norm_of(self._vectors.weight_norms()) / fastest or math.inf

"""How what a worker pushes moves the weights: torch, in place, on flat float32 vectors, without MPI.

A rule is called piece by piece, on pieces that fit the cache: what the server does before and after on the same piece
(copying it from one slot of the ring to the next, applying the next waiting gradient) costs no extra pass over memory.
Which rule has which settings, and where it is from, is in `rulebook`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from asgd_mpi.config.resolved import ResolvedRule
from asgd_mpi.config.rulebook import RULEBOOK, is_adaptive
from asgd_mpi.optim import own
from asgd_mpi.optim.optimizers import make_optimizer
from asgd_mpi.protocol.messages import Verdict
from asgd_mpi.vector.groups import ParameterGroup
from asgd_mpi.vector.partition import pieces

if TYPE_CHECKING:
    from asgd_mpi.vector.codec import Vector

# the name of the running mean of the weights among a rule's state
EMA = "ema"
POLL_EVERY = 8  # pieces: a few milliseconds of applying; an idle poll may give the core away


class Rule:
    """Move the weights by what a worker pushes, at the server; a subclass of yours is named by `--rule package.module:Class`.

    A subclass gives `apply_`, which gets one piece of the vectors at a time: a server may have a part of them only, so what it
    does is element by element. This class makes a step of torch's optimizer for each push.

    Attributes:
        vectors: names of what it keeps for every weight: `self.state[name]` is float32, zero at first, in every checkpoint.
        Options: a dataclass of its settings, with a default each, or None; `--rule.own_options beta=0.95` sets one.
        options: an instance of it.

    Example:
        >>> import dataclasses, asgd_mpi
        >>> @dataclasses.dataclass
        ... class Settings:
        ...     beta: float = 0.9
        >>> class SignOfMean(asgd_mpi.Rule):
        ...     vectors, Options = ("mean",), Settings
        ...     def apply_(self, weights, pushed, verdict, piece):
        ...         mean = self.state["mean"][piece].lerp_(pushed[piece], 1 - self.options.beta)
        ...         weights[piece].sub_(mean.sign(), alpha=verdict.lr)
    """

    # The weight of a stale gradient multiplies the rate, verdict.lr. So does, where a step does not grow with its gradient (Adam),
    # what `max_drift` asks for: verdict.scale is then no factor of what is pushed.

    vectors: tuple[str, ...] = ()
    Options: Any = None

    def __init__(
        self,
        num_parameters: int,
        config: ResolvedRule,
        num_workers: int = 1,
        groups: Sequence[ParameterGroup] = (),
    ):
        self._optimizer = make_optimizer(num_parameters, config, groups)
        self._scales_rate = is_adaptive(config)
        # what a checkpoint keeps, (P,) float32 each
        self.state = dict(self._optimizer.state)
        self.state |= {name: torch.zeros(num_parameters) for name in self.vectors}
        self._ema_samples = config.ema_samples
        if self._ema_samples:
            self.state[EMA] = torch.zeros(num_parameters)
        self.options = own.options_of(self.Options, config.own_options)

    def load_(self, state: Mapping[str, torch.Tensor], part: slice = slice(None)) -> bool:
        """Go on from a slice of a saved `state`; whether the optimizer's was there: if not it is zero, as at the first step."""
        for name in self.state.keys() & state.keys():
            self.state[name].copy_(state[name][part])
        return {*self._optimizer.state, *self.vectors} <= state.keys()

    def read_(self, worker: int, weights: torch.Tensor) -> None:
        """A worker computes its next gradient on these weights, (P,) float32: told where rulebook.keeps_reads says so."""

    def apply_(self, weights: torch.Tensor, pushed: Vector, verdict: Verdict, piece: slice) -> None:
        """Move `piece` of the weights, (P,) float32, by that of what was pushed: `pushed[piece]` is float32.

        verdict: lr, the rate times the weight of the push's staleness; rate, without that weight; staleness, in versions; step,
        1 for the first since the state was zero; worker; version, samples before it, and count, of samples in the push.
        """
        self._descend_(weights[piece], pushed[piece], verdict.lr, verdict, piece)

    def average_(self, weights: torch.Tensor, verdict: Verdict, piece: slice) -> None:
        """Take a piece that `apply_` has moved into the running mean y of the weights, if one is kept (`ema_samples`).

        y <- y + (1 - a) (x - y), (P,) float32; see `ema_weight`.
        """
        if self._ema_samples:
            weight = ema_weight(verdict.samples, verdict.count, self._ema_samples)
            self.state[EMA][piece].lerp_(weights[piece], weight)

    def _descend_(
        self,
        weights: torch.Tensor,
        gradient: torch.Tensor,
        rate: float,
        verdict: Verdict,
        piece: slice,
    ) -> None:
        if self._scales_rate:
            rate *= verdict.scale
        self._optimizer.step_(weights, gradient, rate, verdict.step, piece)


def _share(verdict: Verdict) -> float:
    """Return what staleness leaves of the rate of a push, 0..1."""
    return verdict.lr / verdict.rate if verdict.rate else 1.0


class Mean(Rule):
    """A step is made with the mean of several gradients, each weighted by its staleness (softsync, sync, sync_backup).

    s <- s + w u; with the last one, a step with s / c at the rate of that moment, and s <- 0. State: s, (P,) float32. With Adam w is
    1 (rulebook.check).
    """

    def __init__(
        self,
        num_parameters: int,
        config: ResolvedRule,
        num_workers: int = 1,
        groups: Sequence[ParameterGroup] = (),
    ):
        super().__init__(num_parameters, config, num_workers, groups)
        self._sum = self.state["sum"] = torch.zeros(num_parameters)

    def apply_(self, weights: torch.Tensor, pushed: Vector, verdict: Verdict, piece: slice) -> None:
        total = self._sum[piece]
        total.add_(pushed[piece], alpha=_share(verdict))
        if verdict.mean_of:
            self._descend_(
                weights[piece], total.div_(verdict.mean_of), verdict.rate, verdict, piece
            )
            total.zero_()


class DelayCompensated(Rule):
    """Corrects a gradient by the way that the weights have moved since: g + lambda g g (x - x_i), element by element.

    g is the gradient itself, of one batch and without weight decay; if a worker has scaled it down, what corrects it is scaled
    down as much: s (g + lambda g g (x - x_i)), where s g is pushed.
    x_i is the snapshot that g was computed on, whole: worker i says which one it has read, and the server takes a copy while its
    ring still holds it (`read_`). Adaptive: MS_i <- mm MS_i + (1 - mm) g g and lambda = lambda0 / sqrt(MS_i + 1e-7). Memory: x_i,
    and with `a` MS_i, each (P,) float32 for each worker; a checkpoint keeps MS_i alone.
    """

    def __init__(
        self,
        num_parameters: int,
        config: ResolvedRule,
        num_workers: int = 1,
        groups: Sequence[ParameterGroup] = (),
    ):
        super().__init__(num_parameters, config, num_workers, groups)
        self._lambda, self._decay = config.dc_lambda, config.dc_decay
        self._read = [torch.zeros(num_parameters) for _ in range(num_workers)]
        if config.name == "dc_asgd_a":
            self._squares = [torch.zeros(num_parameters) for _ in range(num_workers)]
        else:
            self._squares = []
        self.state |= {
            f"squares{worker:03d}": squares for worker, squares in enumerate(self._squares)
        }

    def read_(self, worker: int, weights: torch.Tensor) -> None:
        self._read[worker].copy_(weights)

    def apply_(self, weights: torch.Tensor, pushed: Vector, verdict: Verdict, piece: slice) -> None:
        weights, gradient, read = (
            weights[piece],
            pushed[piece],
            self._read[verdict.worker][piece],
        )
        square = (gradient / verdict.scale).square_()
        correction = square * (weights - read)
        if self._squares:
            mean = (
                self._squares[verdict.worker][piece]
                .mul_(self._decay)
                .add_(square, alpha=1 - self._decay)
            )
            correction.div_((mean + 1e-7).sqrt_())
        self._descend_(
            weights,
            gradient + verdict.scale * self._lambda * correction,
            verdict.lr,
            verdict,
            piece,
        )


class Elastic(Rule):
    """x <- x + d, where a worker pushes d = alpha (x_i - x) and has moved its own x_i by -d (easgd, eamsgd).

    x + the sum of all x_i is kept. No state.
    """

    def apply_(self, weights: torch.Tensor, pushed: Vector, verdict: Verdict, piece: slice) -> None:
        weights[piece].add_(pushed[piece])


def ema_weight(samples: int, count: int, ema_samples: float) -> float:
    """Return the weight 1 - a of the newest weights in their running mean, of a push of `count` samples after `samples` others.

    a = exp(-count / ema_samples), and at first no more than samples / (samples + count), a plain mean. By samples and not by
    pushes, so that it does not depend on the batch (Busbridge et al. 2023, arXiv:2307.13813).
    """
    return max(-math.expm1(-count / ema_samples), count / max(1, samples + count))


class DelayedNesterov(Rule):
    """A worker pushes the way D that its weights went; x takes a share of it at once, the momentum of N of them follows (diloco).

    B <- B + w D and x <- x - e w D / N;  after every N-th push  m <- b m + B / N,  x <- x - e b m  and  B <- 0
    (Liu et al. 2024, arXiv:2401.09135, algorithm 3 with c = 0). If nothing is stale, N pushes are a step of torch.optim.SGD(e, b,
    nesterov=True) with their mean. w: the weight of a stale push. State: B and m, (P,) float32 each; none if b is 0.
    """

    def __init__(
        self,
        num_parameters: int,
        config: ResolvedRule,
        num_workers: int = 1,
        groups: Sequence[ParameterGroup] = (),
    ):
        # the optimizer is the workers'
        super().__init__(num_parameters, replace(config, optimizer="sgd"), num_workers, groups)
        self._rate, self._momentum = config.outer_rate, config.outer_momentum
        self._num_pushes = config.outer_pushes or num_workers
        if self._momentum:
            self.state |= {
                name: torch.zeros(num_parameters) for name in ("outer_sum", "outer_velocity")
            }

    def apply_(self, weights: torch.Tensor, pushed: Vector, verdict: Verdict, piece: slice) -> None:
        weights, way = weights[piece], pushed[piece]
        share = _share(verdict) / self._num_pushes
        weights.sub_(way, alpha=self._rate * share)
        if not self._momentum:
            return
        total = self.state["outer_sum"][piece].add_(way, alpha=share)
        if (verdict.version + 1) % self._num_pushes == 0:
            velocity = self.state["outer_velocity"][piece].mul_(self._momentum).add_(total)
            weights.sub_(velocity, alpha=self._rate * self._momentum)
            total.zero_()


_CLASSES = {
    "sgd": Rule,
    "mean": Mean,
    "dc": DelayCompensated,
    "elastic": Elastic,
    "delayed_nesterov": DelayedNesterov,
}


def make_rule(
    num_parameters: int,
    config: ResolvedRule,
    num_workers: int,
    groups: Sequence[ParameterGroup] = (),
) -> Rule:
    """Return the rule of a complete configuration, for (P,) vectors or for a slice of them, and the groups of that.

    Imports the code of a user's own, and raises ConfigError if that fails.
    """
    if not config.own:
        return _CLASSES[RULEBOOK[config.name].server](num_parameters, config, num_workers, groups)
    with own.blamed(config.own):
        return own.find(config.own, Rule)(num_parameters, config, num_workers, groups)


def advance_(
    weights: torch.Tensor,
    latest: torch.Tensor,
    rule: Rule,
    judged: list[tuple[Vector, Verdict]],
    show: Callable[[slice], object],
    poll: Callable[[], object],
    look: Callable[[torch.Tensor, slice], object] = lambda weights, piece: None,
) -> None:
    """Copy the latest snapshot into `weights`, both (P,) float32, and apply the gradients one after the other: in one pass.

    While a piece of the new weights is in the cache, `show` gets its place, to publish it, and `look` the weights and its place.
    """
    for number, piece in enumerate(pieces(len(weights)), start=1):
        weights[piece].copy_(latest[piece])
        for gradient, verdict in judged:
            rule.apply_(weights, gradient, verdict, piece)
            rule.average_(weights, verdict, piece)
        show(piece)
        look(weights, piece)
        if number % POLL_EVERY == 0:
            # fetches over a network need that
            poll()

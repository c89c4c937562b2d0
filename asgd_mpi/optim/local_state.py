"""What a worker does to its vectors, element by element: to the whole ones, or, if its network is cut, to each stage's part.

What takes all of a vector to know, its norm and whether it is finite, comes of numbers for each parameter (see FlatModel), so
that it is the same, to the bit, however the parameters are spread.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import torch

from asgd_mpi.config.options import Config
from asgd_mpi.config.rulebook import RULEBOOK, decays_at_workers, pacing
from asgd_mpi.optim.momentum import Momentum
from asgd_mpi.record import checkpoint
from asgd_mpi.vector import codec
from asgd_mpi.vector.flat import FlatModel
from asgd_mpi.vector.partition import pieces


class Vectors:
    """The momentum and, for a rule that descends, the sum of one worker, p float32 each, beside its `flat`, of p floats.

    own: the weights that the gradient is computed on, and that a rule may move, (p,); with those of `flat` it begins.
    The gradient times a factor, plus the weight decay, goes through the momentum: in the order of the usual loop around
    torch.optim.SGD, where a gradient is clipped before the step adds the decay.
    """

    def __init__(self, flat: FlatModel, config: Config, num_workers: int):
        rule = config.rule
        self.flat, self.own, self._wire = flat, flat.weights, config.exchange.wire
        self._decay = rule.weight_decay if decays_at_workers(rule) else 0.0
        self._moves = RULEBOOK[rule.name].moves
        self._momentum = Momentum(rule, flat.weights, keeps_last=pacing(rule, num_workers).may_drop)
        self._sum = torch.zeros_like(flat.weights) if self._moves == "descends" else None

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps, (p,) float32 each."""
        return self._momentum.state

    def load_(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from another one's `state`; begin anew, with an empty one."""
        self._momentum.load_(state)

    def restore_(self, path: str) -> None:
        """Go on from a `state` in a file. Raises RunDirError."""
        self.load_(checkpoint.read_tensors(Path(path)))

    def undo_(self) -> None:
        """Go back to before the last gradient, which was not applied."""
        self._momentum.undo_()

    def move_(self, factor: float, rate: float, is_first: bool) -> None:
        """Move the own weights by the gradient times `factor`; add up the way that they go, if the rule descends."""
        gradient = self.flat.gradient
        self._push_(factor)
        if self._sum is not None:
            self._sum.copy_(gradient) if is_first else self._sum.add_(gradient)
        self.own.sub_(gradient, alpha=rate)

    def exchange_(self, centre: torch.Tensor, alpha: float, factor: float, rate: float, last_rate: float) -> None:
        """Make an elastic step; the gradient becomes d, what is pushed.

        d = alpha (x_i - x), x_i <- x_i - d - rate u, where u is of the gradient times `factor`, and both are of the x_i before:
        algorithms 1 and 2 of Zhang, Choromanska, LeCun 2015. With Nesterov's momentum `own` looks ahead of x_i by the velocity
        as the last step, at `last_rate`, left it. centre: x, (p,) float32.
        """
        for piece in pieces(len(self.own)):
            gradient, own = self.flat.gradient[piece], self.own[piece]
            pull = own.clone()
            self._momentum.look_back_(pull, last_rate, piece)
            pull.sub_(centre[piece]).mul_(alpha)
            self._push_(factor, piece=piece)
            own.sub_(pull).sub_(gradient, alpha=rate)
            gradient.copy_(pull)

    def take_sum_(self) -> None:
        self.flat.gradient.copy_(self._sum)

    def finish_(self, factor: float, batches: int) -> None:
        """Turn the gradient, a sum over `batches`, times `factor` into what is pushed; no batches: it is that already."""
        if batches:
            self._push_(factor, batches)
        self.deliver_()

    def weight_norms(self) -> list[float]:
        """Of each parameter."""
        return self.flat.norms(self.own)

    def deliver_(self) -> None:
        """Leave what is pushed where the client takes it from."""
        codec.round_(self.flat.gradient, self._wire)

    def _push_(self, factor: float, batches: int = 1, piece: slice = slice(None)) -> None:
        """Turn a piece of the gradient, a sum over `batches`, times `factor` into what moves the weights."""
        gradient = self.flat.gradient[piece]
        if factor != 1:
            gradient.mul_(factor)
        if self._decay:
            gradient.add_(self.own[piece], alpha=batches * self._decay)
        self._momentum.push_(gradient, piece)


class SpreadVectors:
    """The Vectors of all stages of a replica, and the gradients of their FlatModels, as if they were one.

    each(of, verb, *arguments): what `verb` of the `vectors` or the `flat` of each stage returns.
    """

    def __init__(self, each: Callable[..., list], state: Callable[[], dict[str, torch.Tensor]]):
        self._each, self._state = each, state

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """(P,) float32 each."""
        return self._state()

    def load_(self, state: dict[str, torch.Tensor]) -> None:
        """Begin anew, with an empty state; it has to be: tensors come in a file."""
        assert not state
        self._each("vectors", "load_", state)

    def restore_(self, path: str) -> None:
        self._each("vectors", "restore_", path)

    def undo_(self) -> None:
        self._each("vectors", "undo_")

    def move_(self, factor: float, rate: float, is_first: bool) -> None:
        self._each("vectors", "move_", factor, rate, is_first)

    def take_sum_(self) -> None:
        self._each("vectors", "take_sum_")

    def finish_(self, factor: float, batches: int) -> None:
        self._each("vectors", "finish_", factor, batches)

    def is_finite(self) -> bool:
        return all(self._each("flat", "is_finite"))

    def weight_norms(self) -> list[float]:
        return list(itertools.chain.from_iterable(self._each("vectors", "weight_norms")))

    def norms(self) -> list[float]:
        return list(itertools.chain.from_iterable(self._each("flat", "norms")))

    def zero_gradient_(self) -> None:
        self._each("flat", "zero_gradient_")

    def set_aside_(self) -> None:
        self._each("flat", "set_aside_")

    def take_back_(self) -> None:
        self._each("flat", "take_back_")

    def unscale_(self, scale: float) -> None:
        self._each("flat", "unscale_", scale)

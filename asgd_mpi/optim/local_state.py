"""What a worker does to its vectors, element by element: to the whole ones, or, if its network is cut, to each stage's part.

Norms and finiteness are reduced from per-parameter values (see FlatModel), so they do not depend, to the bit, on how the
parameters are split across stages.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from asgd_mpi.config.resolved import Resolved
from asgd_mpi.config.rulebook import (
    COMPRESSED,
    RULEBOOK,
    decays_at_workers,
    optimizer_of,
    pacing,
    share_ahead,
    steps_at_workers,
)
from asgd_mpi.optim import saved
from asgd_mpi.optim.error_feedback import ErrorFeedback
from asgd_mpi.optim.formats import push_format
from asgd_mpi.optim.momentum import Momentum, make_momentum
from asgd_mpi.optim.optimizers import Optimizer, make_optimizer
from asgd_mpi.record import checkpoint
from asgd_mpi.vector import codec
from asgd_mpi.vector.flat import FlatModel
from asgd_mpi.vector.groups import ParameterGroup, Ranges
from asgd_mpi.vector.partition import pieces


# among a worker's state: steps that its optimizer has made, int64 of one number
INNER_STEPS = "inner_steps"


class Vectors:
    """The momentum and, for a rule that descends, the sum of one worker, or where it set out from, p float32 each, beside its `flat`.

    own: the weights that the gradient is computed on, and that a rule may move, (p,); with those of `flat` it begins.
    groups: of these p floats, with a rate and a weight decay of their own.
    The gradient times a factor, plus the weight decay, goes through the momentum: in the order of the usual loop around
    torch.optim.SGD, where a gradient is clipped before the step adds the decay. What compression leaves out of a push is kept,
    too, and, where the worker makes the steps of another optimizer than SGD, the state of that and how many it has made.
    """

    def __init__(
        self,
        flat: FlatModel,
        config: Resolved,
        num_workers: int,
        groups: Sequence[ParameterGroup] = (),
    ):
        rule = config.rule
        self.flat, self.own, self._wire = flat, flat.weights, config.exchange.wire
        self._ranges, self._decays = Ranges(flat.num_floats, groups), decays_at_workers(rule)
        self._decay = rule.weight_decay
        self._moves = RULEBOOK[rule.name].moves
        keeps_last = pacing(rule, num_workers).may_drop
        self._momentum = make_momentum(rule, flat.weights, keeps_last, groups)
        self._feedback: ErrorFeedback | None = None
        if config.exchange.wire in COMPRESSED:
            form = push_format(config.exchange, flat.module)
            self._feedback = ErrorFeedback(form, flat.weights, keeps_last)
        # the bytes of what is pushed, uint8, if it is compressed
        self.code: torch.Tensor | None = None
        self._sum = torch.zeros_like(flat.weights) if self._moves == "descends" else None
        self._optimizer: Optimizer | None = None
        self._steps: dict[str, torch.Tensor] = {}
        if steps_at_workers(rule) and optimizer_of(rule) != "sgd":
            self._optimizer = make_optimizer(flat.num_floats, rule, groups, flat.weights.device)
            self._steps = {INNER_STEPS: torch.zeros(1, dtype=torch.int64)}
        self._overlaps = config.exchange.overlap
        # where the own weights set out from; with overlap, from push to the next batch, the last push
        self._began: torch.Tensor | None = None
        if self._moves == "local":
            self._began = torch.zeros_like(flat.weights)
            self._ahead = share_ahead(rule, num_workers)

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint keeps, (p,) float32 each."""
        kept = dict(self._momentum.state)
        if self._feedback:
            kept |= self._feedback.state
        if self._optimizer:
            kept |= self._optimizer.state
        return kept | self._steps

    def load_(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from another one's `state`; begin anew, with an empty one."""
        self._momentum.load_(state)
        if self._feedback:
            self._feedback.load_(state)
        if self._optimizer:
            saved.load_(self._optimizer.state, state)
        saved.load_(self._steps, state)

    def restore_(self, path: str) -> None:
        """Go on from a `state` in a file. Raises RunDirError."""
        self.load_(checkpoint.read_tensors(Path(path)))

    def undo_(self) -> None:
        """Go back to before the last gradient, which was not applied."""
        self._momentum.undo_()
        if self._feedback:
            self._feedback.undo_()

    def move_(self, factor: float, rate: float, is_first: bool) -> None:
        """Move the own weights by the gradient times `factor`; add up the way that they go, if the rule descends."""
        gradient = self.flat.gradient
        if self._began is not None and is_first:
            self._began.copy_(self.own)
        self._push_(factor)
        if self._sum is not None:
            if is_first:
                self._sum.copy_(gradient)
            else:
                self._sum.add_(gradient)
        if self._optimizer:
            step = int(self._steps[INNER_STEPS].add_(1))
            for piece in pieces(len(gradient)):
                self._optimizer.step_(self.own[piece], gradient[piece], rate, step, piece)
        else:
            self._step_(rate)

    def exchange_(
        self, centre: torch.Tensor, alpha: float, factor: float, rate: float, last_rate: float
    ) -> None:
        """Make an elastic step; the gradient becomes d, what is pushed.

        d = alpha (x_i - x), x_i <- x_i - d - rate u, where u is of the gradient times `factor`, and both are of the x_i before:
        algorithms 1 and 2 of Zhang, Choromanska, LeCun 2015. With Nesterov's momentum `own` looks ahead of x_i by the velocity
        as the last step, at `last_rate`, left it. centre: x, (p,) float32.
        """
        assert isinstance(self._momentum, Momentum)  # an elastic rule is for SGD alone
        for piece in pieces(len(self.own)):
            gradient, own = self.flat.gradient[piece], self.own[piece]
            pull = own.clone()
            for settings, ranges in self._ranges.of(piece):
                for one in ranges:
                    self._momentum.look_back_(pull, last_rate * settings.rate, piece, one)
            pull.sub_(centre[piece]).mul_(alpha)
            self._push_(factor, piece=piece)
            own.sub_(pull)
            self._step_(rate, piece)
            gradient.copy_(pull)

    def take_sum_(self) -> None:
        """Let the gradient be what the batches of a push come to: the sum of their u, or the way of the own weights."""
        if self._began is not None:
            torch.sub(self._began, self.own, out=self.flat.gradient)
        else:
            assert self._sum is not None  # the rule descends
            self.flat.gradient.copy_(self._sum)

    def finish_(self, factor: float, batches: int, kept: int = 0) -> None:
        """Turn the gradient, a sum over `batches`, times `factor` into what is pushed; no batches: it is that already.

        kept: numbers of a chunk that topk sends.
        """
        if batches:
            self._push_(factor, batches)
        self.deliver_(kept)

    def weight_norms(self) -> list[float]:
        """Return the norm of each parameter of the own weights."""
        return self.flat.norms(self.own)

    def deliver_(self, kept: int) -> None:
        """Leave what is pushed where the client takes it from."""
        if self._feedback:
            self._feedback.push_(self.flat.gradient, kept)
            self.code = self._feedback.code
        elif self._wire != "float32":
            codec.round_(self.flat.gradient, self._wire)
        if self._began is not None and self._overlaps:
            self._began.copy_(self.flat.gradient)

    def anticipate_(self, weights: torch.Tensor) -> None:
        """Move weights, (p,) float32, that were fetched before the last push was applied: ahead, by a share of it."""
        assert self._began is not None
        weights.sub_(self._began, alpha=self._ahead)

    def _push_(self, factor: float, batches: int = 1, piece: slice = slice(None)) -> None:
        """Turn a piece of the gradient, a sum over `batches`, times `factor` into what moves the weights."""
        gradient = self.flat.gradient[piece]
        if factor != 1:
            gradient.mul_(factor)
        if self._decays:
            self._add_decay_(gradient, batches, piece)
        self._momentum.push_(gradient, piece)

    def _add_decay_(self, gradient: torch.Tensor, batches: int, piece: slice) -> None:
        """Add to a piece of the gradient what weight decay makes of that of the weights."""
        for settings, ranges in self._ranges.of(piece):
            decay = self._decay if settings.weight_decay is None else settings.weight_decay
            if not decay:
                continue
            for one in ranges:
                gradient[one].add_(self.own[piece][one], alpha=batches * decay)

    def _step_(self, rate: float, piece: slice = slice(None)) -> None:
        """Move a piece of the own weights by what the gradient has become."""
        for settings, ranges in self._ranges.of(piece):
            for one in ranges:
                self.own[piece][one].sub_(
                    self.flat.gradient[piece][one], alpha=rate * settings.rate
                )


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

    @property
    def code(self) -> None:
        """Nothing: what is pushed is not compressed (see limits)."""
        return None

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

    def finish_(self, factor: float, batches: int, kept: int = 0) -> None:
        self._each("vectors", "finish_", factor, batches, kept)

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

"""The stages of a network at work on a batch, micro-batch by micro-batch, in the order of a schedule.

The gradient is that of the uncut network on the same micro-batches, to the bit: each stage makes the same operations in the
same order, gradients of a tensor that crosses a cut are summed up as autograd would, and the state of the random numbers
travels with each micro-batch, so that dropout draws what it would draw without stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import nn

from asgd_mpi.pipeline.cut import Stage
from asgd_mpi.pipeline.schedule import Schedule, Step, one_f_one_b

Tensors = tuple[torch.Tensor, ...]


class Channel(Protocol):
    """A way from one stage to a neighbour, for the tensors of one micro-batch after the other."""

    def put(self, part: int, tensors: Tensors) -> None:
        """Send them off; they may be overwritten."""

    def has(self, part: int) -> bool:
        """Return whether `take` would return at once."""

    def take(self, part: int) -> Tensors:
        """Return what was put in at the other end, as new tensors."""


class Link(NamedTuple):
    """What lies between two neighbours: activations and the state of random numbers go on, gradients come back."""

    activations: Channel
    gradients: Channel


@dataclass
class LocalChannel:
    """Within a process."""

    tensors: dict[int, Tensors] = field(default_factory=dict)

    def put(self, part: int, tensors: Tensors) -> None:
        self.tensors[part] = tensors

    def has(self, part: int) -> bool:
        return part in self.tensors

    def take(self, part: int) -> Tensors:
        return self.tensors.pop(part)


@dataclass
class TwoWays:
    """One end of two channels."""

    out: Channel
    back: Channel
    sent_bytes: int = 0

    def put(self, part: int, tensors: Tensors) -> None:
        self.sent_bytes += sum(tensor.nbytes for tensor in tensors)
        self.out.put(part, tensors)

    def has(self, part: int) -> bool:
        return self.back.has(part)

    def take(self, part: int) -> Tensors:
        return self.back.take(part)


@dataclass(frozen=True)
class Work:
    """What is to be done with the parts of a batch, by their number; the first and the last stage need all of it."""

    taken: Callable[[int], torch.Tensor | None]  # by the network; the first stage alone has it
    seed: Callable[[int], None]  # sets the random numbers
    # of what comes out of the network: what is differentiated
    loss: Callable[[int, torch.Tensor], torch.Tensor]
    generator: torch.Generator  # the random numbers
    autocast: Callable[[], AbstractContextManager] = nullcontext


class AtWork(Protocol):
    """What one rank of a replica computes of a batch."""

    losses: dict[int, torch.Tensor]  # of the parts, by the last rank

    def can(self, step: Step) -> bool:
        """Return whether what a step needs from another rank is there."""

    def do(self, step: Step) -> None:
        """Compute it."""


class Role(NamedTuple):
    """What one rank of a replica computes, batch after batch."""

    module: nn.Module
    # with the links to the ranks before and after it
    at_work: Callable[[Link | None, Link | None, Work], AtWork]
    schedule: Schedule


class StageAtWork:
    """One stage on the parts of one batch; gradients are added to those of its parameters.

    before, after: the links to its neighbours; the first stage has none before it, the last one none after it.
    """

    def __init__(self, stage: Stage, before: Link | None, after: Link | None, work: Work):
        self._stage, self._before, self._after, self._work = stage, before, after, work
        # of a part: what came in, and what goes out
        self._held: dict[int, tuple[Tensors, Tensors]] = {}
        self.losses: dict[int, torch.Tensor] = {}  # of the last stage

    def can(self, step: Step) -> bool:
        """Return whether what a step needs from a neighbour is there."""
        if step.is_forward:
            return self._before is None or self._before.activations.has(step.part)
        return self._after is None or self._after.gradients.has(step.part)

    def do(self, step: Step) -> None:
        if step.is_forward:
            self._forward(step.part)
        else:
            self._backward(step.part)

    def _forward(self, part: int) -> None:
        work = self._work
        if self._before is None:
            work.seed(part)
            taken = (work.taken(part),)
        else:
            *taken, state = self._before.activations.take(part)
            # of a view torch takes what its storage begins with
            work.generator.set_state(state.cpu().clone())
            taken = tuple(
                tensor.requires_grad_(name in self._stage.differentiable)
                for name, tensor in zip(self._stage.takes, taken)
            )
        with work.autocast():
            given = self._stage(*taken)
            if self._after is None:
                given = (work.loss(part, *given),)
        self._held[part] = taken, given
        if self._after is None:
            self.losses[part] = given[0].detach()
        else:
            self._after.activations.put(
                part, (*(tensor.detach() for tensor in given), work.generator.get_state())
            )

    def _backward(self, part: int) -> None:
        taken, given = self._held.pop(part)
        roots = [tensor for tensor in given if tensor.requires_grad]
        gradients = None if self._after is None else self._after.gradients.take(part)
        if roots:  # none, if all that is computed up to here is frozen
            torch.autograd.backward(roots, gradients)
        if self._before is not None:
            self._before.gradients.put(
                part,
                tuple(
                    torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                    for tensor in taken
                    if tensor.requires_grad
                ),
            )


def run_(
    stages: Sequence[Stage],
    work: Work,
    num_parts: int,
    schedule: Schedule = one_f_one_b,
    look: Callable[[], None] = lambda: None,
) -> list[torch.Tensor]:
    """Add the gradients of the parts to those of the parameters, in this process; returns their losses.

    look: called before each forward and each backward pass of a part; may raise.
    """
    links = [None, *(Link(LocalChannel(), LocalChannel()) for _ in stages[1:]), None]
    at_work = [
        StageAtWork(stage, before, after, work)
        for stage, before, after in zip(stages, links, links[1:])
    ]
    return run_in_turn_(at_work, schedule, num_parts, look)


def run_in_turn_(
    at_work: Sequence[AtWork],
    schedule: Schedule,
    num_parts: int,
    look: Callable[[], None] = lambda: None,
) -> list[torch.Tensor]:
    """Do what `run_` does, whoever computes what."""
    todo = [schedule(number, len(at_work), num_parts)[::-1] for number in range(len(at_work))]
    while any(todo):
        for one, steps in zip(at_work, todo):
            while steps and one.can(steps[-1]):
                look()
                one.do(steps.pop())
    return [at_work[-1].losses[part] for part in range(num_parts)]

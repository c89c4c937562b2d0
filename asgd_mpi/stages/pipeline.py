"""The stages of a network at work on a batch, micro-batch by micro-batch, in the order of a schedule.

The gradient is that of the uncut network on the same micro-batches, to the bit: each stage makes the same operations in the
same order, gradients of a tensor that crosses a cut are summed up as autograd would, and the state of the random numbers
travels with each micro-batch, so that dropout draws what it would draw without stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from asgd_mpi.stages.cut import Stage
from asgd_mpi.stages.schedule import Schedule, Step, one_f_one_b

Tensors = tuple[torch.Tensor, ...]


@dataclass
class Link:
    """What is under way between two neighbouring stages, by micro-batch."""

    activations: dict[int, tuple[Tensors, torch.Tensor]] = field(default_factory=dict)   # and the state of random numbers
    gradients: dict[int, Tensors] = field(default_factory=dict)


class StageAtWork:
    """One stage on the micro-batches of one batch; gradients are added to those of its parameters.

    before, after: the links to its neighbours. The first stage has none before it and takes `images` of a micro-batch, after
    `seed` has set the random numbers; the last one has none after it, and `loss` makes of the scores what is differentiated.
    """

    def __init__(self, stage: Stage, before: Link | None, after: Link | None, images: Callable[[int], torch.Tensor],
                 seed: Callable[[int], None], loss: Callable[[int, torch.Tensor], torch.Tensor],
                 generator: torch.Generator, autocast: Callable[[], AbstractContextManager] = nullcontext):
        self._stage, self._before, self._after = stage, before, after
        self._images, self._seed, self._loss = images, seed, loss
        self._generator, self._autocast = generator, autocast
        self._held: dict[int, tuple[Tensors, Tensors]] = {}        # of a micro-batch: what came in, and what goes out
        self.losses: dict[int, torch.Tensor] = {}

    def can(self, step: Step) -> bool:
        """Whether what a step needs from a neighbour is there."""
        if step.is_forward:
            return self._before is None or step.part in self._before.activations
        return self._after is None or step.part in self._after.gradients

    def do(self, step: Step) -> None:
        (self._forward if step.is_forward else self._backward)(step.part)

    def _forward(self, part: int) -> None:
        if self._before is None:
            self._seed(part)
            taken = (self._images(part),)
        else:
            taken, state = self._before.activations.pop(part)
            self._generator.set_state(state)
            taken = tuple(tensor.requires_grad_(name in self._stage.differentiable)
                          for name, tensor in zip(self._stage.takes, taken))
        with self._autocast():
            given = self._stage(*taken)
            if self._after is None:
                given = (self._loss(part, *given),)
        self._held[part] = taken, given
        if self._after is None:
            self.losses[part] = given[0].detach()
        else:
            self._after.activations[part] = tuple(tensor.detach() for tensor in given), self._generator.get_state()

    def _backward(self, part: int) -> None:
        taken, given = self._held.pop(part)
        roots = [tensor for tensor in given if tensor.requires_grad]
        torch.autograd.backward(roots, None if self._after is None else self._after.gradients.pop(part))
        if self._before is not None:
            self._before.gradients[part] = tuple(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                                                 for tensor in taken if tensor.requires_grad)


def run_(stages: Sequence[Stage], images: Callable[[int], torch.Tensor], seed: Callable[[int], None],
         loss: Callable[[int, torch.Tensor], torch.Tensor], num_parts: int, generator: torch.Generator,
         autocast: Callable[[], AbstractContextManager] = nullcontext,
         schedule: Schedule = one_f_one_b) -> list[torch.Tensor]:
    """Add the gradients of `num_parts` micro-batches to those of the parameters, in this process; returns their losses."""
    links = [None, *(Link() for _ in stages[1:]), None]
    at_work = [StageAtWork(stage, before, after, images, seed, loss, generator, autocast)
               for stage, before, after in zip(stages, links, links[1:])]
    todo = [schedule(number, len(stages), num_parts)[::-1] for number in range(len(stages))]
    while any(todo):
        for stage, steps in zip(at_work, todo):
            while steps and stage.can(steps[-1]):
                stage.do(steps.pop())
    return [at_work[-1].losses[part] for part in range(num_parts)]

"""What a worker computes: a gradient, or the errors on some images. The replay computes the same, from the log alone.

A gradient is a pure function of (weights, epoch, positions, seed): the images come from the order, the augmentation
and the dropout from generators seeded by where in the epoch the batch lies, or its part if it is computed in parts.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from asgd_mpi.config.options import ComputeConfig
from asgd_mpi.optim.divided import Divided
from asgd_mpi.optim.local_state import SpreadVectors
from asgd_mpi.optim.objective import Batch, Objective, Tally, parts_of, sizes_of
from asgd_mpi.pipeline import pipeline
from asgd_mpi.vector.flat import FlatModel


class Network(Protocol):
    """The whole network as `validate` needs it: a FlatModel, or the first of the stages that it is cut into."""

    # what the objective calls; has eval() and train()
    module: Any
    device: torch.device


def compute_gradient_(
    flat: FlatModel,
    objective: Objective,
    batch: Batch,
    seed: int,
    accumulate: bool = False,
    compute: ComputeConfig = ComputeConfig(),
    scale: float = 1.0,
    look: Callable[[], None] | None = None,
    smallest: int = 1,
) -> float:
    """Set `flat.gradient` to the gradient of the mean loss over the batch times `scale`, or add it; returns the loss.

    look: called before each forward and each backward pass of a part, when a GPU is done with those before it; may raise, and
    the gradient is then of no use.
    """

    def look_when_done(look: Callable[[], None]) -> None:
        if flat.device.type == "cuda":
            # sync: kernels are only asked for, often long before
            torch.cuda.current_stream(flat.device).synchronize()
        look()

    if not accumulate:
        flat.gradient.zero_()
    inputs = objective.prepare(batch, flat.device)
    count = num_parts(batch.size, compute, smallest)
    sizes, losses = sizes_of(batch.size, count), []
    begins = itertools.accumulate(sizes, initial=batch.start)
    for part, size, begin in zip(parts_of(inputs, batch.size, count), sizes, begins):
        if look:
            look_when_done(look)
        seed_(flat.device, seed, batch.epoch, begin)
        with autocast(flat.device, compute):
            loss = objective.loss(flat.module, part) * (size / batch.size * scale)
        if look:
            look_when_done(look)
        if loss.requires_grad:
            loss.backward()
        losses.append(loss.detach())
    return functools.reduce(torch.add, losses).item() / scale  # sync: the push carries it


def num_parts(size: int, compute: ComputeConfig, smallest: int = 1) -> int:
    """Return in how many parts a batch is computed: each has `smallest` samples or more."""
    return max(1, min(compute.micro_batches, size // smallest))


def seed_(device: torch.device, seed: int, epoch: int, begin: int) -> None:
    """Let the random numbers of a device be those of the batch, or the part of one, that begins there in an epoch."""
    # torch.manual_seed would note a stack trace for a CUDA that is not there
    generator_of(device).manual_seed(
        int(np.random.SeedSequence([seed, epoch, begin]).generate_state(1)[0])
    )


def autocast(device: torch.device, compute: ComputeConfig) -> torch.autocast:
    return torch.autocast(
        device.type,
        getattr(torch, compute.precision),
        enabled=compute.precision != "float32",
    )


@dataclass(frozen=True)
class Parts:
    """The parts that a batch is computed in, and their seeds: all that each stage knows of it beside its samples."""

    epoch: int
    start: int
    size: int
    seed: int
    scale: float  # of the loss
    smallest: int = 1  # samples of a part

    def count(self, compute: ComputeConfig) -> int:
        return num_parts(self.size, compute, self.smallest)

    def work(
        self, inputs: Any, divided: Divided, device: torch.device, compute: ComputeConfig
    ) -> pipeline.Work:
        """For the stages on `device`; only the first and the last one need the inputs."""
        count = self.count(compute)
        sizes = sizes_of(self.size, count)
        begins = list(itertools.accumulate(sizes, initial=self.start))
        parts = [] if inputs is None else parts_of(inputs, self.size, count)

        def taken(part: int) -> torch.Tensor:
            with autocast(device, compute):
                return divided.taken(parts[part])

        def loss(part: int, outputs: torch.Tensor) -> torch.Tensor:
            return divided.loss(outputs, parts[part]) * (sizes[part] / self.size * self.scale)

        return pipeline.Work(
            taken,
            lambda part: seed_(device, self.seed, self.epoch, begins[part]),
            loss,
            generator_of(device),
            lambda: autocast(device, compute),
        )


def looking(taken: torch.Tensor | None, device: torch.device) -> pipeline.Work:
    """Work on what the network takes, in one part, whose `loss` is what comes out; only the first stage needs it."""
    return pipeline.Work(
        lambda part: taken, lambda part: None, lambda part, outputs: outputs, generator_of(device)
    )


def generator_of(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    return torch.cuda.default_generators[device.index]


class ScaledLoss:
    """float16 keeps small gradients only if the loss is scaled up: a power of 2, halved when the gradient overflows.

    The batch is then computed again, so that none is lost; after 2000 batches without, it is doubled (Micikevicius et al.
    2018, arXiv:1710.03740, section 3.2).
    """

    FIRST, PATIENCE = 2.0**16, 2000

    def __init__(
        self,
        compute: ComputeConfig,
        gradient_of: Callable[..., float] | None = None,
        smallest: int = 1,
    ):
        """`gradient_of`: in place of `compute_gradient_`; `smallest`: images of a part of a batch."""
        self._compute, self._gradient_of = (
            compute,
            partial(gradient_of or compute_gradient_, smallest=smallest),
        )
        self._scale = self.FIRST if compute.precision == "float16" else 1.0
        self._good = 0  # batches since it was changed

    def watch(self, look: Callable[[], None]) -> None:
        """Call this between two passes of a batch; not if stages compute, which finish what they have begun."""
        if self._gradient_of.func is compute_gradient_:
            self._gradient_of = partial(self._gradient_of, look=look)

    def compute_gradient_(
        self,
        flat: FlatModel | SpreadVectors,
        objective: Objective,
        batch: Batch,
        seed: int,
        accumulate: bool,
    ) -> float:
        """Do what the function of that name does."""
        if self._compute.precision != "float16":
            return self._gradient_of(flat, objective, batch, seed, accumulate, self._compute)
        if accumulate:
            flat.set_aside_()
        while True:
            loss = self._gradient_of(
                flat, objective, batch, seed, False, self._compute, self._scale
            )
            flat.unscale_(self._scale)
            if flat.is_finite() or self._scale == 1 or not math.isfinite(loss):
                break
            self._scale, self._good = self._scale / 2, 0
        if accumulate:
            flat.take_back_()
        self._good += 1
        if self._good == self.PATIENCE:
            self._scale, self._good = self._scale * 2, 0
        return loss


@torch.no_grad()
def validate(network: Network, objective: Objective, batches: Iterable[Batch]) -> Tally:
    """Return what the network, in evaluation mode, scores on `batches`."""
    tally = Tally()
    network.module.eval()
    for batch in batches:
        tally.skipped += batch.skipped
        if batch.size:  # or all of it is damaged
            inputs = objective.prepare(batch, network.device)
            tally.add(batch.size, objective.score(network.module, inputs))
    network.module.train()
    return tally

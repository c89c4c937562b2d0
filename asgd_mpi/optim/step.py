"""What a worker computes: a gradient, or the errors on some images. The replay computes the same, from the log alone.

A gradient is a pure function of (weights, epoch, positions, seed): the images come from the order, the augmentation
and the dropout from generators seeded by where in the epoch the batch lies, or its part if it is computed in parts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional

from asgd_mpi.config.options import ComputeConfig
from asgd_mpi.data.loader import Batch
from asgd_mpi.optim.local_state import SpreadVectors
from asgd_mpi.pipeline import pipeline
from asgd_mpi.pipeline.cut import Stage, whole
from asgd_mpi.pipeline.schedule import Schedule, one_f_one_b
from asgd_mpi.vector.flat import FlatModel

# Weights of auxiliary losses: Szegedy et al. 2014, arXiv:1409.4842, section 5; torchvision's references
AUXILIARY = {"GoogLeNetOutputs": 0.3, "InceptionOutputs": 0.4}

Normalise = Callable[[torch.Tensor], torch.Tensor]  # uint8 (B, C, S, S) -> float32 (B, C, S, S)


class Network(Protocol):
    """The whole network as `validate` needs it: a FlatModel, or the first of the stages that it is cut into."""

    module: Any               # called with images, (B, C, S, S), it returns scores, (B, classes); has eval() and train()
    device: torch.device


def compute_gradient_(flat: FlatModel, normalise: Normalise, batch: Batch, seed: int, accumulate: bool = False,
                      compute: ComputeConfig = ComputeConfig(), scale: float = 1.0, stages: Sequence[Stage] | None = None,
                      schedule: Schedule = one_f_one_b, look: Callable[[], None] | None = None,
                      smallest: int = 1) -> float:
    """Set `flat.gradient` to the gradient of the mean loss over the batch times `scale`, or add it; returns the loss.

    stages: those that the network is cut into; the gradient is the same, to the bit. look: called before each forward and each
    backward pass of a part, when a GPU is done with those before it; may raise, and the gradient is then of no use.
    """
    def look_when_done() -> None:
        if flat.device.type == "cuda":
            torch.cuda.current_stream(flat.device).synchronize()    # sync: kernels are only asked for, often long before
        look()

    if not accumulate:
        flat.gradient.zero_()
    images = prepared(batch, normalise, flat.device, compute)
    parts = Parts(batch.epoch, batch.start, batch.labels.tolist(), seed, scale, smallest)
    losses = pipeline.run_(stages or whole(flat.module), parts.work(images, flat.device, compute), parts.count(compute),
                           schedule, look_when_done if look else lambda: None)
    return sum(losses).item() / scale  # sync: the push carries it


def prepared(batch: Batch, normalise: Normalise, device: torch.device, compute: ComputeConfig) -> torch.Tensor:
    """The images of a batch as the network takes them, float32 (B, C, S, S) on the device."""
    images = normalise(batch.on(device))
    return images.contiguous(memory_format=torch.channels_last) if compute.channels_last else images


@dataclass(frozen=True)
class Parts:
    """What all stages must know of a batch beside its images: the parts that it is computed in, and their seeds."""

    epoch: int
    start: int
    labels: list[int]
    seed: int
    scale: float              # of the loss
    smallest: int = 1         # images of a part

    def count(self, compute: ComputeConfig) -> int:
        return max(1, min(compute.micro_batches, len(self.labels) // self.smallest))

    def work(self, images: torch.Tensor | None, device: torch.device, compute: ComputeConfig) -> pipeline.Work:
        """For the stages on `device`; only the first one needs the images."""
        labels = torch.tensor(self.labels).to(device, non_blocking=True)
        truths = labels.tensor_split(self.count(compute))
        parts = images.tensor_split(len(truths)) if images is not None else ()
        begins = list(itertools.accumulate(map(len, truths), initial=self.start))
        generator = _generator(device)

        def seed(part: int) -> None:    # torch.manual_seed would note a stack trace for a CUDA that is not there
            generator.manual_seed(int(np.random.SeedSequence([self.seed, self.epoch, begins[part]]).generate_state(1)[0]))

        def loss(part: int, scores: torch.Tensor) -> torch.Tensor:
            return loss_of(scores, truths[part]) * (len(truths[part]) / len(labels) * self.scale)

        def autocast() -> torch.autocast:
            return torch.autocast(device.type, getattr(torch, compute.precision), enabled=compute.precision != "float32")

        return pipeline.Work(parts.__getitem__, seed, loss, generator, autocast)


def outputs_of(outputs: object) -> tuple:
    """Return the scores and those of auxiliary classifiers, which torchvision's networks give in training only."""
    return tuple(each for each in outputs if each is not None) if type(outputs).__name__ in AUXILIARY else (outputs,)


def loss_of(outputs: object, truths: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of scores (b, classes), plus that of auxiliary ones with the weight that they have."""
    scores, *auxiliary = outputs_of(outputs)
    loss = functional.cross_entropy(scores, truths)
    for each in auxiliary:
        loss = loss + AUXILIARY[type(outputs).__name__] * functional.cross_entropy(each, truths)
    return loss


def looking(images: torch.Tensor | None, device: torch.device) -> pipeline.Work:
    """Work on images (B, C, S, S) in one part whose `loss` is their scores; only the first stage needs the images."""
    return pipeline.Work(lambda part: images, lambda part: None, lambda part, scores: scores, _generator(device))


def _generator(device: torch.device) -> torch.Generator:
    return torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index]


class ScaledLoss:
    """float16 keeps small gradients only if the loss is scaled up: a power of 2, halved when the gradient overflows.

    The batch is then computed again, so that none is lost; after 2000 batches without, it is doubled (Micikevicius et al.
    2018, arXiv:1710.03740, section 3.2).
    """

    FIRST, PATIENCE = 2.0 ** 16, 2000

    def __init__(self, compute: ComputeConfig, gradient_of: Callable[..., float] | None = None, smallest: int = 1):
        """`gradient_of`: in place of `compute_gradient_`; `smallest`: images of a part of a batch."""
        self._compute, self._gradient_of = compute, partial(gradient_of or compute_gradient_, smallest=smallest)
        self._scale = self.FIRST if compute.precision == "float16" else 1.0
        self._good = 0                # batches since it was changed

    def watch(self, look: Callable[[], None]) -> None:
        """Call this between two passes of a batch; not if stages compute, which finish what they have begun."""
        if self._gradient_of.func is compute_gradient_:
            self._gradient_of = partial(self._gradient_of, look=look)

    def compute_gradient_(self, flat: FlatModel | SpreadVectors, normalise: Normalise, batch: Batch, seed: int,
                          accumulate: bool) -> float:
        """As the function of that name."""
        if self._compute.precision != "float16":
            return self._gradient_of(flat, normalise, batch, seed, accumulate, self._compute)
        if accumulate:
            flat.set_aside_()
        while True:
            loss = self._gradient_of(flat, normalise, batch, seed, False, self._compute, self._scale)
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


@dataclass
class Errors:
    """Sums over the images seen; `add` and `of` fill it."""

    num_images: int = 0
    loss: float = 0.0
    top1: int = 0             # first guess right
    top5: int = 0             # among the first five
    skipped: int = 0


@torch.no_grad()
def validate(network: Network, normalise: Normalise, batches: Iterable[Batch]) -> Errors:
    """The errors of the network, in evaluation mode, on `batches`."""
    errors = Errors()
    network.module.eval()
    for batch in batches:
        errors.skipped += batch.skipped
        if not len(batch.labels):          # all of them are damaged
            continue
        labels = batch.labels.to(network.device)
        scores = network.module(normalise(batch.on(network.device)))
        guesses = scores.topk(min(5, scores.shape[1]), dim=1).indices
        right = guesses == labels[:, None]
        errors.num_images += len(labels)
        errors.loss += functional.cross_entropy(scores, labels, reduction="sum").item()
        errors.top1 += int(right[:, 0].sum())
        errors.top5 += int(right.sum())
    network.module.train()
    return errors

"""What a worker computes: a gradient, or the errors on some images. The replay computes the same, from the log alone.

A gradient is a pure function of (weights, epoch, positions, seed): the images come from the order, the augmentation
and the dropout from generators seeded by where in the epoch the batch lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from asgd_mpi.data.loader import Batch
from asgd_mpi.model.flat import FlatModel

Normalise = Callable[[torch.Tensor], torch.Tensor]  # uint8 (B, C, S, S) -> float32 (B, C, S, S)


def compute_gradient_(flat: FlatModel, normalise: Normalise, batch: Batch, seed: int, accumulate: bool = False) -> float:
    """Set `flat.gradient` to the gradient of the mean loss over the batch, or add it; returns the loss."""
    _seed_dropout(flat.device, int(np.random.SeedSequence([seed, batch.epoch, batch.start]).generate_state(1)[0]))
    if not accumulate:
        flat.gradient.zero_()
    images = normalise(batch.on(flat.device))
    loss = functional.cross_entropy(flat.module(images), batch.labels.to(flat.device, non_blocking=True))
    loss.backward()
    return loss.item()  # sync: the push carries it


def _seed_dropout(device: torch.device, seed: int) -> None:
    generator = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index]
    generator.manual_seed(seed)  # torch.manual_seed would note a stack trace for a CUDA that is not there


@dataclass
class Errors:
    """Sums over the images seen; `add` and `of` fill it."""

    num_images: int = 0
    loss: float = 0.0
    top1: int = 0             # first guess right
    top5: int = 0             # among the first five
    skipped: int = 0


@torch.no_grad()
def validate(flat: FlatModel, normalise: Normalise, batches: Iterable[Batch]) -> Errors:
    """The errors of the network, in evaluation mode, on `batches`."""
    errors = Errors()
    flat.module.eval()
    for batch in batches:
        labels = batch.labels.to(flat.device)
        scores = flat.module(normalise(batch.on(flat.device)))
        guesses = scores.topk(min(5, scores.shape[1]), dim=1).indices
        right = guesses == labels[:, None]
        errors.num_images += len(labels)
        errors.loss += functional.cross_entropy(scores, labels, reduction="sum").item()
        errors.top1 += int(right[:, 0].sum())
        errors.top5 += int(right.sum())
        errors.skipped += batch.skipped
    flat.module.train()
    return errors

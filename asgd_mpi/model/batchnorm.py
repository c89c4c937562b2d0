"""Batch-norm statistics of a snapshot, measured anew.

Running statistics are not gradients: every worker has its own, of its own past weights, and none of them fit the
server's (MXNet saw five workers with the same weights report 86.35 to 86.87 %). Before a validation they are
measured on the very snapshot that is validated, on the same training images everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

NUM_BATCHES = 16      # that a version is measured on
MOMENTUM = 0.1        # torch's: the weight of a batch in the running mean


def layers(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


def begin_anew_(module: nn.Module) -> None:
    """From now on the statistics are the mean over the batches that pass in training."""
    for layer in layers(module):
        layer.reset_running_stats()
        layer.momentum = None  # cumulative mean


def ema_weight(num_workers: int) -> float:
    """Of the statistics of one push among many workers': as far back as one worker's at torch's momentum of 0.1."""
    return 1 - (1 - MOMENTUM) ** (1 / num_workers)


@contextmanager
def measuring(module: nn.Module) -> Iterator[None]:
    """Within, every batch-norm layer sets its statistics to their mean over what passes, and all else evaluates."""
    found = layers(module)
    momenta = [layer.momentum for layer in found]
    module.eval()
    for layer in found:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative mean
        layer.train()
    yield
    for layer, momentum in zip(found, momenta):
        layer.momentum = momentum
    module.train()


@torch.no_grad()
def recalibrate_(module: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """Set the statistics of every batch-norm layer to their mean over `batches` of images, (B, C, S, S) each."""
    with measuring(module):
        for images in batches:
            module(images)

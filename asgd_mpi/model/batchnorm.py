"""Batch-norm statistics of a snapshot, measured anew.

Running statistics are not gradients: every worker has its own, of its own past weights, and none of them fit the
server's (MXNet saw five workers with the same weights report 86.35 to 86.87 %). Before a validation they are
measured on the very snapshot that is validated, on the same training images everywhere.

Statistics are the running mean and variance of the `measured` layers. A layer that the network keeps frozen stays as it is,
and so does every other buffer (see `buffers`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

NUM_BATCHES = 16  # that a version is measured on
MOMENTUM = 0.1  # torch's: the weight of a batch in the running mean

Layer = nn.modules.batchnorm._BatchNorm


def measured(module: nn.Module) -> list[Layer]:
    """Return the batch-norm layers whose running statistics training moves.

    Not those that the network's own train() leaves in evaluation, that track no statistics or with a momentum of 0; nor a
    class with a forward pass of its own, which may read them in training.
    """
    with as_training(module):
        return [
            layer
            for layer in module.modules()
            if _is_plain(layer)
            and layer.training
            and layer.momentum != 0
            and layer.track_running_stats
            and layer.running_mean is not None
        ]


def _is_plain(layer: nn.Module) -> bool:
    return isinstance(layer, Layer) and type(layer).forward.__module__ == Layer.__module__


@contextmanager
def as_training(module: nn.Module) -> Iterator[None]:
    """Within, the network is in training; then every part of it is again in the mode that it was in."""
    modes = {part: part.training for part in module.modules()}
    module.train()
    try:
        yield
    finally:
        set_modes_(modes)


def set_modes_(modes: dict[nn.Module, bool]) -> None:
    """Set parts of a network to training (True) or evaluation, whatever a train() of theirs would do."""
    for part, mode in modes.items():
        part.training = mode


def statistics(layers: Sequence[Layer]) -> list[torch.Tensor]:
    """Return the running means and variances, in order."""
    return [tensor for layer in layers for tensor in (layer.running_mean, layer.running_var)]


def moved(module: nn.Module) -> list[torch.Tensor]:
    """Return all that batch-norm layers move in training: the statistics of the measured ones, and counts of batches.

    A count is read only where the momentum is None, and then for the statistics alone.
    """
    counts = [layer.num_batches_tracked for layer in module.modules() if _is_plain(layer)]
    return [*statistics(measured(module)), *(count for count in counts if count is not None)]


def counts(module: nn.Module, layers: Sequence[Layer]) -> dict[str, torch.Tensor]:
    """Return copies of the layers' counts of batches, by their names in the module's state_dict."""
    return {
        f"{name}.num_batches_tracked".lstrip("."): part.num_batches_tracked.clone()
        for name, part in module.named_modules(remove_duplicate=False)
        if part in layers
    }


def begin_anew_(layers: Sequence[Layer]) -> None:
    """From now on the statistics are the mean over the batches that pass in training."""
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative mean


def ema_weight(num_workers: int) -> float:
    """Return the weight of one push's statistics among many workers': they reach as far back as one worker's at torch's momentum of 0.1."""
    return 1 - (1 - MOMENTUM) ** (1 / num_workers)


@contextmanager
def measuring(module: nn.Module, layers: Sequence[Layer]) -> Iterator[None]:
    """Within, these layers of a module set their statistics to their mean over what passes, and all else evaluates.

    A layer that nothing passes keeps its statistics. Momenta, counts of batches and modes are then again what they were.
    """
    modes = {part: part.training for part in module.modules()}
    before = [
        (
            layer.momentum,
            layer.num_batches_tracked.clone(),
            *(tensor.clone() for tensor in statistics([layer])),
        )
        for layer in layers
    ]
    module.eval()
    begin_anew_(layers)
    set_modes_(dict.fromkeys(layers, True))
    try:
        yield
    finally:
        for layer, (momentum, count, mean, variance) in zip(layers, before):
            if not layer.num_batches_tracked:
                layer.running_mean.copy_(mean)
                layer.running_var.copy_(variance)
            layer.momentum = momentum
            layer.num_batches_tracked.copy_(count)
        set_modes_(modes)


@torch.no_grad()
def recalibrate_(
    module: nn.Module,
    passes: Iterable[Callable[[nn.Module], object]],
    layers: Sequence[Layer] | None = None,
) -> None:
    """Set the statistics of the measured layers to their mean over forward passes, each of which is called with the module."""
    with measuring(module, measured(module) if layers is None else layers):
        for one in passes:
            one(module)


def positions(num_samples: int, batch_size: int) -> int:
    """Return how many positions of the training set a version is measured on: NUM_BATCHES whole batches, or what there is.

    Without a rest that is smaller than a batch, if there is a whole one: it would count as much as the others, and a single
    image has no variance.
    """
    whole = min(NUM_BATCHES, num_samples // batch_size)
    return whole * batch_size or num_samples

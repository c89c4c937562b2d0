"""What a network holds beside the parameters that are trained: frozen parameters, and buffers.

constant     frozen parameters (requires_grad=False) and buffers that training leaves alone: the same on all ranks, to the bit,
             from the first weights on
statistics   of batch norm: see `batchnorm`
moved        what a forward pass in training changes and may read again: the vectors of spectral norm, a code book, a counter,
             an average of weights. Every worker keeps its own, as it keeps a velocity (see optim.carried).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from asgd_mpi.errors import ConfigError, few
from asgd_mpi.model import batchnorm
from asgd_mpi.model.memory import bytes_of, materialise_


def moved_by_training_(
    module: nn.Module, forward: Callable[[nn.Module], object], whose: str = "--model.name"
) -> list[str]:
    """Return the names of the buffers and frozen parameters, statistics aside, that passes of `forward` change.

    The passes are made on `module` itself, so it must be one that nobody needs afterwards. `whose`: what the user calls it.
    Raises ConfigError if trained parameters are written into, or if what is changed gets another shape or type.
    """
    before = {name: (tensor, tensor.detach().clone()) for name, tensor in _named(module).items()}
    aside = {id(tensor) for tensor in batchnorm.moved(module)}
    with torch.random.fork_rng([]), batchnorm.as_training(module):
        for _ in range(2):  # what the first one makes may be moved by the second
            forward(module)
    after = _named(module)
    changed = [
        name
        for name, tensor in after.items()
        if name not in before
        or id(before[name][0]) not in aside
        and not _is_same(tensor, before[name][1])
    ]
    for name in changed:
        if name not in before or (after[name].shape, after[name].dtype) != (
            before[name][1].shape,
            before[name][1].dtype,
        ):
            raise ConfigError(
                f"{whose}: the forward pass makes {name} anew, or gives it another shape or type: workers could "
                "not agree on it. Make it as large as it will be in the constructor."
            )
        if isinstance(after[name], nn.Parameter) and after[name].requires_grad:
            raise ConfigError(
                f"{whose}: the forward pass in training writes into {name}, which is trained: weights come from "
                "the server, and would undo that. Do it in the constructor, or freeze it (requires_grad=False)."
            )
    return changed


def constants_(module: nn.Module) -> list[torch.Tensor]:
    """Return all that is not trained, in an order that all ranks have; frozen parameters without memory get some."""
    materialise_(module, frozen_only=True)
    return [*(p.data for p in module.parameters() if not p.requires_grad), *module.buffers()]


def told(names: list[str]) -> str:
    """Return what a user is to know of what the forward pass moves."""
    return (
        f"the forward pass moves {few(names)} (buffers, no gradients): every worker keeps its own from push to push, as it does a "
        "velocity; validations and checkpoints have those of the worker that validated"
    )


def _named(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors hold the same bits: NaN is NaN."""
    return (
        one.shape == other.shape
        and one.dtype == other.dtype
        and torch.equal(bytes_of(one), bytes_of(other))
    )

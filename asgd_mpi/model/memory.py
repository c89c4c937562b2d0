"""The memory behind a network's tensors: their bytes, and memory for parameters that have none yet."""

from __future__ import annotations

import torch
from torch import nn


def materialise_(module: nn.Module, frozen_only: bool = False) -> None:
    """Give parameters on the meta device memory, whose contents are anything. They are new ones; shared ones stay shared."""
    known: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if (
                parameter is not None
                and parameter.is_meta
                and not (frozen_only and parameter.requires_grad)
            ):
                memory = torch.empty_like(parameter, device="cpu")
                known.setdefault(id(parameter), nn.Parameter(memory, parameter.requires_grad))
                part._parameters[name] = known[id(parameter)]


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's contents, uint8: a view of it, if it lies in one piece."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)

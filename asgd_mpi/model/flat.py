"""A network whose parameters and gradients are views of two flat vectors: what is fetched and pushed is one vector.

P is the length of the flat vectors. Every parameter starts on a 64-byte boundary, so that kernels see the alignment
they would see without us (and give the same bits); the gaps are zero, have a zero gradient, and stay zero.
"""

from __future__ import annotations

import torch
from torch import nn

from asgd_mpi.errors import ConfigError

ALIGNMENT = 16  # floats = 64 bytes


class FlatModel:
    """`module` on `device`, with `weights` and `gradient`: (P,) float32 on the device, seen through its parameters."""

    def __init__(self, module: nn.Module, device: torch.device):
        self.module = module.to(device)
        self.device = device
        parameters = list(self.module.parameters())
        _demand_float32(self.module)
        self.weights = torch.zeros(sum(_padded(p) for p in parameters), device=device)
        self.gradient = torch.zeros_like(self.weights)
        start = 0
        for parameter in parameters:
            span = slice(start, start + parameter.numel())
            self.weights[span].copy_(parameter.detach().reshape(-1))
            parameter.data = self.weights[span].view(parameter.shape)
            parameter.grad = self.gradient[span].view(parameter.shape)
            start += _padded(parameter)

    @property
    def num_floats(self) -> int:
        """P."""
        return len(self.weights)

    @property
    def statistics(self) -> list[torch.Tensor]:
        """The float buffers of the network: batch-norm statistics. They are no gradients and travel apart."""
        return [buffer for buffer in self.module.buffers() if buffer.is_floating_point()]

    @property
    def num_statistics(self) -> int:
        return sum(buffer.numel() for buffer in self.statistics)

    def save_statistics(self, into: torch.Tensor) -> None:
        """Copy the statistics into the first `num_statistics` floats of `into`."""
        if self.statistics:
            into[:self.num_statistics].copy_(torch.cat([buffer.reshape(-1) for buffer in self.statistics]))

    def load_statistics_(self, source: torch.Tensor) -> None:
        """Set the statistics from the first `num_statistics` floats of `source`."""
        start = 0
        for buffer in self.statistics:
            buffer.copy_(source[start:start + buffer.numel()].view(buffer.shape))
            start += buffer.numel()


def _padded(parameter: torch.Tensor) -> int:
    return -(-parameter.numel() // ALIGNMENT) * ALIGNMENT


def _demand_float32(module: nn.Module) -> None:
    other = {str(p.dtype) for p in module.parameters()} - {"torch.float32"}
    if other:
        raise ConfigError(f"the network has parameters of {', '.join(sorted(other))}: the master weights are float32. "
                          "Build it in float32.")
    if not list(module.parameters()):
        raise ConfigError("the network has no parameters: there is nothing to train.")

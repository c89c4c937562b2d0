"""A network whose parameters and gradients are views of two flat vectors: what is fetched and pushed is one vector.

P is the length of the flat vectors. Every parameter starts on a 64-byte boundary, so that kernels see the alignment
they would see without us (and give the same bits); the gaps are zero, have a zero gradient, and stay zero.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn

from asgd_mpi.errors import ConfigError

ALIGNMENT = 16  # floats = 64 bytes


class FlatModel:
    """`module` on `device`, with `weights` and `gradient`: (P,) float32 on the device, seen through its parameters.

    gradient: memory for it, at least (P,) float32 on the device, if it has a place already.
    spare: make a second vector of each, to swap with.
    """

    def __init__(self, module: nn.Module, device: torch.device, gradient: torch.Tensor | None = None, spare: bool = False):
        self.module = module.to(device)
        self.device = device
        _demand_float32(self.module)
        self._parameters = list(self.module.parameters())
        self._strides = [_stride(parameter) for parameter in self._parameters]
        self._known: dict[int, list[torch.Tensor]] = {}   # the parameters' views of each of the vectors
        self.weights = torch.zeros(num_floats(module), device=device)
        self.gradient = torch.zeros_like(self.weights) if gradient is None else gradient[:len(self.weights)].zero_()
        self.spare_weights = torch.zeros_like(self.weights) if spare else None
        self.spare_gradient = torch.zeros_like(self.weights) if spare else None
        for parameter, view in zip(self._parameters, self._views(self.weights)):
            view.copy_(parameter.detach())
        self._show()

    def swap_weights_(self) -> None:
        self.weights, self.spare_weights = self.spare_weights, self.weights
        self._show()

    def swap_gradients_(self) -> None:
        self.gradient, self.spare_gradient = self.spare_gradient, self.gradient
        self._show()

    def _show(self) -> None:
        """Let the parameters be views of the current vectors."""
        for parameter, weights, gradient in zip(self._parameters, self._views(self.weights), self._views(self.gradient)):
            parameter.data = weights
            parameter.grad = gradient

    def _views(self, vector: torch.Tensor) -> list[torch.Tensor]:
        if id(vector) not in self._known:
            starts = itertools.accumulate((_padded(p) for p in self._parameters), initial=0)
            self._known[id(vector)] = [vector[start:start + p.numel()].as_strided(p.shape, stride)
                                       for start, p, stride in zip(starts, self._parameters, self._strides)]
        return self._known[id(vector)]

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
        return num_statistics(self.module)

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


def num_floats(module: nn.Module) -> int:
    """P: the length of the flat vectors of a module."""
    return sum(_padded(parameter) for parameter in module.parameters())


def slices_of(module: nn.Module, part: nn.Module) -> list[slice]:
    """Where the parameters of a part lie in the flat vectors of the whole module, in order, neighbours in one slice.

    The layout is that of the whole, however it is cut; what is checkpointed does not know of parts.
    """
    own = {id(parameter) for parameter in part.parameters()}
    found: list[slice] = []
    start = 0
    for parameter in module.parameters():
        stop = start + _padded(parameter)
        if id(parameter) in own:
            first = found.pop().start if found and found[-1].stop == start else start
            found.append(slice(first, stop))
        start = stop
    return found


def num_statistics(module: nn.Module) -> int:
    """How many floats the buffers of a module hold."""
    return sum(buffer.numel() for buffer in module.buffers() if buffer.is_floating_point())


def _stride(parameter: torch.Tensor) -> tuple[int, ...]:
    """Of a parameter within its part of the vector: rows by rows, or channels last if the module has it so."""
    return parameter.stride() if parameter.dim() == 4 and parameter.is_contiguous(
        memory_format=torch.channels_last) else torch.empty(parameter.shape, device="meta").stride()


def _padded(parameter: torch.Tensor) -> int:
    return -(-parameter.numel() // ALIGNMENT) * ALIGNMENT


def _demand_float32(module: nn.Module) -> None:
    other = {str(p.dtype) for p in module.parameters()} - {"torch.float32"}
    if other:
        raise ConfigError(f"the network has parameters of {', '.join(sorted(other))}: the master weights are float32. "
                          "Build it in float32.")
    if not list(module.parameters()):
        raise ConfigError("the network has no parameters: there is nothing to train.")

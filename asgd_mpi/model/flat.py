"""A network whose parameters and gradients are views of two flat vectors: what is fetched and pushed is one vector.

P is the length of the flat vectors. Every parameter starts on a 64-byte boundary, so that kernels see the alignment
they would see without us (and give the same bits); the gaps are zero, have a zero gradient, and stay zero.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from asgd_mpi.errors import ConfigError

ALIGNMENT = 16  # floats = 64 bytes


class FlatModel:
    """`module` on `device`, with `weights` and `gradient`: (P,) float32 on the device, seen through its parameters.

    gradient: memory for it, at least (P,) float32 on the device, if it has a place already.
    spare: make a second vector of each, to swap with; spare_weights: of the weights alone.
    """

    def __init__(self, module: nn.Module, device: torch.device, gradient: torch.Tensor | None = None, spare: bool = False,
                 spare_weights: bool = False):
        self.module = module.to(device)
        self.device = device
        _demand_float32(self.module)
        self._parameters = list(self.module.parameters())
        self._aside: torch.Tensor | None = None           # see set_aside_
        self._known: dict[int, list[torch.Tensor]] = {}   # the parameters' views of each of the vectors
        self.weights = torch.zeros(num_floats(module), device=device)
        self.gradient = torch.zeros_like(self.weights) if gradient is None else gradient[:len(self.weights)].zero_()
        self.spare_weights = torch.zeros_like(self.weights) if spare or spare_weights else None
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
            self._known[id(vector)] = views(self.module, vector)
        return self._known[id(vector)]

    def is_finite(self) -> bool:
        """Whether all of the gradient is."""
        return bool(torch.stack(self.gradient.aminmax()).isfinite().all())     # sync: what is pushed depends on it

    def norms(self, vector: torch.Tensor | None = None) -> list[float]:
        """Of each parameter's part of a vector, (P,) float32: of the gradient, if none is given."""
        vector = self.gradient if vector is None else vector
        parts = [vector[start:start + p.numel()] for start, p in zip(_starts(self.module), self._parameters)]
        return torch.stack(torch._foreach_norm(parts)).tolist()                # sync: it may be scaled down

    def set_aside_(self) -> None:
        """Keep a copy of the gradient for `take_back_`, which adds it."""
        self._aside = self.gradient.clone()

    def take_back_(self) -> None:
        self.gradient.add_(self._aside)
        self._aside = None

    def unscale_(self, scale: float) -> None:
        self.gradient.div_(scale)

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


def views(module: nn.Module, vector: torch.Tensor) -> list[torch.Tensor]:
    """The parameters of a module in a vector that is laid out as its own."""
    return [vector[start:start + p.numel()].as_strided(p.shape, _stride(p))
            for start, p in zip(_starts(module), module.parameters())]


def materialise_(module: nn.Module) -> None:
    """Give parameters on the meta device memory, whose contents are anything. They are new ones; shared ones stay shared."""
    known: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_meta:
                memory = torch.empty_like(parameter, device="cpu")
                known.setdefault(id(parameter), nn.Parameter(memory, parameter.requires_grad))
                part._parameters[name] = known[id(parameter)]


def norm_of(norms: Iterable[float]) -> float:
    """Of a vector, from those of its parts in any order: the sum of their squares is rounded once."""
    return math.sqrt(math.fsum(norm * norm for norm in norms))


def places_of(module: nn.Module, part: nn.Module) -> list[tuple[slice, slice]]:
    """Where the parameters of a part of a module lie in the flat vectors of both: (in the module's, in the part's).

    Neighbours in both are one slice. The layout of a module does not depend on how it is cut.
    """
    whole = dict(zip(map(id, module.parameters()), _starts(module)))
    places: list[tuple[slice, slice]] = []
    for parameter, own in zip(part.parameters(), _starts(part)):
        start, size = whole[id(parameter)], _padded(parameter)
        before = places.pop() if places and places[-1][0].stop == start else (slice(start, start), slice(own, own))
        places.append((slice(before[0].start, start + size), slice(before[1].start, own + size)))
    return places


def statistics_of(module: nn.Module, part: nn.Module) -> list[tuple[slice, torch.Tensor]]:
    """The statistics of a part of a module, and where each lies in what `save_statistics` of the module writes."""
    own = {id(buffer) for buffer in part.buffers()}
    buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    starts = itertools.accumulate((buffer.numel() for buffer in buffers), initial=0)
    return [(slice(start, start + buffer.numel()), buffer) for start, buffer in zip(starts, buffers) if id(buffer) in own]


def num_statistics(module: nn.Module) -> int:
    """How many floats the buffers of a module hold."""
    return sum(buffer.numel() for buffer in module.buffers() if buffer.is_floating_point())


def _stride(parameter: torch.Tensor) -> tuple[int, ...]:
    """Of a parameter within its part of the vector: rows by rows, or channels last if the module has it so."""
    return parameter.stride() if parameter.dim() == 4 and parameter.is_contiguous(
        memory_format=torch.channels_last) else torch.empty(parameter.shape, device="meta").stride()


def _starts(module: nn.Module) -> Iterator[int]:
    """Where each parameter begins in the flat vectors."""
    return itertools.accumulate((_padded(parameter) for parameter in module.parameters()), initial=0)


def _padded(parameter: torch.Tensor) -> int:
    return -(-parameter.numel() // ALIGNMENT) * ALIGNMENT


def _demand_float32(module: nn.Module) -> None:
    other = {str(p.dtype) for p in module.parameters()} - {"torch.float32"}
    if other:
        raise ConfigError(f"the network has parameters of {', '.join(sorted(other))}: the master weights are float32. "
                          "Build it in float32.")
    if not list(module.parameters()):
        raise ConfigError("the network has no parameters: there is nothing to train.")

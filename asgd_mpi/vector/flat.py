"""A network whose parameters and gradients are views of two flat vectors: what is fetched and pushed is one vector.

P is the length of the flat vectors. They hold the parameters that are trained; one that is frozen (requires_grad=False) stays
where and what it is, and neither travels nor is decayed, given momentum or counted in a norm. Every parameter starts on a 64-byte boundary, so that kernels see the alignment
they would see without us (and give the same bits); the gaps are zero, have a zero gradient, and stay zero.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from asgd_mpi.errors import ConfigError
from asgd_mpi.model import batchnorm
from asgd_mpi.vector.groups import ALIGNMENT
from asgd_mpi.model.memory import bytes_of
from asgd_mpi.model.trained import trained


class FlatModel:
    """`module` on `device`, with `weights` and `gradient`: (P,) float32 on the device, seen through its trained parameters.

    gradient: memory for it, at least (P,) float32 on the device, if it has a place already.
    spare: make a second vector of each, to swap with; spare_weights: of the weights alone.
    carried: the names of what the forward pass moves beside batch norm's statistics (see `buffers`).
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        gradient: torch.Tensor | None = None,
        spare: bool = False,
        spare_weights: bool = False,
        carried: Sequence[str] = (),
    ):
        self.module = module.to(device)
        self.device = device
        _demand_float32(self.module)
        self._parameters = trained(self.module)
        self.measured = batchnorm.measured(self.module)  # layers
        self._carried = {name: _owner(self.module, name) for name in carried}
        self._counts = batchnorm.counts(self.module, self.measured)
        self._aside: torch.Tensor | None = None  # see set_aside_
        # the parameters' views of each of the vectors
        self._known: dict[int, list[torch.Tensor]] = {}
        self.weights = torch.zeros(num_floats(module), device=device)
        if gradient is None:
            self.gradient = torch.zeros_like(self.weights)
        else:
            self.gradient = gradient[: len(self.weights)].zero_()
        self.spare_weights: torch.Tensor | None = None
        self.spare_gradient: torch.Tensor | None = None
        if spare or spare_weights:
            self.spare_weights = torch.zeros_like(self.weights)
        if spare:
            self.spare_gradient = torch.zeros_like(self.weights)
        for parameter, view in zip(self._parameters, self._views(self.weights)):
            view.copy_(parameter.detach())
        self._show()

    def swap_weights_(self) -> None:
        assert self.spare_weights is not None
        self.weights, self.spare_weights = self.spare_weights, self.weights
        self._show()

    def swap_gradients_(self) -> None:
        assert self.spare_gradient is not None
        self.gradient, self.spare_gradient = self.spare_gradient, self.gradient
        self._show()

    def _show(self) -> None:
        """Let the parameters be views of the current vectors."""
        for parameter, weights, gradient in zip(
            self._parameters, self._views(self.weights), self._views(self.gradient)
        ):
            parameter.data = weights
            parameter.grad = gradient

    def _views(self, vector: torch.Tensor) -> list[torch.Tensor]:
        if id(vector) not in self._known:
            self._known[id(vector)] = views(self.module, vector)
        return self._known[id(vector)]

    @property
    def num_parameters(self) -> int:
        """Return how many parameters are trained."""
        return len(self._parameters)

    def shows_gradient(self) -> bool:
        """Return whether the parameters' gradients are still the views of the flat one."""
        return all(
            parameter.grad is view
            for parameter, view in zip(self._parameters, self._views(self.gradient))
        )

    def is_finite(self) -> bool:
        """Return whether all of the gradient is."""
        # sync: what is pushed depends on it
        return not len(self.gradient) or bool(torch.stack(self.gradient.aminmax()).isfinite().all())

    def norms(self, vector: torch.Tensor | None = None) -> list[float]:
        """Return the norm of each parameter's part of a vector, (P,) float32: of the gradient, if none is given."""
        vector = self.gradient if vector is None else vector
        parts = [
            vector[start : start + p.numel()]
            for start, p in zip(_starts(self.module), self._parameters)
        ]
        # sync: it may be scaled down
        return torch.stack(torch._foreach_norm(parts)).tolist() if parts else []

    def zero_gradient_(self) -> None:
        self.gradient.zero_()

    def set_aside_(self) -> None:
        """Keep a copy of the gradient for `take_back_`, which adds it."""
        self._aside = self.gradient.clone()

    def take_back_(self) -> None:
        assert self._aside is not None
        self.gradient.add_(self._aside)
        self._aside = None

    def unscale_(self, scale: float) -> None:
        self.gradient.div_(scale)

    @property
    def num_floats(self) -> int:
        """P."""
        return len(self.weights)

    @property
    def carried(self) -> dict[str, torch.Tensor]:
        """By name, what the forward pass moves beside batch norm's statistics: of any type, on the device."""
        return {
            name: getattr(owner, attribute).detach()
            for name, (owner, attribute) in self._carried.items()
        }

    def set_carried_(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in self.carried.items():
            tensor.copy_(tensors[name])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the module's, but the counts of batches that a worker's batch norm has seen: as they were at first."""
        return {**self.module.state_dict(), **self._counts}

    @property
    def statistics(self) -> list[torch.Tensor]:
        """Batch norm's, which are no gradients and travel apart, float32."""
        return batchnorm.statistics(self.measured)

    @property
    def num_statistics(self) -> int:
        """The length of what `save_statistics` writes, in floats."""
        return sum(tensor.numel() for tensor in self.statistics) + sum(
            map(_words, self.carried.values())
        )

    def save_statistics(self, into: torch.Tensor) -> None:
        """Copy the statistics, and then the bytes of what is carried, into the first `num_statistics` floats of `into`."""
        start = 0
        for tensor in self.statistics:
            into[start : start + tensor.numel()].copy_(tensor.reshape(-1))
            start += tensor.numel()
        for tensor in self.carried.values():
            contents = bytes_of(tensor)
            into[start : start + _words(tensor)].view(torch.uint8)[: len(contents)].copy_(contents)
            start += _words(tensor)

    def load_statistics_(self, source: torch.Tensor) -> None:
        """Set the statistics, and what is carried, from the first `num_statistics` floats of `source`."""
        start = 0
        for tensor in self.statistics:
            tensor.copy_(source[start : start + tensor.numel()].view(tensor.shape))
            start += tensor.numel()
        for tensor in self.carried.values():
            contents = source[start : start + _words(tensor)].view(torch.uint8)[: tensor.nbytes]
            tensor.copy_(contents.clone().view(tensor.dtype).view(tensor.shape))
            start += _words(tensor)


def num_floats(module: nn.Module) -> int:
    """P: the length of the flat vectors of a module."""
    return sum(_padded(parameter) for parameter in trained(module))


def ranges_below(module: nn.Module, size: int) -> tuple[tuple[int, int], ...]:
    """Return where the trained parameters of less than `size` numbers lie in the flat vectors; neighbours are one range."""
    found: list[tuple[int, int]] = []
    for start, parameter in zip(_starts(module), trained(module)):
        if parameter.numel() < size:
            begin = found.pop()[0] if found and found[-1][1] == start else start
            found.append((begin, start + _padded(parameter)))
    return tuple(found)


def views(module: nn.Module, vector: torch.Tensor) -> list[torch.Tensor]:
    """Return the trained parameters of a module in a vector that is laid out as its own."""
    return [
        vector[start : start + p.numel()].as_strided(p.shape, _stride(p))
        for start, p in zip(_starts(module), trained(module))
    ]


def places(module: nn.Module) -> Iterator[tuple[nn.Parameter, slice]]:
    """Yield each trained parameter and where it lies in the flat vectors."""
    for start, parameter in zip(_starts(module), trained(module)):
        yield parameter, slice(start, start + parameter.numel())


def norm_of(norms: Iterable[float]) -> float:
    """Return the norm of a vector from those of its parts, in any order: the sum of their squares is rounded once."""
    return math.sqrt(math.fsum(norm * norm for norm in norms))


def places_of(module: nn.Module, part: nn.Module) -> list[tuple[slice, slice]]:
    """Return where the trained parameters of a part of a module lie in the flat vectors of both: (in the module's, in the part's).

    Neighbours in both are one slice. The layout of a module does not depend on how it is cut.
    """
    whole = dict(zip(map(id, trained(module)), _starts(module)))
    places: list[tuple[slice, slice]] = []
    for parameter, own in zip(trained(part), _starts(part)):
        start, size = whole[id(parameter)], _padded(parameter)
        if places and places[-1][0].stop == start:
            before = places.pop()
        else:
            before = (slice(start, start), slice(own, own))
        places.append((slice(before[0].start, start + size), slice(before[1].start, own + size)))
    return places


def statistics_of(
    layers: Sequence[batchnorm.Layer], part: nn.Module
) -> list[tuple[slice, torch.Tensor]]:
    """Return the statistics of a part of a module, and where each lies in what `save_statistics` of the module writes.

    layers: all that are measured.
    """
    own, found = {id(tensor) for tensor in part.buffers()}, batchnorm.statistics(layers)
    starts = itertools.accumulate((tensor.numel() for tensor in found), initial=0)
    return [
        (slice(start, start + tensor.numel()), tensor)
        for start, tensor in zip(starts, found)
        if id(tensor) in own
    ]


def num_statistics(module: nn.Module, carried: Sequence[str] = ()) -> int:
    """Count the floats of a module's batch-norm statistics, and of what it is to carry."""
    tensors = (getattr(*_owner(module, name)) for name in carried)
    return sum(tensor.numel() for tensor in batchnorm.statistics(batchnorm.measured(module))) + sum(
        map(_words, tensors)
    )


def _words(tensor: torch.Tensor) -> int:
    """Count the floats that have room for the bytes of a tensor."""
    return -(-tensor.nbytes // 4)


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the part of a module that a tensor belongs to, and its name there."""
    path, _, attribute = name.rpartition(".")
    return module.get_submodule(path), attribute


def _stride(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the strides of a parameter within its part of the vector: rows by rows, or channels last if the module has it so."""
    if parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
        return parameter.stride()
    return torch.empty(parameter.shape, device="meta").stride()


def _starts(module: nn.Module) -> Iterator[int]:
    """Return where each trained parameter begins in the flat vectors."""
    return itertools.accumulate((_padded(parameter) for parameter in trained(module)), initial=0)


def _padded(parameter: torch.Tensor) -> int:
    return -(-parameter.numel() // ALIGNMENT) * ALIGNMENT


def _demand_float32(module: nn.Module) -> None:
    other = {str(p.dtype) for p in trained(module)} - {"torch.float32"}
    if other:
        raise ConfigError(
            f"the network has parameters of {', '.join(sorted(other))} to train: the master weights are float32. "
            "Build it in float32."
        )

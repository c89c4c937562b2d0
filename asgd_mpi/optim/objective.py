"""What is minimised on a batch, and what is measured on a validation split: images by their classes, or what a user brings.

A batch comes from a loader (see `data`), `prepare` makes of it what the network and the loss take, on the device: the
inputs. Any nesting of tuples, lists and dicts of tensors will do, with the samples along the first axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree

from asgd_mpi.protocol.messages import MAX_METRICS

Scores = Mapping[str, Any]  # by name: a mean over the batch, or a pair (sum, weight)


class Batch(Protocol):
    """Some positions of an epoch, read; `size` samples of them are left."""

    size: int
    epoch: int
    start: int
    stop: int
    skipped: int


class Objective(Protocol):
    """What a training minimises and measures."""

    def prepare(self, batch: Any, device: torch.device) -> Any:
        """Return the inputs of a batch, on a device."""

    def forward(self, module: nn.Module, inputs: Any) -> Any:
        """Let the network see the inputs, as in training: what comes out is of no interest."""

    def loss(self, module: nn.Module, inputs: Any) -> torch.Tensor:
        """Return the mean loss over the inputs, a scalar."""

    def score(self, module: nn.Module, inputs: Any) -> Scores:
        """Return what a validation measures on the inputs."""


def parts_of(inputs: Any, size: int, count: int) -> list[Any]:
    """Return inputs of `size` samples in `count` parts; tensors whose first axis is not the samples go with each of them."""
    if count == 1:
        return [inputs]
    leaves, spec = pytree.tree_flatten(inputs)
    cut = [_split(leaf, size, count) for leaf in leaves]
    return [pytree.tree_unflatten(list(part), spec) for part in zip(*cut)]


def sizes_of(size: int, count: int) -> list[int]:
    """Return how many of `size` samples each of `count` parts has, as torch.tensor_split cuts them."""
    return [size // count + (part < size % count) for part in range(count)]


def _split(leaf: Any, size: int, count: int) -> Sequence[Any]:
    if isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and len(leaf) == size:
        return leaf.tensor_split(count)
    return [leaf] * count


def on_device(inputs: Any, device: torch.device) -> Any:
    """Return inputs with their tensors on a device, but for those that hold a shape only (see optim.divided)."""

    def moved(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
            return leaf.to(device, non_blocking=True)
        return leaf

    return pytree.tree_map(moved, inputs)


@dataclass
class Tally:
    """Sums over the samples that were validated: of each metric, and of the weights of its terms."""

    num_samples: int = 0
    skipped: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def add(self, size: int, scores: Scores) -> None:
        """Add what was measured on `size` samples."""
        self.num_samples += size
        for name, value in scores.items():
            # sync: a validation is a sum over batches
            if isinstance(value, tuple):
                term, weight = float(value[0]), float(value[1])
            else:
                term, weight = float(value) * size, size
            self.sums[name] = self.sums.get(name, 0.0) + term
            self.weights[name] = self.weights.get(name, 0.0) + weight

    def mean(self, name: str) -> float:
        """Return a metric over all samples; not a number without any."""
        weight = self.weights.get(name, 0.0)
        return self.sums[name] / weight if weight else float("nan")

    def pairs(self, names: Sequence[str]) -> tuple[float, ...]:
        """Return sum and weight of each metric, one after the other."""
        return tuple(
            number
            for name in names
            for number in (self.sums.get(name, 0.0), self.weights.get(name, 0.0))
        )


def names_of(scores: Any) -> list[str]:
    """Return the metrics that a `score` gives, in order. Raises ValueError if they are none."""
    if not isinstance(scores, Mapping) or not scores:
        raise ValueError(
            f"it gives {type(scores).__name__}: a dict of named metrics is needed, such as "
            '{"accuracy": right / len(batch)}'
        )
    if len(scores) > MAX_METRICS:
        raise ValueError(f"it gives {len(scores)} metrics; {MAX_METRICS} can be sent at most")
    for name, value in scores.items():
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= 64:
            raise ValueError(f"{name!r} is no name of a metric: 1 to 64 printable characters")
        pair = value if isinstance(value, tuple) else (value, 1.0)
        if len(pair) != 2:
            raise ValueError(f"{name} is a tuple of {len(pair)}: give a mean, or (sum, weight)")
        for number in pair:
            try:
                float(number)
            except (TypeError, ValueError, RuntimeError):
                raise ValueError(
                    f"{name} is no number but {type(number).__name__}: give a mean over the batch, or (sum, weight)"
                ) from None
    return list(scores)


def measured(tally: Tally, metrics: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a validation's header; `metrics`: of the task, none for image classification."""
    if metrics:
        return {"metrics": tally.pairs(metrics)}
    sums = tally.sums
    return {
        "loss": sums.get("loss", 0.0),
        "top1": round(sums.get("top1", 0)),
        "top5": round(sums.get("top5", 0)),
    }


def passes(
    objective: Objective, batches: Iterable[Batch], device: torch.device
) -> Iterator[Callable[[nn.Module], Any]]:
    """Yield a forward pass over each batch that has samples, to be called with the network."""
    for batch in batches:
        if batch.size:
            yield partial(_forward, objective, objective.prepare(batch, device))


def _forward(objective: Objective, inputs: Any, module: nn.Module) -> Any:
    return objective.forward(module, inputs)

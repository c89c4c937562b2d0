"""A network cut into a chain of stages that use its own modules; what crosses a cut are several tensors, if there are skips.

    images (b, C, S, S) -> stage 0 -> tensors -> stage 1 -> ... -> scores (b, classes)

A tensor that a later stage needs passes through those between, so a stage talks to its neighbours only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.fx.passes.split_utils import split_by_tags

from asgd_mpi.errors import ConfigError
from asgd_mpi.pipeline.graph import Graph


@dataclass(frozen=True)
class Stage:
    """A part of a network: `takes` comes in, `gives` goes out, in this order.

    differentiable: those values that have a gradient, which travels back (images have none).
    """

    module: nn.Module
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    uses: tuple[str, ...]  # of what it takes: the arguments of its module,
    makes: tuple[str, ...]  # ... and what that returns, a tuple
    differentiable: frozenset[str]

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return what it gives, for what it takes."""
        values = dict(zip(self.takes, tensors, strict=True))
        values |= zip(self.makes, self.module(*(values[name] for name in self.uses)), strict=True)
        return tuple(values[name] for name in self.gives)


class _Whole(nn.Module):
    """A network that returns its scores as the one value of a tuple."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.module(images),)


def whole(module: nn.Module) -> list[Stage]:
    """Return the network as one stage; it need not be traceable."""
    return [
        Stage(
            _Whole(module),
            ("images",),
            ("scores",),
            ("images",),
            ("scores",),
            frozenset({"scores"}),
        )
    ]


def demand(graph: Graph, cuts: Sequence[int]) -> None:
    """Raise ConfigError unless the network can be cut before these nodes."""
    for cut in cuts:
        if reason := graph.why_not(cut):
            near = [
                graph.name(other)
                for other in sorted(range(1, len(graph.nodes)), key=lambda other: abs(other - cut))
                if not graph.why_not(other)
            ][:3]
            raise ConfigError(
                f"no stage can begin at {graph.name(cut)}: {reason}. Take a place near it: "
                f"{', '.join(near) or 'there is none'}."
            )
    if list(cuts) != sorted(set(cuts) - {0}):
        raise ConfigError(
            f"stages that begin at {', '.join(graph.name(cut) for cut in cuts)}: give each name once, in the "
            f"order of the calls, and not the first one, {graph.name(0)}, where stage 0 begins."
        )
    for start, stop in pairwise([0, *cuts, len(graph.nodes)]):
        if not any(graph.parameters[start:stop]):
            raise ConfigError(
                f"a stage from {graph.name(start)} to {graph.name(stop - 1)} would have no parameters: "
                "nothing to train on a rank of its own. Leave it to one of its neighbours."
            )


def cut(
    graph: Graph, cuts: Sequence[int], differentiable: Sequence[str] | None = None
) -> list[Stage]:
    """Return the len(cuts) + 1 stages that begin at node 0 and at `cuts`. Raises ConfigError if they cannot.

    differentiable: graph.differentiable, if somebody has looked at the same graph already.
    """
    if differentiable is None:
        demand(graph, cuts)
        differentiable = graph.differentiable
    bounds = [0, *cuts, len(graph.nodes)]
    tags = [f"stage{number}" for number in range(len(bounds) - 1)]
    for tag, (start, stop) in zip(tags, pairwise(bounds)):
        for node in graph.nodes[start:stop]:
            node.tag = tag
    parts = split_by_tags(graph.traced, tags, return_tuple=True)
    crossing = [tuple(node.name for node in graph.crossing(bound)) for bound in bounds]
    crossing[0] = tuple(node.name for node in graph.traced.graph.nodes if node.op == "placeholder")
    stages = []
    for tag, takes, gives in zip(tags, crossing, crossing[1:]):
        part = getattr(parts, tag)
        uses = tuple(node.name for node in part.graph.nodes if node.op == "placeholder")
        [makes] = [
            tuple(node.name for node in node.args[0])
            for node in part.graph.nodes
            if node.op == "output"
        ]
        stages.append(Stage(part, takes, gives, uses, makes, frozenset(differentiable)))
    return stages


def adopt_(parts: Sequence[nn.Module], module: nn.Module) -> None:
    """Give the first part the parameters of the uncut network that no part uses: they are its to keep as they are."""
    used = {id(parameter) for part in parts for parameter in part.parameters()}
    unused = [parameter for parameter in module.parameters() if id(parameter) not in used]
    if unused:
        parts[0].add_module("unused", nn.ParameterList(unused))

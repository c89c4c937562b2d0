"""Where a network is cut, and what each stage then costs: chosen by measured time, by memory, or by the user's names."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import fx, nn

from asgd_mpi.errors import ConfigError
from asgd_mpi.model.memory import materialise_
from asgd_mpi.pipeline.balance import balance
from asgd_mpi.pipeline.cut import demand
from asgd_mpi.pipeline.graph import Graph
from asgd_mpi.pipeline.schedule import Schedule, gpipe, held, idle_share, timeline


@dataclass(frozen=True)
class Seconds:
    """Of the forward and the backward pass of a micro-batch."""

    forward: float
    backward: float

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.forward + other.forward, self.backward + other.backward)


def measure(graph: Graph, sample: torch.Tensor, repeats: int = 3) -> list[Seconds]:
    """Return what each node takes on a sample (b, ...), on its device: medians, after one run that does not count.

    The network is left as it is: a copy is measured, and the random numbers are set back.
    """
    traced = copy.deepcopy(graph.traced).train()
    gpus = [sample.device] if sample.device.type == "cuda" else []
    with torch.random.fork_rng(gpus, device_type=sample.device.type):
        run = _TimedRun(traced, sample.device, repeats)
        run.run(sample)
    return [run.seconds[node.name] for node in graph.nodes]


def _detached(value: object) -> object:
    """Return a tensor apart from what it was computed of; all else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().requires_grad_(value.requires_grad)


class _TimedRun(fx.Interpreter):
    """Runs a graph node by node, each forward and at once backward, some times; only the node that runs is on the device."""

    def __init__(self, traced: fx.GraphModule, device: torch.device, repeats: int):
        super().__init__(traced)
        self._device, self._repeats = device, repeats
        self.seconds: dict[str, Seconds] = {}

    def run_node(self, node: fx.Node) -> object:
        if not node.op.startswith("call_"):
            return super().run_node(node)
        if node.op == "call_module":
            call = self._on_device(self.fetch_attr(node.target))
        else:
            call = lambda *arguments, **keywords: getattr(self, node.op)(
                node.target, arguments, keywords
            )
        runs = [self._once(node, call) for _ in range(self._repeats + 1)][1:]
        self.seconds[node.name] = Seconds(
            *(statistics.median(times) for times in zip(*(times for _, times in runs)))
        )
        return fx.node.map_aggregate(runs[-1][0], _detached)

    def _once(self, node: fx.Node, call: Callable) -> tuple[object, tuple[float, float]]:
        """Return what a node returns, and the seconds of its two passes."""

        def take(value: object) -> object:
            """A copy, since the node may write into it; its gradient is measured, too, unless it is an image."""
            if isinstance(value, torch.nn.Parameter):
                return self._on_device(nn.ParameterList([value]))[0]
            if not isinstance(value, torch.Tensor):
                return value
            if value.requires_grad:
                return value.detach().requires_grad_().clone()
            return value.to(self._device, copy=True)

        arguments, keywords = (
            fx.node.map_aggregate(each, take) for each in self.fetch_args_kwargs_from_env(node)
        )
        started = _now()
        result = call(*arguments, **keywords)
        middle = _now()
        results = result if isinstance(result, tuple) else (result,)
        roots = [one for one in results if isinstance(one, torch.Tensor) and one.requires_grad]
        if roots:
            torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
        return result, (middle - started, _now() - middle)

    def _on_device(self, module: nn.Module) -> nn.Module:
        """A copy; parameters without memory get some, and numbers that are as quick as any."""
        module = copy.deepcopy(module)
        is_outline = any(parameter.is_meta for parameter in module.parameters())
        materialise_(module)
        if is_outline:
            for parameter in module.parameters():
                nn.init.constant_(parameter, 0.01)
        return module.to(self._device)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class Row:
    """What one stage holds and takes."""

    begins: str  # the first module,
    ends: str  # ... and the last one
    nodes: int
    parameters: int
    activation_bytes: int  # that backward needs, for the micro-batches that are held at a time
    memory_bytes: int  # those, and the copies of the parameters
    sent_bytes: int  # to the next stage, or the other column, of a micro-batch
    seconds: Seconds | None  # of a micro-batch; None if it was not measured


@dataclass(frozen=True)
class Batch:
    """What a plan is made for: `parts` micro-batches of `images` images each."""

    images: int
    parts: int
    schedule: Schedule = gpipe


class StagePlan:
    """The costs of the parts of a network, and the cuts that they suggest.

    seconds: of each node for one micro-batch (`measure`), if the balance is to be that of time.
    vectors: copies of a stage's trained parameters that a rank keeps: weights, gradient, and those of the update rule.
    """

    def __init__(
        self, graph: Graph, batch: Batch, seconds: Sequence[Seconds] | None = None, vectors: int = 3
    ):
        self.graph, self.batch, self.vectors = graph, batch, vectors
        self._scale = batch.images / graph.sample.shape[0]
        if seconds:
            self._until = list(accumulate(seconds, initial=Seconds(0.0, 0.0)))
        else:
            self._until = None
        self._parameters_until = list(accumulate(graph.parameters, initial=0))
        self._trained_until = list(accumulate(graph.trained, initial=0))
        self._parts_held: dict[tuple[int, int], int] = {}  # by stage and number of stages
        # from a node on: what backward needs until each further one
        self._saved: dict[int, list[int]] = {}

    def cuts_by(self, balance_of: str, num_stages: int) -> list[int]:
        """Return the cuts that share out `time` or `memory` best. Raises ConfigError if there are too few places for them."""
        graph = self.graph
        places = {
            place: graph.crossing_bytes(place)
            for place in range(1, len(graph.nodes))
            if not graph.why_not(place)
        }

        def cost(stage: int, start: int, stop: int) -> float | None:
            """A stage without parameters is none."""
            if not self._parameters(start, stop):
                return None
            if balance_of == "memory":
                return self.memory_bytes(stage, num_stages, start, stop)
            return sum(vars(self._seconds(start, stop)).values())

        if num_stages <= len(places) + 1:
            cuts = balance(num_stages, len(graph.nodes), places, cost)
        else:
            cuts = None
        if cuts is None:
            raise ConfigError(
                f"--stages.number {num_stages}: the network can be cut at {len(places)} places, not into {num_stages} "
                "stages that have parameters each. Ask for fewer."
            )
        return cuts

    def cuts_at(self, names: Sequence[str]) -> list[int]:
        """Return the cuts before the named modules. Raises ConfigError if the network cannot be cut there."""
        cuts = [self.graph.start_of(name) for name in names]
        demand(self.graph, cuts)
        return cuts

    def memory_bytes(self, stage: int, num_stages: int, start: int, stop: int) -> int:
        """Return what a stage keeps: its parameters, and the activations that it holds at a time."""
        num_trained = self._trained_until[stop] - self._trained_until[start]
        num_kept = self._parameters(start, stop) + (self.vectors - 1) * num_trained
        return 4 * num_kept + self._held_bytes(stage, num_stages, start, stop)

    def rows(self, cuts: Sequence[int]) -> list[Row]:
        bounds = [0, *cuts, len(self.graph.nodes)]
        return [
            Row(
                self.graph.name(start),
                self.graph.name(stop - 1),
                stop - start,
                self._parameters(start, stop),
                self._held_bytes(stage, len(bounds) - 1, start, stop),
                self.memory_bytes(stage, len(bounds) - 1, start, stop),
                round(self._scale * self.graph.crossing_bytes(stop)) if stop < bounds[-1] else 0,
                self._seconds(start, stop) if self._until else None,
            )
            for stage, (start, stop) in enumerate(pairwise(bounds))
        ]

    def _seconds(self, start: int, stop: int) -> Seconds:
        before, after = self._until[start], self._until[stop]
        return Seconds(after.forward - before.forward, after.backward - before.backward)

    def _parameters(self, start: int, stop: int) -> int:
        """No cut is possible between two nodes that share parameters."""
        return self._parameters_until[stop] - self._parameters_until[start]

    def _held_bytes(self, stage: int, num_stages: int, start: int, stop: int) -> int:
        """A storage that several nodes of the stage save counts once."""
        if start not in self._saved:
            found: set[int] = set()
            self._saved[start] = [0]
            for saved in self.graph.saved[start:]:
                self._saved[start].append(
                    self._saved[start][-1] + sum(saved[key] for key in saved.keys() - found)
                )
                found |= saved.keys()
        key = stage, num_stages
        if key not in self._parts_held:
            self._parts_held[key] = held(self.batch.schedule(stage, num_stages, self.batch.parts))
        return round(self._scale * self._parts_held[key] * self._saved[start][stop - start])


def predicted_bubble(rows: Sequence[Row], batch: Batch) -> float:
    """Return the share of the time in which the stages wait for each other, from their measured seconds; transfers take none."""
    forward, backward = (
        [getattr(row.seconds, way) for row in rows] for way in ("forward", "backward")
    )
    return idle_share(timeline(batch.schedule, forward, backward, batch.parts))


def render(rows: Sequence[Row]) -> str:
    """Return the plan as text, a line for each stage."""
    table = [("stage", "modules", "parameters", "activations MB", "memory MB", "sends MB", "ms")]
    for number, row in enumerate(rows):
        if row.seconds is None:
            milliseconds = "-"
        else:
            milliseconds = f"{1e3 * (row.seconds.forward + row.seconds.backward):.1f}"
        table.append(
            (
                str(number),
                f"{row.begins} ... {row.ends} ({row.nodes})",
                str(row.parameters),
                f"{row.activation_bytes / 1e6:.1f}",
                f"{row.memory_bytes / 1e6:.1f}",
                f"{row.sent_bytes / 1e6:.2f}",
                milliseconds,
            )
        )
    widths = [max(map(len, column)) for column in zip(*table)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths))
        )
        for line in table
    )

"""The graph of a network, and what must be known of it before it is cut into stages.

torch.fx traces it (Reed et al. 2022, arXiv:2112.08429): a node is a call of a module without children, or of a function
between modules. One run on the meta device, which computes nothing, tells of every node what backward will need of it and
whether it writes into its arguments. A cut at k means that a stage begins with node k; values that are made before it and
used after it cross it, however many stages lie between.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TypeVar

import torch
from torch import fx, nn

from asgd_mpi.errors import ConfigError

_Module = TypeVar("_Module", bound=nn.Module)


class _Value(fx.Proxy):
    """What the code of a network sees while it is traced; x += y writes into x, as it does to a tensor."""


def _in_place(operation: Callable) -> Callable:
    return lambda value, other: value.tracer.create_proxy(
        "call_function", operation, (value, other), {}
    )


for _name in ("iadd", "isub", "imul", "itruediv", "ipow"):
    setattr(_Value, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    """A module without children is one node, whatever its code does."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return super().is_leaf_module(module, name) or not list(module.children())


def trace(module: nn.Module) -> fx.GraphModule:
    """Return the network as a graph that calls its own modules: parameters, statistics and train() are shared with it.

    Raises ConfigError for a network that cannot be traced, or whose graph would not follow train() and eval().
    """
    modes = {part: part.training for part in module.modules()}
    own = set(vars(module))
    try:
        evaluating, training = (_Tracer().trace(module.train(mode)) for mode in (False, True))
    except Exception as error:  # the network's own code runs in it
        raise ConfigError(
            f"the network cannot be cut into stages, since torch.fx cannot trace it: {type(error).__name__}: {error}. What "
            "it does must not depend on the values or the number of the samples; put a part that does into a module without "
            "children, which is kept in one piece."
        ) from error
    finally:
        for part, mode in modes.items():
            part.training = mode
    for one, other in zip(_lines(training), _lines(evaluating)):
        if one != other:
            raise ConfigError(
                f"the network cannot be cut into stages: outside of modules it does one thing in training ({one.strip()}) "
                f"and another in evaluation ({other.strip()}). Use modules, such as nn.Dropout for functional.dropout."
            )
    if sum(node.op == "placeholder" for node in training.nodes) != 1:
        raise ConfigError(
            "the network cannot be cut into stages: its forward must take one tensor and nothing else."
        )
    [output] = [node.args[0] for node in training.nodes if node.op == "output"]
    if not isinstance(output, fx.Node):
        raise ConfigError("the network cannot be cut into stages: it must return one tensor.")
    traced = fx.GraphModule(module, training)
    # tensors that its forward makes anew, which torch.fx has left on the user's network; the graph has taken those that it needs
    for name in set(vars(module)) - own:
        delattr(module, name)
    return traced


def _lines(graph: fx.Graph) -> list[str]:
    """Return a graph as text; tensors that the network makes anew in each pass have the names of their order in it."""
    names: dict[str, str] = {}
    return re.sub(
        r"_tensor_constant\d+",
        lambda found: names.setdefault(found[0], f"constant{len(names)}"),
        str(graph),
    ).splitlines()


class Graph:
    """A traced network and, once it is asked for, what a run on `sample` shows, of which shape and type count. n: the number of its nodes.

    nodes        the n calls, in order; sizes[value]: bytes of a tensor
    saved[k]     {storage: bytes} of what backward needs of node k; a storage that several nodes save has one key
    tensors[k]   {id: tensor}: the parameters and buffers that node k uses
    parameters[k]  how many numbers node k brings that no node before it has used; trained[k]: those that are not frozen
    """

    def __init__(self, traced: fx.GraphModule, sample: torch.Tensor):
        self.traced, self.sample = traced, sample
        self.nodes = [node for node in traced.graph.nodes if node.op.startswith("call_")]
        self._place = {node: place for place, node in enumerate(self.nodes)}
        self._last_use = {
            node: max((self._place.get(user, len(self.nodes)) for user in node.users), default=-1)
            for node in traced.graph.nodes
        }
        self.tensors = [
            {id(tensor): tensor for tensor in self._tensors_of(node)} for node in self.nodes
        ]
        self._span: dict[int, tuple[int, int]] = {}  # first and last node that uses a tensor
        for place, tensors in enumerate(self.tensors):
            for key in tensors:
                self._span[key] = (self._span.get(key, (place,))[0], place)
        brought = [
            [
                tensor
                for key, tensor in tensors.items()
                if isinstance(tensor, nn.Parameter) and self._span[key][0] == place
            ]
            for place, tensors in enumerate(self.tensors)
        ]
        self.parameters = [sum(tensor.numel() for tensor in new) for new in brought]
        self.trained = [
            sum(tensor.numel() for tensor in new if tensor.requires_grad) for new in brought
        ]
        self._names = {
            id(tensor): name
            for name, tensor in (*traced.named_parameters(), *traced.named_buffers())
        }

    @cached_property
    def _shown(self) -> _Run:
        """The first one of a process takes a second, since torch then loads what it knows of shapes."""
        run = _Run(on_meta(self.traced))
        run.run(torch.empty_like(self.sample, device="meta"))
        return run

    @cached_property
    def sizes(self) -> dict[fx.Node, int]:
        return {
            node: self._shown.made[node.name].nbytes
            for node in self.traced.graph.nodes
            if node.name in self._shown.made
        }

    @cached_property
    def saved(self) -> list[dict[int, int]]:
        return [self._shown.saved.get(node.name, {}) for node in self.nodes]

    @cached_property
    def _written(self) -> dict[str, int]:
        """By name of a value that a later node writes into: the place of that node."""
        places = {node.name: place for place, node in enumerate(self.nodes)}
        return {name: places[writer] for name, writer in self._shown.written.items()}

    @property
    def differentiable(self) -> list[str]:
        """The names of the values that have a gradient."""
        return [name for name, value in self._shown.made.items() if value.requires_grad]

    def crossing(self, cut: int) -> list[fx.Node]:
        """Return the values that cross a cut, in the order in which they are made."""
        return [
            node
            for node, last in self._last_use.items()
            if node.op != "get_attr" and self._place.get(node, -1) < cut <= last
        ]

    def crossing_bytes(self, cut: int) -> int:
        return sum(self.sizes.get(node, 0) for node in self.crossing(cut))

    def why_not(self, cut: int) -> str:
        """Why the network cannot be cut there; empty if it can."""
        for node in self.crossing(cut):
            value = self._shown.made.get(node.name)
            # a size, for one, is no tensor at all
            if value is None or not value.is_floating_point():
                return f"{node.name}, which is no tensor of floats, would have to cross"
            if self._written.get(node.name, -1) >= cut:
                writer = self.name(self._written[node.name])
                return f"{writer} writes into {node.name} in place, which would be a copy there (give it inplace=False)"
        for key, (first, last) in self._span.items():
            if first < cut <= last:
                return f"{self._names[key]} is used on both sides, by {self.name(first)} and {self.name(last)}"
        return ""

    def name(self, place: int) -> str:
        """Return the module that a node calls; of a function the module that it stands in, and its own name."""
        node = self.nodes[place]
        if node.op == "call_module":
            return str(node.target)
        *_, module = ("", *self._path(node))
        return f"{module}.{node.name}".lstrip(".")

    def start_of(self, module: str) -> int:
        """Return the first node of a module, which may be one with children. Raises ConfigError if there is none."""
        for place, node in enumerate(self.nodes):
            if any(
                f"{path}.".startswith(f"{module}.")
                for path in (*self._path(node), self.name(place))
            ):
                return place
        names = list(
            dict.fromkeys(self.name(place).split(".")[0] for place in range(len(self.nodes)))
        )
        raise ConfigError(
            f"no stage can begin at {module}: the network calls no such module. Take one of those that it calls: {', '.join(names)}."
        )

    def _path(self, node: fx.Node) -> Iterator[str]:
        return (name.partition("@")[0] for name in node.meta.get("nn_module_stack", {}))

    def _tensors_of(self, node: fx.Node) -> Iterator[torch.Tensor]:
        if node.op == "call_module":
            module = self.traced.get_submodule(node.target)
            yield from (*module.parameters(), *module.buffers())
        for argument in node.all_input_nodes:
            if argument.op == "get_attr":
                owner, _, name = argument.target.rpartition(".")
                yield getattr(self.traced.get_submodule(owner), name)


def on_meta(module: _Module) -> _Module:
    """A copy that holds shapes only, in training."""
    tensors = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in module.parameters()
    }
    tensors |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in module.buffers()}
    return copy.deepcopy(module, tensors).train()


class _Run(fx.Interpreter):
    """Runs a graph, and notes by the names of its nodes: the values made, what backward keeps, who writes in place last."""

    def __init__(self, traced: fx.GraphModule):
        super().__init__(traced, garbage_collect_values=False)
        self.made: dict[str, torch.Tensor] = {}
        self.saved: dict[str, dict[int, int]] = {}
        self.written: dict[str, str] = {}
        self._kept: list[torch.Tensor] = []  # so that no storage is used twice
        self._constant = {_storage(tensor) for tensor in (*traced.parameters(), *traced.buffers())}

    def run_node(self, node: fx.Node) -> object:
        before = {name: value._version for name, value in self.made.items()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if _storage(tensor) not in self._constant:
                self._kept.append(tensor)
                self.saved.setdefault(node.name, {})[_storage(tensor)] = (
                    tensor.untyped_storage().nbytes()
                )
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = super().run_node(node)
        self.written |= {
            name: node.name
            for name, version in before.items()
            if self.made[name]._version != version
        }
        if isinstance(result, torch.Tensor) and node.op != "get_attr":
            self.made[node.name] = result
        return result


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata

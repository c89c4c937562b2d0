"""Weights that a run begins with, out of a file of whatever trainer: found, named as the network names them, and said.

A file holds a state_dict, or one within others ({"model": ..., "epoch": 3}). Wrappers leave their name in the tensors' names,
anywhere and in any order: `module.` of DataParallel and DistributedDataParallel, `_orig_mod.` of torch.compile; a trainer that
holds the network as an attribute puts that before them (`model.` of Lightning). Nothing in a file is run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from asgd_mpi.errors import ConfigError, few
from asgd_mpi.record import checkpoint

WRAPPERS = ("module", "_orig_mod")
DEPTH = 4  # of dicts in dicts

State = dict[str, torch.Tensor]


def load_weights_(
    module: nn.Module,
    path: str,
    partial: bool = False,
    note: Callable[[str], None] = lambda text: None,
    option: str = "--model.weights",
) -> list[str]:
    """Take parameters and buffers from a state_dict file or a checkpoint directory; returns the names left as they were.

    `partial`: take those that fit by name and shape. `note` is told what was done to find them, and what was left;
    `option` is what gave the path, for messages. Raises ConfigError naming what does not fit, RunDirError for a file that cannot be read.
    """
    if Path(path).is_dir():
        held = checkpoint.load(path)[0]
    else:
        held = checkpoint.read_tensors(Path(path))
    own = module.state_dict()
    given = f"{option} {path}"
    where, state, stripped = _best(held, own, given)
    missing = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own]
    misshapen = [name for name in own if name in state and state[name].shape != own[name].shape]
    if (missing or unknown or misshapen) and not partial:
        raise ConfigError(_misfit(given, where, state, own, missing, unknown, misshapen))
    fitting = {
        name: tensor
        for name, tensor in state.items()
        if name in own and tensor.shape == own[name].shape
    }
    if not fitting:
        raise ConfigError(
            f"{given}: nothing of it fits the network, neither by name nor by shape: it holds "
            f"{few(list(state))}, the network has {few(list(own))}. Give the "
            "file of this network."
        )
    module.load_state_dict(fitting, strict=False)
    left = [name for name in own if name not in fitting]
    for text in _told(
        given, where, stripped, left, [name for name in state if name not in fitting]
    ):
        note(text)
    return left


def _best(held: Mapping, own: State, given: str) -> tuple[str, State, list[str]]:
    """Return of all state_dicts in a file the one that fits best, the first of several: its key, its tensors by the network's
    names as far as they can be told, and what was taken out of them."""
    found = [(where, *_renamed(state, own)) for where, state in _state_dicts(held)]
    if not found:
        raise ConfigError(
            f"{given} holds no tensors by name, but {few([str(key) for key in held]) or 'nothing'}. Give a "
            "state_dict, or a dict that holds one."
        )
    return max(found, key=lambda one: (_fit(one[1], own), len(one[1])))  # max takes the first


def _state_dicts(held: Mapping, where: str = "", depth: int = 0) -> Iterator[tuple[str, State]]:
    """All dicts in a dict that hold tensors by name, and where they are."""
    tensors = {
        key: value
        for key, value in held.items()
        if isinstance(key, str) and isinstance(value, torch.Tensor)
    }
    if tensors:
        yield where, tensors
    for key, value in held.items():
        if isinstance(value, Mapping) and depth < DEPTH:
            yield from _state_dicts(value, f"{where}.{key}".lstrip("."), depth + 1)


def _renamed(state: State, own: State) -> tuple[State, list[str]]:
    """Return the tensors by the network's names, without what wrappers and trainers have put into them; and what that was."""
    if _num_names(state, own) == len(state):
        return state, []
    ours: dict[str, list[str]] = {}
    for name in own:
        ours.setdefault(_bare(name), []).append(name)

    def name_of(name: str) -> str:
        """Return a name as the network has it, if it can mean one of its names only."""
        meant = ours.get(_bare(name), [])
        return name if name in own or len(meant) != 1 else meant[0]

    for prefix in _prefixes(list(state)):
        renamed = {name_of(name.removeprefix(prefix)): tensor for name, tensor in state.items()}
        if len(renamed) == len(state) and _num_names(renamed, own) > _num_names(state, own):
            rest = [name.removeprefix(prefix).split(".") for name in state]
            return renamed, [
                *filter(None, [prefix]),
                *(f"{part}." for part in WRAPPERS if any(part in path for path in rest)),
            ]
    return state, []


def _prefixes(names: list[str]) -> Iterator[str]:
    """Yield what all names begin with: nothing, then a part more each time."""
    paths = [name.split(".") for name in names]
    for length in range(min(map(len, paths))):
        if all(path[:length] == paths[0][:length] for path in paths):
            yield "".join(f"{part}." for part in paths[0][:length])


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _num_names(state: State, own: State) -> int:
    return sum(name in own for name in state)


def _fit(state: State, own: State) -> tuple[int, int]:
    return sum(
        name in own and tensor.shape == own[name].shape for name, tensor in state.items()
    ), _num_names(state, own)


def _misfit(
    given: str,
    where: str,
    state: State,
    own: State,
    missing: list[str],
    unknown: list[str],
    misshapen: list[str],
) -> str:
    """Say what does not fit: the file's names beside the network's."""
    shapes = [
        f"{name} {tuple(state[name].shape)} in place of {tuple(own[name].shape)}"
        for name in misshapen
    ]
    beside = shapes[:3]
    if unknown:
        beside.append(f"the file's {few(unknown)}")
    if missing:
        beside.append(f"the network's {few(missing)}")
    if where:
        given += f" (its {where!r})"
    return (
        f"{given} does not fit the network: {len(missing)} names are missing, "
        f"{len(unknown)} are not the network's, {len(misshapen)} have another shape, such as {', beside '.join(beside)}. "
        "Give weights of the same network, or --model.partial_weights true to take what fits and begin the rest at random."
    )


def _told(
    given: str, where: str, stripped: list[str], left: list[str], unused: list[str]
) -> Iterator[str]:
    found = []
    if where:
        found.append(f"from its {where!r}")
    if stripped:
        found.append(f"without {' and '.join(stripped)} in its names")
    if found:
        yield f"{given}: taken {', '.join(found)}"
    if left:
        yield f"{given}: {len(left)} of the network's names are not in it, and begin as without it: {few(left)}"
    if unused:
        yield f"{given}: {len(unused)} of its names are left out: {few(unused)}"

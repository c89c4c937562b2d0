"""What a training loop of a user's own brings: the network, the data, and what a validation measures; the loss is the loop's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate

from asgd_mpi.errors import ConfigError
from asgd_mpi.task.base import Task
from asgd_mpi.vector.groups import Settings

ADAPTIVE = {"AdamW": "adamw", "Adam": "adam"}
SUPPORTED = "SGD, Adagrad, AdamW and Adam"
# keys of param_groups that may differ from group to group
BY_GROUP = ("params", "param_names", "lr", "weight_decay", "betas", "name")
# keys that the rules have no counterpart for, and the values that change nothing
PLAIN = {
    "dampening": 0,
    "maximize": False,
    "amsgrad": False,
    "lr_decay": 0,
    "initial_accumulator_value": 0,
}


class Loop(Task):
    """A task whose gradients a loop of the user's computes; `options`: see Task; `settings`: of parameters, by their names."""

    computes = is_seeded = False

    def __init__(
        self,
        model: nn.Module,
        options: Mapping[str, Any],
        factor: Callable[[float], float] | None = None,
        settings: Mapping[str, Settings] | None = None,
    ):
        self.model, self.options = model, dict(options)
        self.settings = dict(settings or {})
        self.data: Any = None
        self.validation: Any = None
        self.measure: Callable[[Any], Mapping[str, Any]] | None = None
        self.collate_fn: Callable[[list], Any] | None = None
        self.factor = factor  # of the rate, for the share of the run that is done
        self.listeners: list[Callable[[Any], None]] = []
        # once this rank is a worker: what it has (runtime.ranks), and its network (vector.flat)
        self.rank: Any = None
        self.flat: Any = None

    def train_set(self) -> Any:
        return self.data

    def val_set(self) -> Any:
        return self.validation

    def module(self) -> nn.Module:
        return self.model.to("cpu")

    def schedule(self, share: float) -> float:
        return self.factor(share) if self.factor else 1.0

    def begin(self, rank: Any, flat: Any) -> None:
        self.rank, self.flat = rank, flat

    def score(self, module: nn.Module, batch: Any) -> Mapping[str, Any]:
        assert self.measure is not None
        return self.measure(batch)

    def collate(self, samples: list) -> Any:
        return (self.collate_fn or default_collate)(samples)


def options_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the options that stand for an optimizer of torch's: its class, its defaults. Raises ConfigError."""
    kind, first = type(optimizer).__name__, _fastest(optimizer)
    for group in optimizer.param_groups:
        differ = [key for key in group if key not in BY_GROUP and group[key] != first[key]]
        if differ:
            raise ConfigError(
                f"the optimizer's parameter groups differ in {', '.join(differ)}: a rule has one for all of them. Take one; groups may differ "
                "in lr, weight_decay and betas."
            )
    for key, value in PLAIN.items():
        if first.get(key, value) != value:
            raise ConfigError(
                f"{kind}({key}={first[key]}): the rules have no counterpart for {key}; leave it at {value}."
            )
    rate = float(first["lr"])
    found: dict[str, Any] = {
        "schedule.lr": rate,
        "schedule.name": "constant",
        "schedule.warmup_epochs": 0.0,
        "rule.weight_decay": float(first["weight_decay"]),
    }
    if kind == "SGD":
        return found | {"rule.name": "asgd", "rule.momentum": float(first["momentum"])}
    if kind == "Adagrad":
        return found | {"rule.name": "adagrad", "rule.momentum": 0.0}
    if kind in ADAPTIVE:
        beta1, beta2 = first["betas"]
        return found | {
            "rule.name": ADAPTIVE[kind],
            "rule.beta1": beta1,
            "rule.beta2": beta2,
            "rule.eps": first["eps"],
        }
    raise ConfigError(
        f"the optimizer is torch.optim.{kind}, whose step cannot be made from gradients of different ages here: give one of "
        f"{SUPPORTED}; --rule names others."
    )


def settings_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Settings]:
    """Return what the optimizer's groups ask for parameters, by name, where it is not what `options_of` says of all.

    Raises ConfigError unless the optimizer has exactly the parameters that are trained.
    """
    first, group_of = _fastest(optimizer), {}
    for group in optimizer.param_groups:
        group_of |= {id(parameter): group for parameter in group["params"]}
    own = dict(model.named_parameters())
    left_out = [name for name, p in own.items() if p.requires_grad and id(p) not in group_of]
    if left_out:
        raise ConfigError(
            f"{len(left_out)} parameters of the network are not in the optimizer, from {left_out[0]} to {left_out[-1]}, and would be "
            "trained: give them to it, or freeze them with requires_grad_(False) before asgd_mpi.init."
        )
    strangers = len(group_of.keys() - {id(parameter) for parameter in own.values()})
    if strangers:
        raise ConfigError(
            f"{strangers} parameters of the optimizer are not the network's: only model.parameters() are trained and travel. Make "
            "what they belong to a part of the model."
        )
    found = {}
    for name, parameter in own.items():
        group = group_of.get(id(parameter), first)
        differ = {
            key: group[key] for key in ("weight_decay", "betas") if group.get(key) != first.get(key)
        }
        found[name] = Settings(rate=group["lr"] / first["lr"] if first["lr"] else 1.0, **differ)
    return {name: settings for name, settings in found.items() if settings != Settings()}


def _fastest(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the first of the groups with the highest rate, which the rule's settings are taken from."""
    return max(optimizer.param_groups, key=lambda group: group["lr"])

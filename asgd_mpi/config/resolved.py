"""A configuration in force: what a user may leave open is filled in, and the types say so.

`with_recipe` makes it, once, of what was asked (`Config`); what computes is given this one. Three fields stay open in it
until the ranks have met: `data.min_batch` follows from the trial step, `rule.max_drift` and `rule.clip_norm` from the number of
workers (see `written.in_force`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, Union

from asgd_mpi.config import rulebook
from asgd_mpi.config.options import (
    Config,
    DataConfig,
    ExchangeConfig,
    Recipe,
    RuleConfig,
    RunConfig,
    ScheduleConfig,
)
from asgd_mpi.config.written import fetch_wire

OPEN = {"min_batch", "max_drift", "clip_norm"}
# what a task without images has
OF_NO_IMAGE = {"image_size": 1, "resize": 0, "mean": "", "std": ""}

T = TypeVar("T")


@dataclass(kw_only=True)
class ResolvedRun(RunConfig):
    epochs: float


@dataclass(kw_only=True)
class ResolvedData(DataConfig):
    batch_size: int
    image_size: int
    resize: int
    mean: str
    std: str
    augment: Literal["none", "shift", "pad_crop", "paper", "reference"]


@dataclass(kw_only=True)
class ResolvedRule(RuleConfig):
    optimizer: str
    momentum: float
    momentum_at: Literal["dana", "worker", "server", "server_nag", "none"]
    staleness: Literal["delay_adaptive", "inverse", "constant"]
    weight_decay: float
    no_decay: str
    groups: str
    dc_lambda: float
    outer_rate: float
    outer_ahead: float


@dataclass(kw_only=True)
class ResolvedSchedule(ScheduleConfig):
    name: Literal["constant", "step", "cosine", "poly"]
    lr: float
    warmup_epochs: float


@dataclass(kw_only=True)
class ResolvedExchange(ExchangeConfig):
    n_push: Union[int, Literal["auto"]]
    n_fetch: int
    overlap: bool
    fetch_wire: str


@dataclass(kw_only=True)
class Resolved(Config):
    run: ResolvedRun
    data: ResolvedData
    rule: ResolvedRule
    schedule: ResolvedSchedule
    exchange: ResolvedExchange


def with_recipe(config: Config, recipe: Recipe) -> Resolved:
    """Fill in what a configuration leaves open, from the network's recipe or from other fields.

    What follows from images (`data.image_size`, `resize`, `mean`, `std`) has been filled in before, by `data.images.fitted`.
    """
    of_rule, lr = rulebook.defaults(config.rule, recipe)
    run = _filled(ResolvedRun, config.run, epochs=recipe.epochs)
    warmup_epochs = min(recipe.warmup_epochs, recipe.most_warmup * run.epochs)
    n_push = config.exchange.n_push or rulebook.RULEBOOK[config.rule.name].n_push
    exchange = _filled(
        ResolvedExchange,
        config.exchange,
        n_push=n_push,
        overlap=n_push == "auto",
        n_fetch=1 if n_push == "auto" else n_push,
        fetch_wire=fetch_wire(config.exchange),
    )
    outer = {
        "outer_rate": rulebook.outer_rate(config.rule, exchange.overlap),
        "outer_ahead": rulebook.OUTER_AHEAD,
    }
    of_config = {section.name: getattr(config, section.name) for section in fields(Config)}
    changed = {
        "run": run,
        "data": _filled(
            ResolvedData,
            config.data,
            batch_size=recipe.batch_size,
            augment=recipe.augment,
            **OF_NO_IMAGE,
        ),
        "rule": _filled(ResolvedRule, config.rule, groups="", **outer, **of_rule),
        "schedule": _filled(
            ResolvedSchedule,
            config.schedule,
            name=recipe.schedule,
            lr=lr,
            warmup_epochs=warmup_epochs,
        ),
        "exchange": exchange,
    }
    return Resolved(**{**of_config, **changed})


def _filled(kind: type[T], section: Any, **defaults: object) -> T:
    """Return a section with these values where it has None."""
    values = {field.name: getattr(section, field.name) for field in fields(section)}
    for name, value in defaults.items():
        if values[name] is None:
            values[name] = value
    missing = {name for name, value in values.items() if value is None} - OPEN
    assert not missing, f"a complete configuration has a value for each of {missing}"
    return kind(**values)

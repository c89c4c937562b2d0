"""What a value of the configuration can be: the range of every number, the names and paths that can be meant, and what fits.

Pure. `check` raises ConfigError in one line with the option's name. A number that has no row in RANGES is an error of ours: a
test goes through all fields. What depends on the data set is checked by `check_with_data`, on the rule by `rulebook.check`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asgd_mpi.config import rulebook
from asgd_mpi.errors import ConfigError

if TYPE_CHECKING:
    from asgd_mpi.config.options import Config, StagesConfig
    from asgd_mpi.config.resolved import Resolved

MOST = 2**31 - 1  # of what nobody means to be larger, whatever its unit
MOST_SLOTS = 31  # of the ring: the words that say what is in them are read with every fetch
LONGEST_PATH = 4096  # bytes: PATH_MAX of Linux
NO_DECAY = ("bias", "norm", "position")
PATHS = ("run.dir", "run.resume", "data.path", "model.weights")

Range = tuple[Callable[[float], bool], str]  # what holds, and the reason or the remedy


def at_least(least: float, most: float = MOST) -> Callable[[float], bool]:
    return lambda value: least <= value <= most


def above(least: float, most: float = MOST) -> Callable[[float], bool]:
    return lambda value: least < value <= most


def _below_1(value: float) -> bool:
    return 0 <= value < 1


_SECONDS = "give seconds above 0"
_EPOCHS = "give epochs"

RANGES: dict[str, Range] = {
    "run.seed": (at_least(0, 2**63 - 1), "a seed is a whole number from 0 to 2^63 - 1"),
    "run.epochs": (above(0), "there is nothing to train; give more than 0"),
    "run.validate_every": (
        at_least(1e-9),
        f"{_EPOCHS} between validations, > 0; more than --run.epochs for the last one only",
    ),
    "run.timeout_s": (above(0), "every wait needs a limit above 0 seconds"),
    "data.batch_size": (at_least(1), "a batch has 1 image or more"),
    "data.min_batch": (at_least(1), "a batch has 1 image or more"),
    "data.image_size": (at_least(1, 8192), "give the side of a square in pixels, 1 to 8192"),
    "data.resize": (at_least(0, 2 * 8192), "give a short side in pixels, data.image_size or more"),
    "data.threads": (
        at_least(1, 1024),
        "somebody has to read the images; give 1 or more, 1024 at most",
    ),
    "data.lease_batches": (at_least(1), "a lease has 1 batch or more"),
    "rule.momentum": (
        _below_1,
        "momentum is 0 or more and below 1; at 1 the velocity never decays",
    ),
    "rule.weight_decay": (
        at_least(0),
        "give a penalty of 0 or more; below 0 the weights would grow without end",
    ),
    "rule.beta1": (_below_1, "the decay of a mean is 0 or more and below 1"),
    "rule.beta2": (_below_1, "the decay of a mean is 0 or more and below 1"),
    "rule.eps": (
        at_least(1e-30, 1),
        "it keeps a weight without a gradient from a division by 0; give more than 0, such as 1e-8",
    ),
    "rule.max_drift": (at_least(0), "give a share, or 0 for no limit"),
    "rule.clip_norm": (at_least(0), "give a norm, or 0 for no limit"),
    "rule.ema_samples": (at_least(0, 2**62), "give samples, or 0 for no mean"),
    "rule.warm_start_epochs": (at_least(0), f"{_EPOCHS}, or 0 for a cold start"),
    "rule.splits": (
        at_least(1),
        "a step is the mean of workers / splits gradients; give 1 or more",
    ),
    "rule.max_staleness": (at_least(0), "give versions, or 0 for twice the workers"),
    "rule.slack": (at_least(0), "give steps; 0 lets everybody wait for the slowest at every step"),
    "rule.backup": (at_least(0), "give workers; with 0 a step waits for all of them"),
    "rule.alpha": (_below_1, "the spring pulls by a part of the way, above 0 and below 1"),
    "rule.dc_lambda": (at_least(0), "give 0 or more"),
    "rule.outer_rate": (above(0), "the server goes a part of the way, above 0"),
    "rule.outer_ahead": (at_least(0, 1), "a worker goes a share of its way ahead, 0 to 1"),
    "rule.outer_momentum": (_below_1, "momentum is 0 or more and below 1"),
    "rule.outer_pushes": (at_least(0), "give pushes, or 0 for as many as there are workers"),
    "rule.dc_decay": (_below_1, "the decay of a mean is 0 or more and below 1"),
    "schedule.lr": (
        above(0),
        "the learning rate must be above 0, and no more than any network bears",
    ),
    "schedule.warmup_epochs": (at_least(0), f"{_EPOCHS}, or 0 for no warm-up"),
    "schedule.step_epochs": (above(0), f"{_EPOCHS} between two steps of the rate, above 0"),
    "schedule.gamma": (at_least(0), "the rate is multiplied by it; give 0 or more"),
    "schedule.power": (above(0), "with 0 the rate is constant; give more than 0"),
    "exchange.ring": (
        at_least(2, MOST_SLOTS),
        f"one slot is read while the next is written, so at least 2 are needed, and {MOST_SLOTS} at most",
    ),
    "exchange.n_push": (at_least(1), "a push holds 1 batch or more; or give auto"),
    "exchange.n_fetch": (at_least(1), "give 1 batch or more"),
    "exchange.density": (
        lambda value: 0 < value <= 1,
        "give a share above 0; 1 sends all of the numbers",
    ),
    "exchange.density_warmup_epochs": (
        at_least(0),
        f"{_EPOCHS}, or 0 for the same density throughout",
    ),
    "exchange.servers": (at_least(1), "somebody has to serve the weights; give 1 or more"),
    "compute.threads": (
        at_least(0, 4096),
        "give threads of each rank, or 0 to share the cores of a node; 4096 at most",
    ),
    "compute.workers_per_gpu": (at_least(1), "a GPU has 1 worker or more"),
    "compute.micro_batches": (at_least(1), "a batch has 1 part or more"),
    "stages.number": (at_least(1), "a replica has 1 stage or more"),
    "record.interval_s": (above(0), _SECONDS),
    "record.spans": (at_least(0), "give how many to write, 0 for none"),
    "checkpoint.every_s": (at_least(0), "give seconds, or 0 for none by time"),
    "checkpoint.every_samples": (at_least(0, 2**62), "give images, or 0 for none by images"),
    "checkpoint.keep": (
        at_least(1),
        "a run that keeps no checkpoint cannot be resumed; give 1 or more",
    ),
    "failure.retire_after_s": (above(0), _SECONDS),
    "failure.max_nonfinite": (at_least(1), "give 1 or more"),
    "failure.grace_s": (above(0), "workers need some time to say goodbye; give more than 0"),
    "failure.stall_s": (above(0), _SECONDS),
}


def check(config: Config) -> None:
    """Raise ConfigError if a value cannot be meant, or contradicts another one."""
    for option, value, kinds in values(config):
        if value is None:
            _demand(
                type(None) in kinds,
                option,
                "(nothing)",
                "it needs a value; give one, or leave its line out",
            )
        elif isinstance(value, str):
            check_text(f"--{option}", value)
            _demand(
                bool(value.strip()) or option not in ("data.path", "model.name"),
                option,
                "''",
                "it is empty; leave it out for the default",
            )
        elif not isinstance(value, bool):
            check_number(f"--{option}", value, RANGES[option])
    others = [name for name in names(config.rule.no_decay) if name not in NO_DECAY]
    _demand(
        not others,
        "rule.no_decay",
        config.rule.no_decay,
        f"{', '.join(others)} is no kind of parameter; choose of {', '.join(NO_DECAY)}",
    )
    _check_images(config)
    _check_exchange(config)
    _check_stages(config)


def values(config: Config) -> Iterator[tuple[str, Any, tuple]]:
    """Yield the dotted name of each option, its value, and the types that it may have."""
    for section in dataclasses.fields(config):
        own = getattr(config, section.name)
        for name, kinds in kinds_of(type(own)).items():
            yield f"{section.name}.{name}", getattr(own, name), kinds


def kinds_of(section: type) -> dict[str, tuple]:
    """Return the types that each field of a section may have: (int, NoneType) for Optional[int]."""
    hints = typing.get_type_hints(section)
    return {field.name: members(hints[field.name]) for field in dataclasses.fields(section)}


def members(hint: object) -> tuple:
    """Return the types that a hint allows: (int, NoneType) for Optional[int] and for int | None."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def in_words(kinds: tuple) -> str:
    """Return what a field of these types takes, for a message."""
    words = {
        int: "a whole number (int)",
        float: "a number (float)",
        bool: "true or false",
        str: "text",
        Path: "a path",
    }
    said = [
        words.get(kind) or f"one of {', '.join(typing.get_args(kind))}"
        for kind in kinds
        if kind is not type(None)
    ]
    return " or ".join(said)


def names(text: str | None) -> list[str]:
    """Return the names of an option such as rule.no_decay, with commas between them."""
    return [name for part in (text or "").split(",") if (name := part.strip())]


def numbers(text: str | None) -> list[float]:
    """Return the numbers of an option such as data.mean, with commas between them. Raises ValueError."""
    if not text:
        return []
    return [float(part) for part in text.split(",")]


def expand(path: str, option: str) -> str:
    """Return a path with ~ and $VARIABLES replaced, as a shell does. Raises ConfigError if there is no such home or variable."""
    whole = os.path.expanduser(os.path.expandvars(path))
    _demand(
        not whole.startswith(("~", "$")),
        option,
        path,
        "there is no such home directory or variable; a name that begins so is written ./~ or ./$",
    )
    return whole


def check_with_data(config: Resolved, num_samples: int) -> None:
    """Raise ConfigError if a span of a complete configuration is less than an image, or more than can be counted."""
    schedule, epochs = config.schedule, config.run.epochs
    _demand(
        1 <= round(epochs * num_samples) < 2**62,
        "run.epochs",
        epochs,
        f"of {num_samples} training images that is less than one, or more than can be counted",
    )
    if schedule.name == "step":
        _demand(
            round(schedule.step_epochs * num_samples) >= 1,
            "schedule.step_epochs",
            schedule.step_epochs,
            f"of {num_samples} training images that is less than one",
        )
        growth = epochs / schedule.step_epochs * math.log10(max(schedule.gamma, 1))
        _demand(
            growth + math.log10(schedule.lr) < 38,
            "schedule.gamma",
            schedule.gamma,
            "the rate would be past what a float32 holds at the end; give less than 1, as a rate is to fall",
        )


def check_number(name: str, value: float, limit: Range) -> None:
    """Raise ConfigError unless a number is one, and within its limit; `name` as the user gives it: --run.seed."""
    holds, reason = limit
    demand(math.isfinite(value) and holds(value), name, value, reason)


def check_text(name: str, value: str) -> None:
    """Raise ConfigError for what cannot be written down, printed, or be the name of a file."""
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        demand(
            False,
            name,
            ascii(value),
            "the name is not UTF-8, and the records of a run are; rename it, or make a link",
        )
    demand(
        not any(unicodedata.category(character) == "Cc" for character in value),
        name,
        ascii(value),
        "it holds a control character",
    )
    demand(
        size <= LONGEST_PATH,
        name,
        f"{value[:40]}...",
        f"it has {size} bytes; {LONGEST_PATH} are the most",
    )


def _check_images(config: Config) -> None:
    data = config.data
    _demand(
        not data.resize or not data.image_size or data.resize >= data.image_size,
        "data.resize",
        data.resize,
        f"a square of --data.image_size {data.image_size} is cut out of it; give that or more",
    )
    for option, text in (("data.mean", data.mean), ("data.std", data.std)):
        try:
            usable = all(0 <= number <= 1 for number in numbers(text))
        except ValueError:
            usable = False
        _demand(
            usable,
            option,
            text,
            "give numbers from 0 to 1 with commas between them, one for "
            "each channel, such as 0.485,0.456,0.406 (pixels count from 0 to 1 here)",
        )
    missing = "data.mean" if data.std else "data.std"
    _demand(bool(data.mean) == bool(data.std), missing, "''", "mean and std go together; give both")


def _check_exchange(config: Config) -> None:
    exchange = config.exchange
    n_push, n_fetch = exchange.n_push, exchange.n_fetch
    auto = n_push == "auto"
    _demand(
        not (auto and n_fetch not in (None, 1)),
        "exchange.n_fetch",
        n_fetch,
        "with n_push auto every push fetches",
    )
    _demand(
        exchange.wire != "auto" or exchange.fetch_wire in (None, "float32"),
        "exchange.fetch_wire",
        exchange.fetch_wire,
        "with wire auto the format of fetches is chosen, too; leave it out",
    )
    _demand(
        not (auto and exchange.overlap is False),
        "exchange.overlap",
        "false",
        "n_push auto sums on while a push is under way, so it needs the overlap",
    )
    _demand(
        n_push == "auto" or not n_fetch or not n_push or n_fetch % n_push == 0,
        "exchange.n_fetch",
        n_fetch,
        f"the batches of one push are computed on one snapshot, so give a multiple of n_push ({n_push})",
    )


def _check_stages(config: Config) -> None:
    stages, exchange = config.stages, config.exchange
    _demand(
        stages.number == 1 or exchange.wire != "auto",
        "exchange.wire",
        exchange.wire,
        "the stages of a replica share a step, whose time is not measured beforehand; give a format",
    )
    _demand(
        not stages.names or len(stages.names) == stages.number - 1,
        "stages.at",
        stages.at,
        f"{stages.number} stages begin at {stages.number - 1} names beside the first module; this is {len(stages.names)}",
    )
    if stages.cut == "columns":
        _check_columns(stages)
    if stages.number > 1:
        _demand(
            not (exchange.overlap or exchange.n_push == "auto"),
            "stages.number",
            stages.number,
            "the stages of a replica share one vector of weights, so exchange.overlap and n_push auto are not possible",
        )
        _demand(
            config.model.batchnorm != "server_ema",
            "stages.number",
            stages.number,
            "model.batchnorm server_ema takes the statistics of a batch from one rank; recalibrate does not need them",
        )
        _demand(
            not config.compute.compile,
            "stages.number",
            stages.number,
            "compute.compile compiles a network in one piece",
        )
        _demand(
            exchange.wire not in rulebook.COMPRESSED,
            "stages.number",
            stages.number,
            f"exchange.wire {exchange.wire} keeps what it leaves out beside the whole gradient, of which a stage has a part; "
            "bfloat16 takes half of the bytes",
        )
        _demand(
            exchange.fetch_wire not in rulebook.COMPRESSED,
            "stages.number",
            stages.number,
            f"exchange.fetch_wire {exchange.fetch_wire} is read by whole pieces of the weights, of which a stage has parts; bfloat16 takes "
            "half of the bytes",
        )


def _check_columns(stages: StagesConfig) -> None:
    of_chain = "it is for --stages.cut chain; columns are cut as the network draws them"
    _demand(
        stages.number == 2,
        "stages.cut",
        stages.cut,
        f"that takes 2 stages, one for each column, not {stages.number}; give --stages 2",
    )
    _demand(not stages.names, "stages.at", stages.at, f"{of_chain}, so leave it out")
    _demand(
        stages.balance == "time",
        "stages.balance",
        stages.balance,
        f"{of_chain}; leave it at time",
    )
    _demand(
        stages.schedule == "1f1b",
        "stages.schedule",
        stages.schedule,
        "it is for --stages.cut chain; columns compute one micro-batch after the other; leave it at 1f1b",
    )


def demand(holds: bool, name: str, value: object, reason: str) -> None:
    """Raise ConfigError, `name` and `value` before the reason, unless it holds."""
    if not holds:
        raise ConfigError(f"{name} {value}: {reason}.")


def _demand(holds: bool, option: str, value: object, reason: str) -> None:
    demand(holds, f"--{option}", value, reason)

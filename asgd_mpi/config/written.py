"""The configuration that a run writes down, as YAML, and what a later one reads in it.

It is complete: what follows from the network or the number of workers stands in it, too, and the record of an older version says
by what it lacks what was in force then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jsonargparse

from asgd_mpi.config import limits, rulebook
from asgd_mpi.config.options import Config, ExchangeConfig
from asgd_mpi.config.parse import make_parser
from asgd_mpi.config.plain import sections
from asgd_mpi.errors import ConfigError, one_line
from asgd_mpi.untrusted import bounded


# first line of a record
BY_WORKERS = "# of this number of workers, others would have another one: "


def of_this_start(config: Config, start: Config) -> Config:
    """Return the configuration of a run with what `start` says of one start only: it is never taken from an earlier one."""
    once = {
        name: getattr(start.run, name)
        for name in ("resume", "override", "accept_gaps", "dry_run", "inject")
    }
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **once))


def in_force(config: Config, num_workers: int) -> Config:
    """With the values that a run of so many workers has where a complete configuration leaves them open: no field is None."""
    rule = dataclasses.replace(
        config.rule,
        max_drift=rulebook.max_drift(config.rule, num_workers),
        clip_norm=config.rule.clip_norm or 0.0,
        groups=config.rule.groups or "",
    )
    data = dataclasses.replace(
        config.data,
        min_batch=config.data.min_batch or 1,
        resize=config.data.resize or 0,
        mean=config.data.mean or "",
        std=config.data.std or "",
    )
    return dataclasses.replace(config, rule=rule, data=data)


def record(config: Config, num_workers: int) -> str:
    """Return what a run writes down: the values in force, and which of them follow from the number of workers. See `asked`."""
    text = to_yaml(in_force(config, num_workers))
    if config.rule.max_drift is None:
        text = f"{BY_WORKERS}rule.max_drift\n{text}"
    return text


def asked(text: str) -> Config:
    """Read what `record` wrote, with what followed from the number of workers left open. Raises ConfigError."""
    config = from_yaml(text)
    if text.startswith(BY_WORKERS):
        config = dataclasses.replace(config, rule=dataclasses.replace(config.rule, max_drift=None))
    return as_before(config)


def as_before(config: Config) -> Config:
    """Return the configuration of a run, where its record is older than an option with what was in force then.

    Without resize, mean and std: 0 and "", the rule of then (data.augment) and the data set's. Without an optimizer: the rule's; no_decay: none.
    Without outer_rate: 0.7. Without outer_ahead: 0.
    Without groups: none, but those of a loop are not known.
    Without fetch_wire: wire.
    """
    data = config.data
    exchange = config.exchange
    if exchange.fetch_wire is None:
        exchange = dataclasses.replace(exchange, fetch_wire=fetch_wire(exchange))
    resize = 0 if data.resize is None else data.resize
    return dataclasses.replace(
        config,
        data=dataclasses.replace(data, resize=resize, mean=data.mean or "", std=data.std or ""),
        rule=dataclasses.replace(
            config.rule,
            optimizer=rulebook.optimizer_of(config.rule),
            no_decay=config.rule.no_decay or "",
            outer_rate=config.rule.outer_rate or rulebook.OUTER_RATE_WITH_MOMENTUM,
            outer_ahead=config.rule.outer_ahead or 0.0,
            groups=config.rule.groups if data.source == "script" else "",
        ),
        exchange=exchange,
    )


def fetch_wire(exchange: ExchangeConfig) -> str:
    """Return the format of fetched weights where the user names none."""
    if exchange.wire == "auto":
        # until it has been chosen
        return "float32"
    return rulebook.fetch_wire(exchange.wire)


def to_yaml(config: Config) -> str:
    parser = make_parser()
    return parser.dump(jsonargparse.Namespace(**dataclasses.asdict(config)), skip_unset=False)


def from_yaml(text: str) -> Config:
    """Read what `to_yaml` wrote. Raises ConfigError."""
    parser = make_parser()
    try:
        sections(text)
        namespace = parser.instantiate(parser.parse_string(text))
        config = Config(
            **{section.name: namespace[section.name] for section in dataclasses.fields(Config)}
        )
        for name, value, kinds in limits.values(config):
            if value is None and type(None) not in kinds:
                raise ValueError(f"{name} is empty, and is {limits.in_words(kinds)}")
        return config
    except (
        Exception
    ) as error:  # what the parser raises on a text that is none of ours is its own affair
        raise ConfigError(
            f"the configuration cannot be read: {type(error).__name__}: {one_line(str(error))}"
        ) from None


def read(path: Path, reader: Callable[[str], Config] = from_yaml) -> Config:
    """Read the configuration of a run directory with `from_yaml` or `asked`. Raises ConfigError, which names the file."""
    try:
        return reader(bounded.read(path, bounded.LARGEST_YAML).decode())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from None

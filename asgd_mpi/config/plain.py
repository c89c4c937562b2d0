"""A YAML text that holds plain settings in sections, and nothing else: it may come from somebody else."""

from __future__ import annotations

import datetime
import re
import typing

from asgd_mpi.config import limits
from asgd_mpi.config.options import Config
from asgd_mpi.untrusted import bounded


def sections(text: str) -> dict:
    """Return the sections of a YAML text. Raises ValueError, yaml.YAMLError unless it holds nothing but plain values in sections.

    The parser would import what a `class_path` names, and read the file that a `config` names, before it refuses them; and a
    file may come from somebody else.
    """
    found = bounded.load_yaml(text)
    if not isinstance(found, dict):
        return {}
    for name, values in found.items():
        if name == "config":
            raise ValueError(
                "it names another file to read (config); give that one with --config, too"
            )
        if isinstance(values, str) and "." not in str(name):
            raise ValueError(f"{name} is text where settings are needed, one a line below it")
        if not isinstance(values, dict):
            values = {name: values}
        for key, value in values.items():
            if (
                {"class_path", "init_args"} & set(str(key).split("."))
                or isinstance(value, dict)
                or str(value).lstrip().startswith("{")
            ):
                raise ValueError(
                    f"{name} holds more than settings and their values ({key}); nothing of it is loaded"
                )
            if isinstance(value, list) and any(isinstance(one, (list, dict)) for one in value):
                raise ValueError(
                    f"{name} holds lists within lists ({key}); nothing of it is loaded"
                )
            parts = value if isinstance(value, list) else [value]
            if not all(_is_plain(one) for one in parts):
                raise ValueError(
                    f"{name} holds what is no number of 64 bits, no text and no date ({key}); nothing of it is loaded"
                )
    return found


def of_other_kinds(found: dict[str, object]) -> list[str]:
    """Return the options, by dotted names, whose values are of another kind than theirs; names that are no options are left out."""
    kinds = {
        f"{section}.{name}": of
        for section, kind in typing.get_type_hints(Config).items()
        for name, of in limits.kinds_of(kind).items()
    }
    return [
        option
        for option, value in found.items()
        if option in kinds and not any(_is_of(kind, value) for kind in kinds[option])
    ]


def _is_of(kind: object, value: object) -> bool:
    """Return whether a value is of a kind."""
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    if isinstance(kind, type):
        return isinstance(value, kind)
    return value in typing.get_args(kind)


def _is_plain(value: object) -> bool:
    """Return whether a value can be one of a setting: YAML has tags for others."""
    if isinstance(value, str):
        # halves of characters, which cannot be written down
        return not re.search("[\ud800-\udfff]", value)
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return value is None or isinstance(value, (float, datetime.date))

"""A rule of a user's own, by its name: the class, and its options out of a text.

Code is imported here only for a rule that the user has named; who may name one is decided in runtime.trust.
"""

from __future__ import annotations

import dataclasses
import importlib
import operator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import msgspec

from asgd_mpi.errors import ConfigError
from asgd_mpi.model import blame

Base = TypeVar("Base")


def blamed(name: str) -> AbstractContextManager[None]:
    """Turn what its code raises into a ConfigError."""
    return blame.blamed(f"--rule {name} cannot be made", "Mend that, or name another rule")


def find(name: str, base: type[Base]) -> type[Base]:
    """Return the class that package.module:Class names. Raises ConfigError."""
    source, _, attribute = name.partition(":")
    if not attribute:
        raise ConfigError(f"--rule.own {name}: name a class as package.module:Class.")
    found = operator.attrgetter(attribute)(importlib.import_module(source))
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(
            f"--rule {name} is {found!r}: it must be a class that inherits from asgd_mpi.Rule, which gives apply_."
        )
    return found


def options_of(kind: Any, text: str) -> Any:
    """Return an instance of a dataclass with what a text such as `beta=0.9,steps=3` sets; None without a class."""
    given = dict(_pairs(text))
    known: list[str] = []
    if kind:
        known = [field.name for field in dataclasses.fields(kind)]
    for name in given:
        if name not in known:
            raise ConfigError(
                f"--rule.own_options {text}: the rule has no option {name}; give some of {', '.join(known) or 'none'}."
            )
    if kind is None:
        return None
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"--rule.own_options {text}: {error}; give values of the types of {kind.__name__}."
        ) from None


def _pairs(text: str) -> list[tuple[str, str]]:
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise ConfigError(
            f"--rule.own_options {text}: {wrong[0]} has no value; give name=value, with commas between them."
        )
    return [(name.strip(), value.strip()) for name, _, value in pairs]

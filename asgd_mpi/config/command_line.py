"""The command line of every command: read in one way, and what is wrong with it said in one line.

In: a parser with its options, and a row of limits for each that takes a number. Out: the values, or ConfigError, before any
work. A number without a row is an error of ours: a test goes through all options of all commands.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jsonargparse

from asgd_mpi.config import limits
from asgd_mpi.errors import ConfigError

WRONG = re.compile(r'Parser key "([\w.]+)":(?:.*?(?:Given|[Gg]ot) value: ?(.*))?')     # jsonargparse: a value of the wrong type


class _OneLine(argparse.ArgumentParser):
    """A parser whose errors are ConfigErrors; `ranges`: what the number of each option may be, by its name without dashes."""

    ranges: Mapping[str, limits.Range] = {}

    def error(self, message: str, ex: Exception | None = None) -> typing.NoReturn:
        raise ConfigError(explain(message, self)) from None

    def checked(self, options: object, arguments: Sequence[str]) -> None:
        """Raise ConfigError if a value that was read cannot be meant."""
        _demand_no_empty(self, arguments)
        for action in self._actions:
            value = getattr(options, action.dest, None) if "." not in action.dest else options[action.dest]
            for one in value if isinstance(value, list) else [value]:
                _check(self, name_of(action), one)


class Parser(_OneLine, jsonargparse.ArgumentParser):
    """Of a command: `read` returns its options, or raises ConfigError. `short`: forms of options that stand for others."""

    def __init__(self, *arguments: object, ranges: Mapping[str, limits.Range] | None = None, short: Mapping[str, str] | None = None,
                 **settings: object):
        super().__init__(*arguments, exit_on_error=False, allow_abbrev=False, **settings)
        self.ranges, self._short = ranges or {}, short or {}

    def read(self, arguments: Sequence[str] | None) -> jsonargparse.Namespace:
        arguments = [self._long(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
        options = self.parse_args(arguments)
        self.checked(options, arguments)
        return options

    def _long(self, argument: str) -> str:
        name, equals, value = argument.partition("=")
        return self._short.get(name, name) + equals + value


class FirstParser(_OneLine):
    """Of a command whose other options are those of a training: `read` returns its own, and the rest of the command line."""

    def __init__(self, *arguments: object, ranges: Mapping[str, limits.Range] | None = None, **settings: object):
        super().__init__(*arguments, allow_abbrev=False, **settings)
        self.ranges = ranges or {}

    def read(self, arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
        arguments = sys.argv[1:] if arguments is None else list(arguments)
        options, rest = self.parse_known_args(arguments)
        self.checked(options, [argument for argument in arguments if argument not in rest])
        return options, rest


def name_of(action: argparse.Action) -> str:
    """Return what the user calls an option: --batch-size, or RUN_DIR of one that is given without a name."""
    return max(action.option_strings, key=len) if action.option_strings else str(action.metavar or action.dest).upper()


def kinds_of(action: argparse.Action) -> tuple:
    """Return the types that an option takes: (int, NoneType) for Optional[int], (str,) for what is read as it is."""
    return limits.members(getattr(action, "_typehint", None) or action.type or str)


def counts(name: str, text: str, most: int) -> list[int]:
    """Return whole numbers from 1 to `most` that are written with commas between them, in order and each once. Raises ConfigError."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = [0]
    limits.demand(1 <= found[0] and found[-1] <= most, name, text,
                  f"give whole numbers from 1 to {most} with commas between them, such as 1,2,4,8")
    return found


def explain(message: str, parser: argparse.ArgumentParser, more: Iterable[str] = ()) -> str:
    """Return in one line what is wrong: with the option that was meant if one is unknown, or what it takes.

    `more`: other names that options have.
    """
    text, help_ = " ".join(message.split()), f"`{parser.prog} --help` lists"
    actions = {action.dest: action for action in parser._actions}
    wrong = WRONG.match(text)
    if wrong and hasattr(actions.get(wrong[1]), "_typehint"):
        value = (wrong[2] or "").partition(" - Expected")[0].partition(" Given value type")[0] or "''"
        action = actions[wrong[1]]
        return f"{name_of(action)} {value[:80]}: give {limits.in_words(kinds_of(action))}."
    plain = re.match(r"argument (\S+): invalid (?:\w+ value|choice): '?(.*?)'?(?: \(.*)?$", text)
    if plain and plain[1] in parser._option_string_actions:
        return f"{plain[1]} {plain[2] or repr('')}: give {limits.in_words(kinds_of(parser._option_string_actions[plain[1]]))}."
    bare = re.match(r"argument (\S+): expected .*argument", text)
    if bare:
        option = bare[1].rpartition("/")[2]
        return f"{option} has no value: give one after it, and one that begins with - as {option}=VALUE."
    known = [option for action in parser._actions for option in action.option_strings]
    for word in text.removeprefix("unrecognized arguments: ").replace("=", " ").split():
        word = word.strip("'\":")
        if word.startswith("--") and word not in known:
            near = difflib.get_close_matches(word, sorted({*known, *more}), n=3, cutoff=0.5)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            return f"unknown option {word}.{hint} {help_} all of them."
    missing = text.removeprefix("the following arguments are required: ")
    if missing != text:
        names = [name_of(actions[one]) if one in actions else one for one in missing.split(", ")]
        return f"{', '.join(names)} must be given. {help_} what it is."
    return f"{text.rstrip('.')}. {help_} the options and their types."


def _check(parser: _OneLine, name: str, value: object) -> None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        limits.check_number(name, value, parser.ranges[name.lstrip("-")])
    elif value is not None and not isinstance(value, bool):
        limits.check_text(name, str(value))
    if isinstance(value, Path):
        _check_path(name, value)


def _check_path(name: str, path: Path) -> None:
    """Raise ConfigError for a path that cannot even be looked at: a loop of links, a name that is too long, no permission."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):      # it may be what is to be made
        pass
    except OSError as error:
        raise ConfigError(f"{name} {path}: it cannot be looked at ({error.strerror}); give another path.") from error


def _demand_no_empty(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Raise ConfigError for an empty value, unless it is the default: a path that is empty would be the current directory."""
    for before, argument in zip(["", *arguments], arguments):
        name, equals, value = argument.partition("=")
        name, value = (name, value) if equals and name.startswith("--") else (before, argument)
        action = parser._option_string_actions.get(name)
        limits.demand(value != "" or action is not None and action.default == "", name if action else "an argument", "''",
                      "it is empty, as a variable that is not set is; give a value, or leave it out")

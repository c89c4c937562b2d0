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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from types import MappingProxyType

import jsonargparse

from asgd_mpi.config import help_text, limits
from asgd_mpi.errors import ConfigError

MOST_COUNTS = 64  # numbers in a list of them: each is played, or trained, on its own
SHOWN = 60  # characters of such a list in a message
# jsonargparse: a value of the wrong type
WRONG = re.compile(r'Parser key "([\w.]+)":(?:.*?(?:Given|[Gg]ot) value: ?(.*))?')


class _OneLine(argparse.ArgumentParser):
    """A parser whose errors are ConfigErrors; `ranges`: what the number of each option may be, by its name without dashes."""

    ranges: Mapping[str, limits.Range] = {}
    _short: Mapping[str, str] = {}

    def error(self, message: str, ex: Exception | None = None) -> typing.NoReturn:
        raise ConfigError(explain(message, self, self._short)) from None

    def print_help_if_asked(self, arguments: Sequence[str]) -> None:
        """Print the help and raise SystemExit, if a command line asks for it."""
        wanted = help_text.asked(arguments)
        if wanted is not None:
            print(help_text.text(self, self._short, whole=wanted == "all"))
            raise SystemExit(0)

    def checked(self, options: Any, arguments: Sequence[str]) -> None:
        """Raise ConfigError if a value that was read cannot be meant."""
        _demand_no_empty(self, arguments)
        for action in self._actions:
            if "." not in action.dest:
                value = getattr(options, action.dest, None)
            else:
                value = options[action.dest]
            if not isinstance(value, list):
                value = [value]
            for one in value:
                _check(self, name_of(action), one)


class Parser(_OneLine, jsonargparse.ArgumentParser):
    """Of a command: `read` returns its options, or raises ConfigError. `short`: forms of options that stand for others."""

    def __init__(
        self,
        *arguments: Any,
        ranges: Mapping[str, limits.Range] | None = None,
        short: Mapping[str, str] | None = None,
        **settings: Any,
    ):
        super().__init__(*arguments, exit_on_error=False, allow_abbrev=False, **settings)
        self.ranges, self._short = ranges or {}, short or {}

    def read(self, arguments: Sequence[str] | None) -> jsonargparse.Namespace:
        if arguments is None:
            arguments = sys.argv[1:]
        arguments = [self._long(argument) for argument in arguments]
        self.print_help_if_asked(arguments)
        options = self.parse_args(arguments)
        self.checked(options, arguments)
        return options

    def _long(self, argument: str) -> str:
        name, equals, value = argument.partition("=")
        return self._short.get(name, name) + equals + value


class FirstParser(_OneLine):
    """Of a command whose other options are those of a training: `read` returns its own, and the rest of the command line."""

    def __init__(
        self,
        prog: str,
        ranges: Mapping[str, limits.Range] | None = None,
        **settings: Any,
    ):
        super().__init__(prog, allow_abbrev=False, **settings)
        self.ranges = ranges or {}

    def read(self, arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
        if arguments is None:
            arguments = sys.argv[1:]
        self.print_help_if_asked(arguments)
        options, rest = self.parse_known_args(arguments)
        self.checked(options, [argument for argument in arguments if argument not in rest])
        return options, rest


def name_of(action: argparse.Action) -> str:
    """Return what the user calls an option: --batch-size, or RUN_DIR of one that is given without a name."""
    if action.option_strings:
        return max(action.option_strings, key=len)
    return str(action.metavar or action.dest).upper()


def kinds_of(action: argparse.Action) -> tuple:
    """Return the types that an option takes: (int, NoneType) for Optional[int], (str,) for what is read as it is."""
    return limits.members(getattr(action, "_typehint", None) or action.type or str)


def counts(name: str, text: str, most: int) -> list[int]:
    """Return whole numbers from 1 to `most` that are written with commas between them, in order and each once. Raises ConfigError."""
    shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = [0]
    limits.demand(
        1 <= found[0] and found[-1] <= most,
        name,
        shown,
        f"give whole numbers from 1 to {most} with commas between them, such as 1,2,4,8",
    )
    limits.demand(
        len(found) <= MOST_COUNTS,
        name,
        shown,
        f"these are {len(found):,} numbers, each of which takes a run of its own; give {MOST_COUNTS} at most, such as 1,2,4,8",
    )
    return found


def meant(word: str, parser: argparse.ArgumentParser, short: Mapping[str, str]) -> list[str]:
    """Return up to 3 options that an unknown one may have been meant for: alike in the whole name or its last part, or in words of its help."""
    listed = [
        one
        for group in help_text.groups(parser, short)
        for one in group.options
        if one.names[0].startswith("-")
    ]
    names = sorted({name for one in listed for name in one.names})
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.6)
    wanted = word.lstrip("-").rpartition(".")[2].replace("-", "_").lower()
    last = {name: name.lstrip("-").rpartition(".")[2].replace("-", "_") for name in names}
    alike = difflib.get_close_matches(wanted, sorted(set(last.values())), n=2, cutoff=0.75)
    near += [name for part in alike for name in names if last[name] == part]
    near += [name for name in names if last[name].startswith(wanted)]
    said = " ".join(re.split("[_.]", wanted))
    near += [one.names[0] for one in listed if said in one.about.lower() and len(said) > 3]
    option = {name: one for one in listed for name in one.names}
    first = {option[name].names: name for name in reversed(near)}  # one name of each option
    return [name for name in dict.fromkeys(near) if first[option[name].names] == name][:3]


def explain(
    message: str, parser: argparse.ArgumentParser, short: Mapping[str, str] = MappingProxyType({})
) -> str:
    """Return in one line what is wrong: with the option that was meant if one is unknown, or what it takes.

    `short`: forms of options that stand for others.
    """
    text, help_ = " ".join(message.split()), f"`{parser.prog} --help all` lists"
    actions = {action.dest: action for action in parser._actions}
    wrong = WRONG.match(text)
    if wrong and hasattr(actions.get(wrong[1]), "_typehint"):
        value = (wrong[2] or "").partition(" - Expected")[0].partition(" Given value type")[
            0
        ] or "''"
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
            hint = ""
            if near := meant(word, parser, short):
                hint = f" Did you mean {' or '.join(near)}?"
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
    except (FileNotFoundError, NotADirectoryError):  # it may be what is to be made
        pass
    except OSError as error:
        raise ConfigError(
            f"{name} {path}: it cannot be looked at ({error.strerror}); give another path."
        ) from error


def _demand_no_empty(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Raise ConfigError for an empty value, unless it is the default: a path that is empty would be the current directory."""
    for before, argument in zip(["", *arguments], arguments):
        name, equals, value = argument.partition("=")
        if not (equals and name.startswith("--")):
            name, value = before, argument
        action = parser._option_string_actions.get(name)
        limits.demand(
            value != "" or action is not None and action.default == "",
            name if action else "an argument",
            "''",
            "it is empty, as a variable that is not set is; give a value, or leave it out",
        )

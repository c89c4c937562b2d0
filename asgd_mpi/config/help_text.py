"""The help of a command: what a person sets at first, with examples; `--help all` lists the rest, in groups.

In: a parser, with `essentials` (the options that are shown at first; none named: all) and `examples`. Out: text, or the groups
that the page of all options (docs/options.md) is made of.
"""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from asgd_mpi.config import limits

FLAGS = ("-h", "--help")
COLUMN, WIDEST = 26, 100  # where the text beside an option begins, and where lines end
SWITCH = "{true,false}"
MOST_CHOICES = 40  # characters of choices that stand behind a name; more are part of the text
EXAMPLES = {
    "train": (
        "mpirun -np 4 python -m asgd_mpi.train --epochs 5 --run.dir runs/a",
        "mpirun -np 8 python -m asgd_mpi.train --data /scratch/imagenet --model resnet50 --resume auto --run.dir runs/b",
    ),
    "report": (
        "python -m asgd_mpi.report runs/a",
        "python -m asgd_mpi.report runs/a runs/b --out comparison",
    ),
    "evaluate": (
        "python -m asgd_mpi.evaluate runs/a/checkpoints/v000003600 --data data/digits",
        "python -m asgd_mpi.evaluate resnet18-f37072fd.pth --model resnet18 --data /scratch/imagenet",
        "python -m asgd_mpi.evaluate runs/b --task mine:Line",
    ),
    "export": (
        "python -m asgd_mpi.export runs/a --format onnx --out digits.onnx",
        "python -m asgd_mpi.export runs/b/checkpoints/v000003600 --format safetensors",
    ),
    "replay": (
        "python -m asgd_mpi.replay runs/a",
        "python -m asgd_mpi.replay runs/a --until 1200 --debug",
    ),
    "plan": (
        "python -m asgd_mpi.plan runs/one_worker runs/eight_workers",
        "python -m asgd_mpi.plan --probe --parameters 25.6e6 --step-ms 120",
    ),
    "poc": (
        "python -m asgd_mpi.poc --workers 1,2 --minutes 1",
        "python -m asgd_mpi.poc slurm/imagenet_alexnet.yaml --workers 1,2,4 -- --data /scratch/imagenet",
    ),
    "simulate": (
        "python -m asgd_mpi.simulate --workers 64 --rule sync --epochs 5",
        "python -m asgd_mpi.simulate --workers 8 --slow 3x@2 --out runs/simulated",
    ),
    "doctor": (
        "mpirun -np 4 python -m asgd_mpi.doctor",
        "srun --mpi=pmix python -m asgd_mpi.doctor --model resnet50 --data /scratch",
    ),
    "stop": ("python -m asgd_mpi.stop runs/a",),
    "slurm_scripts": ("python -m asgd_mpi.slurm_scripts slurm",),
}


@dataclass(frozen=True)
class Option:
    names: tuple[str, ...]  # as they are typed, the short form first
    takes: str  # N, PATH, {a,b}; empty for a switch
    about: str
    default: str  # empty where the text says it, or where there is none to say
    choices: tuple[str, ...] = ()  # words that it takes, if others than those are few or none


@dataclass(frozen=True)
class Group:
    title: str
    options: tuple[Option, ...]


def asked(arguments: Sequence[str]) -> str | None:
    """Return "all" or "" if a command line asks for help before any `--`, None if it does not."""
    own = list(arguments)
    if "--" in own:
        own = own[: own.index("--")]
    for number, argument in enumerate(own):
        if argument in FLAGS or argument.startswith("--help="):
            if "all" in (argument.partition("=")[2], *own[number + 1 :][:1]):
                return "all"
            return ""
    return None


def groups(parser: argparse.ArgumentParser, short: Mapping[str, str]) -> list[Group]:
    """Return the options of a parser as they are listed. `short`: forms of options that stand for others."""
    found = []
    for group in parser._action_groups:
        listed = (_option(action, short) for action in group._group_actions if _is_listed(action))
        options = tuple(listed)
        if options:
            found.append(Group(str(group.title), options))
    return found


def text(
    parser: argparse.ArgumentParser,
    short: Mapping[str, str],
    essentials: Sequence[str] = (),
    whole: bool = False,
) -> str:
    """Return the help of a command, as wide as the terminal; `essentials`: what is listed unless `whole` is asked for."""
    width = min(WIDEST, shutil.get_terminal_size().columns) - 1
    shown = every = groups(parser, short)
    if essentials and not whole:
        by_name = {name: one for group in every for one in group.options for name in one.names}
        shown = [Group("what people set", tuple(_in_short(by_name[name]) for name in essentials))]
    lines = [" ".join(["usage:", parser.prog, *_usage(parser, short), "[OPTIONS]"]), ""]
    if parser.description:
        lines += [*textwrap.wrap(parser.description, width), ""]
    for group in shown:
        lines += [
            f"{group.title}:",
            *(line for one in group.options for line in _lines(one, width)),
        ]
        lines.append("")
    if parser.epilog:
        lines += [*textwrap.wrap(parser.epilog, width), ""]
    examples = EXAMPLES.get(parser.prog.rpartition(".")[2], ())
    if examples:
        lines += ["examples:", *(f"  {example}" for example in examples), ""]
    left = sum(len(group.options) for group in every) - sum(len(group.options) for group in shown)
    if left:
        lines.append(f"`{parser.prog} --help all` lists {left} more options, in groups.")
    return "\n".join(lines).rstrip()


def _option(action: argparse.Action, short: Mapping[str, str]) -> Option:
    names = tuple(sorted(action.option_strings, key=len)) or (_name(action),)
    brief = tuple(one for one, long in short.items() if long in names)
    about = " ".join((action.help or "").split())
    about = about.partition(" (required, type:")[0].partition(" (type:")[0]
    takes, choices = _takes(action)
    words = tuple(choices_of(action))
    if choices:
        about += f"; one of {', '.join(choices)}"
    default = ""
    if "default" not in about and action.default not in (None, "", argparse.SUPPRESS, False):
        if isinstance(action.default, float):
            default = f"{action.default:g}"
        else:
            default = str(action.default)
    if brief and takes == SWITCH:  # the short form of a switch takes no value
        return Option(brief, "", about, default)
    return Option((*brief, *names), takes, about, default, words)


def _in_short(option: Option) -> Option:
    """Return an option by its shortest name and the first clause of its text."""
    about, *_ = re.split(r"; |\. |, which | \(default: ", option.about)
    return Option(option.names[:1], option.takes, about, option.default)


def choices_of(action: argparse.Action) -> list[str]:
    """Return the words that an option takes, beside numbers and the like; [] if any text is taken."""
    kinds = limits.members(getattr(action, "_typehint", None) or action.type or str)
    named = [str(one) for kind in kinds for one in typing.get_args(kind)]
    if not named and bool in kinds and action.nargs != 0:
        return ["true", "false"]
    return named


def _takes(action: argparse.Action) -> tuple[str, list[str]]:
    """Return what stands for the value of an option, its type where it has no name for one, and the choices that are too many for it."""
    if not action.option_strings or action.nargs == 0:
        return "", []
    kinds = limits.members(getattr(action, "_typehint", None) or action.type or str)
    choices = [one for one in choices_of(action) if one not in ("true", "false")]
    name = str(action.metavar or "")
    if "[=" in name:  # a switch, which may have flags
        return "", []
    if name and not name.startswith("{") and name != action.dest.upper():
        return name, choices
    if len(",".join(choices)) > MOST_CHOICES:
        return "NAME", choices
    if action.dest in limits.PATHS:
        return "PATH", []
    words = {int: "N", float: "NUMBER", bool: SWITCH, Path: "PATH", str: "TEXT"}
    taken = [words[kind] for kind in kinds if kind in words]
    if not taken:
        return f"{{{','.join(choices)}}}", []
    return "|".join([*taken, *choices]), []


def _is_listed(action: argparse.Action) -> bool:
    """Return whether an option is one to type: a section as a whole (--run FILE) is none, --config has it."""
    return action.help is not argparse.SUPPRESS and type(action).__name__ not in (
        "_ActionConfigLoad",
        "_HelpAction",
    )


def _name(action: argparse.Action) -> str:
    return str(action.metavar or action.dest).upper()


def _usage(parser: argparse.ArgumentParser, short: Mapping[str, str]) -> list[str]:
    """Return what must be given, and what may be given without a name."""
    required: set[str] = getattr(parser, "required_args", set())
    words = []
    for action in parser._actions:
        name = _name(action)
        if not action.option_strings:
            forms = {"?": f"[{name}]", "*": f"[{name} ...]", "+": f"{name} [{name} ...]"}
            words.append(forms.get(str(action.nargs), name))
        elif action.required or action.dest in required:
            option = _option(action, short)
            words.append(f"{option.names[0]} {option.takes}")
    return words


def _lines(option: Option, width: int) -> list[str]:
    """Return an option beside its text; a long one has a line of its own."""
    head = f"  {', '.join(option.names)} {option.takes}".rstrip()
    about = option.about
    if option.default:
        about += f" (default: {option.default})"
    beside = textwrap.wrap(about, max(20, width - COLUMN)) or [""]
    if len(head) > COLUMN - 2:
        return [head, *(" " * COLUMN + line for line in beside)]
    rest = [" " * COLUMN + line for line in beside[1:]]
    return [f"{head:{COLUMN}}{beside[0]}", *rest]

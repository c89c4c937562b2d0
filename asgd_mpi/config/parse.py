"""The command line of a training, and the files that it names: an argument list becomes a `Config`, or ConfigError.

Beside the options of `config.options`, by their dotted names, it takes short names, and knows the words of other trainers.
Pure: no MPI, no torch. What every command's line has in common is in `config.command_line`.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path

import jsonargparse
import yaml

from asgd_mpi.config import command_line, help_text, limits
from asgd_mpi.config.options import Config
from asgd_mpi.config.plain import sections
from asgd_mpi.errors import ConfigError
from asgd_mpi.untrusted import bounded


SHORTHANDS = {
    "--data": "--data.path",
    "--model": "--model.name",
    "--rule": "--rule.name",
    "--seed": "--run.seed",
    "--epochs": "--run.epochs",
    "--lr": "--schedule.lr",
    "--batch-size": "--data.batch_size",
    "--n-sync": "--exchange.n_push",
    "--resume": "--run.resume",
    "--override": "--run.override",
    "--dry-run": "--run.dry_run",
    "--stages": "--stages.number",
    "--servers": "--exchange.servers",
    "--inject": "--run.inject",
    "--weights": "--model.weights",
    "--print-config": "--print_config",
}

# words of other trainers, and what they are here
FAMILIAR = {
    "--workers": "the launcher decides: `mpirun -np 5` starts 1 server and 4 workers",
    "--num-workers": "threads that read and decode images are --data.threads",
    "--gpus": "every worker takes a GPU: `mpirun -np 5` uses 4",
    "--gpu": "each worker takes its own; --compute.device cpu takes none",
    "--bs": "that is --batch-size",
    "--out": "that is --run.dir",
    "--output-dir": "that is --run.dir",
    "--optimizer": "that is --rule, with --rule.momentum",
    "--amp": "that is --compute.precision bfloat16",
}

# what `--help` lists at first: what people set, in the order in which they meet it
ESSENTIALS = (
    "--config",
    "--data",
    "--model",
    "--weights",
    "--epochs",
    "--batch-size",
    "--lr",
    "--rule",
    "--n-sync",
    "--seed",
    "--run.dir",
    "--resume",
    "--override",
    "--dry-run",
    "--data.augment",
    "--data.threads",
    "--compute.device",
    "--compute.workers_per_gpu",
    "--compute.precision",
    "--stages",
    "--servers",
    "--checkpoint.every_s",
)


def make_parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog="python -m asgd_mpi.train",
        exit_on_error=False,
        default_env=False,
        description="Train a network by asynchronous SGD: rank 0 serves the weights, every other rank is a worker. Start it "
        "with mpirun or srun; without any option it trains on handwritten digits.",
    )
    parser.add_argument(
        "--config",
        action="config",
        metavar="FILE",
        help="YAML file with the same nesting as the options.",
    )
    parser.add_class_arguments(Config, as_group=False)
    return parser


def parse(arguments: list[str], base: Config | None = None) -> Config:
    """Read a command line (with `--config FILE` anywhere in it); what it does not give is taken from `base`.

    Raises ConfigError; SystemExit(0) for --help.
    """
    parser = make_parser()
    wanted = help_text.asked(arguments)
    if wanted is not None:
        print(help_text.text(parser, SHORTHANDS, ESSENTIALS, whole=wanted == "all"))
        raise SystemExit(0)
    for path in config_files(arguments):
        _check_file(path)
    try:
        with redirect_stderr(io.StringIO()):
            if base:
                parser.set_defaults(
                    {
                        f"{section}.{name}": value
                        for section, values in dataclasses.asdict(base).items()
                        for name, value in values.items()
                    }
                )
            namespace = parser.parse_args(_long_forms(arguments))
    except jsonargparse.ArgumentError as error:
        raise ConfigError(_explain(str(error), parser)) from None
    except OSError as error:
        raise ConfigError(
            f"--config {error.filename}: it cannot be read ({error.strerror}); give a file that you may read."
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--config: the file is not UTF-8 ({error.reason} at byte {error.start}); save it as that."
        ) from None
    config = _expanded(_made(parser, namespace))
    limits.check(config)
    return config


def ours(arguments: Sequence[str]) -> list[str]:
    """Return those words of a script's command line that are options of ours, with their values; others are left alone.

    Raises ConfigError for a name that only one of ours can have, such as --exchange.npush.
    """
    parser = make_parser()
    sections = tuple(f"--{section.name}." for section in dataclasses.fields(Config))
    names = {*parser._option_string_actions, *SHORTHANDS} - {"-h", "--help"}
    found, takes_value = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if name.startswith(sections):
            name = _long_form(name)
        if takes_value or name in names:
            found.append(argument)
        elif name.startswith(sections):
            raise ConfigError(_explain(f"unrecognized arguments: {argument}", parser))
        takes_value = name in names and not equals and name != "--dry-run" and not takes_value
    return found


def long_names(short: Mapping[str, object]) -> dict[str, object]:
    """Return keyword arguments such as `lr` by the dotted names of their options. Raises ConfigError."""
    names = {name[2:].replace("-", "_"): long[2:] for name, long in SHORTHANDS.items()}
    for name in short:
        if name not in names:
            raise ConfigError(
                f"{name}=...: there is no such option; short names are {', '.join(sorted(names))}; give others as "
                'options={"section.key": value}.'
            )
    given = {names[name]: value for name, value in short.items()}
    if ":" in str(given.get("rule.name", "")):
        given["rule.own"] = given.pop("rule.name")
    return given


def config_files(arguments: Sequence[str]) -> list[str]:
    """Return the files that `--config` names in a command line."""
    files = [
        value
        for name, equals, value in (argument.partition("=") for argument in arguments)
        if name == "--config" and equals
    ]
    return files + [value for name, value in zip(arguments, arguments[1:]) if name == "--config"]


def _check_file(path: str) -> None:
    """Raise ConfigError if a file asks for more than settings; what cannot be read the parser tells."""
    try:
        sections(bounded.read(Path(path).expanduser(), bounded.LARGEST_YAML).decode())
    except bounded.OutOfBounds as error:
        raise ConfigError(f"--config {path}: {error.strerror}; it is no configuration.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        pass
    except ValueError as error:
        raise ConfigError(f"--config {path}: {error}.") from None


def _long_forms(arguments: Sequence[str]) -> list[str]:
    """Return a command line without short forms; --task stands for two options, and --rule for one of two."""
    found = [_long_form(argument) for argument in arguments]
    following = [*found[1:], ""]
    for number, argument in enumerate(found):
        name, equals, value = argument.partition("=")
        if name == "--rule.name" and ":" in (value if equals else following[number]):
            found[number] = f"--rule.own{equals}{value}"
    tasks = [n for n, argument in enumerate(found) if argument.partition("=")[0] == "--task"]
    for number in tasks:
        found[number] = f"--model.name{found[number].removeprefix('--task')}"
    if tasks:
        found.insert(0, "--data.source=task")
    return found


def _long_form(argument: str) -> str:
    name, equals, value = argument.partition("=")
    if argument == "--dry-run":
        return "--run.dry_run=true"
    if name.startswith("--") and "." in name:
        name = "--" + name[2:].replace("-", "_")
    return SHORTHANDS.get(name, name) + equals + value


def _explain(message: str, parser: jsonargparse.ArgumentParser) -> str:
    """Say in one line what is wrong with a file, or with an option (`command_line.explain`)."""
    text = " ".join(message.split())
    if text.startswith("Unexpected config:"):
        return (
            "--config: the file holds no settings, or a section with nothing below it, such as `data:` alone; give values as "
            f"in `data: {{batch_size: 32}}`, or leave the section out ({text[19:79]})."
        )
    if text.startswith(("Problems parsing config", "Key must be")):
        return f"--config: {text.rstrip('.')}."
    unknown = text.removeprefix("unrecognized arguments: ").partition("=")[0].partition(" ")[0]
    if unknown in FAMILIAR and unknown != text:
        return f"unknown option {unknown}: {FAMILIAR[unknown]}."
    return command_line.explain(text, parser, {**SHORTHANDS, "--task": "--model.name"})


def _made(parser: jsonargparse.ArgumentParser, namespace: jsonargparse.Namespace) -> Config:
    """Return the configuration that was read. Raises ConfigError if something else than a section stands for one."""
    for section in dataclasses.fields(Config):
        if not isinstance(namespace[section.name], jsonargparse.Namespace):
            raise ConfigError(
                f"--config: {section.name} is {namespace[section.name]!r}; it is a section; put its values below it, indented."
            )
    whole = parser.instantiate(namespace)
    return Config(**{section.name: whole[section.name] for section in dataclasses.fields(Config)})


def _expanded(config: Config) -> Config:
    """With ~ and $VARIABLES of paths replaced, as a shell would: it does not see those of a file. Raises ConfigError."""
    for option in limits.PATHS:
        section, name = option.split(".")
        before = getattr(config, section)
        if isinstance(path := getattr(before, name), str):
            changed = dataclasses.replace(before, **{name: limits.expand(path, option)})
            config = dataclasses.replace(config, **{section: changed})
    return config

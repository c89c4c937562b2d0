"""Whose code may be imported: a run directory or a checkpoint may have been sent by somebody else, and names a function.

The networks of this package and of torchvision's own list are free. A function of the user's own, package.module:function, is
imported only if the user names it in this command (--model, or a --config file that lies in no run directory), or if this user
has started the run at this path before with the same source: `record` writes the sha256 of the module's file, and of the
packages around it, to $XDG_STATE_HOME/asgd_mpi/networks (~/.local/state), outside of the run directory, since what lies in
there proves nothing. A module inside the run directory is never taken by the record. What a recorded module imports itself is
found as Python finds it. Nothing is executed to find out: files are located, and read.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from asgd_mpi.config.parse import config_files
from asgd_mpi.errors import ConfigError, RunDirError
from asgd_mpi.record.disk import write_whole

# the options that name code, by the one that is told
NAMED_BY = {
    "--model": ("--model", "--model.name", "--task"),
    "--rule": ("--rule", "--rule.name", "--rule.own"),
}
# one of them beside config.yaml: a run directory
MARKS = ("metrics", "checkpoints", "pushes.log", "versions.json")


class Known(msgspec.Struct):
    """A network that this user has named for a run."""

    run: str  # absolute path
    model: str
    sources: dict[str, str]  # file -> sha256


def demand(model: str, named: str, run: Path, option: str = "--model") -> None:
    """Raise ConfigError if `model`, which something in run directory `run` names, is code that the user has not asked for.

    named: what the user has named in this command, if anything. `option`: by which; with --rule it is a rule's, of which no record
    is kept.
    """
    if is_free(model) or model == named:
        return
    sources, known = find_sources(model), _read(run)
    if (
        known
        and known.model == model
        and sources
        and known.sources == sources
        and not _lies_in(run, sources)
    ):
        return
    why = (
        "you have not named it, and there is no record that you have trained this run here with it"
    )
    if known and known.model == model:
        why = "its source is another one than when you trained this run here, or lies in the run directory itself"
    where = list(sources)[-1] if sources else "which is not found from here"
    raise ConfigError(
        f"{run} names the {'rule' if option == '--rule' else 'network'} {model} ({where}): to use it means to run that code, and {why}. If you know it, "
        f"name it: {option} {model}"
    )


def demand_outside(script: str, run: Path) -> None:
    """Raise ConfigError for a script that lies in the run directory: that may have been sent by somebody else."""
    if _lies_in(run, {script: ""}):
        raise ConfigError(
            f"--script {script} lies in the run directory {run}, which may have come from somebody else: to use it means to run "
            "it. Give your own copy."
        )


def demand_named(model: str, arguments: Sequence[str], option: str = "--model") -> None:
    """Raise ConfigError if a command line takes `model` from a configuration that lies in a run directory."""
    for run in _runs_of_configs(arguments):
        demand(model, named(model, arguments, option), run, option)


def named(model: str, arguments: Sequence[str], option: str = "--model") -> str:
    """Return `model` if the user has named it: it is what this command line gives, and not only by a run's configuration."""
    given = any(argument.partition("=")[0] in NAMED_BY[option] for argument in arguments)
    return model if given or not _runs_of_configs(arguments) else ""


def record(model: str, run: Path) -> str:
    """Remember that the user has named this network for this run; returns what there is to say if that cannot be."""
    sources = {} if is_free(model) else find_sources(model)
    if not sources or _lies_in(run, sources):
        return ""
    try:
        file = _file_of(run)
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(file, msgspec.json.encode(Known(str(_absolute(run)), model, sources)))
    except (OSError, RuntimeError, RunDirError) as error:
        return (
            f"what this run was trained with is not remembered ({error}): to resume, replay or evaluate it, name the network "
            f"again: --model {model}"
        )
    return ""


def is_free(model: str) -> bool:
    """Return whether a name is one of this package's, or one that is looked up in torchvision's list."""
    return ":" not in model or model.startswith("torchvision:")


def find_sources(model: str) -> dict[str, str]:
    """Return the files that importing package.module:function would run, and their sha256, the module's own last.

    Empty if one cannot be found or read.
    """
    found, path, name = {}, None, ""
    for part in model.partition(":")[0].split("."):
        name = f"{name}.{part}" if name else part
        spec = _find_spec(name, path)
        if spec is None:
            return {}
        path = spec.submodule_search_locations
        if spec.origin and spec.has_location:
            try:
                found[os.path.realpath(spec.origin)] = hashlib.sha256(
                    Path(spec.origin).read_bytes()
                ).hexdigest()
            except OSError:
                return {}
        elif path is None:
            return {}
    return found


def is_run(path: Path) -> bool:
    """Return whether a directory is one that a training made, as far as its names tell."""
    # False for whatever the system says of a name; Path.exists raises
    return os.path.exists(path / "config.yaml") and any(
        os.path.exists(path / mark) for mark in MARKS
    )


def _find_spec(name: str, path: object):
    """Return where a module lies; unlike importlib.util.find_spec this imports no package around it."""
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, path)
        except (ImportError, AttributeError, ValueError):
            continue
        if spec is not None:
            return spec
    return None


def _runs_of_configs(arguments: Sequence[str]) -> list[Path]:
    """Return the run directories that --config files of a command line lie in."""
    parents = [
        Path(os.path.realpath(file)).parent
        for file in config_files(arguments)
        if "\n" not in file and len(file) < 4096
    ]
    return [parent for parent in parents if is_run(parent)]


def _lies_in(run: Path, sources: dict[str, str]) -> bool:
    return any(
        Path(os.path.realpath(source)).is_relative_to(os.path.realpath(run)) for source in sources
    )


def _absolute(run: Path) -> Path:
    return Path(os.path.realpath(run))


def _file_of(run: Path) -> Path:
    """Raises RuntimeError if this user has no home."""
    state = os.environ.get("XDG_STATE_HOME", "")
    home = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return (
        home
        / "asgd_mpi"
        / "networks"
        / f"{hashlib.sha256(os.fsencode(_absolute(run))).hexdigest()[:32]}.json"
    )


def _read(run: Path) -> Known | None:
    """Return the record of a run, if it is this user's own and no one else may write it."""
    try:
        file = _file_of(run)
        for path in (file, file.parent):
            status = os.stat(path)
            if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
                return None
        known = msgspec.json.decode(file.read_bytes(), type=Known)
    except (OSError, RuntimeError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return known if known.run == str(_absolute(run)) else None

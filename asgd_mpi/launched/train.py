"""A task of the user's own, trained by the ranks that call `train`: those of mpirun or srun, or one process alone."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asgd_mpi import api
from asgd_mpi.config.parse import long_names, ours
from asgd_mpi.errors import ConfigError
from asgd_mpi.launched.source import class_of, demand_made_alike, located
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.task import Task


def train(
    task: Task | type[Task],
    *,
    options: Mapping[str, Any] | None = None,
    **short: Any,
) -> Path:
    """Train a task of your own to its end, as `python -m asgd_mpi.train --task` does; every rank calls it, alike.

    Started with `mpirun -np 8 python speech.py` rank 0 serves the weights and the others are workers; started with
    `python speech.py` this process trains, as one worker would, without MPI. The call stands below
    `if __name__ == "__main__":`, since a resume and a replay (`--task speech:Speech`) import the script.

    Args:
        task: a task, or its class; one that is made without arguments.
        options: defaults of options by dotted names, such as {"exchange.n_push": 4}, which go ahead of the task's own; a YAML
            file (--config) overrides them, and the command line overrides both. Other words of the command line are left alone.
        **short: options by their short names: epochs, lr, seed, servers, rule, resume, ...

    Returns the run directory, on every rank. If the run is asked to end sooner (a signal), if it failed, or if nothing is to be
    trained (--dry-run), the process ends here, with the status of `train`.

    Raises:
        ConfigError: a task or an option that cannot be used.

    Example:
        >>> import asgd_mpi
        >>> asgd_mpi.train(asgd_mpi.Task, epochs=3)  # doctest: +SKIP
    """
    kind = class_of(task)
    if not issubclass(kind, Task):
        raise ConfigError(
            f"asgd_mpi.train was given a {kind.__name__}: give a class that inherits from asgd_mpi.Task, or one made of it."
        )
    api.demand_first()
    demand_made_alike(task)
    place = located(kind)
    name = f"{place.module}:{place.name}"
    if api.replays is not None:
        raise ConfigError(
            f"a training of a task is computed again without its script: python -m asgd_mpi.replay RUN_DIR --task {name}"
        )
    own = kind() if task is kind else copy.copy(task)
    given = {**(options or {}), **long_names(short)}
    own.options, own.given = {**own.options, **given}, set(given)
    status, directory = api.train(own, [f"--task={name}", *ours(sys.argv[1:])])
    if directory is None or not RunDir(directory).finished.exists():
        raise SystemExit(status)
    return directory

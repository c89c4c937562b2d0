"""Asynchronous SGD over MPI: rank 0 serves the weights through one RMA window, every other rank trains.

Import nothing heavy here: the report reads run directories without torch or MPI.
"""

import importlib
import os
import sys

__version__ = "0.4.2"
PUBLIC = {
    "init": "asgd_mpi.api",
    "Run": "asgd_mpi.api",
    "Task": "asgd_mpi.task",
    "Rule": "asgd_mpi.optim.rules",
    "train": "asgd_mpi.train",  # a verb, which can be called
    "launch": "asgd_mpi.launch",  # another one
}  # the public names, as a reader wants them, and where they are


def _leave_out_run_directory() -> None:
    """Take the current directory off the path where it is a run directory: `python -m` would import a `numpy.py` from there."""
    here = os.getcwd()
    # of a checkpoint, too
    above = [here, os.path.dirname(here), os.path.dirname(os.path.dirname(here))]
    if any(
        all(
            os.path.exists(os.path.join(path, mark))
            for mark in ("config.yaml", "metrics", "checkpoints")
        )
        for path in above
    ):
        sys.path[:] = [path for path in sys.path if path and os.path.realpath(path) != here]


def __getattr__(name: str) -> object:
    """Load a public name when it is first used: torch takes seconds, and the report needs none of it."""
    if name not in PUBLIC:
        raise AttributeError(f"module 'asgd_mpi' has no attribute {name!r}")
    home = importlib.import_module(PUBLIC[name])
    return getattr(home, name, home)


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])


_leave_out_run_directory()

"""Asynchronous SGD over MPI: rank 0 serves the weights through one RMA window, every other rank trains.

Import nothing heavy here: the report reads run directories without torch or MPI.
"""

import os
import sys

__version__ = "0.4.2"


def _leave_out_run_directory() -> None:
    """Take the current directory off the path where it is a run directory: `python -m` would import a `numpy.py` from there."""
    here = os.getcwd()
    above = [here, os.path.dirname(here), os.path.dirname(os.path.dirname(here))]       # of a checkpoint, too
    if any(all(os.path.exists(os.path.join(path, mark)) for mark in ("config.yaml", "metrics", "checkpoints")) for path in above):
        sys.path[:] = [path for path in sys.path if path and os.path.realpath(path) != here]


_leave_out_run_directory()

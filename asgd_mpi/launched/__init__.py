"""The calls of a script or a notebook: `launch` starts ranks on one machine, `train` is one of them."""

from asgd_mpi.launched.start import launch
from asgd_mpi.launched.train import train

__all__ = ["launch", "train"]

"""`asgd_mpi.train` with emulated GPUs: a step sleeps ASGD_BENCH_STEPS_MS, and the gradient is there, at no cost.

So the host's processors and memory have the exchange to themselves, as beside GPUs: the gradient (zeros) lies where the
worker wants it, and is taken for finite, which a GPU finds out in a tenth of a millisecond (244 MB at 3 TB/s), a core here in
tens of them. Everything else is the training itself: same options, same loops.
"""

import os
import sys
import time

from asgd_mpi import train
from asgd_mpi.optim import step
from asgd_mpi.vector.flat import FlatModel
from benchmarks.networks import STEPS_MS


def sleep_(*_: object, **__: object) -> float:
    """In place of `compute_gradient_`: the loss."""
    time.sleep(float(os.environ[STEPS_MS]) / 1e3)
    return 0.0


if __name__ == "__main__":
    # what is replaced is what the worker calls
    assert callable(step.compute_gradient_) and callable(FlatModel.is_finite)
    step.compute_gradient_ = sleep_
    FlatModel.is_finite = lambda flat: True
    sys.exit(train.main())

"""`asgd_mpi.train` with few made-up images to validate; its first worker leaves a trace at ASGD_BENCH_TRACE, if that is set.

The trace is that of torch's profiler, in Chrome's JSON format: kernels and copies on the streams of the GPU where they ran;
without a GPU what the processor did.
"""

import os
import sys

import torch
from torch.profiler import ProfilerActivity, profile

from asgd_mpi import train
from asgd_mpi.data.folder import SyntheticSet
from benchmarks.networks import RANKS

TRACE = "ASGD_BENCH_TRACE"
NUM_VALIDATED = 64  # images: a run ends with a validation, which is not what is measured


def profiled() -> int:
    activity = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        left = train.main()
    found.export_chrome_trace(os.environ[TRACE])
    return left


if __name__ == "__main__":
    SyntheticSet.NUM_SAMPLES["val"] = NUM_VALIDATED
    rank = next(os.environ[name] for name in RANKS if name in os.environ)
    sys.exit(profiled() if rank == "1" and TRACE in os.environ else train.main())

"""`python python_with_gpus.py -m MODULE OPTION...` or `-c CODE`: Python where CUDA sees what CUDA_VISIBLE_DEVICES lists.

The GPUs of the test cluster are files that nobody can open: each worker chooses one, and computes on the CPU.
"""

import os
import runpy
import sys

AWARE = "ASGD_TEST_CUDA_AWARE"


def pretend() -> None:
    from asgd_mpi.process import signals

    signals.install()  # as the program does, before anything heavy is imported
    import torch

    from asgd_mpi.config.topology import Gpu
    from asgd_mpi.runtime import devices

    tokens = [token for token in os.environ.get(devices.VARIABLE, "").split(",") if token]
    devices.visible = lambda: [Gpu(f"{os.uname().nodename}-{token}", "fake") for token in tokens]
    devices.take = lambda places, rank: torch.device("cpu")
    if AWARE in os.environ:  # an MPI library that sends from the memory of these GPUs
        from asgd_mpi.comm import world

        world.takes_gpu_memory = lambda: True


flag, what, *arguments = sys.argv[1:]
if flag == "-c":
    exec(what, {"__name__": "__main__"})
else:
    if what in ("asgd_mpi.train", "asgd_mpi.doctor"):
        pretend()
    sys.argv = [what, *arguments]
    runpy.run_module(what, run_name="__main__", alter_sys=True)

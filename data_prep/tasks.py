"""Which of the tasks of an `srun` or `mpirun` this process is, from its environment: packing needs no message.

Shards are dealt out by their number, and files alone say what is done, so MPI is never started, and the worker
processes may be forked.
"""

import ctypes
import os
import signal
from collections.abc import Mapping

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
# One pair a launcher; PALS is Cray's, PMI is MPICH's and Intel's.
VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("PALS_RANKID", "PALS_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)


def rank_and_size(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return this task's number and how many there are; (0, 1) outside of any launcher."""
    for rank, size in VARIABLES:
        if rank in environment and size in environment:
            return int(environment[rank]), int(environment[size])
    return 0, 1


def end_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends, however it ends.

    So tasks end with the launcher that started them on their host, and worker processes with their task.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

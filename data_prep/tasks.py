"""Which of the tasks of an `srun` or `mpirun` this process is, from its environment: packing needs no message.

Shards are dealt out by their number, and files alone say what is done, so MPI is never started, and the worker
processes may be forked.
"""

import os
from collections.abc import Mapping

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

"""How ranks are started here: `python -m asgd_mpi.launch` in a Slurm allocation prints the launcher that works.

Each launcher starts all tasks of the allocation on a few lines of Python, and the first by which they meet in one world, on
all nodes, is printed (`srun --mpi=pmix`); what was wrong with the others goes to standard error. Status 1 if none works.
What follows `--` starts Python on the nodes, from a container for example:
`python -m asgd_mpi.launch -- apptainer exec --nv IMAGE python`.

A wrong launcher is no error for MPI: it gives as many worlds of one rank as there are tasks. Only the standard library is
used here, so that it runs where the packages are not.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

from asgd_mpi.errors import ConfigError
from asgd_mpi.process import ending, launchers


class _Verb(ModuleType):
    """This module, which is called, too: `asgd_mpi.launch(train, ranks=4)` in a script or a notebook."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from asgd_mpi.launched import launch  # brings torch, which the command does without

        return launch(*arguments, **options)


sys.modules[__name__].__class__ = _Verb


@ending.of_command
def main(arguments: list[str] | None = None) -> int:
    arguments = ending.words(arguments)
    if arguments[:1] != ["--"]:
        ending.demand_no_options(arguments, __doc__)
    allocation = launchers.Allocation.of(os.environ)
    if allocation is None:
        raise ConfigError(
            "there is no Slurm job here: call this within one (sbatch, salloc); elsewhere `mpirun` starts the ranks."
        )
    number = launchers.find(allocation, arguments[1:] or [sys.executable])
    if number is not None:
        print(allocation.launchers()[number])
        return 0
    print(
        f"no launcher brings {allocation.num_tasks} ranks on {allocation.num_nodes} nodes into one world. Load the MPI "
        "that mpi4py was built with in slurm/env.sh, or set LAUNCH there to what your site starts MPI programs with.",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())

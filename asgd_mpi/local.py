"""Print the settings that let `mpirun` start on this machine: `eval "$(python -m asgd_mpi.local)"`.

On a laptop, in a container or in CI, Open MPI refuses to start as root, and refuses more ranks than cores. On a
cluster none of this is wanted: there the scheduler says what may run where.
"""

from __future__ import annotations

import os
import shlex
import sys

from asgd_mpi.process import ending


def settings(is_root: bool) -> dict[str, str]:
    """Environment variables for the launcher; MPICH reads none of them and needs none."""
    variables = {
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",  # more ranks than cores
        "OMPI_MCA_osc": "^ucx",                                     # silences a component that is not used here
    }
    if is_root:
        variables |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return variables


@ending.of_command
def main(arguments: list[str] | None = None) -> int:
    ending.demand_no_options(sys.argv[1:] if arguments is None else arguments, __doc__)
    for name, value in settings(is_root=os.geteuid() == 0).items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Print the settings that let `mpirun` start on this machine: `eval "$(python -m asgd_mpi.local)"`.

On a laptop, in a container or in CI, Open MPI refuses to start as root, and refuses more ranks than cores. On a
cluster none of this is wanted: there the scheduler says what may run where.
"""

from __future__ import annotations

import os
import shlex
import sys

from asgd_mpi.process import ending, mpirun_env


@ending.of_command
def main(arguments: list[str] | None = None) -> int:
    ending.demand_no_options(ending.words(arguments), __doc__)
    for name, value in mpirun_env.settings(is_root=os.geteuid() == 0).items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Shared memory that dead MPI jobs have left: `python -m asgd_mpi.segments` removes it on this host, and says what it removed.

An MPI library keeps the memory that the ranks of a host share in files of /dev/shm. Ranks whose launcher is killed end within
some 3 s, but nobody removes their files: 16 MB of address space each with Open MPI 5, and the whole ring of snapshots if they
die while the window is made. A file is removed if all of this holds: it has the form of a name that Open MPI or MPICH gives
to such files, it belongs to this user, no process has it open or mapped, and all processes that could are seen from here.
Only the standard library is used, so that a job script can call this wherever Python is.
"""

from __future__ import annotations

import sys

from asgd_mpi.process import ending, segments


@ending.of_command
def main(arguments: list[str] | None = None) -> int:
    ending.demand_no_options(ending.words(arguments), __doc__)
    removed = segments.remove_dead()
    if removed:
        print(segments.describe(removed))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The MPI library, begun and ended within a limit: import `MPI` from here.

MPI_Init and MPI_Finalize wait for all ranks, for ever if one of them has died or is stuck (`mpirun --with-ft ulfm`, a stopped
process), and mpi4py holds the interpreter meanwhile, so that nobody could tell. Called through ctypes they leave it free for
a thread that keeps the time. As with mpi4py, the library begins with the first import, and ends with the process.
"""

from __future__ import annotations

import ctypes
import socket
import sys

import mpi4py

# what is begun here is ended by mpi4py, unless `end` was called
mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
from mpi4py import MPI  # noqa: E402

from asgd_mpi.comm import wait  # noqa: E402
from asgd_mpi.process import launchers  # noqa: E402

# from the first rank that is ready to the last one; `--run.timeout_s` of the command line, if given
START_S = 600.0
OPTION = "--run.timeout_s"
# the first process speaks first: without fault tolerance the job ends with it
LATER_S = 2.0


def start_limit_s(arguments: list[str]) -> float:
    """Return the seconds that ranks wait for each other to load: before MPI runs only the command line is known to all."""
    for one, following in zip(arguments, [*arguments[1:], ""]):
        name, is_whole, value = one.partition("=")
        if name == OPTION:
            try:
                return float(value if is_whole else following)
            except ValueError:  # rank 0 will say so
                break
    return START_S


def end(limit_s: float, who: str, status: int) -> None:
    """End the library; a process whose end takes longer than the limit, since another one does not come, ends the job."""
    with wait.at_most(
        limit_s,
        f"{who} waits for all ranks to end MPI, and one does not come: the job is ended with it",
        status,
    ):
        _call("MPI_Finalize")


def _call(name: str, *arguments: object) -> None:
    """Call a function of the library that mpi4py has loaded. Raises RuntimeError if it fails."""
    # linked to it, or loaded for all (MPI4PY_LIBMPI)
    loaded = (ctypes.CDLL(MPI.__file__), ctypes.CDLL(None))
    function = next(getattr(library, name) for library in loaded if hasattr(library, name))
    if (code := function(*arguments)) != 0:
        raise RuntimeError(f"{name} of {MPI.Get_library_version()} failed with code {code}")


def _begin() -> None:
    number = launchers.rank_by_launcher()
    who = f"rank {number} on {socket.gethostname()}"
    limit_s = start_limit_s(sys.argv)
    later_s = LATER_S if number else 0
    with wait.at_most(
        limit_s + later_s,
        f"error: {who} has waited {limit_s:g} s for all ranks to start MPI ({OPTION}, {START_S:g} s unless it is on the "
        "command line): one of them has ended, or is stuck, while Python was loading. See the launcher's output "
        "for who it was, and start the job again; raise the limit if a slow file system only needs longer.",
    ):
        _call("MPI_Init_thread", None, None, int(MPI.THREAD_MULTIPLE), ctypes.byref(ctypes.c_int()))
    for comm in (MPI.COMM_WORLD, MPI.COMM_SELF):
        comm.Set_errhandler(MPI.ERRORS_RETURN)  # mpi4py makes exceptions of them


if not MPI.Is_initialized():
    _begin()

"""Start and end a process that loads torch without the housekeeping of Python, which costs it 0.4 CPU seconds each time.

torch makes many objects that stay. While they are loaded the garbage collector goes through them again and again, and at the end
the interpreter takes them apart one by one, for nothing: the memory goes with the process. CPU seconds of `python -c "import
torch"`: 2.2; after `gc.disable()` 1.8; ended by `os._exit(0)`, too, 1.4 (medians of 4).
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import sys
from typing import NoReturn

_status: int | None = None  # that the process is to end with, once it is known


def begin() -> None:
    """Collect no garbage while modules are loaded. Called first: what registers with atexit later is called before `_end`."""
    gc.disable()
    atexit.register(_end)


def loaded() -> None:
    """Collect garbage from now on, and never look through what has been loaded."""
    gc.freeze()
    gc.enable()


def end(status: int) -> NoReturn:
    """End the process as `sys.exit` does: threads are waited for, and what has registered with atexit is called."""
    global _status
    _status = status
    sys.exit(status)


def leave(status: int) -> NoReturn:
    """End the process at once, without atexit and threads.

    Where MPI has been used, and is over, the C library ends the process: MPICH signs off from its launcher in a function that
    C calls at exit, and the launcher kills all ranks once one has gone without. Python's lock is kept meanwhile: no thread of
    Python runs among what is being taken down.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if _mpi_was_initialized() and not _mpi_is_open():
        ctypes.PyDLL(None).exit(status)
    os._exit(status)


def _end() -> None:
    """End the process without taking the interpreter apart; an exception that nobody caught ends it as usual."""
    if _status is not None and not _mpi_is_open():
        leave(_status)


def _mpi_is_open() -> bool:
    """Return whether mpi4py has yet to end MPI, which it does when the interpreter is gone."""
    return _mpi_was_initialized() and not sys.modules["mpi4py.MPI"].Is_finalized()


def _mpi_was_initialized() -> bool:
    loaded = sys.modules.get("mpi4py.MPI")
    return loaded is not None and loaded.Is_initialized()

"""Train a network by asynchronous SGD: `mpirun -np 8 python -m asgd_mpi.train` (1 server, 7 workers).

Rank 0 reads the command line, checks everything that can be checked (`prepare`), makes the run directory and tells the
others; then it serves and they work, or serve slices of the weights (`--servers`). A worker that fails is retired, and the
others go on; a server that fails ends the job, with its own error as the first thing to see.

Status: 0 finished; 3 finished, but with fewer workers than at the beginning; 75 asked to end by a signal, to be resumed
(`--resume`); 2 something that the user can put right; 1 anything else. `finished.json` in the run directory is written
last, and only when the training is finished: launchers are known to return 0 without that.
"""

from __future__ import annotations

from asgd_mpi.process import interpreter, signals

if __name__ == "__main__":  # before anything heavy is imported
    signals.install()
    interpreter.begin()

import sys
from contextlib import ExitStack
from types import ModuleType
from typing import Any

from asgd_mpi import report
from asgd_mpi.errors import UserError
from asgd_mpi.offline.trainer import finished
from asgd_mpi.process import ending, launchers


class _Verb(ModuleType):
    """This module, which is called, too: `asgd_mpi.train(Speech(), epochs=3)` in a script."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from asgd_mpi.launched import train

        return train(*arguments, **options)


sys.modules[__name__].__class__ = _Verb


@ending.of_command
def main(arguments: list[str] | None = None) -> int:
    signals.install()
    launchers.demand_mpi()
    # they load MPI, which a script that calls this module in one process does without
    from asgd_mpi.comm import mpi
    from asgd_mpi.comm.world import World
    from asgd_mpi.runtime.joining import agree, take_part
    from asgd_mpi.runtime.last_words import fail

    arguments = ending.words(arguments)
    world = World(mpi.start_limit_s(arguments))
    with ExitStack() as hold:  # the lock of the run directory, on rank 0
        try:
            setup = agree(world, arguments, hold)
            if "status" in setup:
                return setup["status"] if world.is_server else 0
            world.renumber(setup["order"])
        except UserError as error:  # some rank did not come
            fail(world, None, error)
        return finished(take_part(world, setup, report.make))


if __name__ == "__main__":
    interpreter.loaded()
    interpreter.end(main())

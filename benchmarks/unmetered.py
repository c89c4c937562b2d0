"""`asgd_mpi.train` that measures nothing: no phase is timed, nothing is counted, no interval is written.

`pushes.log` is kept: a run cannot be audited or replayed without it, and its times say how fast the run was.
"""

from asgd_mpi.process import interpreter

if __name__ == "__main__":  # before anything heavy is imported, as train does
    interpreter.begin()

from contextlib import nullcontext

from asgd_mpi import train
from asgd_mpi.record.meter import Meter


def measure_nothing() -> None:
    """Make every Meter from now on one that does nothing."""
    nowhere = nullcontext()
    Meter.phase = lambda self, name: nowhere
    Meter.add = Meter.tick = Meter.flush = lambda self, **amounts: None


if __name__ == "__main__":
    measure_nothing()
    interpreter.loaded()
    interpreter.end(train.main())

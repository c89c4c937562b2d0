"""`python -m asgd_mpi.train` whose workers of other hosts read by messages, however fast one-sided reads are measured to be."""

from asgd_mpi.process import interpreter

if __name__ == "__main__":  # before anything heavy is imported, as train does
    interpreter.begin()

from asgd_mpi import train
from asgd_mpi.comm import worker_window

worker_window.CLEARLY = float("inf")

if __name__ == "__main__":
    interpreter.loaded()
    interpreter.end(train.main())

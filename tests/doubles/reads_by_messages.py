"""`python -m asgd_mpi.train` whose workers of other hosts read by messages, however fast one-sided reads are measured to be."""

import sys

from asgd_mpi import train
from asgd_mpi.comm import worker_window

worker_window.CLEARLY = float("inf")

if __name__ == "__main__":
    sys.exit(train.main())

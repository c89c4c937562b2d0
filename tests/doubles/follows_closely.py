"""`python -m asgd_mpi.train` whose workers follow an update piece by piece, however small the network is."""

import sys

from asgd_mpi import train
from asgd_mpi.comm import worker_window
from asgd_mpi.vector.partition import PIECE

worker_window.STRIDE = PIECE

if __name__ == "__main__":
    sys.exit(train.main())

"""`python -m asgd_mpi.train` whose workers follow an update piece by piece, however small the network is."""

import sys

from asgd_mpi import train
from asgd_mpi.exchange import reader
from asgd_mpi.server.slices import PIECE

reader.STRIDE = PIECE

if __name__ == "__main__":
    sys.exit(train.main())

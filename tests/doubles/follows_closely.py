"""`python -m asgd_mpi.train` whose workers follow an update piece by piece, however small the network is."""

from asgd_mpi.process import interpreter

if __name__ == "__main__":  # before anything heavy is imported, as train does
    interpreter.begin()

from asgd_mpi import train
from asgd_mpi.comm import worker_window
from asgd_mpi.vector.partition import PIECE

worker_window.STRIDE = PIECE

if __name__ == "__main__":
    interpreter.loaded()
    interpreter.end(train.main())

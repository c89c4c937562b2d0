"""`python -m asgd_mpi.train` in a world that takes every other rank for one of another host: no memory is shared with it."""

from asgd_mpi.process import interpreter

if __name__ == "__main__":  # before anything heavy is imported, as train does
    interpreter.begin()

from asgd_mpi import train
from asgd_mpi.comm.world import World


def on_this_host(self):
    return self.comm.Split(color=self.rank % 2, key=self.rank)


World.on_this_host = on_this_host

if __name__ == "__main__":
    interpreter.loaded()
    interpreter.end(train.main())

"""Two hosts as in `two_hosts`, over an MPI whose messages carry 100,000 bytes at most: every vector travels in parts."""

from asgd_mpi.process import interpreter

if __name__ == "__main__":  # before anything heavy is imported, as train does
    interpreter.begin()

import two_hosts  # noqa: F401 - every other rank is on another host
from mpi4py import MPI

from asgd_mpi import train
from asgd_mpi.comm import world


class Short(MPI.Intracomm):
    def Isend(self, buf, dest, tag=0):
        assert memoryview(buf[0]).nbytes <= world.MAX_BYTES
        return super().Isend(buf, dest, tag)


def start(self, timeout_s=600.0, start=world.World.__init__):
    start(self, timeout_s)
    self.comm = Short(self.comm)


world.MAX_BYTES = 100_000
world.World.__init__ = start

if __name__ == "__main__":
    interpreter.loaded()
    interpreter.end(train.main())

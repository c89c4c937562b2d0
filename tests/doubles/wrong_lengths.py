"""Two hosts as in `two_hosts`, where ranks 1, 3 and 4 send a payload of another length than its kind has.

Each does so with its fifth payload: it is lent eight batches at the start, and who has the others is open. Rank 1 sends 1000 bytes too
many, rank 3 as many too few. Rank 4, on the server's host, whose payload is in the window, sends 1000 bytes behind its fifth header.
"""

from asgd_mpi.process import interpreter

if __name__ == "__main__":  # before anything heavy is imported, as train does
    interpreter.begin()

import numpy as np
import two_hosts  # noqa: F401 - ranks 1 and 3 are on another host than rank 0
from mpi4py import MPI

from asgd_mpi import train
from asgd_mpi.comm import packets, world

MORE = {1: 1000, 3: -1000, 4: 1000}
payloads = 0


class Comm(MPI.Intracomm):
    def Isend(self, buf, dest, tag=0):
        global payloads
        num_bytes = memoryview(buf[0]).nbytes
        counts = tag == packets.TAG and (num_bytes > 1000 or self.rank == 4)
        payloads += counts
        if counts and payloads == 5 and self.rank in MORE:
            self.sent = np.zeros(num_bytes + MORE[self.rank], np.uint8)
            room = min(num_bytes, len(self.sent))
            self.sent[:room] = np.frombuffer(buf[0], np.uint8)[:room]
            buf = [self.sent, MPI.BYTE]
        return super().Isend(buf, dest, tag)


def start(self, timeout_s=600.0, start=world.World.__init__):
    start(self, timeout_s)
    self.comm = Comm(self.comm)


world.World.__init__ = start

if __name__ == "__main__":
    interpreter.loaded()
    interpreter.end(train.main())

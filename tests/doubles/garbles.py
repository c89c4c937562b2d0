"""`asgd_mpi.train` whose workers send nonsense as their 10th packet: GARBLE names what ranks 1, 2, ... send, `nothing` for none."""

from asgd_mpi.process import interpreter

if __name__ == "__main__":  # before anything heavy is imported, as train does
    interpreter.begin()

import dataclasses
import os

from asgd_mpi import train
from asgd_mpi.protocol import messages

RANK = int(os.environ["OMPI_COMM_WORLD_RANK"])
NONSENSE = {
    "bytes": None,
    "worker": {"worker": 77},
    "lease": {"lease": 999},
    "count": {"count": 10**9},
    "future": {"read_version": 10**9},
    "goodbye": {"kind": messages.Kind.GOODBYE},
}

if __name__ == "__main__":
    fault = ["nothing", *os.environ["GARBLE"].split(",")][RANK]
    pack, packets = messages.pack_header, 0

    def garble(header):
        global packets
        packets += 1
        if packets != 10 or fault == "nothing":
            return pack(header)
        other = NONSENSE[fault]
        return (
            os.urandom(messages.HEADER_BYTES)
            if other is None
            else pack(dataclasses.replace(header, **other))
        )

    messages.pack_header = garble
    interpreter.loaded()
    interpreter.end(train.main())

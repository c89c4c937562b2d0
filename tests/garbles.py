"""`asgd_mpi.train` whose rank 1 sends nonsense as its 10th packet: what GARBLE names."""

import dataclasses
import os
import sys

from asgd_mpi import train
from asgd_mpi.exchange import wire

if __name__ == "__main__":
    pack, packets = wire.pack_header, 0
    other = {"bytes": None, "worker": {"worker": 7}, "lease": {"lease": 999}, "count": {"count": 10**9},
             "future": {"read_version": 10**9}, "goodbye": {"kind": wire.Kind.GOODBYE}}[os.environ["GARBLE"]]

    def garble(header):
        global packets
        packets += 1
        if packets != 10 or os.environ["OMPI_COMM_WORLD_RANK"] != "1":
            return pack(header)
        return os.urandom(wire.HEADER_BYTES) if other is None else pack(dataclasses.replace(header, **other))

    wire.pack_header = garble
    sys.exit(train.main())

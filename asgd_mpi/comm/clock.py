"""How far this rank's clock is from that of rank 0, so that the records of all ranks can be laid on one time axis.

Rank 0 answers each other rank in turn, NUM_PINGS times, with its own time. If `asked` and `heard` are this rank's times
around the quickest of them, the answer was given in between, and so the estimate is off by (heard - asked) / 2 at most
(Cristian 1989). Clocks drift apart by some milliseconds an hour; that is not measured.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import numpy as np

from asgd_mpi.comm import wait
from asgd_mpi.comm.mpi import MPI
from asgd_mpi.comm.world import World
from asgd_mpi.config import topology

NUM_PINGS = 16
TAG = 7


class Offset(NamedTuple):
    seconds: float  # to add to this rank's time
    error: float  # at most, seconds


def measure(world: World) -> Offset:
    """Return the offset of this rank's clock; all ranks call it. Raises DeadlineExceeded."""
    if not world.is_server:
        return min((_ask(world) for _ in range(NUM_PINGS)), key=lambda offset: offset.error)
    for rank in range(world.size):
        if rank == topology.SERVER:
            continue
        for _ in range(NUM_PINGS):
            _receive(world, rank)
            _send(world, rank, time.time())
    return Offset(0.0, 0.0)


def _ask(world: World) -> Offset:
    asked = time.time()
    _send(world, topology.SERVER, math.nan)
    answer = _receive(world, topology.SERVER)
    heard = time.time()
    return Offset(answer - (asked + heard) / 2, (heard - asked) / 2)


def _send(world: World, rank: int, value: float) -> None:
    buffer = np.array([value])
    _complete(world, world.comm.Isend(buffer, dest=rank, tag=TAG), rank)


def _receive(world: World, rank: int) -> float:
    buffer = np.empty(1)
    _complete(world, world.comm.Irecv(buffer, source=rank, tag=TAG), rank)
    return float(buffer[0])


def _complete(world: World, request: MPI.Request, rank: int) -> None:
    wait.until(
        request.Test, world.timeout_s, f"rank {world.rank} waits for the clock of rank {rank}"
    )

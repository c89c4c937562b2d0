"""A plain two-sided stream: `mpirun -np 2`. P float32 after P float32, two messages under way, one direction after the other."""

import json
import time

import numpy as np
from mpi4py import MPI

from benchmarks.peers import protocol

UNDER_WAY = 2


def stream(comm: MPI.Comm, vectors: list[np.ndarray], source: int, count: int) -> float:
    """Seconds that a vector takes, of `count`."""
    start = comm.Isend if comm.rank == source else comm.Irecv
    requests = [MPI.REQUEST_NULL] * UNDER_WAY
    comm.Barrier()
    started = time.perf_counter()
    for number in range(count):
        requests[number % UNDER_WAY].Wait()
        requests[number % UNDER_WAY] = start(vectors[number % UNDER_WAY], 1 - comm.rank)
    MPI.Request.Waitall(requests)
    comm.Barrier()
    return (time.perf_counter() - started) / count


def main() -> None:
    options, comm = protocol.options(), MPI.COMM_WORLD
    vectors = [protocol.make_gradient(options.parameters).numpy() for _ in range(UNDER_WAY)]
    told = {}
    for name, source in (("push_s", 1), ("fetch_s", 0)):
        once = comm.bcast(stream(comm, vectors, source, UNDER_WAY))
        told[name] = stream(
            comm, vectors, source, max(2 * UNDER_WAY, round(options.seconds / once))
        )
    if comm.rank == 0:
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()

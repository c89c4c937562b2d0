"""asgd_mpi from another host: `mpirun -np 2`. How long a push takes, and how long the fetch after it.

A push ends when the server has told what became of it, and a fetch when the weights are there.
"""

import json
import statistics
import time

from asgd_mpi.protocol.messages import Header
from asgd_mpi.runtime.client import ServerClient
from benchmarks.peers import ours


class Apart:
    """An exchange whose push and fetch are made one after the other, and timed."""

    def __init__(self):
        self.push_s, self.fetch_s = [], []

    def __call__(self, client: ServerClient, header: Header) -> None:
        times = [time.perf_counter()]
        client.push_gradient(header, fetch=False)
        client.wait()
        times.append(time.perf_counter())
        client.start(None, lambda payload: 0)
        client.wait()
        times.append(time.perf_counter())
        self.push_s.append(times[1] - times[0])
        self.fetch_s.append(times[2] - times[1])


def main() -> None:
    apart = Apart()
    world = ours.main(apart)
    told = world.gather(
        {name: statistics.median(times) for name, times in vars(apart).items() if times}
    )
    if world.is_server:
        print(json.dumps(told[1]), flush=True)
    world.barrier("all ranks to be done")


if __name__ == "__main__":
    main()

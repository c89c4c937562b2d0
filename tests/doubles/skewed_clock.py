"""Every rank prints the offset of its clock as JSON; the clock of rank 2 is 5 s ahead. `mpirun -np 3 python -m skewed_clock`."""

import json
import time

from asgd_mpi.comm import clock
from asgd_mpi.comm.world import World

if __name__ == "__main__":
    world = World()
    if world.rank == 2:
        true_time = time.time
        time.time = lambda: true_time() + 5.0
    found = world.gather(clock.measure(world))
    if world.is_server:
        print(json.dumps(found))

"""A job that has nothing to do but to begin and to end. `python last_words.py WHAT`: what goes wrong in rank 1."""

import os
import signal
import sys
import time

what = sys.argv[1]
is_it = os.environ.get("OMPI_COMM_WORLD_RANK") == "1"
if what == "dies while it loads" and is_it:
    os.kill(os.getpid(), signal.SIGKILL)

from asgd_mpi.comm.mpi import start_limit_s  # noqa: E402 - MPI begins here
from asgd_mpi.comm.world import World  # noqa: E402
from asgd_mpi.errors import RanksLost  # noqa: E402

world = World(start_limit_s(sys.argv))
if what == "dies before all have met" and is_it:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    world.gather(world.rank)
except RanksLost as error:
    print(f"error: {error}", file=sys.stderr)
    world.abort(2)
limit_s = 8.0  # that rank 0 waits for the others; a machine that has much else to do may hold one for some seconds
world.timeout_s = 4.0 if what == "waits for the report" else 600.0
if world.is_server:
    with world.keeping_others():
        time.sleep(1.5 * world.timeout_s if what == "waits for the report" else 0)
if what == "stops at its end" and is_it:
    os.kill(os.getpid(), signal.SIGSTOP)
world.leave(status=0, limit_s=limit_s, status_without_all=3)

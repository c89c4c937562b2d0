"""The ranks of an MPI job drive a loop or a task of the user's; `alone` does the same in one process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from asgd_mpi.comm import mpi
from asgd_mpi.comm.world import World
from asgd_mpi.config import topology
from asgd_mpi.config.topology import Topology
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.runtime import devices
from asgd_mpi.runtime.joining import agree, take_part
from asgd_mpi.runtime.prepare import configured
from asgd_mpi.runtime.rank import Turns
from asgd_mpi.task import Task


class Ranks:
    """This rank of a job, for a loop or a task of the user's; see asgd_mpi.api. Raises ConfigError."""

    is_alone = False

    def __init__(self, own: Task, arguments: list[str], write_report: Callable[[RunDir], Path]):
        self._own, self._arguments, self._write_report = own, arguments, write_report
        self._world = world = World(mpi.start_limit_s(arguments))
        self.directory: Path | None = None
        config = configured(arguments, own)
        on_cpu = config.compute.device == "cpu"
        gpus = [] if world.is_server or on_cpu else devices.visible()
        ranks = world.gather({"host": world.host, "gpus": gpus})
        order = topology.arrange([rank["host"] for rank in ranks], 1, config.exchange.servers)
        places = Topology.of([ranks[rank] for rank in order], 1, config.exchange.servers)
        self.rank = order.index(world.rank)
        self.is_worker = self.rank in places.workers
        self.device = devices.take(places, self.rank)

    def begin(self, hold: ExitStack) -> Turns:
        """Meet the other ranks, and take part in the run; see runtime.joining."""
        setup = agree(self._world, self._arguments, hold, self._own)
        if "status" in setup:
            return setup["status"]
        self._world.renumber(setup["order"])
        self.directory = Path(setup["run"])
        return (yield from take_part(self._world, setup, self._write_report, self._own))

    def give_up(self, status: int) -> int:
        """End the job: something outside of the loop has failed, and the others wait for this rank."""
        if not mpi.MPI.Is_finalized():
            self._world.abort(status)
        return status

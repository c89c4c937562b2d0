"""Who does what: rank 0 serves, every other rank is a worker and drives one device.

Pure: the host name of every rank goes in, roles and devices come out. A worker's device is its position among the
*workers* of its host, so that a server on the same host neither takes a GPU nor shifts the map.
"""

from __future__ import annotations

from dataclasses import dataclass

from asgd_mpi.errors import ConfigError

SERVER = 0  # the rank that serves


@dataclass(frozen=True)
class Topology:
    """The hosts of all ranks, in rank order."""

    hosts: tuple[str, ...]

    @property
    def size(self) -> int:
        return len(self.hosts)

    @property
    def num_workers(self) -> int:
        return self.size - 1

    def num_on_host_of(self, rank: int) -> int:
        return self.hosts.count(self.hosts[rank])

    def position_on_host(self, rank: int) -> int:
        """The position of a worker among the workers of its host, 0 for the first one."""
        return sum(self.hosts[other] == self.hosts[rank] for other in range(SERVER + 1, rank))


def plan(hosts: list[str], tasks_of_scheduler: int | None = None) -> Topology:
    """Give every rank its role. Raises ConfigError if there is no worker, or if the launcher made separate worlds.

    tasks_of_scheduler: the number of tasks that Slurm says it started, if it says so.
    """
    if len(hosts) == 1 and (tasks_of_scheduler or 1) > 1:
        raise ConfigError(
            f"Slurm started {tasks_of_scheduler} tasks, but MPI sees 1 rank in each: they would be {tasks_of_scheduler} "
            "separate trainings. The launcher does not match the MPI library that mpi4py was built with: try "
            "`srun --mpi=pmix` (Open MPI), `srun --mpi=pmi2` (MPICH), or that library's own `mpirun`.")
    if len(hosts) == 1:
        raise ConfigError(
            "1 rank = 1 server + 0 workers: nobody would train. Start at least 2 ranks: `mpirun -np 2 python -m "
            "asgd_mpi.train`. If you did, this mpirun is not of the MPI library that mpi4py uses: take the one that "
            "came with it.")
    return Topology(tuple(hosts))


def device_index(position: int, num_devices: int) -> int:
    """The GPU of the worker at `position` on its host; workers share GPUs in turn if there are fewer GPUs."""
    return position % num_devices


def threads_for(num_cores: int, num_bound: int, num_ranks: int) -> int:
    """Torch threads of a rank: its share of the host's cores, and no more than it is bound to."""
    return max(1, min(num_bound, num_cores // num_ranks))

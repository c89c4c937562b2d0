"""Who does what: rank 0 serves, every other rank is a worker and drives one device.

Pure: what each rank sees of its host goes in, roles and devices come out. A worker's GPU is its position among the
*workers* of its host that see the same GPUs: a server on that host neither takes a GPU nor shifts the map, hosts may
have different numbers of GPUs, and a launcher that shows each task GPUs of its own is taken at its word.

With several stages a worker is a replica of as many ranks on one host. Of N workers, worker w is led by rank w + 1, which
computes stage 0; its stage s is rank 1 + s N + w. Of several servers rank 0 is the first one, which decides and serves slice 0
of the weights; slice s of S is served by rank size - S + s. The ranks are numbered so by `arrange`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from asgd_mpi.errors import ConfigError, few

SERVER = 0  # the rank that serves, or the first one of those


def ranks_of_servers(size: int, num_servers: int) -> list[int]:
    """By slice: rank 0, then the last ones."""
    return [SERVER, *range(size - num_servers + 1, size)]


class Gpu(NamedTuple):
    """One GPU, or one slice of a GPU (MIG)."""

    id: str  # tells it from all others of its host
    name: str = ""


@dataclass(frozen=True)
class Topology:
    """The hosts of all ranks, in rank order, and the GPUs that each rank may use, in its own numbering."""

    hosts: tuple[str, ...]
    gpus: tuple[tuple[Gpu, ...], ...] = ()  # of each rank; empty: all compute on the CPU
    num_stages: int = 1  # ranks of a worker
    num_servers: int = 1

    @classmethod
    def of(cls, ranks: list[dict], num_stages: int = 1, num_servers: int = 1) -> Topology:
        """From what each rank says: {"host": its name, "gpus": [[id, name] of each]}."""
        return cls(
            tuple(rank["host"] for rank in ranks),
            tuple(tuple(Gpu(*gpu) for gpu in rank["gpus"]) for rank in ranks),
            num_stages,
            num_servers,
        )

    @property
    def size(self) -> int:
        return len(self.hosts)

    @property
    def workers(self) -> range:
        """The ranks that compute: all stages of all workers."""
        return range(SERVER + 1, self.size - self.num_servers + 1)

    @property
    def servers(self) -> list[int]:
        """The ranks that serve, by slice."""
        return ranks_of_servers(self.size, self.num_servers)

    @property
    def num_workers(self) -> int:
        return len(self.workers) // self.num_stages

    def worker(self, rank: int) -> int:
        """Whose rank it is, 0-based."""
        return (rank - 1) % self.num_workers

    def stage(self, rank: int) -> int:
        return (rank - 1) // self.num_workers

    def num_on_host_of(self, rank: int) -> int:
        return self.hosts.count(self.hosts[rank])

    def position_on_host(self, rank: int) -> int:
        """Return the position of a worker among the workers of its host, 0 for the first one."""
        return sum(self.hosts[other] == self.hosts[rank] for other in range(SERVER + 1, rank))

    def gpu_index(self, rank: int) -> int | None:
        """Return the GPU of a rank, in its own numbering; None for a server, and where there is none.

        Workers take GPUs in turn if there are fewer GPUs than workers.
        """
        gpus = self._gpus_of(rank)
        if rank not in self.workers or not gpus:
            return None
        before = sum(
            self.hosts[other] == self.hosts[rank] and self._gpus_of(other) == gpus
            for other in range(SERVER + 1, rank)
        )
        return before % len(gpus)

    def gpu(self, rank: int) -> Gpu | None:
        index = self.gpu_index(rank)
        return None if index is None else self._gpus_of(rank)[index]

    def workers_by_gpu(self) -> dict[tuple[str, str], list[int]]:
        """(host, id of a GPU) -> the workers that drive it."""
        taken: dict[tuple[str, str], list[int]] = {}
        for rank in self.workers:
            gpu = self.gpu(rank)
            if gpu is not None:
                taken.setdefault((self.hosts[rank], gpu.id), []).append(rank)
        return taken

    def _gpus_of(self, rank: int) -> tuple[Gpu, ...]:
        return self.gpus[rank] if self.gpus else ()


def check(places: Topology, tasks_of_scheduler: int | None = None) -> None:
    """Raise ConfigError if there is no worker, or if the launcher made separate worlds.

    tasks_of_scheduler: the number of tasks that Slurm says it started, if it says so.
    """
    size = places.size
    # fewer are the launcher's own: one for each node
    if tasks_of_scheduler and tasks_of_scheduler > size:
        raise ConfigError(
            f"Slurm started {tasks_of_scheduler} tasks, but every process is in a world of {size}: they would be "
            f"{tasks_of_scheduler // size} separate trainings. The launcher does not match the MPI library that mpi4py was "
            "built with: try `srun --mpi=pmix` (Open MPI), `srun --mpi=pmi2` (MPICH), or that library's own `mpirun`; "
            "`python -m asgd_mpi.launch` in the allocation tries them all."
        )
    if size == 1:
        raise ConfigError(
            "1 rank = 1 server + 0 workers: nobody would train. Start at least 2 ranks: `mpirun -np 2 python -m "
            "asgd_mpi.train`. If you did, this mpirun is not of the MPI library that mpi4py uses: take the one that "
            "came with it."
        )


def arrange(hosts: Sequence[str], num_stages: int, num_servers: int = 1) -> list[int]:
    """Return the launcher's ranks in the order in which they are numbered: server, stages 0 of all workers, stages 1, ..., other servers.

    The stages of a worker are neighbours on one host. Raises ConfigError naming sizes that fit.
    """
    _demand_size(len(hosts), num_stages, num_servers)
    by_host: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        if rank != SERVER:
            by_host.setdefault(host, []).append(rank)
    others = [
        by_host[host].pop()
        for host in _hosts_of_servers(by_host, hosts[SERVER], num_stages, num_servers - 1)
    ]
    replicas = [
        ranks[start : start + num_stages]
        for ranks in by_host.values()
        for start in range(0, len(ranks), num_stages)
    ]
    return [SERVER, *(rank for stage in zip(*replicas) for rank in stage), *sorted(others)]


def _demand_size(size: int, num_stages: int, num_servers: int) -> None:
    computing = size - num_servers
    below = computing - computing % num_stages
    if computing % num_stages or computing < num_stages:
        fitting = [
            str(number + num_servers) for number in (below, below + num_stages) if number > 0
        ]
        servers = f"{num_servers} server{'s' * (num_servers > 1)}"
        if computing <= 0 or num_stages == 1:
            raise ConfigError(
                f"{size} ranks for {servers}: nobody would train. Ask for {num_servers + num_stages} ranks or more."
            )
        raise ConfigError(
            f"{size} ranks = {servers} + {computing} that compute, which {num_stages} stages per replica do "
            f"not divide; ask for {' or '.join(fitting)} ranks."
        )


def _hosts_of_servers(
    by_host: dict[str, list[int]], first: str, num_stages: int, count: int
) -> list[str]:
    """Return the host of each of `count` further servers: what stages leave over, then one after the other, `first` the last."""
    chosen = [host for host, ranks in by_host.items() for _ in range(len(ranks) % num_stages)]
    if len(chosen) > count:
        host = chosen[0]
        others = f", and {count} more for the other servers" if count else ""
        raise ConfigError(
            f"{host} has {len(by_host[host])} ranks that compute, which {num_stages} stages per replica do not divide, and a "
            f"replica stays on one host. Start a multiple of {num_stages} on each host, 1 more on that of the server{others}."
        )
    while len(chosen) < count:
        taken = Counter(chosen)
        free = [host for host, ranks in by_host.items() if len(ranks) - taken[host] >= num_stages]
        host = min(
            free, key=lambda host: (host == first, taken[host], taken[host] - len(by_host[host]))
        )
        chosen += [host] * num_stages
    return chosen


def demand_gpus(places: Topology, device: str, workers_per_gpu: int) -> None:
    """Raise ConfigError unless all workers have a GPU (none has to, with `device` auto), and few enough share it."""
    without = [rank for rank in places.workers if places.gpu(rank) is None]
    if without and (device == "cuda" or len(without) < len(places.workers)):
        named = few([f"rank {rank} on {places.hosts[rank]}" for rank in without], 4)
        raise ConfigError(
            f"{len(without)} of {len(places.workers)} workers see no GPU ({named}), and would be many times slower than the "
            "others. Look at nvidia-smi and CUDA_VISIBLE_DEVICES there; under Slurm ask for GPUs on every node that has "
            "workers (--gpus-per-node). Or train on the CPU everywhere: --compute.device cpu."
        )
    crowds = {
        gpu: ranks for gpu, ranks in places.workers_by_gpu().items() if len(ranks) > workers_per_gpu
    }
    if crowds:
        (host, _), ranks = next(iter(crowds.items()))
        num_gpus = len({gpu for one, gpu in places.workers_by_gpu() if one == host})
        num_workers = sum(places.hosts[rank] == host for rank in places.workers)
        raise ConfigError(
            f"{host} shows {num_gpus} GPU{'s' * (num_gpus > 1)} to its {num_workers} workers, so that ranks "
            f"{few(ranks, 4)} would share one: each would be slower, and they share its memory. Start one "
            f"worker for each GPU (tasks = GPUs + {places.num_servers}, for the server{'s' * (places.num_servers > 1)}), or say that you want it: --compute.workers_per_gpu "
            f"{max(map(len, crowds.values()))}."
        )


def table(places: Topology) -> list[tuple[int, str, str, str]]:
    """(rank, host, role, device) of every rank."""
    rows = []
    for rank, host in enumerate(places.hosts):
        gpu, index = places.gpu(rank), places.gpu_index(rank)
        if rank in places.servers:
            device = "none"
        elif gpu is None:
            device = "cpu"
        else:
            device = f"cuda:{index} ({', '.join(filter(None, (gpu.name, gpu.id)))})"
        rows.append((rank, host, _role(places, rank), device))
    return rows


def _role(places: Topology, rank: int) -> str:
    if rank in places.servers:
        if places.num_servers > 1:
            return f"server of slice {places.servers.index(rank)}"
        return "server"
    if places.num_stages == 1:
        return "worker"
    return f"worker {places.worker(rank)}, stage {places.stage(rank)}"


def describe(places: Topology, rank: int) -> str:
    """One rank's row in words: `rank 3 on n2, worker, cuda:1 (H200, GPU-...)`."""
    _, host, role, device = table(places)[rank]
    return f"rank {rank} on {host}, {role}, {device}"


def render(rows: list[tuple[int, str, str, str]]) -> str:
    """Return the table as text, a line for each rank."""
    lines: list[tuple[object, str, str, str]] = [("rank", "host", "role", "device"), *rows]
    hosts = max(len(host) for _, host, _, _ in lines)
    roles = max(len(role) for _, _, role, _ in lines)
    return "\n".join(
        f"{rank:>4}  {host:{hosts}}  {role:{roles}}  {device}" for rank, host, role, device in lines
    )


def identities(visible: str | None, uuids: list[str], names: list[str]) -> list[Gpu]:
    """Return the GPUs that a process may use, from its CUDA_VISIBLE_DEVICES and what CUDA counts there.

    CUDA shows a process one MIG slice at most, the first of its list: there the list itself says what there is.
    """
    tokens = [token.strip() for token in (visible or "").split(",") if token.strip()]
    if tokens and tokens[0].startswith("MIG-"):
        return [Gpu(token, "MIG") for token in tokens]
    return [Gpu(uuid, name) for uuid, name in zip(uuids, names)]


def threads_for(num_cores: int, num_bound: int, num_ranks: int) -> int:
    """Torch threads of a rank: its share of the host's cores, and no more than it is bound to."""
    return max(1, min(num_bound, num_cores // num_ranks))

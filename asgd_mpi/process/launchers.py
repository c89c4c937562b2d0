"""What starts the ranks of a job: which launchers an allocation of Slurm has, which of them works, and who speaks before MPI does.

A launcher is tried by starting all tasks of the allocation on a few lines of Python. A wrong one is no error for MPI: it gives
as many worlds of one rank as there are tasks. Only the standard library is used, so that it runs where the packages are not.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from os import environ

from asgd_mpi.errors import ConfigError

# how much later than the first process another one may come to the same error
FIRST_SPEAKS_S = 3.0
TIMEOUT_S = 90.0  # Python starts late from a busy file system
# srun has been seen not to come back though all ranks of a heterogeneous step had ended
TRIES = 2
# one write: launchers mix the lines of ranks
RANK = (
    "import os, socket; from mpi4py import MPI; "
    "os.write(1, f'<rank {MPI.COMM_WORLD.rank} of {MPI.COMM_WORLD.size} on {socket.gethostname()}>\\n'.encode())"
)
RAISED = re.compile(r"[\w.]*(Error|Exception)\b")
SEEN = re.compile(r"<rank (\d+) of (\d+) on ([^<>\s]+)>")
# a process's number, as its launcher has it
VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
# what torchrun sets, and no MPI launcher does
OF_TORCHRUN = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
# those of a launcher that say how many processes there are
SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


@dataclass(frozen=True)
class Allocation:
    """What Slurm gave: tasks and nodes, over all groups of a heterogeneous job."""

    num_tasks: int
    num_nodes: int
    num_groups: int = 1
    is_part: bool = False

    @classmethod
    def of(cls, env: Mapping[str, str]) -> Allocation | None:
        """From the variables of a job; None outside of one."""
        if "SLURM_JOB_ID" not in env:
            return None
        groups = int(env.get("SLURM_HET_SIZE", 1))
        if groups == 1:
            suffixes = [""]
        else:
            suffixes = [f"_HET_GROUP_{group}" for group in range(groups)]
        nodes = [int(env.get(f"SLURM_JOB_NUM_NODES{suffix}", 1)) for suffix in suffixes]
        tasks = [
            int(env.get(f"SLURM_NTASKS{suffix}", number)) for suffix, number in zip(suffixes, nodes)
        ]
        return cls(sum(tasks), sum(nodes), groups)

    def part(self, num_tasks: int) -> Allocation:
        """So many of the tasks, on as few of the nodes as hold them."""
        per_node = -(-self.num_tasks // self.num_nodes)
        return Allocation(num_tasks, -(-num_tasks // per_node), self.num_groups, is_part=True)

    def launchers(self) -> list[str]:
        """Return what to try, the best first: srun passes signals on, and its status is that of the ranks."""
        if self.num_groups > 1:  # mpirun sees the first group only
            groups = ",".join(map(str, range(self.num_groups)))
            return [f"srun --mpi={kind} --het-group={groups}" for kind in ("pmix", "pmi2")]
        # mpirun starts its own daemons with srun
        mpirun = f"env SLURM_MPI_TYPE=none mpirun -n {self.num_tasks}"
        size = ""
        if self.is_part:
            size = f" --nodes={self.num_nodes} --ntasks={self.num_tasks}"
        return [f"srun --mpi=pmix{size}", f"srun --mpi=pmi2{size}", mpirun]


def rank_by_launcher(env: Mapping[str, str] = environ) -> int:
    """Return this process's number as its launcher has it, before MPI runs; 0 without a launcher."""
    return next((int(env[name]) for name in VARIABLES if env.get(name, "").isdecimal()), 0)


def is_first_process(env: Mapping[str, str] = environ) -> bool:
    """Return whether the launcher takes this for its first process: of separate worlds of one rank, one should speak."""
    return all(env.get(name, "0") == "0" for name in VARIABLES)


def let_first_speak() -> None:
    """Wait, on all processes but the first, before this one ends: with the first end the launcher ends all, spoken or not."""
    if not is_first_process():
        time.sleep(FIRST_SPEAKS_S)


def starts_several(env: Mapping[str, str] = environ) -> bool:
    """Return whether a launcher of MPI programs has started this process, and others."""
    return any(int(env.get(name, "0") or 0) > 1 for name in SIZES)


def demand_mpi(env: Mapping[str, str] = environ) -> None:
    """Raise ConfigError if torchrun has started this process: its processes are in no world of MPI."""
    if any(name in env for name in OF_TORCHRUN) and not starts_several(env):
        raise ConfigError(
            "this was started by torchrun, whose processes know each other by NCCL or gloo and not by MPI: each would be a run of "
            "its own. Start it with `mpirun -np N python SCRIPT`, or srun; one process more than GPUs, since rank 0 serves the weights."
        )


def own_launcher(library: str, in_slurm: bool) -> str:
    """Return what starts programs of this MPI library ("Open MPI v5.0.11"), in words."""
    kind = "pmix" if library.startswith("Open MPI") else "pmi2"
    mpirun = f"the mpirun that came with {library}"
    if in_slurm:
        return f"`srun --mpi={kind}`, or {mpirun}; `python -m asgd_mpi.launch` tries all"
    return mpirun


def judge(allocation: Allocation, status: int | None, output: str) -> str:
    """Return what is wrong with a launcher, from how it ended (None: it did not) and what it printed; empty if it works."""
    ranks = SEEN.findall(output)
    sizes, hosts = {int(size) for _, size, _ in ranks}, {host for *_, host in ranks}
    said = [
        line.strip()
        for line in SEEN.sub("", output).splitlines()
        if re.search("[a-z]{3}", line) and "arning" not in line
    ]
    if status is None:
        return f"hangs: not all {allocation.num_tasks} ranks had started and ended after {TIMEOUT_S:.0f} s, {TRIES} times"
    if sizes == {1} and allocation.num_tasks > 1:
        return f"every process is rank 0 of 1 ({len(ranks)} of them): it does not start the MPI that mpi4py uses"
    if status or sizes != {allocation.num_tasks}:
        raised = [line for line in said if RAISED.match(line)]  # ends a traceback
        why = "".join(f": {line}" for line in (raised or said)[:1])
        return f"status {status}, {len(ranks)} of {allocation.num_tasks} ranks came up{why}"
    if len(hosts) < allocation.num_nodes:
        return f"puts all ranks on {len(hosts)} of {allocation.num_nodes} nodes: {', '.join(sorted(hosts))}"
    return ""


def attempt(launcher: str, python: list[str], allocation: Allocation) -> str:
    """Start all ranks by a launcher, again if it hangs; what is wrong with it, or empty."""
    for _ in range(TRIES):
        try:
            done = subprocess.run(
                [*launcher.split(), *python, "-c", RANK],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=TIMEOUT_S,
            )
            return judge(allocation, done.returncode, done.stdout)
        except subprocess.TimeoutExpired:
            continue
        except FileNotFoundError as error:
            return f"there is no {error.filename}"
    return judge(allocation, None, "")


def find(allocation: Allocation, python: list[str]) -> int | None:
    """Return the position in `launchers` of the first that works; what is wrong with those before it goes to standard error."""
    for number, launcher in enumerate(allocation.launchers()):
        wrong = attempt(launcher, python, allocation)
        if not wrong:
            return number
        print(f"{launcher}: {wrong}", file=sys.stderr)
    return None

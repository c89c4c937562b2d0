"""Ask one run to save and leave: `python -m asgd_mpi.stop RUN_DIR`, on the host of its rank 0.

The run directory's `lock` names the process of rank 0 and its host. That process is asked (SIGUSR2) only if it lives here and
has this very file open, so no other run is. It finishes its step, writes a checkpoint and ends with status 75, for `--resume`.
Ctrl-C is less: `mpirun` kills the ranks half a second later.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from asgd_mpi.config import command_line, limits
from asgd_mpi.errors import RunDirError, tell
from asgd_mpi.process import ending
from asgd_mpi.record.rundir import RunDir

RANGES = {"wait-s": (limits.at_least(0), "give seconds, 0 for not waiting at all")}
PROCESSES = Path("/proc")
LOOK_S = 0.1


def make_parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog="python -m asgd_mpi.stop",
        ranges=RANGES,
        description="Ask a run to finish its step, write a checkpoint and end, so that --resume goes on where it was.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=str, help="The run that is to end.")
    parser.add_argument(
        "--wait-s", type=float, default=60.0, help="Seconds to wait until it has ended."
    )
    return parser


@ending.of_command
def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().read(arguments)
    run = RunDir.open(options.run_dir)
    process = find(run)
    try:
        os.kill(process, signal.SIGUSR2)
    except PermissionError:
        raise RunDirError(
            f"process {process}, which trains in {run.path}, belongs to another user: ask them to stop it."
        ) from None
    tell(f"{run.path}: process {process} was asked to finish its step, save and end")
    if job := _job_of(process):
        tell(f"job {job} may go back into the queue then; `scancel {job}` ends it for good")
    if not _ended(run, process, options.wait_s):
        raise RunDirError(
            f"{run.path}: process {process} has not ended within {options.wait_s:g} s. It may still be writing; "
            f"`python -m asgd_mpi.report {run.path} --follow` shows its state."
        )
    newest = run.checkpoints_by_name[-1:]
    where = newest[0] if newest else "none, it was too early"
    tell(f"it has ended; newest checkpoint: {where}\ngo on with --resume {run.path}")
    return 0


def find(run: RunDir) -> int:
    """Return the process of rank 0 of a run that is going on here. Raises RunDirError if there is none."""
    process, host = run.writer()
    if not process:
        raise RunDirError(
            f"{run.path}: its lock names no process, so nobody trains in it, and there is nothing to stop; "
            f"see how it ended: `python -m asgd_mpi.report {run.path}`."
        )
    here = socket.gethostname()
    if host != here:
        raise RunDirError(
            f"{run.path} was last written by process {process} on {host}, and this is {here}, which cannot reach it. Run "
            f"there: ssh {host} python -m asgd_mpi.stop {run.path.absolute()}"
        )
    if not _holds(run, process):
        raise RunDirError(
            f"{run.path}: process {process} on {host}, which trained in it last, has ended (or is in a container of its own); "
            f"`python -m asgd_mpi.train --resume {run.path} --dry-run` says what there is."
        )
    return process


def _holds(run: RunDir, process: int) -> bool:
    """Return whether a process has the lock of a run open. Raises RunDirError if it may not be looked at."""
    lock = os.stat(run.lock)
    try:
        for descriptor in os.scandir(PROCESSES / str(process) / "fd"):
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(descriptor.path), lock):
                    return True
    except PermissionError:
        raise RunDirError(
            f"{run.path}: process {process} belongs to another user, and may not be looked at: ask them to stop it."
        ) from None
    except (FileNotFoundError, ProcessLookupError):
        pass
    return False


def _ended(run: RunDir, process: int, within_s: float) -> bool:
    """Wait until a process no longer writes a run; return whether it does not."""
    deadline = time.monotonic() + within_s
    while _holds(run, process):
        if time.monotonic() >= deadline:
            return False
        time.sleep(LOOK_S)
    return True


def _job_of(process: int) -> str:
    """Return the number of the Slurm job of a process; empty if it has none."""
    with suppress(OSError):
        for entry in (PROCESSES / str(process) / "environ").read_bytes().split(b"\0"):
            name, _, value = entry.partition(b"=")
            if name == b"SLURM_JOB_ID" and value.isdigit():
                return value.decode()
    return ""


if __name__ == "__main__":
    sys.exit(main())

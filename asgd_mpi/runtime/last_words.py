"""What a rank says when an error ends it: on stderr, in the run directory, and to the others."""

from __future__ import annotations

import sys
import sysconfig
import time
import traceback
from pathlib import Path

import asgd_mpi
from asgd_mpi.comm.world import FORWARDING_S, World
from asgd_mpi.errors import DiskRefuses, RunDirError, UserError
from asgd_mpi.process.ending import FAULT, WRONG
from asgd_mpi.record import tee
from asgd_mpi.record.rundir import RunDir

DISK_PATIENCE_S = 4.0
PACKAGE = Path(asgd_mpi.__file__).parent
# whose lines are not the user's
LIBRARIES = ("<", str(PACKAGE), *{sysconfig.get_path(name) for name in ("stdlib", "purelib")})


def tell_server(world: World, run: RunDir, error: BaseException) -> str:
    """Write down what ended the loop of a user's on this rank; returns it, with the line of their code.

    It is not printed: all workers run one script, and rank 0 says it, of each worker in a line, and once more if all have failed.
    """
    short = f"{in_short(error)}{_line_of_user(error)}"
    try:
        tee.write_error(run.error_of(world.rank), short, traceback.format_exc())
    except (OSError, RunDirError):
        tell_error(world, None, error)
    return short


def _line_of_user(error: BaseException) -> str:
    """Return where the user's own code was when an error came; empty if it was not running."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(LIBRARIES)]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""


def tell_error(world: World, run: RunDir | None, error: BaseException) -> str:
    """Say what ended this rank, on stderr and in the run directory; returns it."""
    who = f"rank {world.rank} on {world.host}"
    if isinstance(error, UserError):
        text = f"error: {who}: {error}"
    else:
        text = f"{who} failed:\n{traceback.format_exc()}"
    print(text, file=sys.stderr, flush=True)
    if run is not None:
        try:
            tee.write_error(run.error_of(world.rank), in_short(error), text)
        except (OSError, RunDirError) as second:
            if not isinstance(error, DiskRefuses):  # else it is said already
                print(
                    f"{who}: the error could not be written to the run directory: {second}",
                    file=sys.stderr,
                    flush=True,
                )
    return in_short(error)


def let_server_speak(world: World, error: BaseException) -> None:
    """Wait, if the disk refuses a rank's files: rank 0 writes more often, and ends the job with one message for all."""
    if isinstance(error, DiskRefuses) and not world.is_server:
        time.sleep(DISK_PATIENCE_S)


def in_short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def fail(world: World, run: RunDir | None, error: BaseException) -> None:
    """Say what ended this rank, and end the job."""
    let_server_speak(world, error)
    tell_error(world, run, error)
    time.sleep(FORWARDING_S)
    world.abort(WRONG if isinstance(error, UserError) else FAULT)

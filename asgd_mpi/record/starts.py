"""The starts of a run, from the first and the last lines of what rank 0 wrote in each, and the clock that runs while one of
them does: training time leaves out what lies between two starts.

Times are Unix seconds on rank 0's clock.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from pathlib import Path

import msgspec

from asgd_mpi.record.events import Resume, Start, read_events, read_log, written_at
from asgd_mpi.record.rundir import RunDir

TAIL_BYTES = 1 << 16  # of a file, in which its latest time is looked for


class Restart(msgspec.Struct):
    """One start of a run."""

    restart: int  # 0 for the first
    started: float
    ended: float  # of the last thing that rank 0 wrote in it
    num_workers: int
    version: int = 0  # that it went on from
    num_computing: int = 0  # ranks that compute: all stages of all workers


def starts_of(run: RunDir) -> list[Restart]:
    """Return the starts in which rank 0 got as far as writing its metrics, the first one first."""
    return [
        start
        for rank, restart, path in run.metrics_files
        if rank == 0 and (start := _start(run, restart, path))
    ]


def gaps_s(starts: Sequence[Restart], until: float) -> float:
    """Return the seconds between the end of a start and the next one, as far as they lie before `until`."""
    return sum(
        max(0.0, min(after.started, until) - before.ended)
        for before, after in zip(starts, starts[1:])
    )


def seconds_outside(starts: Sequence[Restart], restarts: Container[int], until: float) -> float:
    """Return how long the starts lasted that are not among `restarts`, as far as they lie before `until`."""
    return sum(
        max(0.0, min(start.ended, until) - start.started)
        for start in starts
        if start.restart not in restarts
    )


def _start(run: RunDir, restart: int, metrics: Path) -> Restart | None:
    log = run.pushes_of(restart)
    begun = _first(read_events, metrics)
    if begun is None:
        return None
    resumed = _first(read_log, log)
    began = written_at(begun)
    return Restart(
        restart,
        began,
        max(began, _latest(read_events, metrics), _latest(read_log, log)),
        begun.num_workers if isinstance(begun, Start) else 0,
        resumed.version if isinstance(resumed, Resume) else 0,
    )


def _first(read, path: Path):
    try:
        return next((entry for entry in read(path) if entry), None)
    except (OSError, UnicodeError):
        return None


def _latest(read, path: Path) -> float:
    """Return the latest time among the last lines: what a thread beside wrote may lie after what came later."""
    latest = -math.inf
    try:
        for entry in read(path, TAIL_BYTES):
            if entry:
                latest = max(latest, written_at(entry))
    except (OSError, UnicodeError):
        pass
    return latest

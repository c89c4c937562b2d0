"""The pushes that made the weights, over all restarts of a run.

A run that is resumed from the checkpoint of version v forgets what was applied after v: those samples are trained
again. Each restart writes a log of its own, which begins with what it goes on from; the last one, and what it
descends from, is the history of the weights. A job that still writes after it was thought dead harms no one's log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asgd_mpi.record.events import Push, Resume, read_log
from asgd_mpi.record.rundir import RunDir

Read = Callable[[Callable[[Path], Iterator[Any]], Path], Iterator[Any]]


@dataclass(frozen=True)
class Session:
    """One start of a run, and how much of it its successor kept."""

    restart: int
    log: Path
    begin: Resume | None           # None for the first start
    kept: int | None = None        # versions from here on are forgotten; None: nothing is


def _plainly(reader: Callable[[Path], Iterator[Any]], path: Path) -> Iterator[Any]:
    return reader(path) if path.exists() else iter(())


def lineage(run: RunDir) -> list[Session]:
    """The sessions that the weights descend from, the first start first."""
    found: list[Session] = []
    restart, kept = max(run.restarts, default=0), None
    while True:
        log = run.pushes_of(restart)
        begin = next((entry for entry in _plainly(read_log, log)), None) if restart else None
        begin = begin if isinstance(begin, Resume) else None
        found.append(Session(restart, log, begin, kept))
        if begin is None or begin.parent >= restart:
            return found[::-1]
        restart, kept = begin.parent, begin.version


def pushes(run: RunDir, read: Read = _plainly, forgotten: list[Push] | None = None) -> Iterator[Push | None]:
    """The pushes of the lineage in order, None for a line that cannot be read; `forgotten` collects the others."""
    for session in lineage(run):
        for entry in read(read_log, session.log):
            if isinstance(entry, Push) and session.kept is not None and entry.version >= session.kept:
                if forgotten is not None:
                    forgotten.append(entry)
            elif entry is None or isinstance(entry, Push):
                yield entry

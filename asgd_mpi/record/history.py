"""The pushes that made the weights, over all restarts of a run.

A run that is resumed from the checkpoint of version v forgets what was applied after v: those samples are trained
again. Each restart writes a log of its own, which begins with what it goes on from; the last one, and what it
descends from, is the history of the weights. A job that still writes after it was thought dead harms no one's log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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


def lineage(run: RunDir, restart: int | None = None) -> list[Session]:
    """The sessions that the weights of a start (None: the last one) descend from, the first start first."""
    found: list[Session] = []
    restart, kept = max(run.restarts, default=0) if restart is None else restart, None
    while True:
        log = run.pushes_of(restart)
        begin = next((entry for entry in _plainly(read_log, log)), None) if restart else None
        begin = begin if isinstance(begin, Resume) else None
        found.append(Session(restart, log, begin, kept))
        if begin is None or begin.parent >= restart:
            return found[::-1]
        if not begin.version and not run.pushes_of(begin.parent).exists():      # it ended before it began a log
            return found[::-1]
        restart, kept = begin.parent, begin.version


def gap(run: RunDir, restart: int | None = None, version: int | None = None, momenta: Iterable[int] = ()) -> str:
    """Return where the pushes that made `version` of a start are no longer all on record; empty if they are.

    None: of the last start, all that it has written. `momenta`: versions that pushes in saved momenta have made, which a
    replay needs, too. Read is as much of each start's log as its successor kept.
    """
    sessions = lineage(run, restart)
    needs = [max([after.begin.version, *after.begin.momenta]) for after in sessions[1:]]
    needs.append(None if version is None else max([version, *momenta]))
    for session, needed in zip(sessions, needs):
        if session.restart and session.begin is None:
            return f"{session.log.name}: its first line, which says what this start went on from, is missing or damaged"
        if needed == 0:
            continue
        damage = _damage(session, needed)
        if damage:
            return f"{session.log.name}: {damage}"
    return ""


def _damage(session: Session, needed: int | None) -> str:
    """Return what is wrong with a log until it has made version `needed`, or up to its end."""
    due = session.begin.version if session.begin else 0
    for number, entry in enumerate(_plainly(read_log, session.log), start=1):
        if needed is not None and due >= needed:
            break
        if entry is None:
            return f"line {number}, at version {due}, is damaged"
        if isinstance(entry, Push):
            if entry.version != due:
                return f"line {number} is push {entry.version}, where {due} is due: lines are missing, or there twice"
            due += 1
    return f"it ends at version {due}, and {needed} was made" if needed is not None and due < needed else ""


def pushes(run: RunDir, read: Read = _plainly, forgotten: list[Push] | None = None) -> Iterator[Push | None]:
    """The pushes of the lineage in order, None for a line that cannot be read; `forgotten` collects the others."""
    for session in lineage(run):
        for entry in read(read_log, session.log):
            if isinstance(entry, Push) and session.kept is not None and entry.version >= session.kept:
                if forgotten is not None:
                    forgotten.append(entry)
            elif entry is None or isinstance(entry, Push):
                yield entry

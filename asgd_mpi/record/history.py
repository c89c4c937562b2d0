"""The pushes that made the weights, over all restarts of a run.

A run that is resumed from the checkpoint of version v forgets what was applied after v: those samples are trained
again. Each restart writes a log of its own, which begins with what it goes on from; the last one, and what it
descends from, is the history of the weights. A job that still writes after it was thought dead harms no one's log.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asgd_mpi.errors import RunDirError
from asgd_mpi.record.events import Push, Resume, read_log
from asgd_mpi.record.rundir import RunDir

Read = Callable[[Callable[[Path], Iterator[Any]], Path], Iterator[Any]]


@dataclass(frozen=True)
class Session:
    """One start of a run, and how much of it its successor kept."""

    restart: int
    log: Path
    begin: Resume | None  # None for the first start
    kept: int | None = None  # versions from here on are forgotten; None: nothing is


def _plainly(reader: Callable[[Path], Iterator[Any]], path: Path) -> Iterator[Any]:
    """Read a log; nothing if it is not there. Raises RunDirError if it cannot be read."""
    try:
        if os.path.lexists(path):
            yield from reader(path)
    except OSError as error:
        raise RunDirError(f"{path} cannot be read: {error.strerror}.") from error


def lineage(run: RunDir, restart: int | None = None) -> list[Session]:
    """Return the sessions that the weights of a start (None: the last one) descend from, the first start first."""
    found: list[Session] = []
    if restart is None:
        restart = max(run.restarts, default=0)
    kept = None
    while True:
        log = run.pushes_of(restart)
        begin = _begin(log) if restart else None
        found.append(Session(restart, log, begin, kept))
        if begin is None or begin.parent >= restart:
            return found[::-1]
        # it ended before it began a log
        if not begin.version and not run.pushes_of(begin.parent).exists():
            return found[::-1]
        restart, kept = begin.parent, begin.version


def _begin(log: Path) -> Resume | None:
    """Return the first line of the log of a start that went on; None if it is missing or cannot be read."""
    try:
        first = next(_plainly(read_log, log), None)
    except RunDirError:
        return None
    return first if isinstance(first, Resume) else None


def gap(
    run: RunDir, restart: int | None = None, version: int | None = None, momenta: Iterable[int] = ()
) -> str:
    """Return where the pushes that made `version` of a start are no longer all on record; empty if they are.

    None: of the last start, all that it has written. `momenta`: versions that pushes in saved momenta have made, which a
    replay needs, too. Read is as much of each start's log as its successor kept.
    """
    sessions = lineage(run, restart)
    # all but the first have begun, else nothing would be known to lie before them
    begins = [session.begin for session in sessions[1:] if session.begin]
    needs: list[int | None] = [max([begin.version, *begin.momenta]) for begin in begins]
    if version is None:
        needs.append(None)
    else:
        needs.append(max([version, *momenta]))
    for session, needed in zip(sessions, needs):
        if session.restart and session.begin is None:
            return f"{session.log.name}: its first line, which says what this start went on from, is missing or damaged"
        if needed == 0:
            continue
        try:
            damage = _damage(session, needed)
        except RunDirError as error:
            return str(error)
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
    if needed is not None and due < needed:
        return f"it ends at version {due}, and {needed} was made"
    return ""


def pushes(
    run: RunDir, read: Read = _plainly, forgotten: list[Push] | None = None
) -> Iterator[Push | None]:
    """Yield the pushes of the lineage in order, None for a line that cannot be read; `forgotten` collects the others."""
    for session in lineage(run):
        made = session.begin.version if session.begin else 0
        for entry in read(read_log, session.log):
            # Once the version is made that the next start went on from, the rest counts no more, whatever it says.
            is_forgotten = session.kept is not None and (
                made >= session.kept or isinstance(entry, Push) and entry.version >= session.kept
            )
            if isinstance(entry, Push):
                made = max(made, entry.version + 1)
            if not is_forgotten and (entry is None or isinstance(entry, Push)):
                yield entry
            elif forgotten is not None and isinstance(entry, Push):
                forgotten.append(entry)

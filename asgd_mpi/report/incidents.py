"""What went wrong in a run and what became of it, in the order of time: restarts, retired workers, refused pushes."""

from __future__ import annotations

from dataclasses import dataclass

from asgd_mpi.record.summary import Summary
from asgd_mpi.record.unit import one_of
from asgd_mpi.report import units

MAX_INCIDENTS = 200  # the earliest ones are shown


@dataclass(frozen=True)
class Incident:
    after: str  # so much training time
    rank: str
    what: str


def incidents(summary: Summary) -> list[Incident]:
    """At most MAX_INCIDENTS; empty for a run without any."""
    found: list[tuple[float, str, str]] = []
    starts, one = summary.restarts, one_of(summary.unit)
    for before, after in zip(starts, starts[1:]):
        found.append(
            (
                after.started,
                "all",
                f"started again (start {after.restart}) with {units.count(after.num_workers, 'worker')}, at "
                f"version {after.version:,}, {units.seconds(max(0.0, after.started - before.ended))} after the last sign of life",
            )
        )
    for loss in summary.retirements:
        kind = "retired" if loss.for_good else "retired until it is heard of again"
        found.append(
            (
                loss.t,
                str(loss.rank),
                f"{kind} at version {loss.version:,}: {loss.reason}; "
                f"{units.count(loss.positions, one)} that it held were given to others",
            )
        )
    rows = [
        Incident(units.seconds(summary.seconds_at(t)), rank, what)
        for t, rank, what in sorted(found)[:MAX_INCIDENTS]
    ]
    rows += [
        Incident("", "0", f"{units.count(count, 'push', 'pushes')} not applied: {reason}")
        for reason, count in summary.refusals.items()
    ]
    if summary.given_up:
        rows.append(
            Incident(
                "",
                "0",
                f"{units.count(summary.given_up, one)} left out: their gradient was never finite",
            )
        )
    if summary.forgotten_pushes:
        rows.append(
            Incident(
                "",
                "0",
                f"{units.count(summary.forgotten_pushes, 'push', 'pushes')} applied after a checkpoint that "
                f"the run then went on from: their {summary.unit} were trained again",
            )
        )
    if summary.forgotten_validations:
        rows.append(
            Incident(
                "",
                "0",
                f"{units.count(summary.forgotten_validations, 'validation')} of versions that were forgotten "
                "with them left out here",
            )
        )
    return rows

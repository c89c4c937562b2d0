"""What the stages of cut networks did, from the intervals of their ranks: how they share the time of a batch, and the bubble.

A batch takes a replica `pipelined` seconds, measured by its leader, from the word to begin until all stages are done. In them
each stage is busy with its own `passes`; the rest is the bubble, of all stages together (S pipelined - sum of passes) over
S pipelined. What was to be expected is that of the plan (`Cut`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from asgd_mpi.record.aggregate import Rank, joined
from asgd_mpi.record.events import Cut
from asgd_mpi.record.starts import Restart


class StageUse(msgspec.Struct):
    """One rank of a replica. The seconds add up to those that its intervals cover."""

    rank: int
    worker: int  # 0-based
    stage: int
    host: str
    device: str
    seconds: float  # covered by intervals,
    passes: float  # ... forward and backward passes,
    # ... for other stages while the replica computes a batch,
    waits: float
    validate: float
    # ... data, push, fetch; of a further stage also while its leader does those
    rest: float


class Pipelines(msgspec.Struct):
    """All replicas of a run."""

    num_stages: int
    num_parts: int  # micro-batches
    schedule: str
    expected: float | None  # bubble by the plan, 0..1
    measured: float | None  # ... and in the run, of all replicas together
    stages: list[StageUse]

    @property
    def are_columns(self) -> bool:
        """In place of a chain."""
        return self.schedule == "columns"


def pipelines(
    cuts: Mapping[int, Cut], starts: Sequence[Restart], files: Sequence[Rank]
) -> Pipelines | None:
    """Return the bubbles of the latest start that cut its networks, and those that cut them alike, for as many workers; None if none did.

    `cuts`: by start; `files`: what each rank did in each start.
    """
    workers = {start.restart: start.num_workers for start in starts if start.restart in cuts}
    if not workers:
        return None
    latest = max(workers)
    cut, num_workers = cuts[latest], workers[latest]
    alike = {
        restart
        for restart, count in workers.items()
        if count == num_workers and _key(cuts[restart]) == _key(cut)
    }
    ranks = {
        rank.rank: rank for rank in joined(file for file in files if alike.issuperset(file.starts))
    }
    uses = []
    for number in range(1, 1 + num_workers * cut.num_stages):
        stage, worker = divmod(number - 1, num_workers)  # see topology
        rank, lead = ranks.get(number), ranks.get(worker + 1)
        if rank is None or lead is None:
            continue
        waits = min(max(0.0, lead.pipelined - rank.passes), max(0.0, rank.seconds - rank.passes))
        validate = min(rank.phases["validate"], max(0.0, rank.seconds - rank.passes - waits))
        uses.append(
            StageUse(
                number,
                worker,
                stage,
                rank.host,
                rank.device,
                rank.seconds,
                rank.passes,
                waits,
                validate,
                max(0.0, rank.seconds - rank.passes - waits - validate),
            )
        )
    whole = sum(ranks[use.worker + 1].pipelined for use in uses)
    measured = None
    if whole:
        measured = 1 - sum(use.passes for use in uses) / whole
    return Pipelines(cut.num_stages, cut.num_parts, cut.schedule, cut.bubble, measured, uses)


def _key(cut: Cut) -> tuple[int, int, str, list[str]]:
    return cut.num_stages, cut.num_parts, cut.schedule, cut.begins

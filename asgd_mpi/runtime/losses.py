"""What to say when no worker is left: that all met one error, which would come again, or what became of each. Pure."""

from __future__ import annotations

import builtins
import re
from collections.abc import Sequence

from asgd_mpi.errors import TOO_FAST, TrainingDiverged, UserError, WorkersLost, few
from asgd_mpi.record.events import Retirement

FEW = 8  # ranks that are named
# of an object in memory: another one in every process
ADDRESS = re.compile(r"\b0x[0-9a-fA-F]+\b")
# errors that a later start need not meet
OUTSIDE = {"DiskRefuses", "DeadlineExceeded", "StageLost", "ServerLost"}


def explain(losses: Sequence[Retirement], version: int) -> UserError:
    """Return the error that ends a run whose workers are all lost for good, at `version`."""
    history = told(losses)
    if all("not finite" in loss.reason and not loss.error for loss in losses):
        return TrainingDiverged(
            f"the loss or the gradient of every worker is no longer finite at version {version}:\n{history}\n"
            f"{TOO_FAST} Checkpoints of before are kept: see checkpoints/ in the run directory."
        )
    if error := common_error(losses):
        ranks = sorted({loss.rank for loss in losses})
        which = "it failed"
        if len(ranks) > 1:
            which = f"all {len(ranks)} have failed of the same error"
        return WorkersLost(
            f"no worker is left at version {version}: {which}\n"
            f"  {error}\nTo start again would meet it again: mend its cause first. Where it was raised: "
            f"error.rank{ranks[0]:03d}.txt in the run directory. What was trained before is kept there."
        )
    return WorkersLost(
        f"no worker is left at version {version}:\n{history}\nMend that, and go on from the checkpoint with "
        "--resume RUN_DIR."
    )


def told(losses: Sequence[Retirement]) -> str:
    """Return a line for each reason, with the ranks that were lost for it, in the order in which the first of them was."""
    ranks: dict[str, list[int]] = {}
    for loss in losses:
        ranks.setdefault(loss.reason, []).append(loss.rank)
    return "\n".join(f"  {_these(numbers)}: {reason}" for reason, numbers in ranks.items())


def _these(numbers: list[int]) -> str:
    """Return some ranks as text, a few of many."""
    numbers = sorted(set(numbers))
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"ranks {numbers[0]} to {numbers[-1]}"
    return f"ranks {few(numbers, FEW)}"


def common_error(losses: Sequence[Retirement]) -> str:
    """Return the error, type and message, that every lost worker has failed of; empty if they failed of several, or from outside."""
    # one that came back, and failed: what it failed of
    last = {loss.rank: loss for loss in losses}
    errors = {ADDRESS.sub("0x...", loss.error) for loss in last.values()}
    if len(errors) != 1:
        return ""
    error = errors.pop()
    return "" if _is_outside(error.partition(":")[0]) else error


def _is_outside(name: str) -> bool:
    kind = getattr(builtins, name, None)
    return name in OUTSIDE or isinstance(kind, type) and issubclass(kind, (OSError, MemoryError))

"""What the header of a packet may claim: the range of each of its fields, and what they must not say of each other.

Pure. `contradiction` looks at one header alone; what depends on the state of the run (which lease, which version is the
latest) the ledger compares with what it knows. What it finds here a damaged or foreign packet has said: a worker of ours
never does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from asgd_mpi.protocol.messages import Header

Fields = Mapping[str, object]
LARGEST_LOSS = 3.4028234663852886e38  # of float32, in which the loss of a batch is computed
# what a packet without a range says
NOTE: Fields = {"lease": 0, "start": 0, "count": 0, "skipped": 0, "loss": 0.0}
# ... and one that is no validation,
GUESSES: Fields = {"top1": 0, "top5": 0, "stored_top1": -1, "metrics": ()}
OWN: Fields = {"base": -1, "scale": 1.0, "kept": 0}  # ... or no gradient


def of_gradient(header: Header, moves_own: bool, signed_loss: bool = False) -> str:
    """Return what a gradient claims that cannot be, or an empty text.

    moves_own: the workers' weights are their own, and began with the snapshot `base` (an elastic rule). signed_loss: a user's
    own loss may be negative.
    """
    if wrong := _of_range(header) or _other_than(header, GUESSES):
        return wrong
    least = -LARGEST_LOSS if signed_loss else 0
    if math.isfinite(header.loss) and not least <= header.loss <= LARGEST_LOSS:
        return f"a mean loss of {header.loss:g}, which no batch has: {least:.3g} to {LARGEST_LOSS:.3g} are possible"
    if not 0 < header.scale <= 1:
        return f"that it was scaled by {header.scale:g}; a gradient is scaled by more than 0 and at most 1"
    if not (0 if moves_own else -1) <= header.base <= header.read_version:
        return f"own weights that began with version {header.base}, and read version {header.read_version} since"
    return ""


def of_validation(header: Header, is_final: bool, num_metrics: int = 0) -> str:
    """Return what a validated range claims that cannot be, or an empty text. The loss of a poor version may be infinite.

    num_metrics: of the task, if it is not image classification.
    """
    if wrong := _of_range(header) or _other_than(header, OWN):
        return wrong
    if len(header.metrics) != 2 * num_metrics:
        return f"{len(header.metrics)} numbers of metrics, where {2 * num_metrics} are due"
    if num_metrics:
        return _other_than(header, {"loss": 0.0, "top1": 0, "top5": 0, "stored_top1": -1})
    seen = header.count - header.skipped
    if not 0 <= header.top1 <= header.top5 <= seen:
        return (
            f"{header.top1} first guesses right and {header.top5} among five, of {seen} images; each is 0 or more, and at "
            "most the next"
        )
    if header.stored_top1 != -1 and not (is_final and 0 <= header.stored_top1 <= seen):
        return f"{header.stored_top1} of {seen} images right with stored statistics, " + (
            "which is not possible" if is_final else "which is tried at the end only"
        )
    if header.loss < 0:
        return f"a loss of {header.loss:g} in sum; it is 0 or more"
    return ""


def of_note(header: Header) -> str:
    """Return what a packet without a range claims of one, or an empty text."""
    return _other_than(header, {**NOTE, **GUESSES, **OWN})


def _of_range(header: Header) -> str:
    if header.count <= 0:
        return "a packet covers 1 position or more"
    if not 0 <= header.skipped <= header.count:
        return f"{header.skipped} images left out, of {header.count}"
    return ""


def _other_than(header: Header, due: Fields) -> str:
    """Name the first field that is not what it is in every packet of this kind."""
    for name, value in due.items():
        if getattr(header, name) != value:
            return f"{name} {getattr(header, name)}, which is {value} in a packet of this kind"
    return ""

"""Whether weights are finite: one piece now and then of those that are applied, and all of them before they are kept.

A worker pushes no gradient that is not finite. What remains is a number damaged on its way, a worker that is not ours, and an
update that overflows; it stays in the weights for ever, and spreads. To look at every piece of every pass costs 7 to 33 % of
it (a sum over what lies in the cache), so one in STRIDES is looked at, another one each time, and all of them in as many
passes: 0.5 to 0.6 % of a pass of 54,000 and of 262,144 floats (0.19 and 0.39 us a piece, of 36.6 and 68.4).
Before a checkpoint gets its name all of what it holds is looked at, on the thread that writes it, and the server looks at all
of the weights when a worker reports that its loss is not finite. So what is poisoned is served to workers for a few versions
at most, and never saved.
"""

from __future__ import annotations

import math

import torch

from asgd_mpi.errors import TOO_FAST, TrainingDiverged
from asgd_mpi.vector.partition import PIECE, pieces

# primes: one that does not divide the number of pieces reaches each of them
STRIDES = (61, 67, 71, 73, 79)


class Lookout:
    """Looks at one in so many of the pieces of a (P,) vector that are shown to it in their order, pass after pass."""

    def __init__(self, num_floats: int):
        num_pieces = -(-num_floats // PIECE)
        self._stride = next((stride for stride in STRIDES if num_pieces % stride), 1)
        self._left = self._stride

    def look(self, weights: torch.Tensor, piece: slice) -> None:
        """Raise TrainingDiverged if it is the turn of this piece of the weights, (P,) float32, and it is not finite."""
        self._left -= 1
        if not self._left:
            self._left = self._stride
            demand(weights[piece], "the weights")


def is_finite(vector: torch.Tensor) -> bool:
    """Return whether all of a float32 vector is finite; reads it once, without memory of its size."""
    # a sum may overflow
    return all(
        math.isfinite(vector[piece].sum().item()) or bool(vector[piece].isfinite().all())
        for piece in pieces(len(vector))
    )


def demand(vector: torch.Tensor, what: str) -> None:
    """Raise TrainingDiverged if a float32 vector is not finite; `what` it holds, for the message."""
    if not is_finite(vector):
        raise TrainingDiverged(
            f"{what}: no longer finite on the server. An update overflowed, or a gradient was damaged on its way. No "
            "checkpoint is written of them; those in checkpoints/ of the run directory are of before, and finite: go on with "
            f"--resume RUN_DIR. If it happens again at the same place: {TOO_FAST}"
        )

"""How high a rate may be under a given staleness, and whether the loss says that it is too high.

The limit is that of the field's model: a quadratic of curvature c, workers that take turns. A step x <- x - lr c x' on the
snapshot x' contracts up to a largest lr c; with momentum 0 and staleness s it is 2 sin(pi / (2 (2 s + 1))), with momentum it is
the edge at which the turn of all workers, a linear map, has a spectral radius of 1. The curvature of a network is not known,
so the limit says how many times lower a rate must be than one worker's, not which one; whether the rate of a run is too high
is read off its loss. Pure: no MPI, no torch.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

SOURCE = "edge of stability under delay: Giladi et al. 2020, arXiv:1909.12340"
MOST = 32             # workers for which the edge is computed; beyond it goes with 1 / workers
HALVINGS = 24         # of the interval that holds the edge
REMEMBER = 0.02       # weight of the newest push in the running mean of the loss
PATIENCE = 100        # pushes until the running mean is trusted
LOST = 0.5            # share of what the loss had fallen by that may be lost again
GROWN = 1.3           # times its first value that a loss may have, if it never fell


@cache
def limit(num_workers: int, momentum: float, momentum_at: str) -> float:
    """The largest lr x curvature at which so many workers, taking turns, converge: a staleness of num_workers - 1."""
    if num_workers > MOST:
        return limit(MOST, momentum, momentum_at) * MOST / num_workers
    low, high = 0.0, 4.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        turn = _turn(num_workers, middle, momentum, momentum_at)
        low, high = (middle, high) if max(abs(np.linalg.eigvals(turn))) < 1 else (low, middle)
    return low


def _turn(n: int, rate: float, momentum: float, momentum_at: str) -> np.ndarray:
    """What one push of every worker makes of (weights, their snapshots, velocities), as a matrix; curvature 1."""
    is_shared = momentum_at.startswith("server")
    state = np.eye(1 + n + (1 if is_shared else n))
    for worker in range(n):
        gradient = state[1 + worker].copy()
        velocity = 1 + n + (0 if is_shared else worker)
        state[velocity] = momentum * state[velocity] + gradient
        looks_ahead = momentum_at in ("dana", "server_nag")
        state[0] -= rate * (gradient + momentum * state[velocity] if looks_ahead else state[velocity])
        state[1 + worker] = state[0]
    return state


class LossWatch:
    """The running mean of the loss, push by push; `add` is true once, when it has risen as under too high a rate."""

    def __init__(self, momentum: float = 0.0, momentum_at: str = "none"):
        self._momentum, self._momentum_at = momentum, momentum_at
        self.pushes, self.has_warned = 0, False
        self.loss = self.first = self.lowest = math.nan
        self.staleness = 0.0                  # running mean

    def add(self, loss: float, staleness: int) -> bool:
        self.pushes += 1
        weight = max(REMEMBER, 1 / self.pushes)
        self.staleness += weight * (staleness - self.staleness)
        self.loss = loss if self.pushes == 1 else self.loss + weight * (loss - self.loss)
        if self.pushes == PATIENCE // 10:
            self.first = self.loss
        if self.pushes < PATIENCE:
            return False
        self.lowest = min(self.loss, self.lowest) if self.pushes > PATIENCE else self.loss
        fell = max(0.0, self.first - self.lowest)
        is_lost = self.loss > self.lowest + max(LOST * fell, (GROWN - 1) * self.first)
        if self.has_warned or not is_lost:
            return False
        self.has_warned = True
        return True

    def warning(self, lr: float) -> str:
        """What to say then; `lr`: of the last push."""
        kept = f"momentum {self._momentum:g} ({self._momentum_at})" if self._momentum else "no momentum"
        alone, now = (limit(turns, self._momentum, self._momentum_at) for turns in (1, round(self.staleness) + 1))
        return (f"warning: the loss rises, {self.lowest:.3g} -> {self.loss:.3g} in the mean, at a rate of {lr:.3g} and a measured "
                f"staleness of {self.staleness:.1f}. With {kept} a quadratic of curvature c then converges up to lr c = {now:.3g}, "
                f"{alone / now:.0f} times less than with fresh gradients ({SOURCE}). If it does not fall again: --schedule.lr at a "
                "third of its value, --schedule.warmup_epochs, a lower --rule.max_drift, a lower --rule.momentum, or fewer workers.")

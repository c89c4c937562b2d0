"""How high a rate may be under a given staleness, and whether the loss says that it is too high.

The limit is that of the field's model: a quadratic of curvature c, workers that take turns. A step x <- x - lr c x' on the
snapshot x' contracts up to a largest lr c; with momentum 0 and staleness s it is 2 sin(pi / (2 (2 s + 1))), with momentum it is
the edge at which the turn of all workers, a linear map, has an eigenvalue on the unit circle. The curvature of a network is not known,
so the limit says how many times lower a rate must be than one worker's, not which one; whether the rate of a run is too high
is read off its loss. Pure: no MPI, no torch.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

SOURCE = "edge of stability under delay: Giladi et al. 2020, arXiv:1909.12340"
STEPS = 32            # angles between two crossings, or more
MOST_ANGLES = 1_000_000
HALVINGS = 50         # of the interval that holds an edge
REMEMBER = 0.02       # weight of the newest push in the running mean of the loss
PATIENCE = 100        # pushes until the running mean is trusted
LOST = 0.5            # share of what the loss had fallen by that may be lost again
GROWN = 1.3           # times its first value that a loss may have, if it never fell


@cache
def limit(num_workers: int, momentum: float, momentum_at: str) -> float:
    """Return the largest lr x curvature at which so many workers, taking turns, converge: a staleness of num_workers - 1.

    The edge is the least rate > 0 at which a root of the characteristic equation lies on the unit circle: there `_rate_of` is
    real. All angles are looked at, which takes some ms for a hundred workers.
    """
    length = round(1 / (1 - momentum)) if momentum_at != "none" else 1       # the longer a velocity, the sharper the response
    angles = np.linspace(0, math.pi, 1 + min(MOST_ANGLES, STEPS * length * num_workers))[1:]
    signs = np.sign(_rate_of(np.exp(1j * angles), num_workers, momentum, momentum_at).imag)
    crossed = np.flatnonzero(signs[:-1] * signs[1:] < 0)
    low, high, sign = angles[crossed], angles[crossed + 1], signs[crossed]
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        is_before = _rate_of(np.exp(1j * middle), num_workers, momentum, momentum_at).imag * sign > 0
        low, high = np.where(is_before, middle, low), np.where(is_before, high, middle)
    edges = _rate_of(np.append(np.exp(1j * high), -1), num_workers, momentum, momentum_at).real
    return float(min(edges[edges > 0]))


def _rate_of(z: np.ndarray, n: int, momentum: float, momentum_at: str) -> np.ndarray:
    """Return the rate at which pushes of n workers in turn have a solution z ** k, k the number of the push; curvature 1.

    x z = x - rate u, where u is of a gradient of n - 1 pushes ago, for a worker fetches with its push. A velocity was last
    touched by its worker's own last push, n pushes ago, or by everybody's last one.
    """
    at = momentum if momentum_at != "none" else 0.0
    velocity = 1 / (1 - at * z ** (-n if momentum_at in ("worker", "dana") else -1))
    moved = 1 + at * velocity if momentum_at in ("dana", "server_nag") else velocity
    return -(z - 1) * z ** (n - 1) / moved


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

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
STEPS = 32  # angles between two crossings, or more
MOST_ANGLES = 1_000_000
HALVINGS = 50  # of the interval that holds an edge
REMEMBER = 0.02  # weight of the newest push in the running mean of the loss
PATIENCE = 100  # pushes until the running mean is trusted
LOST = 0.5  # share of what the loss had fallen by that may be lost again
GROWN = 1.3  # times its first value that a loss may have, if it never fell
# standard deviations of the running mean that it may rise by chance: near 0 a loss wanders by more than GROWN, as after a
# resume. Of losses drawn about one level (gamma, mean 0.03, four shapes) 155 of 160 warned within 5,000 pushes without this,
# 1 of 80 within 12,000 with it; one that grows by 0.5 % a push is told some 100 pushes later
CHANCE = 7.0


@cache
def limit(num_workers: int, momentum: float, momentum_at: str) -> float:
    """Return the largest lr x curvature at which so many workers, taking turns, converge: a staleness of num_workers - 1.

    The edge is the least rate > 0 at which a root of the characteristic equation lies on the unit circle: there `_rate_of` is
    real. All angles are looked at, which takes some ms for a hundred workers.
    """
    # the longer a velocity, the sharper the response
    length = round(1 / (1 - momentum)) if momentum_at != "none" else 1
    angles = np.linspace(0, math.pi, 1 + min(MOST_ANGLES, STEPS * length * num_workers))[1:]
    signs = np.sign(_rate_of(np.exp(1j * angles), num_workers, momentum, momentum_at).imag)
    crossed = np.flatnonzero(signs[:-1] * signs[1:] < 0)
    low, high, sign = angles[crossed], angles[crossed + 1], signs[crossed]
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        is_before = (
            _rate_of(np.exp(1j * middle), num_workers, momentum, momentum_at).imag * sign > 0
        )
        low, high = np.where(is_before, middle, low), np.where(is_before, high, middle)
    edges = _rate_of(np.append(np.exp(1j * high), -1), num_workers, momentum, momentum_at).real
    return float(min(edges[edges > 0]))


def _rate_of(z: np.ndarray, n: int, momentum: float, momentum_at: str) -> np.ndarray:
    """Return the rate at which pushes of n workers in turn have a solution z ** k, k the number of the push; curvature 1.

    x z = x - rate u, where u is of a gradient of n - 1 pushes ago, for a worker fetches with its push. A velocity was last
    touched by its worker's own last push, n pushes ago, or by everybody's last one.
    """
    if momentum_at == "none":
        momentum = 0.0
    turns = n if momentum_at in ("worker", "dana") else 1
    moved = 1 / (1 - momentum * z ** (-turns))
    if momentum_at in ("dana", "server_nag"):
        moved = 1 + momentum * moved
    return -(z - 1) * z ** (n - 1) / moved


class LossWatch:
    """The running mean of the loss, push by push; `add` is true once, when it has risen as under too high a rate.

    momentum, momentum_at, option: what rulebook.momentum_of and rulebook.momentum_option say.
    """

    def __init__(
        self, momentum: float = 0.0, momentum_at: str = "none", option: str = "rule.momentum"
    ):
        self._momentum, self._momentum_at, self._option = momentum, momentum_at, option
        self.pushes, self.has_warned = 0, False
        self.loss = self.first = self.lowest = math.nan
        self._variance = 0.0  # of single losses, running
        self.staleness = 0.0  # running mean

    def add(self, loss: float, staleness: int) -> bool:
        self.pushes += 1
        weight = max(REMEMBER, 1 / self.pushes)
        self.staleness += weight * (staleness - self.staleness)
        off = 0.0 if self.pushes == 1 else loss - self.loss
        self._variance += weight * (off * off - self._variance)
        self.loss = loss if self.pushes == 1 else self.loss + weight * off
        if self.pushes == PATIENCE // 10:
            self.first = self.loss
        if self.pushes < PATIENCE:
            return False
        if self.pushes > PATIENCE:
            self.lowest = min(self.loss, self.lowest)
        else:
            self.lowest = self.loss
        fell = max(0.0, self.first - self.lowest)
        is_lost = self.loss > self.lowest + max(LOST * fell, (GROWN - 1) * self.first)
        by_chance = CHANCE * math.sqrt(weight / (2 - weight) * self._variance)
        if self.has_warned or not is_lost or self.loss - self.lowest <= by_chance:
            return False
        self.has_warned = True
        return True

    def warning(self, lr: float) -> str:
        """Return what to say then; `lr`: of the last push."""
        if self._momentum:
            kept = f"momentum {self._momentum:g} ({self._momentum_at})"
        else:
            kept = "no momentum"
        alone, now = (
            limit(turns, self._momentum, self._momentum_at)
            for turns in (1, round(self.staleness) + 1)
        )
        return (
            f"warning: the loss rises, {self.lowest:.3g} -> {self.loss:.3g} in the mean, at a rate of {lr:.3g} and a measured "
            f"staleness of {self.staleness:.1f}. With {kept} a quadratic of curvature c then converges up to lr c = {now:.3g}, "
            f"{alone / now:.0f} times less than with fresh gradients ({SOURCE}). If it does not fall again: --schedule.lr at a "
            f"third of its value, --schedule.warmup_epochs, a lower --rule.max_drift, a lower --{self._option}, or fewer workers."
        )

"""What all peers share: the work of an exchange, how it is timed, and how its result is checked.

An exchange is: push a gradient (P,) float32, have momentum SGD applied to the weights, hold the weights that follow. A
round of an all-reduce over N workers is N exchanges. A worker's gradient is always the same and lies ready: nothing else
is computed.

The check: with momentum 1/2, a rate that is a power of 2 and integer gradients, float32 arithmetic is exact but for the
first 24 steps, so that the weights after k steps are known in closed form, and tell k exactly however large it is:
v_k = g (2 - 2^(1 - k)), w_k = -lr g (2 k - 2 + 2^(1 - k)). AdamW without decay takes a step of lr against the sign of a gradient
that never changes, so w_k = -lr k sign(g), but for the rounding of its bias corrections.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable

import torch

LR = 2.0**-10
MOMENTUM = 0.5


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parameters", type=int, required=True, help="P")
    parser.add_argument("--workers", type=int, required=True, help="N")
    parser.add_argument("--seconds", type=float, default=5.0, help="timed")
    parser.add_argument("--warmup", type=float, default=1.0, help="seconds before that")
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads of the process that applies"
    )
    parser.add_argument(
        "--optimizer", choices=("sgd", "adamw"), default="sgd", help="adamw: asgd_mpi alone has it"
    )
    return parser.parse_args()


def make_gradient(num_parameters: int) -> torch.Tensor:
    """(P,) float32 of integers from -3 to 3."""
    return (torch.arange(num_parameters, dtype=torch.int32) % 7 - 3).float()


def step_(
    weights: torch.Tensor, gradient: torch.Tensor, velocity: torch.Tensor, num_summed: int = 1
) -> None:
    """One step of momentum SGD in one pass; a gradient that is a sum over workers becomes (in place) their mean."""
    torch._fused_sgd_(
        [weights],
        [gradient],
        [velocity],
        weight_decay=0.0,
        momentum=MOMENTUM,
        lr=LR,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        grad_scale=torch.tensor(float(num_summed)) if num_summed > 1 else None,
    )


def are_right(weights: torch.Tensor, num_steps: int, optimizer: str = "sgd") -> bool:
    """Return whether `weights`, (P,) float32, are those after `num_steps` steps from zero: one step more or less is seen."""
    if optimizer == "adamw":
        change = LR * num_steps
    else:
        change = LR * (2 * num_steps - 2 + 2.0 ** (1 - num_steps)) if num_steps else 0.0
    for start in range(0, len(weights), 7 << 17):  # a multiple of the gradient's period
        piece = weights[start : start + (7 << 17)].double()
        way = make_gradient(len(piece)).double()
        if optimizer == "adamw":
            way.sign_()
        if (piece + way * change).abs().max() > LR / 2:
            return False
    return True


class Clock:
    """Counts a worker's exchanges, and times those after the warm-up, from the end of one to the end of another."""

    def __init__(self, warmup_s: float, seconds: float):
        self.exchanges = 0  # all of them
        self._warm_at = time.perf_counter() + warmup_s
        self._seconds = seconds
        self._began: float | None = None
        self._before = 0  # exchanges until then

    def tick(self) -> bool:
        """An exchange is over; whether to make another."""
        self.exchanges += 1
        self._last = time.perf_counter()
        if self._began is None and self._last >= self._warm_at:
            self._began, self._before = self._last, self.exchanges
        return self._began is None or self._last < self._began + self._seconds

    @property
    def rate(self) -> float:
        """Exchanges per second."""
        return (self.exchanges - self._before) / (self._last - self._began)


def in_step(
    round_: Callable[[], None], agree: Callable[[int], int], warmup_s: float, seconds: float
) -> tuple[int, float]:
    """Time rounds that all ranks make together: (rounds made, rounds per second).

    agree: gives every rank the number of rank 0. While it is timed, nothing is agreed on: how many rounds there will be
    follows from the warm-up.
    """
    warm, started = 0, time.perf_counter()
    while agree(int(warm == 0 or time.perf_counter() - started < warmup_s)):
        round_()
        warm += 1
    timed = agree(max(2, round(seconds * warm / (time.perf_counter() - started))))
    started = time.perf_counter()
    for _ in range(timed):
        round_()
    return warm + timed, timed / (time.perf_counter() - started)


def report(rates: Iterable[float], exchanges: int, right: bool) -> None:
    """The one line that a peer prints; `exchanges` counts the warm-up, too."""
    print(
        json.dumps({"exchanges_per_s": sum(rates), "exchanges": exchanges, "right": right}),
        flush=True,
    )

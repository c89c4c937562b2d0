"""Momentum that a worker keeps: the gradient becomes what is pushed, in place, on flat vectors.

Momentum on the server is the main trap of asynchronous SGD: n workers push it the same way n times before the first of
them sees the effect. At m = 0.9 and n = 8 a quadratic of curvature c is stable up to lr c = 0.0158 with heavy ball on the
server, 0.0279 with a velocity per worker, 0.0971 with DANA, 0.209 without momentum.
"""

from __future__ import annotations

import torch

from asgd_mpi.config import RuleConfig


def is_kept_by_workers(config: RuleConfig) -> bool:
    return bool(config.momentum) and config.momentum_at != "server"


class Momentum:
    """One worker's velocity v, (P,) float32 on the gradient's device; no state without momentum.

    worker  v <- m v + g, and v is pushed.
    dana    v <- m v + g, and g + m v is pushed, which looks ahead by a step (DANA-Slim, Hakimi et al. 2019, algorithm 4).
            With one worker that is torch.optim.SGD(nesterov=True).
    """

    def __init__(self, config: RuleConfig, gradient: torch.Tensor):
        """`gradient`: one of those that will come, for its length and device."""
        self._momentum = config.momentum
        self._looks_ahead = config.momentum_at == "dana"
        self.state = {"velocity": torch.zeros_like(gradient)} if is_kept_by_workers(config) else {}

    def push_(self, gradient: torch.Tensor) -> None:
        """Turn the gradient, (P,) float32, into what is pushed."""
        for velocity in self.state.values():
            velocity.mul_(self._momentum).add_(gradient)
            if self._looks_ahead:
                gradient.add_(velocity, alpha=self._momentum)
            else:
                gradient.copy_(velocity)

    def load_(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from another one's `state`; from nothing, with an empty one."""
        for name, velocity in self.state.items():
            velocity.copy_(state[name]) if state else velocity.zero_()

"""Momentum that a worker keeps: the gradient becomes what is pushed, in place, on flat vectors."""

from __future__ import annotations

import torch

from asgd_mpi.config.options import RuleConfig
from asgd_mpi.config.rulebook import is_kept_by_workers


class Momentum:
    """One worker's velocity v, (P,) float32 on the gradient's device; no state without momentum.

    worker  v <- m v + g, and v is pushed.
    dana    v <- m v + g, and g + m v is pushed, which looks ahead by a step (DANA-Slim, Hakimi et al. 2019, algorithm 4).
            With one worker that is torch.optim.SGD(nesterov=True).
    """

    def __init__(self, config: RuleConfig, gradient: torch.Tensor, keeps_last: bool = False):
        """`gradient`: one of those that will come, for its length and device; `keeps_last`: so that `undo_` is possible."""
        self._momentum = config.momentum
        self._looks_ahead = config.momentum_at == "dana"
        self.state = {"velocity": torch.zeros_like(gradient)} if is_kept_by_workers(config) else {}
        self._last = {name: velocity.clone() for name, velocity in self.state.items()} if keeps_last else {}

    def push_(self, gradient: torch.Tensor, piece: slice = slice(None)) -> None:
        """Turn a piece of the gradient, float32, into that of what is pushed."""
        for name, last in self._last.items():
            last[piece].copy_(self.state[name][piece])
        for whole in self.state.values():
            velocity = whole[piece]
            velocity.mul_(self._momentum).add_(gradient)
            if self._looks_ahead:
                gradient.add_(velocity, alpha=self._momentum)
            else:
                gradient.copy_(velocity)

    def look_back_(self, weights: torch.Tensor, rate: float, piece: slice) -> None:
        """Turn a piece of weights that look ahead, as Nesterov's last step at this rate left them, into those that do not."""
        if self._looks_ahead:
            for velocity in self.state.values():
                weights.add_(velocity[piece], alpha=rate * self._momentum)

    def undo_(self) -> None:
        """Go back to before the last gradient, which was not applied."""
        for name, last in self._last.items():
            self.state[name].copy_(last)

    def load_(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from another one's `state`; from nothing, with an empty one."""
        for name, velocity in self.state.items():
            velocity.copy_(state[name]) if state else velocity.zero_()

"""Make the push of a gradient, in place, with a velocity or Adam's means that a worker keeps from push to push."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from asgd_mpi.config.resolved import ResolvedRule
from asgd_mpi.config.rulebook import is_adaptive, is_kept_by_workers
from asgd_mpi.optim import saved
from asgd_mpi.vector.groups import ParameterGroup, Ranges
from asgd_mpi.vector.partition import pieces

# among a worker's state: how many gradients Adam's means are of, int64 of one number
STEPS = "steps"


class Momentum:
    """One worker's velocity v, (P,) float32 on the gradient's device; no state without momentum.

    worker  v <- m v + g, and v is pushed.
    dana    v <- m v + g, and g + m v is pushed, which looks ahead by a step (DANA-Slim, Hakimi et al. 2019, algorithm 4).
            With one worker that is torch.optim.SGD(nesterov=True).
    """

    def __init__(self, config: ResolvedRule, gradient: torch.Tensor, keeps_last: bool = False):
        """`gradient`: one of those that will come, for its length and device; `keeps_last`: so that `undo_` is possible."""
        self._momentum = config.momentum
        self._looks_ahead = config.momentum_at == "dana"
        if is_kept_by_workers(config):
            self.state = {"velocity": torch.zeros_like(gradient)}
        else:
            self.state = {}
        if keeps_last:
            self._last = {name: velocity.clone() for name, velocity in self.state.items()}
        else:
            self._last = {}

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

    def look_back_(self, weights: torch.Tensor, rate: float, piece: slice, part: slice) -> None:
        """Turn a part of a piece of weights that look ahead, as Nesterov's last step at this rate left them, into those that do not."""
        if self._looks_ahead:
            for velocity in self.state.values():
                weights[part].add_(velocity[piece][part], alpha=rate * self._momentum)

    def undo_(self) -> None:
        """Go back to before the last gradient, which was not applied."""
        for name, last in self._last.items():
            self.state[name].copy_(last)

    def load_(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from another one's `state`; from nothing, with an empty one."""
        saved.load_(self.state, state)


class AdamMeans:
    """One worker's means m and v of its own gradients and of their squares, (P,) float32 each, and k, how many they are of.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g g;  and f / (sqrt(v / (1 - b2^k)) + eps) is pushed, a direction, with which the
    server steps (optim.optimizers.Directed).
    worker  f = m / (1 - b1^k): one worker is torch.optim.AdamW, but for the last bits.
    dana    f = b1 m / (1 - b1^(k + 1)) + (1 - b1) g / (1 - b1^k): it looks ahead by a step, as NAdam does (Dozat 2016), so that
            the momentum of n workers does not push the same way n times before the first of them sees it (Hakimi et al. 2019).
    """

    def __init__(
        self,
        config: ResolvedRule,
        gradient: torch.Tensor,
        keeps_last: bool = False,
        groups: Sequence[ParameterGroup] = (),
    ):
        """Begin with no gradient; see Momentum. groups: of the vector, with betas of their own."""
        self._config = config
        # without the gaps between parameters, where an eps of 0 would leave 0 / 0
        self._ranges = Ranges(len(gradient), groups, by_parameter=True)
        self._looks_ahead = config.momentum_at == "dana"
        means = {name: torch.zeros_like(gradient) for name in ("exp_avg", "exp_avg_sq")}
        # k lies in the memory of the host: it is read at every push
        self.state = means | {STEPS: torch.zeros(1, dtype=torch.int64)}
        if keeps_last:
            self._last = {name: tensor.clone() for name, tensor in self.state.items()}
        else:
            self._last = {}

    def push_(self, gradient: torch.Tensor, piece: slice = slice(None)) -> None:
        """Turn the gradient, float32, into what is pushed; a whole one, since k counts them."""
        for name, last in self._last.items():
            last.copy_(self.state[name])
        step = int(self.state[STEPS].add_(1))
        mean, square = (self.state[name] for name in ("exp_avg", "exp_avg_sq"))
        for part in pieces(len(gradient)):
            for settings, ranges in self._ranges.of(part):
                beta1, beta2 = settings.betas or (self._config.beta1, self._config.beta2)
                for one in ranges:
                    g, m, v = (whole[part][one] for whole in (gradient, mean, square))
                    m.lerp_(g, 1 - beta1)
                    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                    root = v.div(1 - beta2**step).sqrt_().add_(self._config.eps)
                    if self._looks_ahead:
                        g.mul_((1 - beta1) / (1 - beta1**step))
                        g.add_(m, alpha=beta1 / (1 - beta1 ** (step + 1)))
                    else:
                        torch.div(m, 1 - beta1**step, out=g)
                    g.div_(root)

    def undo_(self) -> None:
        """Go back to before the last gradient, which was not applied."""
        for name, last in self._last.items():
            self.state[name].copy_(last)

    def load_(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from another one's `state`; from nothing, with an empty one."""
        saved.load_(self.state, state)


def make_momentum(
    config: ResolvedRule,
    gradient: torch.Tensor,
    keeps_last: bool = False,
    groups: Sequence[ParameterGroup] = (),
) -> Momentum | AdamMeans:
    """Return what a worker keeps under the rule; with nothing to keep, a Momentum without state."""
    if is_adaptive(config) and is_kept_by_workers(config):
        return AdamMeans(config, gradient, keeps_last, groups)
    return Momentum(config, gradient, keeps_last)

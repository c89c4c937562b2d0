"""How a gradient moves the weights: torch, in place, on flat float32 vectors, without MPI.

A rule is called piece by piece, on pieces that fit the cache: what the server does before and after on the same piece
(copying it from one slot of the ring to the next, applying the next waiting gradient) costs no extra pass over memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from asgd_mpi.config import RuleConfig

PIECE = 262_144  # floats: 1 MB each of weights, velocity and gradient; smaller ones cost more in calls than they save


def pieces(num_floats: int) -> Iterator[slice]:
    """Cut [0, num_floats) into pieces for `Rule.apply_`."""
    return (slice(start, min(start + PIECE, num_floats)) for start in range(0, num_floats, PIECE))


class Rule(Protocol):
    state: dict[str, torch.Tensor]        # what a checkpoint keeps of the rule, (P,) float32 each

    def apply_(self, weights: torch.Tensor, gradient: torch.Tensor, lr: float, piece: slice) -> None:
        """Move `piece` of the weights by that of the gradient; both (P,) float32."""


class Asgd:
    """Apply each gradient on arrival: x <- x - lr (u + wd x), where u is what a worker pushes.

    With the momentum at the server (heavy ball), v <- m v + (u + wd x) and x <- x - lr v. State: v, (P,) float32. With one
    worker, to the bit torch.optim.SGD that is not fused; so long as pieces hold a multiple of 16 floats, as those of
    FlatModel do: the fused kernel rounds the rest of a vector in another way. Otherwise no state; weight decay acts on
    the server's fresh weights, apart from the momentum. Source: Downpour SGD with n_push = n_fetch = 1 (Dean et al. 2012).
    """

    def __init__(self, num_parameters: int, config: RuleConfig):
        self.momentum = config.momentum if config.momentum_at == "server" else 0.0
        self.weight_decay = config.weight_decay
        self.state = {"velocity": torch.zeros(num_parameters)} if self.momentum else {}

    def apply_(self, weights: torch.Tensor, gradient: torch.Tensor, lr: float, piece: slice) -> None:
        torch._fused_sgd_(
            [weights[piece]], [gradient[piece]], [velocity[piece] for velocity in self.state.values()],
            weight_decay=self.weight_decay, momentum=self.momentum, lr=lr, dampening=0.0, nesterov=False,
            maximize=False, is_first_step=False)


RULES = {"asgd": Asgd}

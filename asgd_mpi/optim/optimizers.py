"""The step that a gradient makes, piece by piece of flat float32 vectors, with torch's own kernels: SGD, Adagrad, Adam and NAdam.

Who calls it, with which rate and at which step, is the rule's to say (optim.rules). One worker's steps are those of torch.optim,
to the bit, so long as pieces hold a multiple of 16 floats, as those of FlatModel do, and the groups of Adam are the parameters.
Legend: P parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from asgd_mpi.config.resolved import ResolvedRule
from asgd_mpi.config.rulebook import (
    decays_at_workers,
    is_adaptive,
    is_kept_by_workers,
    optimizer_of,
)
from asgd_mpi.vector.groups import ParameterGroup, Ranges, Settings

Tensors = list[torch.Tensor]
# torch.optim.NAdam's default: how fast its momentum warms up
MOMENTUM_DECAY = 4e-3


class Optimizer(ABC):
    """`state`: what it keeps and a checkpoint holds, (P,) float32 each, by name. groups: of the vectors, as Ranges takes them."""

    # whether its kernel rounds the last numbers of a tensor in another way than the others
    by_parameter = False

    def __init__(
        self,
        num_parameters: int,
        config: ResolvedRule,
        groups: Sequence[ParameterGroup] = (),
        device: torch.device | None = None,
    ):
        self._config = config
        self._ranges = Ranges(num_parameters, groups, self.by_parameter)
        if decays_at_workers(config):
            self._decay = 0.0
        else:
            self._decay = config.weight_decay
        self.state = {name: torch.zeros(num_parameters, device=device) for name in self._names()}

    def step_(
        self, weights: torch.Tensor, gradient: torch.Tensor, rate: float, step: int, piece: slice
    ) -> None:
        """Move a piece of the weights by that of the gradient, float32. `step`: 1 for the first one since the state was zero."""
        only = self._ranges.only
        if only:
            state = [[whole[piece]] for whole in self.state.values()]
            self._move_([weights], [gradient], state, rate * only.rate, step, only)
            return
        for settings, ranges in self._ranges.of(piece):
            self._move_(
                [weights[one] for one in ranges],
                [gradient[one] for one in ranges],
                [[whole[piece][one] for one in ranges] for whole in self.state.values()],
                rate * settings.rate,
                step,
                settings,
            )

    def _names(self) -> Sequence[str]:
        return ()

    def _decay_of(self, settings: Settings) -> float:
        """Return the weight decay that is the server's to apply."""
        if settings.weight_decay is None or decays_at_workers(self._config):
            return self._decay
        return settings.weight_decay

    @abstractmethod
    def _move_(
        self,
        weights: Tensors,
        gradients: Tensors,
        state: list[Tensors],
        rate: float,
        step: int,
        settings: Settings,
    ) -> None:
        """Move ranges of one settings, each a tensor of `weights`, of `gradients` and of every vector of the state."""


class Sgd(Optimizer):
    """x <- x - lr u. With the momentum at the server (heavy ball), v <- m v + u and x <- x - lr v; `server_nag` (Nesterov's)
    takes u + m v in place of v. State: v. To the bit torch.optim.SGD that is not fused."""

    def __init__(
        self,
        num_parameters: int,
        config: ResolvedRule,
        groups: Sequence[ParameterGroup] = (),
        device: torch.device | None = None,
    ):
        at_server = config.momentum_at in ("server", "server_nag")
        self._momentum = config.momentum if at_server else 0.0
        self._nesterov = bool(self._momentum) and config.momentum_at == "server_nag"
        super().__init__(num_parameters, config, groups, device)

    def _names(self) -> Sequence[str]:
        return ("velocity",) if self._momentum else ()

    def _move_(self, weights, gradients, state, rate, step, settings) -> None:
        torch._fused_sgd_(
            weights,
            gradients,
            state[0] if state else [],
            weight_decay=self._decay_of(settings),
            momentum=self._momentum,
            lr=rate,
            dampening=0.0,
            nesterov=self._nesterov,
            maximize=False,
            is_first_step=False,
        )


class Adagrad(Optimizer):
    """h <- h + g g; x <- x - lr g / (sqrt(h) + 1e-10): torch.optim.Adagrad. State: h."""

    def _names(self) -> Sequence[str]:
        return ("squares",)

    def _move_(self, weights, gradients, state, rate, step, settings) -> None:
        for x, g, squares in zip(weights, gradients, *state):
            squares.addcmul_(g, g)
            x.addcdiv_(g, squares.sqrt().add_(1e-10), value=-rate)


class Adam(Optimizer):
    """m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g g; x <- x - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps).

    Kingma and Ba 2015 (arXiv:1412.6980), algorithm 1. The weight decay is part of g (`adam`), or shrinks x by lr wd ahead of the
    step (`adamw`: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2). State: m, v. To the bit
    torch.optim.Adam(fused=True) and torch.optim.AdamW(fused=True).
    """

    by_parameter = True

    def _names(self) -> Sequence[str]:
        return ("exp_avg", "exp_avg_sq")

    def _betas(self, settings: Settings) -> tuple[float, float]:
        return settings.betas or (self._config.beta1, self._config.beta2)

    def _move_(self, weights, gradients, state, rate, step, settings) -> None:
        beta1, beta2 = self._betas(settings)
        means, squares = state
        decoupled = optimizer_of(self._config) == "adamw"
        kernel_ = torch._fused_adamw_ if decoupled else torch._fused_adam_
        kernel_(
            weights,
            gradients,
            means,
            squares,
            [],
            [torch.tensor(float(step), device=weights[0].device)] * len(weights),
            lr=rate,
            beta1=beta1,
            beta2=beta2,
            weight_decay=self._decay_of(settings),
            eps=self._config.eps,
            amsgrad=False,
            maximize=False,
        )


class NAdamW(Adam):
    """AdamW that looks ahead by a step, with a momentum that warms up: mu_t = b1 (1 - 0.96^(0.004 t) / 2).

    x <- x (1 - lr wd); x <- x - lr ((1 - mu_t) g / (1 - mu_1...mu_t) + mu_(t+1) m / (1 - mu_1...mu_(t+1))) / (sqrt(v / (1 - b2^t)) + eps)
    Dozat 2016 (Incorporating Nesterov momentum into Adam). State: m, v. To the bit
    torch.optim.NAdam(decoupled_weight_decay=True).
    """

    def __init__(
        self,
        num_parameters: int,
        config: ResolvedRule,
        groups: Sequence[ParameterGroup] = (),
        device: torch.device | None = None,
    ):
        super().__init__(num_parameters, config, groups, device)
        # beta1 -> (step, mu_1...mu_step); torch multiplies them in float32
        self._products: dict[float, tuple[int, torch.Tensor]] = {}

    def _move_(self, weights, gradients, state, rate, step, settings) -> None:
        (beta1, beta2), decay = self._betas(settings), self._decay_of(settings)
        product, mu, mu_next = self._product(beta1, step), _mu(beta1, step), _mu(beta1, step + 1)
        of_gradient = -rate * (1.0 - mu) / (1.0 - product)
        of_mean = -rate * mu_next / (1.0 - product * mu_next)
        for x, g, mean, squares in zip(weights, gradients, *state):
            x.mul_(1 - rate * decay)
            mean.lerp_(g, 1 - beta1)
            squares.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            root = squares.div(1 - beta2**step).sqrt_().add_(self._config.eps)
            x.addcdiv_(g, root, value=of_gradient)
            x.addcdiv_(mean, root, value=of_mean)

    def _product(self, beta1: float, step: int) -> float:
        """Return mu_1...mu_step; steps come in their order, so it is one product more than the last one asked for."""
        last, product = self._products.get(beta1, (0, torch.ones(())))
        if step < last:
            last, product = 0, torch.ones(())
        for one in range(last + 1, step + 1):
            if not product:
                break
            product = product * _mu(beta1, one)
        self._products[beta1] = step, product
        return product.item()


class Directed(Optimizer):
    """x <- x (1 - lr wd) - lr u, where a worker has made of its gradient the direction u of AdamW (optim.momentum). No state."""

    def _move_(self, weights, gradients, state, rate, step, settings) -> None:
        decay = self._decay_of(settings)
        for x, u in zip(weights, gradients):
            if decay:
                x.mul_(1 - rate * decay)
            x.sub_(u, alpha=rate)


def _mu(beta1: float, step: int) -> float:
    return beta1 * (1.0 - 0.5 * 0.96 ** (step * MOMENTUM_DECAY))


_CLASSES: dict[str, type[Optimizer]] = {
    "sgd": Sgd,
    "adagrad": Adagrad,
    "adamw": Adam,
    "adam": Adam,
    "nadamw": NAdamW,
}


def make_optimizer(
    num_parameters: int,
    config: ResolvedRule,
    groups: Sequence[ParameterGroup] = (),
    device: torch.device | None = None,
) -> Optimizer:
    """Return the optimizer of a complete configuration, for (P,) vectors or a slice of them, with its state on `device`."""
    if is_adaptive(config) and is_kept_by_workers(config):
        return Directed(num_parameters, config, groups, device)
    return _CLASSES[optimizer_of(config)](num_parameters, config, groups, device)

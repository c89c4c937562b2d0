"""How what a worker pushes moves the weights: torch, in place, on flat float32 vectors, without MPI.

A rule is called piece by piece, on pieces that fit the cache: what the server does before and after on the same piece
(copying it from one slot of the ring to the next, applying the next waiting gradient) costs no extra pass over memory.
Which rule has which settings, and where it is from, is in `rulebook`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from asgd_mpi.config.options import RuleConfig
from asgd_mpi.config.rulebook import RULEBOOK, decays_at_workers
from asgd_mpi.protocol.messages import Verdict
from asgd_mpi.vector.partition import pieces

if TYPE_CHECKING:
    from asgd_mpi.vector.codec import Vector

POLL_EVERY = 8   # pieces: a few milliseconds of applying; an idle poll may give the core away


class Rule:
    """Applies each gradient on arrival: x <- x - lr u, where u is what a worker pushes, which holds the weight decay.

    With the momentum at the server (heavy ball), v <- m v + u and x <- x - lr v; `server_nag` (Nesterov's) takes u + m v in
    place of v. State: v, (P,) float32; otherwise none. With one worker, to the bit torch.optim.SGD that is not fused; so
    long as pieces hold a multiple of 16 floats, as those of FlatModel do: the fused kernel rounds the rest of a vector in
    another way. Where u must be the gradient itself (rulebook.decays_at_workers), u + wd x takes its place here.
    """

    def __init__(self, num_parameters: int, config: RuleConfig, num_workers: int = 1):
        self.momentum = config.momentum if config.momentum_at in ("server", "server_nag") else 0.0
        self.nesterov = bool(self.momentum) and config.momentum_at == "server_nag"
        self.weight_decay = 0.0 if decays_at_workers(config) else config.weight_decay
        self._velocity = [torch.zeros(num_parameters)] if self.momentum else []
        self.state = {"velocity": velocity for velocity in self._velocity}   # what a checkpoint keeps, (P,) float32 each

    def begin_(self, worker: int, weights: torch.Tensor) -> None:
        """A worker begins, or begins again, with these weights, (P,) float32."""

    def apply_(self, weights: torch.Tensor, pushed: torch.Tensor, verdict: Verdict, piece: slice) -> None:
        """Move `piece` of the weights, (P,) float32, by that of what was pushed: `pushed[piece]` is float32."""
        self._descend_(weights[piece], pushed[piece], verdict.lr, piece)

    def _descend_(self, weights: torch.Tensor, gradient: torch.Tensor, lr: float, piece: slice) -> None:
        torch._fused_sgd_(
            [weights], [gradient], [velocity[piece] for velocity in self._velocity], weight_decay=self.weight_decay,
            momentum=self.momentum, lr=lr, dampening=0.0, nesterov=self.nesterov, maximize=False, is_first_step=False)


class Mean(Rule):
    """A step is made with the mean of several gradients, each weighted by its staleness (softsync, sync, sync_backup).

    s <- s + w u; with the last one, a step with s / c at the rate of that moment, and s <- 0. State: s, (P,) float32.
    """

    def __init__(self, num_parameters: int, config: RuleConfig, num_workers: int = 1):
        super().__init__(num_parameters, config)
        self._sum = self.state["sum"] = torch.zeros(num_parameters)

    def apply_(self, weights: torch.Tensor, pushed: torch.Tensor, verdict: Verdict, piece: slice) -> None:
        total = self._sum[piece]
        total.add_(pushed[piece], alpha=verdict.lr / verdict.rate if verdict.rate else 1.0)
        if verdict.mean_of:
            self._descend_(weights[piece], total.div_(verdict.mean_of), verdict.rate, piece)
            total.zero_()


class Adagrad(Rule):
    """h <- h + g g; x <- x - lr g / (sqrt(h) + 1e-10): torch.optim.Adagrad. State: h, (P,) float32."""

    def __init__(self, num_parameters: int, config: RuleConfig, num_workers: int = 1):
        super().__init__(num_parameters, config)
        self._squares = self.state["squares"] = torch.zeros(num_parameters)

    def apply_(self, weights: torch.Tensor, pushed: torch.Tensor, verdict: Verdict, piece: slice) -> None:
        weights, squares, gradient = weights[piece], self._squares[piece], pushed[piece]
        squares.addcmul_(gradient, gradient)
        weights.addcdiv_(gradient, squares.sqrt().add_(1e-10), value=-verdict.lr)


class DelayCompensated(Rule):
    """Corrects a gradient by the way that the weights have moved since: g + lambda g g (x - x_i), element by element.

    g is the gradient itself, of one batch and without weight decay; if a worker has scaled it down, what corrects it is scaled
    down as much: s (g + lambda g g (x - x_i)), where s g is pushed.
    x_i are the weights right after worker i's last push: what it fetches then, unless others have moved them before it
    does: then they are not what g was computed on. Adaptive: MS_i <- mm MS_i + (1 - mm) g g and lambda = lambda0 / sqrt(MS_i + 1e-7). Memory: x_i, and with
    `a` MS_i, each (P,) float32 for each worker; a checkpoint keeps MS_i alone.
    """

    def __init__(self, num_parameters: int, config: RuleConfig, num_workers: int = 1):
        super().__init__(num_parameters, config)
        self._lambda, self._decay = config.dc_lambda, config.dc_decay
        self._backups = [torch.zeros(num_parameters) for _ in range(num_workers)]
        self._squares = [torch.zeros(num_parameters) for _ in range(num_workers)] if config.name == "dc_asgd_a" else []
        self.state |= {f"squares{worker:03d}": squares for worker, squares in enumerate(self._squares)}

    def begin_(self, worker: int, weights: torch.Tensor) -> None:
        self._backups[worker].copy_(weights)

    def apply_(self, weights: torch.Tensor, pushed: torch.Tensor, verdict: Verdict, piece: slice) -> None:
        weights, gradient, backup = weights[piece], pushed[piece], self._backups[verdict.worker][piece]
        square = (gradient / verdict.scale).square_()
        correction = square * (weights - backup)
        if self._squares:
            mean = self._squares[verdict.worker][piece].mul_(self._decay).add_(square, alpha=1 - self._decay)
            correction.div_((mean + 1e-7).sqrt_())
        self._descend_(weights, gradient + verdict.scale * self._lambda * correction, verdict.lr, piece)
        backup.copy_(weights)


class Elastic(Rule):
    """x <- x + d, where a worker pushes d = alpha (x_i - x) and has moved its own x_i by -d (easgd, eamsgd).

    x + the sum of all x_i is kept. No state.
    """

    def apply_(self, weights: torch.Tensor, pushed: torch.Tensor, verdict: Verdict, piece: slice) -> None:
        weights[piece].add_(pushed[piece])


_CLASSES = {"sgd": Rule, "mean": Mean, "adagrad": Adagrad, "dc": DelayCompensated, "elastic": Elastic}


def make_rule(num_parameters: int, config: RuleConfig, num_workers: int) -> Rule:
    """The rule of a complete configuration."""
    return _CLASSES[RULEBOOK[config.name].server](num_parameters, config, num_workers)


def advance_(weights: torch.Tensor, latest: torch.Tensor, rule: Rule, judged: list[tuple[Vector, Verdict]],
             show: Callable[[slice], object], poll: Callable[[], object],
             look: Callable[[torch.Tensor], object] = lambda piece: None) -> None:
    """Copy the latest snapshot into `weights`, both (P,) float32, and apply the gradients one after the other: in one pass.

    While a piece of the new weights is in the cache, `show` gets its place, to publish it, and `look` the piece itself.
    """
    for number, piece in enumerate(pieces(len(weights)), start=1):
        weights[piece].copy_(latest[piece])
        for gradient, verdict in judged:
            rule.apply_(weights, gradient, verdict, piece)
        show(piece)
        look(weights[piece])
        if number % POLL_EVERY == 0:
            poll()                                                                    # fetches over a network need that

"""What compression leaves out of a push goes into the next one: a worker's residual. No MPI.

    p = e + u;  q = C(p);  e <- p - q;  q is pushed                     (u: what was to be pushed, e: the residual)

(Seide et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847, algorithm 1.) p - q is exact in float32 for every format, so
nothing is lost: what was sent and the residual add up to what was to be pushed.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import nn

from asgd_mpi.config.options import ExchangeConfig
from asgd_mpi.optim import saved
from asgd_mpi.vector.flat import num_floats, ranges_below
from asgd_mpi.vector.largest import CHUNK
from asgd_mpi.vector.partition import pieces
from asgd_mpi.vector.push_format import PushFormat

FIRST_KEPT = (
    CHUNK // 4
)  # of a chunk, where the density warms up: 25 %, 6.25 %, 1.6 %, ... (Lin et al. 2018, section 3.3)


class ErrorFeedback:
    """One worker's residual, (P,) float32 on the gradient's device, and the bytes of its last push, `code`, uint8.

    keeps_last: so that `undo_` is possible.
    """

    def __init__(self, form: PushFormat, like: torch.Tensor, keeps_last: bool = False):
        self._form, self._residual = form, torch.zeros_like(like)
        self._last = torch.zeros_like(like) if keeps_last else None
        self._memory = torch.zeros(form.longest, dtype=torch.uint8, device=like.device)
        self.code = self._memory[:0]
        self.state = {"residual": self._residual}

    def push_(self, pushed: torch.Tensor, kept: int) -> None:
        """Turn what was to be pushed, (P,) float32, into what arrives of it."""
        if self._last is not None:
            self._last.copy_(self._residual)
        self.code = self._memory[: self._form.num_bytes(kept)]
        vector = self._form.vector_in(self.code, kept)
        for piece in pieces(len(pushed)):
            residual = self._residual[piece].add_(pushed[piece])
            vector[piece] = residual
            residual.sub_(pushed[piece].copy_(vector[piece]))

    def undo_(self) -> None:
        """Go back to before the last push, which was not applied: its images will be trained again."""
        assert self._last is not None  # keeps_last
        self._residual.copy_(self._last)

    def load_(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from another one's `state`; from nothing, with an empty one."""
        saved.load_(self.state, state)


def push_format(exchange: ExchangeConfig, module: nn.Module) -> PushFormat:
    """Return how a network's gradient is pushed."""
    form = PushFormat(num_floats(module), exchange.wire)
    if not form.is_compressed:
        return form
    most = 0
    if exchange.wire == "topk":
        most = kept_of(exchange.density)
        if exchange.density_warmup_epochs:
            most = max(most, FIRST_KEPT)
    return PushFormat(form.num_floats, exchange.wire, ranges_below(module, CHUNK), most)


def kept_of(density: float) -> int:
    """Return how many numbers of a chunk are sent of a share of them: 1 at least."""
    return max(1, -int(-Fraction(density) * CHUNK // 1))


def kept_at(exchange: ExchangeConfig, samples: int, samples_per_epoch: int) -> int:
    """Return how many numbers of a chunk a push on a snapshot of this sample clock sends; 0 if not topk.

    While the density warms up it is divided by 4 again and again, for equal times.
    """
    if exchange.wire != "topk":
        return 0
    kept, warmup = (
        kept_of(exchange.density),
        round(exchange.density_warmup_epochs * samples_per_epoch),
    )
    if samples >= warmup:
        return kept
    steps = [FIRST_KEPT >> 2 * step for step in range(6) if FIRST_KEPT >> 2 * step > kept] or [kept]
    return steps[samples * len(steps) // warmup]

"""What compression leaves out of a push goes into the next one: a worker's residual. No MPI.

    p = e + u;  q = C(p);  e <- p - q;  q is pushed                     (u: what was to be pushed, e: the residual)

(Seide et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847, algorithm 1.) p - q is exact in float32 for every format, so
nothing is lost: what was sent and the residual add up to what was to be pushed.
"""

from __future__ import annotations

import torch

from asgd_mpi.optim import saved
from asgd_mpi.vector.partition import pieces
from asgd_mpi.vector.vector_format import VectorFormat


class ErrorFeedback:
    """One worker's residual, (P,) float32 on the gradient's device, and the bytes of its last push, `code`, uint8.

    keeps_last: so that `undo_` is possible.
    """

    def __init__(self, form: VectorFormat, like: torch.Tensor, keeps_last: bool = False):
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

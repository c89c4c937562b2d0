"""What a network's forward pass moves beside its parameters, such as the vectors of spectral norm (see model.buffers).

A worker keeps it as it keeps its velocity: from push to push, dropped with a push that is dropped, saved with a checkpoint. So
a gradient is a function of the weights, the positions, the seed and what the worker has pushed before, and a replay computes it.
"""

from __future__ import annotations

import torch

from asgd_mpi.vector.flat import FlatModel


class Carried:
    """One worker's own, beside its `flat`, whose network several may use in turn. `state`: as the last push left it, by name.

    begin_ -> forward passes -> finish_
    """

    def __init__(self, flat: FlatModel):
        self._flat = flat
        self._first, self._last, self.state = (_copy(flat.carried) for _ in range(3))

    def begin_(self) -> None:
        """Before the first batch of a push."""
        self._flat.set_carried_(self.state)

    def finish_(self) -> None:
        """A push is complete."""
        self._last, self.state = self.state, _copy(self._flat.carried)

    def undo_(self) -> None:
        """Go back to before the last push, which was not applied."""
        self.state = self._last

    def load_(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from another one's `state`; begin anew, without one."""
        self.state = self._last = _copy(
            {name: state.get(name, first) for name, first in self._first.items()}
        )


def _copy(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}

"""Vectors that go on from saved ones."""

from collections.abc import Mapping

import torch


def load_(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
    """Copy what was saved into one's own, by name; zero what was not, as at the beginning: the settings may be others."""
    for name, tensor in own.items():
        if name in state:
            tensor.copy_(state[name])
        else:
            tensor.zero_()

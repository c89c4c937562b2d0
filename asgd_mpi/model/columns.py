"""What a network in two columns is: one that can be computed on two ranks at the same time (see pipeline.columns)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class TwoColumns(nn.Module):
    """images (B, C, S, S) -> scores (B, classes), through its `segments`, in order; each is one of

    a pair        tuple of two modules, the columns: both take all maps that there are, and give as many maps of one shape
                  each. Theirs are put together along dimension 1: that is a cross-over.
    nn.Dropout    or its kin, of all maps, so that what it drops does not depend on who computes which column.
    the head      whatever comes after the last pair.

    A network that registers one column before the other has the parameters of each in one piece of the flat vectors.
    """

    @property
    def segments(self) -> Sequence[nn.Module | tuple[nn.Module, nn.Module]]:
        raise NotImplementedError

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = images
        for segment in self.segments:
            is_pair = isinstance(segment, tuple)
            if is_pair:
                maps = torch.cat([column(maps) for column in segment], 1)
            else:
                maps = segment(maps)
        return maps

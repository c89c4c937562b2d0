"""Networks that stand for a GPU: a training step sleeps, so that many of them fit on few cores."""

import os
import time

import torch
from torch import nn

STEP_S = float(os.environ.get("EMULATED_STEP_S", "0.02"))


class Emulated(nn.Module):
    """A linear classifier that carries `num_ballast` more parameters, and takes STEP_S for a step."""

    def __init__(self, num_classes: int, num_ballast: int):
        super().__init__()
        self.ballast = nn.Parameter(torch.zeros(num_ballast))
        self.head = nn.LazyLinear(num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            time.sleep(STEP_S)
        return self.head(images.flatten(1)) + self.ballast[:1]


def _network(num_classes: int, num_ballast: int) -> nn.Module:
    network = Emulated(num_classes, num_ballast).eval()
    network(torch.zeros(1, 1, 8, 8))  # gives the head its shape
    return network.train()


def small(num_classes: int) -> nn.Module:
    return _network(num_classes, 100_000)


def large(num_classes: int) -> nn.Module:
    return _network(num_classes, 2_000_000)

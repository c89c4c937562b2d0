"""A network that stands for a GPU: a training step sleeps, so that many fit on a host, and the exchange is as it would be.

`--model asgd_mpi.model.emulated:network`; how large it is and how long a step takes comes in the environment.
"""

from __future__ import annotations

import os
import time

import torch
from torch import nn

PARAMETERS, STEP_S = "ASGD_EMULATED_PARAMETERS", "ASGD_EMULATED_STEP_S"


class Emulated(nn.Module):
    """P parameters, of which only a bias (num_classes,) is used: the gradient of the rest is zero, and costs nothing."""

    def __init__(self, num_parameters: int, num_classes: int, step_s: float):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(max(1, num_parameters - num_classes)))
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self.step_s = step_s

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            time.sleep(self.step_s)
        return self.bias.expand(len(images), -1)


def network(num_classes: int) -> nn.Module:
    return Emulated(int(os.environ[PARAMETERS]), num_classes, float(os.environ[STEP_S]))

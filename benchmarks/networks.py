"""Networks whose steps take a given time: `--model benchmarks.networks:NAME`; what they need comes in the environment."""

import os
import time

import torch
from torch import nn

from asgd_mpi.model import networks

STEPS_MS = "ASGD_BENCH_STEPS_MS"  # of each worker, "20,20,20,100"
PARAMETERS = "ASGD_BENCH_PARAMETERS"  # P of `vector`
IMAGE_MS = "ASGD_BENCH_IMAGE_MS"  # forward and backward of one image through `chain`
NUM_LINKS = 4  # of `chain`
BACKWARD = 2 / 3  # share of the backward pass in a step
RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")


class Sleep(nn.Module):
    """Passes its input on after `seconds`, in training only."""

    def __init__(self, seconds: float):
        super().__init__()
        self.seconds = seconds

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            time.sleep(self.seconds)
        return images


def sleeping_digits(num_classes: int, channels: int, step_s: float) -> nn.Module:
    return nn.Sequential(Sleep(step_s), networks.digits_cnn(num_classes, channels))


def sleeping(num_classes: int, channels: int) -> nn.Module:
    """The network of the digits, on this rank's worker as slow as the environment says."""
    rank = int(next(os.environ[name] for name in RANKS if name in os.environ))
    steps = [float(step) / 1e3 for step in os.environ[STEPS_MS].split(",")]
    return sleeping_digits(num_classes, channels, steps[rank - 1] if rank else 0.0)


def fashion_cnn(num_classes: int, channels: int) -> nn.Module:
    """A small convolutional network for images of 28 x 28 pixels, quick on a CPU."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 128),
        nn.ReLU(),
        nn.Dropout(0.25),
        nn.Linear(128, num_classes),
    )


class Vector(nn.Module):
    """P parameters that cost nothing: the scores are those of no knowledge, and depend on the first of them only."""

    def __init__(self, num_parameters: int, num_classes: int):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(num_parameters))
        self.num_classes = num_classes

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.weights[:1].expand(len(images), self.num_classes)


def vector(num_classes: int) -> nn.Module:
    return Vector(int(os.environ[PARAMETERS]), num_classes)


class _SleepBothWays(torch.autograd.Function):
    """Passes its input and its gradient on, each after so many seconds."""

    @staticmethod
    def forward(ctx, images: torch.Tensor, forward_s: float, backward_s: float) -> torch.Tensor:
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return images.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        time.sleep(ctx.backward_s)
        return gradient, None, None


class Link(nn.Module):
    """As long forward and backward as its share of a step on so many images takes; in training only."""

    def __init__(self, image_s: float):
        super().__init__()
        self.image_s = image_s

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not self.training or images.is_meta:
            return images
        seconds = len(images) * self.image_s
        return _SleepBothWays.apply(images, (1 - BACKWARD) * seconds, BACKWARD * seconds)


def chain(num_classes: int) -> nn.Module:
    """NUM_LINKS blocks that take the same time, with a small real gradient: to be cut at 1, 2 and 3."""
    image_s = float(os.environ[IMAGE_MS]) / 1e3 / NUM_LINKS
    blocks = [nn.Sequential(nn.Linear(64, 64), Link(image_s)) for _ in range(NUM_LINKS)]
    blocks[0].insert(0, nn.Flatten())
    blocks[-1].append(nn.Linear(64, num_classes))
    return nn.Sequential(*blocks)

"""Networks that a user might bring, some of them ill: `--model.name networks_for_tests:NAME`."""

import glob
import itertools
import os
import random
import time
from pathlib import Path

import torch
from torch import nn

from asgd_mpi.model import networks
from asgd_mpi.model.columns import TwoColumns
from asgd_mpi.process import signals

RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "-1")))


class Behaviour(nn.Module):
    """Passes its input on after doing something else, in training only."""

    def __init__(self, act):
        super().__init__()
        self.act = act

    def forward(self, images):
        if self.training:
            self.act()
        return images


def small(num_classes: int, channels: int, act=lambda: None) -> nn.Module:
    return nn.Sequential(
        Behaviour(act),
        nn.Conv2d(channels, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(8 * 36, num_classes),
    )


def slow_on_rank_3(num_classes: int, channels: int) -> nn.Module:
    """A forward pass takes 0.2 s there."""
    return small(num_classes, channels, lambda: time.sleep(0.2) if RANK == 3 else None)


def without_dropout(num_classes: int, channels: int) -> nn.Module:
    """For workers that are threads of one process: they would share its random numbers."""
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, num_classes)
    )


def broad(num_classes: int, channels: int) -> nn.Module:
    """Most of its parameters, 16,384 of 19,210, are of a layer that compression does not leave as it is."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(channels * 64, 256), nn.ReLU(), nn.Linear(256, num_classes)
    )


class Crossed(nn.Module):
    """The images and an early layer are needed late: they cross every cut."""

    def __init__(self, num_classes: int, channels: int):
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        )
        self.second = nn.Sequential(
            nn.Dropout(0.3), nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        )
        self.third = nn.Sequential(nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.Dropout(0.3))
        self.last = nn.Linear((6 + channels) * 64, num_classes)

    def forward(self, images):
        early = self.first(images)
        late = self.third(self.second(early) + early)
        late += early
        return self.last(torch.cat([late, images], 1).flatten(1))


def crossed(num_classes: int, channels: int) -> nn.Module:
    return Crossed(num_classes, channels)


class Columned(TwoColumns):
    """Two columns that meet three times, with dropout of images and maps, batch norm, and a layer that nobody uses."""

    def __init__(self, num_classes: int, channels: int):
        super().__init__()

        def pair(make):
            return nn.ModuleList([make(), make()])

        def conv(width, **options):
            return nn.Sequential(
                nn.Conv2d(width, 4, 3, **options), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
            )

        self.early, self.late = nn.Dropout(0.1), nn.Dropout(0.1)
        self.low = pair(lambda: conv(channels, padding=1))
        self.middle = pair(lambda: conv(8).append(nn.MaxPool2d(2, 1)).append(nn.Flatten()))
        self.high = pair(lambda: nn.Linear(8 * 25, 16))
        self.head = nn.Sequential(nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, num_classes))
        self.spare = nn.Linear(3, 3)

    @property
    def segments(self):
        return [
            self.early,
            tuple(self.low),
            tuple(self.middle),
            self.late,
            tuple(self.high),
            self.head,
        ]


def columned(num_classes: int, channels: int) -> nn.Module:
    return Columned(num_classes, channels)


class Masked(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.register_buffer(
            "mask",
            torch.zeros(num_classes).index_fill(0, torch.tensor([num_classes - 1]), -torch.inf),
        )

    def forward(self, scores):
        return scores + torch.clamp(self.mask, min=-1.0)


class Keeping(nn.Module):
    """Holds much that is not trained: frozen layers, a frozen batch norm, buffers of other types, a mask of -inf."""

    def __init__(self, num_classes: int, channels: int):
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 3, padding=1).requires_grad_(False)
        self.kept = nn.BatchNorm2d(8)  # in evaluation, always
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
        )
        self.head = nn.Sequential(nn.Linear(128, num_classes), Masked(num_classes))
        self.register_buffer("precise", torch.tensor([1 / 3, 1e-300], dtype=torch.float64))
        self.register_buffer("count", torch.tensor(2**40 + 1))

    def train(self, mode=True):
        super().train(mode)
        self.kept.eval()
        return self

    def forward(self, images):
        return self.head(self.body(self.kept(self.stem(images))))


def keeping(num_classes: int, channels: int) -> nn.Module:
    return Keeping(num_classes, channels)


class Counting(nn.Module):
    """Reads in training what it has moved: a mean of all images, in float64, and how many it has seen."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, images):
        if self.training:
            self.mean.lerp_(images.detach().mean().double(), 0.1)
            self.seen = self.seen + len(images)
        return images - self.mean.float()


def moving(num_classes: int, channels: int) -> nn.Module:
    """Its forward pass moves buffers: spectral norm's, and Counting's; and batch norm's, which are measured anew."""
    return nn.Sequential(
        Counting(),
        nn.Conv2d(channels, 6, 3),
        nn.BatchNorm2d(6),
        nn.Flatten(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(6 * 36, 32)),
        nn.ReLU(),
        nn.Linear(32, num_classes),
    )


def restless(num_classes: int, channels: int) -> nn.Module:
    """Takes a random time for each step, so that pushes come in an order of their own.

    A test may have a step last until its process is asked to end, and knows by the file held.RANK that it does: from step HOLD_FROM
    on, or once there is a file that HOLD_ONCE matches.
    """
    clock, steps = random.SystemRandom(), itertools.count(1)
    first, once = int(os.environ.get("HOLD_FROM", "0")), os.environ.get("HOLD_ONCE", "")

    def act():
        time.sleep(clock.choice([0, 0, 0.002, 0.01]))
        if 0 < first <= next(steps) or once and glob.glob(once):
            Path(f"held.{RANK}").touch()
            while not signals.asked_to_leave():
                time.sleep(0.01)

    return small(num_classes, channels, act)


def normed(num_classes: int, channels: int) -> nn.Module:
    """With batch norm, whose statistics are no gradients."""
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, num_classes),
    )


def seven_classes(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))


def raises_on_rank_2(num_classes: int, channels: int) -> nn.Module:
    def act():
        if RANK == 2:
            raise ArithmeticError("the third rank has had enough")

    return small(num_classes, channels, act)


def hangs_on_rank_1(num_classes: int, channels: int) -> nn.Module:
    return small(num_classes, channels, lambda: time.sleep(3600) if RANK == 1 else None)


def explodes(num_classes: int, channels: int) -> nn.Module:
    class Infinite(nn.Module):
        def forward(self, scores):
            return scores * torch.inf if self.training else scores

    return nn.Sequential(small(num_classes, channels), Infinite())


def unhurried(num_classes: int, channels: int, step_s: float = 0.02) -> nn.Module:
    """The digits' own network, with time enough to interrupt a training."""
    return nn.Sequential(
        Behaviour(lambda: time.sleep(step_s)),
        networks.build("digits_cnn", num_classes, channels, 8),
    )


def waits_for_hurry(num_classes: int, channels: int) -> nn.Module:
    """The digits' own network, which takes 0.5 s for a step until there is a file `hurry` where the run began."""
    hurry = Path("hurry").absolute()
    return nn.Sequential(
        Behaviour(lambda: hurry.exists() or time.sleep(0.5)),
        networks.build("digits_cnn", num_classes, channels, 8),
    )


def wide(num_classes: int, channels: int) -> nn.Module:
    """614,432 numbers in the flat vector: more than two pieces of what a rule is called with; and restless."""
    clock = random.SystemRandom()
    return nn.Sequential(
        Behaviour(lambda: time.sleep(clock.choice([0, 0, 0.01]))),
        nn.Flatten(),
        nn.Linear(64 * channels, 8192),
        nn.ReLU(),
        nn.Linear(8192, num_classes),
    )

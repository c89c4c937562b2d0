"""A rule of your own: Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2) moves the weights at the server, for two spirals.

    mpirun -np 4 python -m asgd_mpi.train --task own_rule:Spirals --rule own_rule:Lion     # within examples/
    python -m asgd_mpi.simulate --task own_rule:Spirals --rule own_rule:Lion --workers 3 --rule.own_options beta2=0.95
    python -m asgd_mpi.replay RUN_DIR --rule own_rule:Lion

The last lines it prints have the share of held-out points that are on the right spiral.
"""

import dataclasses
import math

import torch
from torch import nn

import asgd_mpi


@dataclasses.dataclass
class Settings:
    beta1: float = 0.9
    beta2: float = 0.99
    decay: float = 0.1


class Lion(asgd_mpi.Rule):
    vectors = ("mean",)  # kept for every weight, in checkpoints, too
    Options = Settings

    def apply_(self, weights, pushed, verdict, piece):
        own, gradient, mean = self.options, pushed[piece], self.state["mean"][piece]
        step = torch.lerp(gradient, mean, own.beta1).sign_()
        weights[piece].mul_(1 - verdict.lr * own.decay).sub_(step, alpha=verdict.lr)
        mean.lerp_(gradient, 1 - own.beta2)


def spirals(number, seed):
    """Points (x, y) on two arms around the origin, and which arm, 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    arm = torch.randint(0, 2, (number,), generator=generator)
    angle = 3 * math.pi * torch.rand(number, generator=generator).sqrt() + math.pi * arm
    far = (angle - math.pi * arm) / (3 * math.pi)
    points = torch.stack([far * angle.cos(), far * angle.sin()], dim=1)
    noise = 0.02 * torch.randn(number, 2, generator=generator)
    return torch.utils.data.TensorDataset(points + noise, arm)


class Spirals(asgd_mpi.Task):
    unit, maximize = "points", True
    options = {"schedule.lr": 2e-3, "run.epochs": 20, "data.batch_size": 32}

    def train_set(self):
        return spirals(1024, seed=0)

    def val_set(self):
        return spirals(256, seed=1)

    def module(self):
        return nn.Sequential(
            nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
        )

    def loss(self, module, batch):
        points, arms = batch
        return nn.functional.cross_entropy(module(points), arms)

    def score(self, module, batch):
        points, arms = batch
        return {"accuracy": (module(points).argmax(1) == arms).float().mean()}

"""Label smoothing and mixup (Zhang et al. 2018, arXiv:1710.09412) in the loss of a task: scikit-learn's digits, by a small CNN.

    mpirun -np 4 python -m asgd_mpi.train --task mixup:Digits      # within examples/
    python -m asgd_mpi.simulate --task mixup:Digits --workers 3

The last lines it prints have the share of the held-out digits that are known, and the plain cross-entropy of them.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import asgd_mpi

SMOOTHING, ALPHA = 0.1, 0.2
HELD_OUT = 297  # of 1797 digits


def digits(part):
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[part]
    return torch.utils.data.TensorDataset(images[order], torch.tensor(labels)[order])


class Digits(asgd_mpi.Task):
    unit, maximize = "images", True
    options = {"schedule.lr": 0.05, "run.epochs": 8, "data.batch_size": 16}

    def train_set(self):
        return digits(slice(HELD_OUT, None))

    def val_set(self):
        return digits(slice(HELD_OUT))

    def module(self):
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )

    def loss(self, module, batch):
        images, labels = batch
        # torch's generator is seeded for every batch, so a replay draws the same
        share = torch.distributions.Beta(ALPHA, ALPHA).sample().item()
        other = torch.randperm(len(images), device=images.device)
        scores = module(share * images + (1 - share) * images[other])
        first = functional.cross_entropy(scores, labels, label_smoothing=SMOOTHING)
        second = functional.cross_entropy(scores, labels[other], label_smoothing=SMOOTHING)
        return share * first + (1 - share) * second

    def score(self, module, batch):
        images, labels = batch
        scores = module(images)
        return {
            "accuracy": (scores.argmax(1) == labels).float().mean(),
            "loss": functional.cross_entropy(scores, labels),
        }

"""Tasks of a user's own, for the tests: a regression with dropout, and the ways in which one can be wrong."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import asgd_mpi


def made(num, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 4, generator=generator)
    y = x @ torch.tensor([1.0, -2.0, 3.0, 0.5]) + 0.1 * torch.randn(num, generator=generator)
    return torch.utils.data.TensorDataset(x, y)


class Regression(asgd_mpi.Task):
    """Loss and metrics that image classification does not have; the best version has the lowest error."""

    unit = "rows"
    options = {"run.epochs": 4, "schedule.lr": 0.05, "data.batch_size": 16}

    def train_set(self):
        return made(256, 0)

    def val_set(self):
        return made(70, 1)

    def module(self):
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 1))

    def loss(self, module, batch):
        x, y = batch
        return functional.mse_loss(module(x)[:, 0], y)

    def score(self, module, batch):
        x, y = batch
        guess = module(x)[:, 0]
        return {
            "mse": functional.mse_loss(guess, y),
            "near": (((guess - y).abs() < 0.5).sum(), len(y)),
        }


class Hits(Regression):
    """The best version has the most hits; its losses are negative; it has batch norm."""

    maximize = True

    def module(self):
        return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))

    def loss(self, module, batch):
        return super().loss(module, batch) - 1000

    def score(self, module, batch):
        return {"near": super().score(module, batch)["near"]}


class Drawn(Regression):
    """Samples that are drawn anew each time, by three generators."""

    def train_set(self):
        return Noisy(made(256, 0))

    def val_set(self):
        return None


class Noisy(torch.utils.data.Dataset):
    def __init__(self, base):
        self.base = base

    def __len__(self):
        return len(self.base)

    def __getitem__(self, index):
        x, y = self.base[index]
        return x + 0.01 * torch.randn(4) + 0.01 * float(np.random.rand()), y


class Streamed(Regression):
    def train_set(self):
        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                return iter(range(9))

        return Stream()


class Vector(Regression):
    def loss(self, module, batch):
        return (module(batch[0])[:, 0] - batch[1]) ** 2


class Many(Regression):
    def score(self, module, batch):
        return {f"metric{number}": 0.0 for number in range(9)}


class Faulty(Regression):
    def loss(self, module, batch):
        return module(batch["x"]).mean()


class Misspelt(Regression):
    options = {"run.epoch": 4}

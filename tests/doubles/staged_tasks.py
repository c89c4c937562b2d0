"""Tasks of a user's own that are cut into stages, and those that cannot be, each for its own reason."""

import random

import numpy as np
import torch
from networks_for_tests import columned
from torch import nn
from torch.nn import functional

import asgd_mpi


class Windows(torch.utils.data.Dataset):
    """Some numbers, and a function of them: a dict of tensors of whole numbers, with a text."""

    def __init__(self, num, seed):
        generator = torch.Generator().manual_seed(seed)
        self.seen = torch.randint(0, 9, (num, 5), generator=generator)
        self.next = (2 * self.seen[:, 0] + self.seen[:, 4]) % 9

    def __len__(self):
        return len(self.next)

    def __getitem__(self, index):
        return {"seen": self.seen[index], "next": (self.next[index], "text")}


class Residual(nn.Module):
    """Two tensors cross a cut within it."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU())
        self.drop = nn.Dropout(0.1)

    def forward(self, known):
        return known + self.drop(self.inner(known))


class Words(asgd_mpi.Task):
    """The network takes whole numbers, the loss works before and after it, and the batch is a nested dict."""

    unit, maximize = "windows", True
    options = {
        "run.epochs": 2,
        "schedule.lr": 0.05,
        "data.batch_size": 16,
        "compute.micro_batches": 3,
        "compute.threads": 1,
    }

    def train_set(self):
        return Windows(200, 0)

    def val_set(self):
        return Windows(70, 1)

    def module(self):
        return nn.Sequential(
            nn.Embedding(9, 4), nn.Flatten(), Residual(20), Residual(20), nn.Linear(20, 9)
        )

    def loss(self, module, batch):
        scores = module(batch["seen"].flip(1)) / 2
        return functional.cross_entropy(scores, batch["next"][0], label_smoothing=0.1)

    def score(self, module, batch):
        truths = batch["next"][0]
        guesses = module(batch["seen"].flip(1)).argmax(1)
        return {"right": (guesses == truths).float().mean(), "loss": self.loss(module, batch)}


class InColumns(asgd_mpi.Task):
    """A network that is drawn in two columns."""

    options = {"data.batch_size": 16, "stages.number": 2, "stages.cut": "columns"}

    def train_set(self):
        images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        return torch.utils.data.TensorDataset(images, (images.mean((1, 2, 3)) > 0.5).long())

    def module(self):
        return columned(10, 1)

    def loss(self, module, batch):
        return functional.cross_entropy(module(2 * batch[0]), batch[1])


class Restored(Words):
    """The last stage reads what the network takes, too."""

    def loss(self, module, batch):
        scores = module(batch["seen"])
        return functional.cross_entropy(scores, batch["next"][0]) + functional.mse_loss(
            scores[:, :5], batch["seen"].float()
        )


class Weighed(Words):
    """What the network takes decides what the loss does."""

    def collate(self, samples):
        return super().collate(samples) | {"spare": torch.ones(3)}

    def loss(self, module, batch):
        loss = super().loss(module, batch)
        return loss if batch["seen"].sum() >= 0 else -loss


class Listed(Words):
    """A list that is as long as the batch goes before what the network takes."""

    def collate(self, samples):
        batch = super().collate(samples)
        return list(batch["next"][0]), batch["seen"]

    def loss(self, module, batch):
        return functional.cross_entropy(module(batch[1]), torch.stack(batch[0]))

    def score(self, module, batch):
        return {"loss": self.loss(module, batch)}


class Twice(Words):
    def loss(self, module, batch):
        return super().loss(module, batch) + 0 * module(batch["seen"]).sum()


class TwoTensors(Words):
    def module(self):
        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.known = Words().module()

            def forward(self, seen, shift):
                return self.known(seen) + shift

        return Both()

    def loss(self, module, batch):
        scores = module(batch["seen"], torch.ones(9))
        return functional.cross_entropy(scores, batch["next"][0])

    def val_set(self):
        return None


class Inside(Words):
    """Its loss looks into the module."""

    def loss(self, module, batch):
        return super().loss(module, batch) + 1e-3 * module[4].weight.square().sum()


class Beside(Words):
    """Its loss knows the parameters by another way."""

    def module(self):
        self.kept = super().module()
        return self.kept

    def loss(self, module, batch):
        return super().loss(module, batch) + self.kept[4].weight.square().sum()


class Elsewhere(Beside):
    def loss(self, module, batch):
        return super().loss(self.kept, batch)


class Noisy(Words):
    def loss(self, module, batch):
        torch.rand(1)
        return super().loss(module, batch)


class NoisyBy(Noisy):
    """numpy's generator, after the call."""

    def loss(self, module, batch):
        return Words.loss(self, module, batch) * (1 + 0 * np.random.rand())


class NoisyByPython(Noisy):
    def loss(self, module, batch):
        return Words.loss(self, module, batch) * (1 + 0 * random.random())


class Counting(Words):
    """Its loss depends on what it has kept."""

    calls = 0

    def loss(self, module, batch):
        self.calls += 1
        return super().loss(module, batch) * self.calls


class Grouped(Words):
    """A batch that is no nesting of tensors."""

    def collate(self, samples):
        return super().collate(samples) | {"more": np.ones(len(samples))}


class Redrawn(Words):
    def prepare(self, batch, device):
        found = super().prepare(batch, device)
        return found | {"more": torch.rand(3)}


class TwoOutputs(Words):
    def module(self):
        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.known = Words().module()

            def forward(self, seen):
                return self.known(seen), seen

        return Both()

    def loss(self, module, batch):
        return functional.cross_entropy(module(batch["seen"])[0], batch["next"][0])

    def val_set(self):
        return None


class Untraceable(Words):
    def module(self):
        class Looks(nn.Module):
            def __init__(self):
                super().__init__()
                self.known = Words().module()

            def forward(self, seen):
                return self.known(seen if seen.sum() > 0 else -seen)

        return Looks()


class Moving(Words):
    def module(self):
        class Counted(nn.Module):
            def __init__(self):
                super().__init__()
                self.known = Words().module()
                self.register_buffer("calls", torch.zeros(()))

            def forward(self, seen):
                self.calls += 1
                return self.known(seen)

        return Counted()


class DrawsAnew(Words):
    """Its network draws random numbers of a shape that does not depend on its input."""

    def module(self):
        class Shaken(nn.Module):
            def __init__(self):
                super().__init__()
                self.known = Words().module()

            def forward(self, seen):
                return self.known(seen) + torch.randn(9)

        return Shaken()


class Positions(Words):
    """Its network makes a tensor anew in each pass, always the same, and asks for a size."""

    def module(self):
        class Placed(nn.Module):
            def __init__(self):
                super().__init__()
                self.known, self.places = nn.Embedding(9, 4), nn.Embedding(5, 4)
                self.last = Words().module()[2:]

            def forward(self, seen):
                known = self.known(seen) + self.places(torch.arange(5))
                return self.last(known.view(known.size(0), -1))

        return Placed()


class LooksToScore(Words):
    def score(self, module, batch):
        return {"size": float(module[4].weight.norm())}

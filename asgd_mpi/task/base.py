"""What a user subclasses to train anything: the data, the network, the loss, and what a validation measures."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate

from asgd_mpi.data.dataset import SampleBatch
from asgd_mpi.optim.objective import on_device
from asgd_mpi.vector.groups import Settings


class Task:
    """A training of your own, for `python -m asgd_mpi.train --task package.module:Speech` or `asgd_mpi.launch(Speech)`.

    Every rank makes one, without arguments: what its methods return must be the same everywhere. A subclass gives at least
    `train_set`, `module` and `loss`.

    Attributes:
        unit: what samples are called in reports, in the plural, such as "windows".
        maximize: whether the first metric of `score` is to be high; it decides which version is the best.
        options: defaults of options by their dotted names, such as {"run.epochs": 5, "schedule.lr": 0.05}; a configuration
            file and the command line override them. A batch and a rate are those of one worker: many take others in a short run.

    Example:
        >>> import torch, asgd_mpi
        >>> class Line(asgd_mpi.Task):
        ...     def train_set(self):
        ...         x = torch.linspace(-1, 1, 256)[:, None]
        ...         return torch.utils.data.TensorDataset(x, 2 * x)
        ...     def module(self):
        ...         return torch.nn.Linear(1, 1)
        ...     def loss(self, module, batch):
        ...         x, y = batch
        ...         return torch.nn.functional.mse_loss(module(x), y)
        >>> len(Line().train_set())
        256
    """

    unit = "samples"
    maximize = False
    options: Mapping[str, Any] = {}
    # those of them that a call of asgd_mpi.train gives, and not the class
    given: Collection[str] = ()
    computes = True  # a loss of its own; else a loop of the user's computes the gradients
    is_seeded = True  # its first weights are a function of the seed
    listeners: Sequence[Callable[[Any], None]] = ()  # called with every event that a rank records
    settings: Mapping[str, Settings] = {}  # of parameters that have some of their own, by name

    def train_set(self) -> Any:
        """Return the dataset to train on: anything with len() and [index], such as a torch.utils.data.Dataset."""
        raise NotImplementedError(f"{type(self).__name__} must have a method train_set")

    def val_set(self) -> Any:
        """Return the dataset to validate on, or None for no validation."""
        return None

    def module(self) -> nn.Module:
        """Return the network with its first weights; torch's generator is seeded with --seed before."""
        raise NotImplementedError(f"{type(self).__name__} must have a method module")

    def loss(self, module: nn.Module, batch: Any) -> torch.Tensor:
        """Return the mean loss over a batch, a scalar tensor to differentiate."""
        raise NotImplementedError(f"{type(self).__name__} must have a method loss")

    def score(self, module: nn.Module, batch: Any) -> Mapping[str, Any]:
        """Return what a validation measures on a batch, by name: means over its samples, or pairs (sum, weight).

        The network is in evaluation mode, without gradients. The first metric decides which version is the best.
        """
        return {"loss": self.loss(module, batch)}

    def schedule(self, share: float) -> float:
        """Return a factor of the rate for the share of the run that is done, 0..1.

        It multiplies that of --schedule.name, which is cosine by default: for yours alone put "schedule.name": "constant" and
        "schedule.warmup_epochs": 0 among the options.
        """
        return 1.0

    def collate(self, samples: list) -> Any:
        """Return a batch of some samples; torch's default_collate stacks tensors, numbers, and nestings of them."""
        return default_collate(samples)

    # ---- what the engine calls (optim.objective.Objective)

    def prepare(self, batch: SampleBatch, device: torch.device) -> Any:
        """Return a batch on the device."""
        return on_device(batch.data, device)

    def begin(self, rank: Any, flat: Any) -> None:
        """Take note that a worker begins."""

    def forward(self, module: nn.Module, inputs: Any) -> Any:
        """Let the network see a batch, as in training."""
        return self.loss(module, inputs)

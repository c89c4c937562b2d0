"""Image classification: the built-in task."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from asgd_mpi.data import images
from asgd_mpi.data.augment import Normalise, make_policy
from asgd_mpi.data.folder import FolderSet, SyntheticSet
from asgd_mpi.data.loader import Loader
from asgd_mpi.data.order import Order, Sequential
from asgd_mpi.data.shards import ShardSet
from asgd_mpi.errors import ConfigError, few
from asgd_mpi.model import networks, pretrained
from asgd_mpi.model.buffers import moved_by_training_
from asgd_mpi.model.trained import demand_trained
from asgd_mpi.model.weights import load_weights_
from asgd_mpi.optim.classification import Classification, DividedClassification
from asgd_mpi.task.opened import Forward, OpenedTask


@dataclass(frozen=True)
class ImageTask(OpenedTask):
    """Images by their classes, from shards, a folder or made up; a network by its name."""

    train: ShardSet
    val: ShardSet

    @property
    def objective(self) -> Classification:
        return Classification(self.normalise, self.config.compute.channels_last)

    @property
    def divided(self) -> DividedClassification:
        return DividedClassification(self.objective, self.config.model.name)

    @property
    def channels(self) -> int:
        if not self.train.image_shape:
            return 3
        return self.train.image_shape[2]

    @property
    def facts(self) -> dict[str, Any]:
        return super().facts | {
            "channels": self.channels,
            "image_size": self.config.data.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "resize": self.config.data.resize or 0,
        }

    @property
    def normalise(self) -> Normalise:
        return Normalise(self.mean, self.std)

    @property
    def mean(self) -> tuple[float, ...]:
        return images.mean_of(self.config.data, self.train)

    @property
    def std(self) -> tuple[float, ...]:
        return images.std_of(self.config.data, self.train)

    def build_module(self) -> nn.Module:
        """Return the network with its first weights, a function of the seed. Raises ConfigError."""
        torch.manual_seed(self.config.run.seed)
        module = networks.build(
            self.config.model.name,
            self.train.num_classes,
            self.channels,
            self.config.data.image_size,
        )
        demand_trained(module)
        return self._laid_out(module)

    def outline(self) -> nn.Module:
        """Return the network without memory for its parameters, to be cut into stages; with it, if its code needs it."""
        module = networks.outline(self.config.model.name, self.train.num_classes, self.channels)
        if module is None:
            return self.build_module()
        return self._laid_out(module)

    def first_module(self, note: Callable[[str], None] = lambda text: None) -> nn.Module:
        """Return the network with the weights that training begins with: random, or from a file. Raises ConfigError.

        `note` is told what was done to what a file holds.
        """
        module, model = self.build_module(), self.config.model
        if model.weights:
            load_weights_(module, pretrained.file_of(model.weights), model.partial_weights, note)
        return module

    def one(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return an image of noise, of the first class."""
        size, generator = self.config.data.image_size, torch.Generator().manual_seed(0)
        noise = torch.randn(1, self.channels, size, size, generator=generator)
        return noise, torch.zeros(1, dtype=torch.int64)

    def carried(self, module: nn.Module, forward: Forward | None = None) -> list[str]:
        if forward is None:
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(2, *self._shape_of_part[1:], generator=generator)
            forward = lambda network: network(noise)
        moved = moved_by_training_(module, forward)
        self.demand_unmoved(moved)
        if moved and self.config.model.batchnorm == "server_ema":
            raise ConfigError(
                f"--model.batchnorm server_ema: the network's forward pass moves {few(moved)}, of which there is no "
                "mean. Take recalibrate."
            )
        return moved

    def train_loader(self, on_skip=print, touch_on_device: bool = False) -> Loader:
        order = Order(self.train.num_samples, self.config.run.seed)
        return self._loader(
            self.train, order, self.config.data.augment, on_skip, touch_on_device, self.smallest
        )

    def val_loader(self, on_skip=print) -> Loader:
        return self._loader(self.val, Sequential(self.val.num_samples), "none", on_skip)

    def sample(self) -> torch.Tensor:
        return torch.empty(self._shape_of_part, device="meta")

    @property
    def _shape_of_part(self) -> tuple[int, ...]:
        """The shape of the images of a micro-batch."""
        data = self.config.data
        return (
            -(-data.batch_size // self.config.compute.micro_batches),
            self.channels,
            data.image_size,
            data.image_size,
        )

    def _laid_out(self, module: nn.Module) -> nn.Module:
        return (
            module.to(memory_format=torch.channels_last)
            if self.config.compute.channels_last
            else module
        )

    def _loader(
        self,
        shards: ShardSet,
        order: Order | Sequential,
        augment: str,
        on_skip,
        touch_on_device: bool = False,
        smallest: int = 1,
    ) -> Loader:
        data = self.config.data
        policy = make_policy(augment, data.image_size, shards.image_shape, data.resize or 0)
        return Loader(
            shards,
            order,
            policy,
            self.config.run.seed,
            data.threads,
            on_skip if data.on_bad_image == "skip" else None,
            touch_on_device,
            smallest,
        )


def open_split(
    source: str, path: str, split: str, on_retry: Callable[[str], None] = warnings.warn
) -> ShardSet | FolderSet | SyntheticSet:
    """Open one split of a data set, as `data.source` and `data.path` name it. Raises DataError."""
    if source == "synthetic":
        return SyntheticSet(split)
    if source == "folder":
        return FolderSet(path, split)
    return ShardSet.open(path, split, on_retry)

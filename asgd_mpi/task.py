"""What a configuration names, opened: the data set, the network with its first weights, the plan of the run.

The server, the workers and the replay open the same task from the same configuration, and get the same one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from asgd_mpi.config import limits
from asgd_mpi.config.options import Config, with_recipe
from asgd_mpi.config.rulebook import RULEBOOK, in_flight, linear_scale, pacing, vectors
from asgd_mpi.data import images
from asgd_mpi.data.augment import Normalise, make_policy
from asgd_mpi.data.folder import FolderSet, SyntheticSet
from asgd_mpi.data.loader import Loader
from asgd_mpi.data.manifest import MANIFEST
from asgd_mpi.data.order import Order, Sequential
from asgd_mpi.data.shards import ShardSet
from asgd_mpi.errors import ConfigError
from asgd_mpi.model import networks, pretrained
from asgd_mpi.model.buffers import few, moved_by_training_
from asgd_mpi.model.weights import load_weights_
from asgd_mpi.optim.lr_schedule import Schedule
from asgd_mpi.pipeline import columns
from asgd_mpi.pipeline.graph import Graph, trace
from asgd_mpi.pipeline.plan import Batch, Row, Seconds, StagePlan
from asgd_mpi.pipeline.schedule import SCHEDULES
from asgd_mpi.protocol.ledger import Plan
from asgd_mpi.vector.flat import demand_trained

EMBEDDED = "digits"
EMBEDDED_DIR = Path("data/digits")
LEASE_PUSHES = 4  # with n_push auto: while one is under way the next is summed up, and either may be longer than the last one


@dataclass(frozen=True)
class Task:
    """See the module. `config` is complete: no field is None."""

    config: Config
    train: ShardSet
    val: ShardSet

    @property
    def channels(self) -> int:
        return self.train.image_shape[2] if self.train.image_shape else 3

    @property
    def smallest(self) -> int:
        """Images that a batch, or a part of one, has at least; 1 in runs that were recorded without."""
        return self.config.data.min_batch or 1

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
        """The network with its first weights, a function of the seed. Raises ConfigError."""
        torch.manual_seed(self.config.run.seed)
        module = networks.build(self.config.model.name, self.train.num_classes, self.channels, self.config.data.image_size)
        demand_trained(module)
        return self._laid_out(module)

    def outline(self) -> nn.Module:
        """The network without memory for its parameters, to be cut into stages; with it, if its code needs it."""
        module = networks.outline(self.config.model.name, self.train.num_classes, self.channels)
        return self._laid_out(module) if module else self.build_module()

    def first_module(self, note: Callable[[str], None] = lambda text: None) -> nn.Module:
        """The network with the weights that training begins with: random, or from a file. Raises ConfigError.

        `note` is told what was done to what a file holds.
        """
        module, model = self.build_module(), self.config.model
        if model.weights:
            load_weights_(module, pretrained.file_of(model.weights), model.partial_weights, note)
        return module

    def carried(self, module: nn.Module) -> list[str]:
        """The names of what the network's forward pass moves in training (see model.buffers). Raises ConfigError.

        `module` is trained for it: nobody may need it afterwards.
        """
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(2, *self._shape_of_part[1:], generator=generator)
        moved = moved_by_training_(module, noise)
        if moved and self.config.stages.number > 1:
            raise ConfigError(f"--stages.number {self.config.stages.number}: the network's forward pass moves {few(moved)}, which "
                              "every worker keeps, and a network that is cut cannot. Leave --stages out.")
        if moved and self.config.model.batchnorm == "server_ema":
            raise ConfigError(f"--model.batchnorm server_ema: the network's forward pass moves {few(moved)}, of which there is no "
                              "mean. Take recalibrate.")
        return moved

    def train_loader(self, on_skip=print, touch_on_device: bool = False) -> Loader:
        order = Order(self.train.num_samples, self.config.run.seed)
        return self._loader(self.train, order, self.config.data.augment, on_skip, touch_on_device, self.smallest)

    def val_loader(self, on_skip=print) -> Loader:
        return self._loader(self.val, Sequential(self.val.num_samples), "none", on_skip)

    def stage_plan(self, module: nn.Module, seconds: list[Seconds] | None = None) -> StagePlan:
        """What the parts of the network cost. Raises ConfigError if it cannot be cut."""
        shape, micro = self._shape_of_part, self.config.compute.micro_batches
        batch = Batch(shape[0], micro, SCHEDULES[self.config.stages.schedule])
        return StagePlan(Graph(trace(module), shape), batch, seconds, self._vectors)

    def rows_of_columns(self, module: nn.Module) -> list[Row]:
        """What each column of the network costs. Raises ConfigError if it has none."""
        return columns.rows(module, self._shape_of_part, self._vectors)

    def cuts(self, plan: StagePlan, balance: str) -> list[int]:
        """Where the network is cut: at the user's names, or by what is to be balanced. Raises ConfigError."""
        stages = self.config.stages
        return plan.cuts_at(stages.names) if stages.names else plan.cuts_by(balance, stages.number)

    def plan(self, num_workers: int) -> Plan:
        data, run, samples = self.config.data, self.config.run, self.train.num_samples
        n_push = self.config.exchange.n_push
        sums_on = n_push == "auto"                                                  # while a push is under way
        lease_batches = max(data.lease_batches, 1 if sums_on else n_push)           # two are held: enough for a push
        return Plan(num_workers, samples, self.val.num_samples, round(run.epochs * samples), data.batch_size,
                    lease_batches, run.validate_every, self.config.failure.max_nonfinite,
                    round(self.config.rule.warm_start_epochs * samples), pacing(self.config.rule, num_workers),
                    LEASE_PUSHES if sums_on else 0, RULEBOOK[self.config.rule.name].moves == "elastic", self.smallest)

    def schedule(self, num_workers: int) -> Schedule:
        samples, config = self.train.num_samples, self.config
        return Schedule(config.schedule, samples, round(config.run.epochs * samples), num_workers, config.rule.staleness,
                        in_flight(config.rule, num_workers, config.exchange.overlap), linear_scale(config.rule, num_workers))

    @property
    def _shape_of_part(self) -> tuple[int, ...]:
        """Of the images of a micro-batch."""
        data = self.config.data
        return -(-data.batch_size // self.config.compute.micro_batches), self.channels, data.image_size, data.image_size

    @property
    def _vectors(self) -> int:
        """Copies of its parameters that a stage keeps."""
        return 2 + vectors(self.config.rule, num_workers=1)[1]

    def _laid_out(self, module: nn.Module) -> nn.Module:
        return module.to(memory_format=torch.channels_last) if self.config.compute.channels_last else module

    def _loader(self, shards: ShardSet, order: Order | Sequential, augment: str, on_skip,
                touch_on_device: bool = False, smallest: int = 1) -> Loader:
        data = self.config.data
        policy = make_policy(augment, data.image_size, shards.image_shape, data.resize or 0)
        return Loader(shards, order, policy, self.config.run.seed, data.threads, data.on_bad_image, on_skip,
                      touch_on_device, smallest)


def open_task(config: Config, on_retry: Callable[[str], None] = warnings.warn) -> Task:
    """Open the data that a complete configuration names. Raises DataError, ConfigError.

    `on_retry` gets a message each time a read of a shard has to be repeated, from any thread.
    """
    train, val = (open_split(config.data.source, config.data.path, split, on_retry) for split in ("train", "val"))
    limits.check_with_data(config, train.num_samples)
    task = Task(config, train, val)
    if len(task.mean) != task.channels or len(task.std) != task.channels:
        raise ConfigError(f"--data.mean {config.data.mean} and --data.std {config.data.std}: the images of {config.data.path} have "
                          f"{task.channels} channels; give a number for each.")
    return task


def open_split(source: str, path: str, split: str,
               on_retry: Callable[[str], None] = warnings.warn) -> ShardSet | FolderSet | SyntheticSet:
    """Open one split of a data set, as `data.source` and `data.path` name it. Raises DataError."""
    if source == "synthetic":
        return SyntheticSet(split)
    return FolderSet(path, split) if source == "folder" else ShardSet.open(path, split, on_retry)


def complete(config: Config) -> Config:
    """Fill in what the configuration leaves to the network and the data; makes the embedded data set on first use.

    Raises ConfigError, DataError.
    """
    data = config.data
    if data.source == "synthetic":
        data = replace(data, path="synthetic")
    if data.source == "shards" and data.path == EMBEDDED and not Path(EMBEDDED).exists():
        data = replace(data, path=str(EMBEDDED_DIR))
        if not (EMBEDDED_DIR / MANIFEST).exists():
            from data_prep import digits  # brings scikit-learn, which nothing else needs

            digits.prepare_once(EMBEDDED_DIR)
    if None in (data.image_size, data.resize, data.mean, data.std):
        train = open_split(data.source, data.path, "train")
        data = images.fitted(data, train, pretrained.expected(config.model.weights))
    config = replace(config, data=data)
    return with_recipe(config, networks.recipe(config.model.name, data.image_size, config.model.recipe))


def told(task: Task) -> Iterator[str]:
    """Say how images are prepared, and what the recipe is, line by line: before the run."""
    weights = task.config.model.weights
    yield from images.told(task.config.data, task.train, weights, pretrained.expected(weights))
    yield networks.recipe_told(task.config)

"""A user's own task, opened."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from asgd_mpi.config import limits
from asgd_mpi.config.options import Config, Recipe
from asgd_mpi.config.resolved import Resolved, with_recipe
from asgd_mpi.data.dataset import DatasetLoader, SampleBatch, Samples, seed_all_
from asgd_mpi.data.order import Order, Sequential
from asgd_mpi.errors import ConfigError, few
from asgd_mpi.model import pretrained
from asgd_mpi.model.blame import blamed
from asgd_mpi.model.buffers import moved_by_training_
from asgd_mpi.model.trained import demand_trained
from asgd_mpi.model.weights import load_weights_
from asgd_mpi.optim.divided import Divided
from asgd_mpi.optim.lr_schedule import Schedule
from asgd_mpi.optim.objective import Objective
from asgd_mpi.task.base import Task
from asgd_mpi.task.opened import Forward, OpenedTask
from asgd_mpi.vector.flat import FlatModel
from asgd_mpi.vector.groups import ParameterGroup, Settings

OWN = ("task", "script")  # values of data.source: a user's own
RECIPE = Recipe(
    epochs=10,
    batch_size=32,
    augment="none",
    momentum=0.9,
    weight_decay=0.0,
    schedule="cosine",
    lr=0.01,
    source="general defaults, not tuned for your task",
)


@dataclass(frozen=True)
class OwnSchedule(Schedule):
    """The rate of --schedule times a task's own factor."""

    factor: Callable[[float], float] = lambda share: 1.0

    def _decay(self, samples: int) -> float:
        return super()._decay(samples) * float(self.factor(samples / self.total_samples))


class Nothing:
    """The validation split of a task that has none."""

    num_samples, num_classes = 0, 0
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    root = fingerprint = ""
    draws, dataset = False, ()


@dataclass(frozen=True)
class OwnTask(OpenedTask):
    """See OpenedTask. `own`: the user's; `metrics`: what its `score` gives, as the trial step before the run finds them."""

    train: Samples
    val: Samples | Nothing
    own: Task = field(kw_only=True)
    unread: tuple[str, ...] = ()  # of a batch, by the last stage (see optim.divided)

    is_own = True

    @property
    def name(self) -> str:
        """Return what messages call it."""
        return f"--task {self.config.model.name}" if self.computes else self.config.model.name

    @property
    def computes(self) -> bool:
        return self.own.computes

    @property
    def is_seeded(self) -> bool:
        return self.own.is_seeded

    def begin(self, rank: Any, flat: FlatModel) -> None:
        self.own.begin(rank, flat)

    def schedule(self, num_workers: int) -> Schedule:
        return OwnSchedule(**vars(super().schedule(num_workers)), factor=self.own.schedule)

    def groups(self, module: nn.Module) -> list[ParameterGroup]:
        def merged(group: ParameterGroup, own: Settings | None) -> ParameterGroup:
            # --rule.no_decay goes ahead of the optimizer's decay
            decays = group.settings.weight_decay != 0
            settings = (own or Settings())._replace(**{} if decays else {"weight_decay": 0.0})
            return replace(group, settings=settings)

        names = [name for name, one in module.named_parameters() if one.requires_grad]
        return [
            merged(group, self.own.settings.get(name))
            for name, group in zip(names, super().groups(module), strict=True)
        ]

    @property
    def objective(self) -> Objective:
        return self.own

    @property
    def divided(self) -> Divided:
        who = f"--stages.number {self.config.stages.number}: {self.name}"
        return Divided(self.own, who, self.unread)

    @property
    def maximize(self) -> bool:
        return self.own.maximize

    @property
    def unit(self) -> str:
        return self.own.unit

    def build_module(self) -> nn.Module:
        seed_all_(self.config.run.seed)
        torch.manual_seed(self.config.run.seed)
        with blamed(f"{self.name}: its network cannot be made", "Mend that"):
            module = self.own.module()
        if not isinstance(module, nn.Module):
            raise ConfigError(
                f"{self.name}: module() gave a {type(module).__name__}; it must return a torch.nn.Module."
            )
        demand_trained(module)
        return module.train()

    def first_module(self, note: Callable[[str], None] = lambda text: None) -> nn.Module:
        module, model = self.build_module(), self.config.model
        if model.weights:
            load_weights_(module, pretrained.file_of(model.weights), model.partial_weights, note)
        return module

    def outline(self) -> nn.Module:
        return self.build_module()

    def sample(self) -> torch.Tensor:
        size = -(-self.config.data.batch_size // self.config.compute.micro_batches)
        inputs = self.trial(min(size, self.train.num_samples))
        with blamed(f"{self.name} fails in a loss", "Mend that"):
            return self.divided.taken(inputs)

    def one(self) -> Any:
        return self.trial(1)

    def carried(self, module: nn.Module, forward: Forward | None = None) -> list[str]:
        if not self.computes:  # nobody knows how the loop calls it
            return []
        if forward is None:
            inputs = self.trial(min(2, self.train.num_samples))
            forward = lambda network: self.own.forward(network, inputs)
        with blamed(f"{self.name} fails in a forward pass", "Mend that"):
            moved = moved_by_training_(module, forward, self.name)
        self.demand_unmoved(moved)
        if moved and self.config.model.batchnorm == "server_ema":
            raise ConfigError(
                f"--model.batchnorm server_ema: the network's forward pass moves {few(moved)}, of which there is no "
                "mean. Take recalibrate."
            )
        return moved

    def train_loader(
        self, on_skip: Callable[[str], None] = print, touch_on_device: bool = False
    ) -> DatasetLoader:
        order = Order(self.train.num_samples, self.config.run.seed)
        return DatasetLoader(self.train, order, self.config.run.seed, self.own.collate)

    def val_loader(self, on_skip: Callable[[str], None] = print) -> DatasetLoader:
        order = Sequential(self.val.num_samples)
        return DatasetLoader(self.val, order, self.config.run.seed, self.own.collate)

    def trial(self, size: int, of_validation: bool = False) -> Any:
        """Return a batch of the first samples of a split, as the network takes it, on the CPU. Raises ConfigError."""
        batch = self.trial_batch(size, of_validation)
        with blamed(f"{self.name}: a batch cannot be prepared", "Mend that, or `collate`"):
            return self.own.prepare(batch, torch.device("cpu"))

    def trial_batch(self, size: int, of_validation: bool = False) -> SampleBatch:
        """Return the same as it is read."""
        if of_validation:
            loader, whose = self.val_loader(), "val_set"
        else:
            loader, whose = self.train_loader(), "train_set"
        with blamed(f"{self.name}: a batch of {whose} cannot be made", "Mend that, or `collate`"):
            batch = loader.batch(0, 0, size)
            loader.close()
        return batch


def told_of_own(task: OwnTask) -> Iterator[str]:
    """Say what a task of the user's trains with, line by line: before the run."""
    config = task.config
    has_factor = any(task.own.schedule(share) != 1 for share in (0.0, 0.25, 0.5, 0.75))
    times = ", times your schedule" if has_factor else ""
    yield (
        f"{config.model.name}: {config.run.epochs:g} epochs, batches of {config.data.batch_size}, lr {config.schedule.lr:g} "
        f"({config.schedule.name}{times}), momentum {config.rule.momentum:g}, weight decay {config.rule.weight_decay:g}; what you did not "
        f"give are {RECIPE.source}"
    )
    if own := task.own.settings.values():
        differ = {
            "rate": {one.rate * config.schedule.lr for one in own} - {config.schedule.lr},
            "weight decay": {one.weight_decay for one in own} - {None},
            "betas": {one.betas for one in own} - {None},
        }
        told = [
            f"{name} {', '.join(f'{value:g}' if isinstance(value, float) else str(value) for value in sorted(values))}"
            for name, values in differ.items()
            if values
        ]
        yield f"parameter groups: {len(own)} parameters have settings of their own: {'; '.join(told)}"
    if task.train.draws:
        yield (
            "note: the training set draws random numbers, so its samples are read by the thread that trains, with the draws of "
            "(seed, epoch, sample): they can be drawn again by a resumed run and a replay"
        )


def find(name: str) -> Task:
    """Return the task that package.module:Class names. Raises ConfigError; imports code, see runtime.trust."""
    source, _, attribute = name.partition(":")
    if name.endswith(".py"):
        raise ConfigError(
            f"the run was made by a training loop in {name}, and only that goes on with it: python {name} --resume RUN (with "
            "--dry-run to look first)."
        )
    if not attribute:
        raise ConfigError(f"--task {name}: name a class as package.module:Class.")
    with blamed(f"--task {name} cannot be made", "Mend that, or name another task"):
        found = importlib.import_module(source)
        for part in attribute.split("."):
            found = getattr(found, part)
        own = found() if isinstance(found, type) else found
    if not isinstance(own, Task):
        raise ConfigError(
            f"--task {name} is a {type(own).__name__}: it must be a class that inherits from asgd_mpi.Task."
        )
    return own


def with_options(config: Config, own: Task) -> Config:
    """Return a configuration with the options that a task brings as its defaults. Raises ConfigError."""
    for option, value in own.options.items():
        section, _, name = option.partition(".")
        part = getattr(config, section, None)
        if part is None or not hasattr(part, name):
            raise ConfigError(
                f"{type(own).__name__}.options: {option} is no option; name it as section.key, such as run.epochs."
            )
        config = replace(config, **{section: replace(part, **{name: value})})
    limits.check(config)
    return config


def completed(config: Config) -> Resolved:
    """Return the configuration of an own task with what it leaves open: no recipe knows it, so these are general defaults."""
    return with_recipe(config, RECIPE)


def open_own(config: Config, own: Task) -> OwnTask:
    """Open a user's task. Raises ConfigError, DataError."""
    name = f"--task {config.model.name}" if own.computes else config.model.name
    if not isinstance(own.options, Mapping):
        raise ConfigError(f"{name}: options is a {type(own.options).__name__}; give a dict.")
    with blamed(f"{name}: its data cannot be made", "Mend that"):
        train, val = own.train_set(), own.val_set()
    with blamed(f"{name}: its first sample cannot be read", "Mend that"):
        task = OwnTask(
            config,
            Samples(train, f"{name}: train_set"),
            Nothing() if val is None else Samples(val, f"{name}: val_set"),
            own=own,
        )
    limits.check_with_data(config, task.train.num_samples)
    return task

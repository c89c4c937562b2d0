"""How a task is opened: image classification, or a user's own, as `data.source` says."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from asgd_mpi.config import limits, rulebook
from asgd_mpi.config.options import Config
from asgd_mpi.config.resolved import Resolved, with_recipe
from asgd_mpi.data import images, packers
from asgd_mpi.data.manifest import MANIFEST
from asgd_mpi.errors import ConfigError
from asgd_mpi.model import batchnorm, networks, pretrained
from asgd_mpi.task.base import Task
from asgd_mpi.task.images import ImageTask, open_split
from asgd_mpi.task.opened import OpenedTask
from asgd_mpi.task.own import OWN, OwnTask, completed, find, open_own, told_of_own

EMBEDDED = "digits"
EMBEDDED_DIR = Path("data/digits")


def open_task(
    config: Config,
    on_retry: Callable[[str], None] = warnings.warn,
    own: Task | None = None,
    metrics: Sequence[str] = (),
) -> OpenedTask:
    """Open the data that a complete configuration names. Raises DataError, ConfigError.

    `on_retry` gets a message each time a read of a shard has to be repeated, from any thread. `own`: the user's task, if it is
    not to be found by its name; `metrics`: those that its trial step has found.
    """
    if config.data.source in OWN:
        return replace(open_own(config, own or find(config.model.name)), metrics=tuple(metrics))
    train, val = (
        open_split(config.data.source, config.data.path, split, on_retry)
        for split in ("train", "val")
    )
    limits.check_with_data(config, train.num_samples)
    task = ImageTask(config, train, val)
    if len(task.mean) != task.channels or len(task.std) != task.channels:
        raise ConfigError(
            f"--data.mean {config.data.mean} and --data.std {config.data.std}: the images of {config.data.path} have "
            f"{task.channels} channels; give a number for each."
        )
    return task


def complete(config: Config) -> Resolved:
    """Fill in what the configuration leaves to the network and the data; makes the embedded data set on first use.

    Raises ConfigError, DataError.
    """
    data = config.data
    if data.source in OWN:
        return completed(config)
    if data.source == "synthetic":
        data = replace(data, path="synthetic")
    if data.source == "shards" and data.path == EMBEDDED and not Path(EMBEDDED).exists():
        data = replace(data, path=str(EMBEDDED_DIR))
        if not (EMBEDDED_DIR / MANIFEST).exists():
            # brings scikit-learn, which nothing else needs
            packers.packer("digits").prepare_once(EMBEDDED_DIR)
    if None in (data.image_size, data.resize, data.mean, data.std):
        train = open_split(data.source, data.path, "train")
        data = images.fitted(data, train, pretrained.expected(config.model.weights))
    config = replace(config, data=data)
    asked = rulebook.RULEBOOK[config.rule.name].optimizer or config.rule.optimizer or ""
    chosen = networks.recipe(config.model.name, data.image_size, config.model.recipe, asked)
    return with_recipe(config, chosen)


def for_workers(task: OpenedTask, asked: Config, num_workers: int) -> tuple[OpenedTask, list[str]]:
    """Return the task with the batch and the rate that suit so many workers, if `asked` leaves both open, and what to say of it.

    asked: the configuration before it was completed; what a user gives is taken as it is, and so is what a run has recorded. What
    a task of one's own brings is for one worker, as a recipe is: `runtime.prepare.as_given` leaves it open.
    """
    config = task.config
    data, schedule = config.data, config.schedule
    if asked.data.batch_size is not None or asked.schedule.lr is not None or not task.computes:
        return task, []
    whose = "task" if task.is_own else "recipe"
    if (scale := rulebook.local_scale(config.rule, num_workers)) > 1:
        rate = schedule.lr * scale
        note = (
            f"{num_workers} workers: lr {rate:g}, not {schedule.lr:g} as the {whose} has for one, since the mean of what they train on their own "
            f"bears more (docs/rules.md). To have the {whose}'s: --lr {schedule.lr:g}"
        )
        return replace(task, config=replace(config, schedule=replace(schedule, lr=rate))), [note]
    samples, least = task.train.num_samples, 1
    divisor = rulebook.batch_divisor(config, num_workers, samples)
    if divisor > 1:
        least = _least_batch(task, data.batch_size // divisor)
    divisor = rulebook.batch_divisor(config, num_workers, samples, least)
    if divisor == 1:
        return task, []
    images, rule = data.batch_size // divisor, config.rule
    rate = rulebook.smaller_rate(rule, schedule.lr, divisor)
    drift = rulebook.smaller_batch_drift(rule, num_workers, divisor)
    pushes, more = config.run.epochs * samples / num_workers / images, ""
    if drift != rule.max_drift:
        rule = replace(rule, max_drift=drift)
        more += f" and max_drift {drift:g}"
    if asked.rule.momentum_at is None and rulebook.suits_dana(config, pushes):
        rule = replace(rule, momentum_at="dana")
        more += ", AdamW's means kept by the workers"
    note = (
        f"{num_workers} workers: batches of {images} at lr {rate:g}{more}, not of {data.batch_size} at {schedule.lr:g} as the {whose} has "
        f"for one, since each pushes {pushes:,.0f} times only, and with less under way gradients are less stale (docs/rules.md), for "
        f"{divisor} times the exchanges. To have the {whose}'s: --batch-size {data.batch_size} --lr {schedule.lr:g}"
    )
    config = replace(
        config,
        rule=rule,
        data=replace(data, batch_size=images),
        schedule=replace(schedule, lr=rate),
    )
    return replace(task, config=config), [note]


def _least_batch(task: OpenedTask, images: int) -> int:
    """Return how many samples a batch needs at least for the network and the loss, of which it may come to have `images`."""
    module = task.build_module()
    if batchnorm.measured(module):
        return rulebook.LEAST_NORMED_BATCH
    if images > 1 or _learns_from_one(task, module):
        return 1
    return 2


def _learns_from_one(task: OpenedTask, module: nn.Module) -> bool:
    """Return whether the loss of one sample can be computed, and is no constant: one that compares samples with each other is."""
    try:
        task.objective.loss(module, task.one()).backward()
    except Exception:  # what fails with two samples, too, the trial step tells
        return False
    found = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return any(bool(gradient.any()) for gradient in found)


def told(task: OpenedTask) -> Iterator[str]:
    """Say how images are prepared, and what the recipe is, line by line: before the run."""
    if isinstance(task, OwnTask):
        yield from told_of_own(task)
        return
    weights = task.config.model.weights
    yield from images.told(task.config.data, task.train, weights, pretrained.expected(weights))
    yield networks.recipe_told(task.config)

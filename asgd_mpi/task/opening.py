"""How a task is opened: image classification, or a user's own, as `data.source` says."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

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

    asked: the configuration before it was completed; what a user gives is taken as it is, and so is what a run has recorded.
    """
    config = task.config
    data, schedule = config.data, config.schedule
    if asked.data.batch_size is not None or asked.schedule.lr is not None or not task.computes:
        return task, []
    samples, least = task.train.num_samples, rulebook.LEAST_BATCH
    if rulebook.batch_divisor(config, num_workers, samples, least) > 1:
        if batchnorm.measured(task.build_module()):
            least = rulebook.LEAST_NORMED_BATCH
    divisor = rulebook.batch_divisor(config, num_workers, samples, least)
    if divisor == 1:
        return task, []
    images = data.batch_size // divisor
    rate = rulebook.smaller_rate(config.rule, schedule.lr, divisor)
    note = (
        f"{num_workers} workers: batches of {images} at lr {rate:g}, not of {data.batch_size} at {schedule.lr:g} as the recipe has for one, "
        f"since each pushes {config.run.epochs * samples / num_workers / images:,.0f} times only, and with less under way gradients "
        f"are less stale (docs/rules.md), for {divisor} times the exchanges. To have the recipe's: --batch-size {data.batch_size} --lr {schedule.lr:g}"
    )
    config = replace(
        config, data=replace(data, batch_size=images), schedule=replace(schedule, lr=rate)
    )
    return replace(task, config=config), [note]


def told(task: OpenedTask) -> Iterator[str]:
    """Say how images are prepared, and what the recipe is, line by line: before the run."""
    if isinstance(task, OwnTask):
        yield from told_of_own(task)
        return
    weights = task.config.model.weights
    yield from images.told(task.config.data, task.train, weights, pretrained.expected(weights))
    yield networks.recipe_told(task.config)

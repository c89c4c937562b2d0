"""The embedded digits in a loop of one's own, without augmentation: what `benchmarks.own_loop` compares with `asgd_mpi.train`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

import asgd_mpi
from asgd_mpi.config.options import Config
from asgd_mpi.data.augment import make_policy
from asgd_mpi.data.loader import Loader
from asgd_mpi.data.order import Sequential
from asgd_mpi.task import open_task
from asgd_mpi.task.opening import complete

SECTIONS = (
    "schedule",
    "rule",
)  # of a configuration: what the recipe says there is said to the loop, too


def options_of(config: Config) -> dict[str, Any]:
    """Return what a configuration says of rule and schedule, by dotted names."""
    return {
        f"{section}.{field.name}": getattr(part, field.name)
        for section in SECTIONS
        for part, plain in [(getattr(config, section), getattr(Config(), section))]
        for field in dataclasses.fields(plain)
        if getattr(part, field.name) != getattr(plain, field.name)
    }


def in_memory(task: Any, images: Any) -> torch.utils.data.TensorDataset:
    """Return a split as the network takes it: normalised images and their labels."""
    data = task.config.data
    policy = make_policy("none", data.image_size, images.image_shape, data.resize or 0)
    loader = Loader(images, Sequential(images.num_samples), policy, 0, 1)
    batch = loader.batch(0, 0, images.num_samples)
    loader.close()
    return torch.utils.data.TensorDataset(*task.objective.prepare(batch, torch.device("cpu")))


def main() -> None:
    """Train, as any script of a user's does."""
    task = open_task(complete(Config()))
    model = task.build_module()
    run = asgd_mpi.init(model, options=options_of(task.config))

    @run.validate(in_memory(task, task.val), maximize=True)
    def top1(batch: Any) -> dict[str, torch.Tensor]:
        images, labels = batch
        return {"top1": (model(images).argmax(1) == labels).float().mean()}

    batch_size = task.config.data.batch_size
    for images, labels in run.batches(in_memory(task, task.train), batch_size=batch_size):
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        run.step(loss)


if __name__ == "__main__":
    main()

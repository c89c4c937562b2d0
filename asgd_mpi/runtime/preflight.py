"""One step of training before the run: forward, loss and backward on 2 images of noise, on the CPU.

What a network does only in training is found here, and not by every worker at its first batch: another kind of output, an
error in the user's code, batch norm that refuses a batch of one image. No MPI.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from asgd_mpi.errors import ConfigError
from asgd_mpi.model import networks
from asgd_mpi.model.blame import blamed
from asgd_mpi.optim.step import loss_of, outputs_of
from asgd_mpi.task import Task

NAMED = 3      # parameters in a message
TOO_FEW = "Expected more than 1 value per channel when training"      # torch's batch norm


def try_out_(task: Task, module: nn.Module) -> tuple[Task, list[str]]:
    """Train one step; returns the task with `data.min_batch` filled in, and what the user should know.

    The network's statistics are moved by it; its weights are not. Raises ConfigError.
    """
    config, classes = task.config, task.train.num_classes
    name = config.model.name
    spoilt = [key for key, tensor in module.state_dict().items() if tensor.is_floating_point() and tensor.isnan().any()]
    if spoilt:
        raise ConfigError(f"--model.{f'weights {config.model.weights}' if config.model.weights else f'name {name}'}: "
                          f"{_some(spoilt)} begins with NaN, so that no loss would be finite.")
    size, generator = config.data.image_size, torch.Generator().manual_seed(config.run.seed % 2**32)
    images = torch.randint(0, 256, (2, task.channels, size, size), dtype=torch.uint8, generator=generator)
    images, labels = task.normalise(images).clone(), torch.tensor([0, classes - 1])
    with blamed(f"--model.name {name} fails in a step of training"):
        outputs = module.train()(images)
    for scores in outputs_of(outputs):
        networks.demand_scores(name, scores, 2, classes, "in training ")
    if len(outputs_of(outputs)) > 1 and config.stages.number > 1:
        raise ConfigError(f"--stages.number {config.stages.number}: {name} has auxiliary outputs in training, and the stages of a "
                          "replica pass on one. Train it without stages.")
    with blamed(f"--model.name {name} fails in the backward pass"):
        loss_of(outputs, labels).backward()
    idle = [key for key, parameter in module.named_parameters() if parameter.requires_grad and parameter.grad is None]
    module.zero_grad(set_to_none=True)
    task = replace(task, config=replace(config, data=replace(config.data, min_batch=_min_batch(task, module, images[:1]))))
    return task, _notes(task, idle)


@torch.no_grad()
def _min_batch(task: Task, module: nn.Module, image: torch.Tensor) -> int:
    """Return how many images a batch has at least. Raises ConfigError if the run has smaller ones."""
    config, data = task.config, task.config.data
    name, classes = config.model.name, task.train.num_classes
    with blamed(f"--model.name {name} fails for one image in evaluation"):
        alone = module.eval()(image)
    networks.demand_scores(name, alone, 1, classes, "in evaluation ")
    needed = 2 if _refuses_one(task, module.train(), image) else 1
    asked = data.min_batch or needed
    parts = config.compute.micro_batches
    for holds, option, value in ((asked >= needed, "data.min_batch", asked), (data.batch_size >= asked, "data.batch_size", data.batch_size),
                                 (parts == 1 or data.batch_size // parts >= asked, "compute.micro_batches", parts),
                                 (task.train.num_samples >= asked, "data.path", data.path)):
        if not holds:
            option, value = ("data.min_batch", asked) if asked > needed else (option, value)
            raise ConfigError(f"--{option} {value}: {name} is trained on {max(asked, needed)} images at a time or more (batch norm of one value "
                              f"has no deviation), and a batch, or a part of one, would have fewer.")
    return asked


def _refuses_one(task: Task, module: nn.Module, image: torch.Tensor) -> bool:
    """Return whether batch norm refuses `image`, (1, C, S, S), in training: one value for each channel has no deviation.

    Any other error is the network's own. Raises ConfigError for it, unless the run has no batch of one image.
    """
    name = task.config.model.name
    remedy = "Mend that, or give --data.min_batch 2, so that no batch is of one image"
    try:
        with blamed(f"--model.name {name} fails for one image in training", remedy):
            for scores in outputs_of(module(image)):
                networks.demand_scores(name, scores, 1, task.train.num_classes, "in training ")
    except ConfigError as error:
        cause = error.__cause__
        if isinstance(cause, ValueError) and str(cause).startswith(TOO_FEW):
            return True
        if (task.config.data.min_batch or 1) < 2:
            raise
    return False


def _notes(task: Task, idle: list[str]) -> list[str]:
    config, notes = task.config, []
    if idle:
        notes.append(f"warning: {len(idle)} parameters of {config.model.name} get no gradient in a step of training, such as "
                     f"{_some(idle)}: they stay as they are, but for the weight decay")
    if config.data.min_batch > 1 and task.train.num_samples % config.data.batch_size in range(1, config.data.min_batch):
        notes.append(f"{config.model.name} needs {config.data.min_batch} images at a time: the last batch of an epoch takes the rest "
                     "that is smaller (data.min_batch)")
    return notes


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED])

"""One step of training before the run: forward, loss and backward on 2 images of noise or samples, on the CPU.

What a network does only in training is found here, and not by every worker at its first batch: another kind of output, an
error in the user's code, batch norm that refuses a batch of one image. No MPI.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from asgd_mpi.errors import ConfigError
from asgd_mpi.model import batchnorm, networks
from asgd_mpi.model.blame import blamed
from asgd_mpi.optim.classification import loss_of, outputs_of
from asgd_mpi.optim.objective import names_of
from asgd_mpi.task import OpenedTask
from asgd_mpi.task.images import ImageTask
from asgd_mpi.task.opened import Forward
from asgd_mpi.task.own import OwnTask

NAMED = 3  # parameters in a message
TOO_FEW = "Expected more than 1 value per channel when training"  # torch's batch norm


Found = tuple[OpenedTask, list[str], list[str]]


def try_out_(task: OpenedTask, module: nn.Module) -> Found:
    """Train one step; returns the task with what it found (`data.min_batch`, metrics), notes for the user, and what is carried.

    Carried: the names of what the forward pass moves (see model.buffers); for them a second pass follows. The network's
    statistics are moved by it; its weights are not. Raises ConfigError.
    """
    model = task.config.model
    spoilt = [
        key
        for key, tensor in module.state_dict().items()
        if tensor.is_floating_point() and tensor.isnan().any()
    ]
    if spoilt:
        option = f"weights {model.weights}" if model.weights else f"name {model.name}"
        raise ConfigError(
            f"--model.{option}: {_some(spoilt)} begins with NaN, so that no loss would be finite. "
            "See how they are initialised, or what wrote them."
        )
    if isinstance(task, OwnTask):
        return _try_out_own_(task, module)
    assert isinstance(task, ImageTask)
    return _try_out_images_(task, module)


def _twice(step: Forward, again: Forward) -> Forward:
    """Return what is `step` when it is called first, and then `again`, without gradients."""
    passes = iter((step, torch.no_grad()(again)))
    return lambda module: next(passes)(module)


def _try_out_own_(task: OwnTask, module: nn.Module) -> Found:
    """Do what `try_out_` does, on the first samples of the data."""
    notes, smallest = [], 2 if batchnorm.measured(module) else 1
    inputs = task.trial(min(2, task.train.num_samples)) if task.computes else None

    def step(network: nn.Module) -> None:
        with blamed(f"{task.name} fails in a step of training", "Mend that"):
            loss = task.own.loss(network, inputs)
        if not isinstance(loss, torch.Tensor) or loss.dim() or not loss.is_floating_point():
            if isinstance(loss, torch.Tensor):
                kind = tuple(loss.shape)
            else:
                kind = type(loss).__name__
            raise ConfigError(
                f"{task.name}: loss() gave {kind}; it must return a scalar tensor of floats, the mean over the batch."
            )
        with blamed(f"{task.name} fails in the backward pass", "Mend that"):
            loss.backward()

    carried = task.carried(module, _twice(step, lambda network: task.own.forward(network, inputs)))
    if task.computes:
        notes += _idle(module, task.name)
    metrics: list[str] = []
    if task.val.num_samples:
        inputs = task.trial(min(2, task.val.num_samples), of_validation=True)
        with torch.no_grad(), blamed(f"{task.name} fails in a validation", "Mend that"):
            metrics = names_of(task.own.score(module.eval(), inputs))
        module.train()
    data = replace(task.config.data, min_batch=task.config.data.min_batch or smallest)
    task = replace(task, config=replace(task.config, data=data), metrics=tuple(metrics))
    return task, notes, carried


def _try_out_images_(task: ImageTask, module: nn.Module) -> Found:
    """Do what `try_out_` does, on images of noise."""
    config, classes = task.config, task.train.num_classes
    name = config.model.name
    size, generator = config.data.image_size, torch.Generator().manual_seed(config.run.seed % 2**32)
    images = torch.randint(
        0, 256, (2, task.channels, size, size), dtype=torch.uint8, generator=generator
    )
    images, labels = task.normalise(images).clone(), torch.tensor([0, classes - 1])

    def step(network: nn.Module) -> None:
        with blamed(f"--model.name {name} fails in a step of training"):
            outputs = network(images)
        for scores in outputs_of(outputs):
            networks.demand_scores(name, scores, 2, classes, "in training ")
        if len(outputs_of(outputs)) > 1 and config.stages.number > 1:
            raise ConfigError(
                f"--stages.number {config.stages.number}: {name} has auxiliary outputs in training, and the stages of a "
                "replica pass on one. Train it without stages."
            )
        with blamed(f"--model.name {name} fails in the backward pass"):
            loss_of(outputs, labels).backward()

    carried = task.carried(module, _twice(step, lambda network: network(images)))
    idle = _idle(module, name)
    task = replace(
        task,
        config=replace(
            config, data=replace(config.data, min_batch=_min_batch(task, module, images[:1]))
        ),
    )
    return task, [*idle, *_notes(task)], carried


def _idle(module: nn.Module, name: str) -> list[str]:
    """Return a warning if parameters got no gradient in the step that was made; all gradients are forgotten."""
    idle = [
        key
        for key, parameter in module.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    module.zero_grad(set_to_none=True)
    return [
        f"warning: {len(idle)} parameters of {name} get no gradient in a step of training, such as "
        f"{_some(idle)}: they stay as they are, but for the weight decay"
    ] * bool(idle)


@torch.no_grad()
def _min_batch(task: ImageTask, module: nn.Module, image: torch.Tensor) -> int:
    """Return how many images a batch has at least. Raises ConfigError if the run has smaller ones."""
    config, data = task.config, task.config.data
    name, classes = config.model.name, task.train.num_classes
    with blamed(f"--model.name {name} fails for one image in evaluation"):
        alone = module.eval()(image)
    networks.demand_scores(name, alone, 1, classes, "in evaluation ")
    needed = 2 if _refuses_one(task, module.train(), image) else 1
    asked = data.min_batch or needed
    parts = config.compute.micro_batches
    for holds, option, value in (
        (asked >= needed, "data.min_batch", asked),
        (data.batch_size >= asked, "data.batch_size", data.batch_size),
        (parts == 1 or data.batch_size // parts >= asked, "compute.micro_batches", parts),
        (task.train.num_samples >= asked, "data.path", data.path),
    ):
        if not holds:
            if asked > needed:
                option, value = "data.min_batch", asked
            raise ConfigError(
                f"--{option} {value}: {name} is trained on {max(asked, needed)} images at a time or more (batch norm of one value "
                f"has no deviation), and a batch, or a part of one, would have fewer. "
                "Give a larger --data.batch_size, or fewer --compute.micro_batches."
            )
    return asked


def _refuses_one(task: ImageTask, module: nn.Module, image: torch.Tensor) -> bool:
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


def _notes(task: ImageTask) -> list[str]:
    config, notes = task.config, []
    if config.data.min_batch > 1 and task.train.num_samples % config.data.batch_size in range(
        1, config.data.min_batch
    ):
        notes.append(
            f"{config.model.name} needs {config.data.min_batch} images at a time: the last batch of an epoch takes the rest "
            "that is smaller (data.min_batch)"
        )
    return notes


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED])

"""Try before the run the loss and the score of a user's task as the stages of a cut network compute them.

On a few samples, on the CPU, the loss is computed as the first and the last stage do it (optim.divided), and as it stands.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from asgd_mpi.data.dataset import SampleBatch
from asgd_mpi.errors import ConfigError
from asgd_mpi.model import batchnorm
from asgd_mpi.model.blame import blamed
from asgd_mpi.optim.divided import Divided
from asgd_mpi.optim.step import seed_
from asgd_mpi.pipeline.graph import trace
from asgd_mpi.task.own import OwnTask
from asgd_mpi.vector.packed import pack, unpack

SAMPLES = 2
CPU = torch.device("cpu")
MEND = "Mend that, or leave --stages out"
CLOSE = {"rtol": 1e-3, "atol": 1e-6}  # kernels may add up in another order


def demand(task: OwnTask, module: nn.Module) -> list[str]:
    """Raise ConfigError unless stages can compute the loss and the score of a task; returns what the last one does not read.

    The network's statistics are moved by it; its weights are not.
    """
    batch = task.trial_batch(min(SAMPLES, task.train.num_samples))
    inputs = _travelled(task, batch)
    is_chain = task.config.stages.cut == "chain"
    with torch.random.fork_rng([]), batchnorm.as_training(module):
        by_stages = _by_stages(task.divided, module, is_chain, inputs)
        _demand_same(task.divided.who, by_stages, _as_it_stands(task, module, inputs))
        unread = _unread(task, batch, module(task.divided.taken(inputs)).detach())
    _try_forward(task, module, inputs)
    return unread


def _travelled(task: OwnTask, batch: SampleBatch) -> Any:
    """Return the inputs of a few samples. Raises ConfigError unless the last stage gets the same."""
    divided = task.divided
    words, tensors = divided.share(batch)
    for tensor in tensors:
        if tensor.layout != torch.strided:
            raise ConfigError(
                f"{divided.who}: a batch holds a tensor of layout {tensor.layout}, and the last stage can be sent strided ones. Let "
                "`collate` make one, or leave --stages out."
            )
    with blamed(f"{divided.who}: a batch cannot be sent to the last stage", MEND):
        _, arrived = unpack(pack(0, tensors, {}), CPU)
    with blamed(f"{task.name}: a batch cannot be prepared", "Mend that"):
        inputs = task.own.prepare(batch, CPU)
        theirs = divided.prepare((words, arrived), batch.size, batch.epoch, batch.start, CPU)
    ours, spec = pytree.tree_flatten(inputs)
    others, other_spec = pytree.tree_flatten(theirs)
    if spec != other_spec or not all(map(_is_same, ours, others)):
        raise ConfigError(
            f"{divided.who}: prepare() makes another thing of the same batch the second time, and the first and the last stage both call "
            "it. Draw random numbers in the data set, or leave --stages out."
        )
    return inputs


def _by_stages(
    divided: Divided, module: nn.Module, is_chain: bool, inputs: Any
) -> dict[str, torch.Tensor]:
    """Return the loss and its gradients, by name, as the stages compute them. Raises ConfigError if they cannot."""
    with (
        blamed(f"{divided.who}: loss() fails before it calls the module", MEND),
        _no_draws(divided.who),
    ):
        taken = divided.taken(inputs)
    seed_(CPU, 0, 0, 0)
    with blamed(f"{divided.who}: the module fails with what loss() calls it with", MEND):
        outputs = module(taken)
    if not isinstance(outputs, torch.Tensor):
        raise ConfigError(
            f"{divided.who}: the module gives a {type(outputs).__name__}, and what comes out of the last stage is one tensor. Put what it "
            "gives into one, which loss() takes apart, or leave --stages out."
        )
    if is_chain:
        outputs = _traced(divided.who, module, taken, outputs)
    given = outputs.detach().requires_grad_(outputs.requires_grad)
    with (
        blamed(
            f"{divided.who}: loss() fails with what comes out of the stages in place of the module",
            MEND,
        ),
        _no_draws(divided.who),
    ):
        loss = divided.loss(given, inputs)
    if given.requires_grad and loss.requires_grad:
        # not what else the loss may be a function of: no stage would compute that
        [gradient] = torch.autograd.grad(loss, [given], allow_unused=True)
        if gradient is not None:
            outputs.backward(gradient)
    return _gradients(module, loss)


def _traced(
    who: str, module: nn.Module, taken: torch.Tensor, outputs: torch.Tensor
) -> torch.Tensor:
    """Return what the traced network gives for what the loss calls it with. Raises ConfigError unless it is the same."""
    graph = trace(module)
    seed_(CPU, 0, 0, 0)
    found = graph(taken)
    if not torch.allclose(found, outputs, equal_nan=True, **CLOSE):
        raise ConfigError(
            f"{who}: the module gives another thing when torch.fx has traced it, and its parts are made of that: what its forward makes "
            "without its input, such as torch.randn(3), is then the same each time. Put that into a module without children, which is "
            "kept in one piece, or leave --stages out."
        )
    return found


def _as_it_stands(task: OwnTask, module: nn.Module, inputs: Any) -> dict[str, torch.Tensor]:
    """Return what `_by_stages` does, of the loss of the whole network."""
    seed_(CPU, 0, 0, 0)
    with blamed(f"{task.name} fails in a step of training", "Mend that"):
        loss = task.own.loss(module, inputs)
        if loss.requires_grad:
            loss.backward()
    return _gradients(module, loss)


def _unread(task: OwnTask, batch: SampleBatch, outputs: torch.Tensor) -> list[str]:
    """Return where tensors of the batch lie that the loss does not read once the network has given its outputs.

    A tensor on the meta device has a shape and no numbers: whatever needs those fails.
    """

    def loss(unread: list[str]) -> list[torch.Tensor | None]:
        divided = Divided(task.own, task.divided.who, unread)
        about = (batch.size, batch.epoch, batch.start, CPU)
        given = outputs.clone().requires_grad_()
        value = divided.loss(given, divided.prepare(divided.share(batch), *about))
        if not value.requires_grad:
            return [value]
        return [value.detach(), *torch.autograd.grad(value, [given], allow_unused=True)]

    found: list[str] = []
    if outputs.is_floating_point():
        whole = loss([])
        for place in task.divided.places(batch.data):
            with suppress(Exception):  # it is read
                without = loss([*found, place])
                if all(map(_is_same, whole, without)):
                    found.append(place)
    return found


def _gradients(module: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the loss and the gradients of the parameters, which are forgotten."""
    found = {"its loss": loss.detach()}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad
            found[name] = torch.zeros_like(parameter) if gradient is None else gradient
    module.zero_grad(set_to_none=True)
    return found


def _demand_same(
    who: str, by_stages: dict[str, torch.Tensor], whole: dict[str, torch.Tensor]
) -> None:
    for name, value in whole.items():
        if not torch.allclose(by_stages[name], value, equal_nan=True, **CLOSE):
            what = name if name == "its loss" else f"the gradient of {name}"
            raise ConfigError(
                f"{who}: {what} is another one by stages than by the whole network: loss() depends on more than its batch and one call of "
                "the module, such as parameters of the network, or what it has kept of another batch. Take that into the module, or leave "
                "--stages out."
            )


@torch.no_grad()
def _try_forward(task: OwnTask, module: nn.Module, inputs: Any) -> None:
    """Raise ConfigError if more than calls of the module is needed to validate, or to measure batch norm's statistics."""
    called = task.divided.whole(module)
    if batchnorm.measured(module):
        with blamed(f"{task.divided.who} fails in a forward pass", MEND):
            task.own.forward(called, inputs)
    if task.val.num_samples:
        inputs = task.trial(min(SAMPLES, task.val.num_samples), of_validation=True)
        called.eval()
        with blamed(f"{task.divided.who} fails in a validation", MEND):
            task.own.score(called, inputs)
        called.train()


@contextmanager
def _no_draws(who: str) -> Iterator[None]:
    """Raise ConfigError if random numbers are drawn within."""
    before = _generators()
    yield
    if _generators() != before:
        raise ConfigError(
            f"{who}: loss() draws random numbers outside of the module, and both the first and the last stage run it: they would draw "
            "others. Draw them in the data set, in `collate` or in the module, or leave --stages out."
        )


def _generators() -> tuple[bytes, str, tuple]:
    return (
        torch.get_rng_state().numpy().tobytes(),
        repr([*np.random.get_state()[1:], np.random.get_state()[1].tobytes()]),
        random.getstate(),
    )


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)

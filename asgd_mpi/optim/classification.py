"""The objective of image classification: cross-entropy, and the first and the first five guesses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from asgd_mpi.data.loader import Batch
from asgd_mpi.optim.divided import Divided, Share
from asgd_mpi.optim.objective import Scores

# Weights of auxiliary losses: Szegedy et al. 2014, arXiv:1409.4842, section 5; torchvision's references
AUXILIARY = {"GoogLeNetOutputs": 0.3, "InceptionOutputs": 0.4}

Normalise = Callable[[torch.Tensor], torch.Tensor]  # uint8 (B, C, S, S) -> float32 (B, C, S, S)
Inputs = tuple[torch.Tensor, torch.Tensor]  # images float32 (B, C, S, S), labels int64 (B,)


@dataclass(frozen=True)
class Classification:
    """Images by their classes; `channels_last`: lay them out by pixels."""

    normalise: Normalise
    channels_last: bool = False

    def prepare(self, batch: Batch, device: torch.device) -> Inputs:
        """Return normalised images, float32 (B, C, S, S), and labels, int64 (B,), on a device."""
        images = self.normalise(batch.on(device))
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, batch.labels.to(device, non_blocking=True)

    def forward(self, module: nn.Module, inputs: Inputs) -> object:
        return module(inputs[0])

    def loss(self, module: nn.Module, inputs: Inputs) -> torch.Tensor:
        return loss_of(module(inputs[0]), inputs[1])

    def score(self, module: nn.Module, inputs: Inputs) -> Scores:
        """Return sums over the images: the loss, and how often the first and one of the first five guesses is right."""
        images, labels = inputs
        scores = module(images)
        guesses = scores.topk(min(5, scores.shape[1]), dim=1).indices
        right = guesses == labels[:, None]
        loss = functional.cross_entropy(scores, labels, reduction="sum")
        return {
            "loss": (loss.item(), len(labels)),
            "top1": (int(right[:, 0].sum()), len(labels)),
            "top5": (int(right.sum()), len(labels)),
        }


class DividedClassification(Divided):
    """The first stage takes the images, the last one the labels, which are all that it has to know of a batch."""

    def taken(self, inputs: Inputs) -> torch.Tensor:
        return inputs[0]

    def loss(self, outputs: torch.Tensor, inputs: tuple[Any, torch.Tensor]) -> torch.Tensor:
        return loss_of(outputs, inputs[1])

    def share(self, batch: Batch) -> Share:
        return None, (batch.labels,)

    def prepare(
        self, share: Share, size: int, epoch: int, start: int, device: torch.device
    ) -> tuple[None, torch.Tensor]:
        return None, share[1][0].to(device, non_blocking=True)

    def whole(self, lead: Any) -> Any:
        return lead


def outputs_of(outputs: Any) -> tuple:
    """Return the scores and those of auxiliary classifiers, which torchvision's networks give in training only."""
    if type(outputs).__name__ not in AUXILIARY:
        return (outputs,)
    return tuple(each for each in outputs if each is not None)


def loss_of(outputs: Any, truths: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of scores (b, classes), plus that of auxiliary ones with the weight that they have."""
    scores, *auxiliary = outputs_of(outputs)
    loss = functional.cross_entropy(scores, truths)
    for each in auxiliary:
        loss = loss + AUXILIARY[type(outputs).__name__] * functional.cross_entropy(each, truths)
    return loss

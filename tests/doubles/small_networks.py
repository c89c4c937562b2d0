"""Networks that do something else in training than in evaluation: `--model.name small_networks:NAME`."""

import sys
from typing import NamedTuple, Optional

import torch
from torch import nn


def strict(num_classes: int, channels: int) -> nn.Module:
    """Batch norm of one value for each channel: it refuses a batch of one image."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64 * channels, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, num_classes),
    )


class _Linear(nn.Linear):
    def __init__(self, num_classes: int, channels: int, act):
        super().__init__(64 * channels, num_classes)
        self.act = act

    def forward(self, images):
        return self.act(self, super().forward(images.flatten(1)))


def _when_training(act):
    return lambda num_classes, channels: _Linear(
        num_classes, channels, lambda self, scores: act(scores) if self.training else scores
    )


def _fails(scores):
    raise KeyError("a head that is not there")


tuple_in_training = _when_training(lambda scores: (scores, scores))
wrong_size_in_training = _when_training(lambda scores: scores[:, :3])
fails_in_training = _when_training(_fails)
leaves_in_training = _when_training(lambda scores: sys.exit("bye"))
detached = _when_training(lambda scores: scores.detach())


def a_dict(num_classes: int, channels: int) -> nn.Module:
    return _Linear(num_classes, channels, lambda self, scores: {"out": scores})


def whole_numbers(num_classes: int, channels: int) -> nn.Module:
    return _Linear(num_classes, channels, lambda self, scores: scores.long())


def squeezed(num_classes: int, channels: int) -> nn.Module:
    return _Linear(num_classes, channels, lambda self, scores: scores.squeeze())


def no_arguments() -> nn.Module:
    return nn.Linear(64, 10)


class GoogLeNetOutputs(NamedTuple):
    """As torchvision's."""

    logits: torch.Tensor
    aux_logits2: Optional[torch.Tensor]
    aux_logits1: Optional[torch.Tensor]


class Helped(nn.Module):
    """A network with auxiliary classifiers, and one that nobody uses."""

    def __init__(self, num_classes: int, channels: int):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, 16), nn.ReLU())
        self.head, self.second, self.first, self.idle = (
            nn.Linear(16, num_classes) for _ in range(4)
        )

    def forward(self, images):
        maps = self.body(images)
        return (
            GoogLeNetOutputs(self.head(maps), self.second(maps), self.first(maps))
            if self.training
            else self.head(maps)
        )


def helped(num_classes: int, channels: int) -> nn.Module:
    return Helped(num_classes, channels)


class _Single(nn.Linear):
    """Fails in training if it gets one image, for a reason of its own."""

    def forward(self, images):
        if self.training and len(images) == 1:
            raise ValueError("needs a pair of images")
        return super().forward(images.flatten(1))


def pairs(num_classes: int, channels: int) -> nn.Module:
    return _Single(64 * channels, num_classes)

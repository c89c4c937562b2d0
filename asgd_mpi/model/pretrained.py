"""What weights expect of the images that they are given: mean and deviation, sizes. Known of torchvision's, and of checkpoints.

torchvision's weights are named as there (`ResNet18_Weights.IMAGENET1K_V2`; the file is then looked for where torch keeps
its downloads) or by the file as it is downloaded (`resnet18-f37072fd.pth`). A state_dict says nothing of it. Nothing is downloaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from asgd_mpi.errors import ConfigError
from asgd_mpi.model.networks import torchvision_models
from asgd_mpi.record import checkpoint

OF_TORCHVISION = re.compile(r"(?:torchvision:)?(\w+_Weights\.\w+)")


@dataclass(frozen=True)
class Expected:
    """How the images were prepared that weights were trained on."""

    by: str  # whose word it is
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    resize: int  # the short side before the centre crop; 0 if it is not known
    note: str = ""  # of what is not done here


def expected(weights: str) -> Expected | None:
    """Return what the weights of `--model.weights` expect; None if nothing says it. Raises ConfigError, RunDirError."""
    if not weights:
        return None
    is_file = Path(weights).name == checkpoint.MODEL or checkpoint.is_of_mean(weights)
    if is_file or Path(weights).is_dir():
        return _of_checkpoint(Path(weights))
    if OF_TORCHVISION.fullmatch(weights):
        return _of_torchvision(_named(weights))
    file = os.path.basename(weights)
    if file.endswith(".pth"):
        for one in _all_weights():
            if os.path.basename(one.url) == file:
                return _of_torchvision(one)
    return None


def file_of(weights: str) -> str:
    """Return the file or directory of `--model.weights`; raise ConfigError if torchvision's are named and not there."""
    if not OF_TORCHVISION.fullmatch(weights):
        return weights
    url = _named(weights).url
    path = Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(url)
    if not path.is_file():
        raise ConfigError(
            f"--model.weights {weights}: {path} is not there, and nothing is downloaded here. Get {url}, and put it "
            "there, or give the file itself."
        )
    return str(path)


def _named(weights: str):
    """Return torchvision's weights of that name, for classification. Raises ConfigError."""
    try:
        found = torchvision_models().get_weight(OF_TORCHVISION.fullmatch(weights)[1])
    except (ValueError, KeyError, AttributeError):
        found = None
    if found not in list(_all_weights()):
        raise ConfigError(
            f"--model.weights {weights}: torchvision has no such weights for classification. Take one of those that "
            "https://pytorch.org/vision/stable/models.html lists, such as ResNet18_Weights.IMAGENET1K_V1."
        )
    return found


def _of_torchvision(weights) -> Expected:
    preset = weights.transforms()
    usual = preset.interpolation.value == "bilinear"
    if usual:
        note = ""
    else:
        note = f"they were trained on images resized by {preset.interpolation.value} interpolation; here it is bilinear"
    return Expected(
        f"torchvision's {weights}",
        tuple(preset.mean),
        tuple(preset.std),
        preset.crop_size[0],
        preset.resize_size[0],
        note,
    )


def _of_checkpoint(path: Path) -> Expected | None:
    directory = path if path.is_dir() else path.parent
    if not (directory / checkpoint.MANIFEST).exists():
        return None
    manifest = checkpoint.read_manifest(directory)
    return Expected(
        f"the checkpoint {directory}",
        tuple(manifest.mean),
        tuple(manifest.std),
        manifest.image_size,
        manifest.resize,
    )


def _all_weights() -> Iterator:
    """Yield torchvision's weights for classification; the import takes longer than all the rest of a start."""
    models = torchvision_models()
    for name in models.list_models(module=models):
        yield from models.get_model_weights(name)

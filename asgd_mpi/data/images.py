"""How images are prepared for a network: size, scale, mean and deviation; whose word is taken for each, and said.

What is given counts; then what the weights that training begins with expect, if that is known; then what the images are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from asgd_mpi.config import limits
from asgd_mpi.config.options import DataConfig, as_text
from asgd_mpi.data.augment import short_side
from asgd_mpi.data.folder import IMAGENET_MEAN, IMAGENET_STD, FolderSet, SyntheticSet
from asgd_mpi.data.shards import ShardSet
from asgd_mpi.model.pretrained import Expected

ImageSet = ShardSet | FolderSet | SyntheticSet
PHOTO_SIZE = 224  # pixels


def fitted(data: DataConfig, images: ImageSet, expected: Expected | None) -> DataConfig:
    """Fill in image_size, resize, mean and std; `expected` is None if the weights do not say what they were trained on."""
    size, resize, mean, std = data.image_size, data.resize, data.mean, data.std
    if expected and len(expected.mean) != len(images.mean):
        expected = None  # of images with other channels; loading such weights tells
    if size is None:
        size = expected.image_size if expected else size_of(images)
    if resize is None:
        told = expected.resize if expected and expected.image_size == size else 0
        resize = told or short_side(size, typical_side(images))
    if mean is None and std is None:
        mean, std = (
            as_text(values) for values in ((expected or images).mean, (expected or images).std)
        )
    return replace(data, image_size=size, resize=resize, mean=mean, std=std)


def size_of(images: ImageSet) -> int:
    """Return the side of images that all have one, 224 at most; 224 for others."""
    sides = images.short_sides()
    if sides[0] and (sides == sides[0]).all():
        return min(int(sides[0]), PHOTO_SIZE)
    return PHOTO_SIZE


def typical_side(images: ImageSet) -> float:
    """Return the median of the short sides, in pixels."""
    return float(np.median(images.short_sides()))


def told(
    data: DataConfig, images: ImageSet, weights: str, expected: Expected | None
) -> Iterator[str]:
    """Say how the images are prepared and by whose word, line by line."""
    used = (mean_of(data, images), std_of(data, images))
    whose = "as given"
    if used == (tuple(images.mean), tuple(images.std)):
        whose = f"of {images.root}"
    if expected and used == (expected.mean, expected.std):
        whose = f"of {expected.by}"
    if data.resize:
        scale = f"short side to {data.resize}"
    else:
        scale = "scale as recorded (no data.resize)"
    yield f"images: {data.image_size} x {data.image_size} pixels ({scale}, centre crop to validate), mean {_short(used[0])}, std {_short(used[1])} {whose}"
    typical = typical_side(images)
    if 0 < typical < data.image_size:
        yield (
            f"note: the images of {images.root} are smaller, about {typical:g} pixels, and are enlarged for training and validation; "
            f"--data.image_size {typical:.0f} takes them as they are"
        )
    if expected and expected.note:
        yield f"note: {weights}: {expected.note}"
    if weights and not expected:
        yield (
            f"note: {weights} does not say with which mean and std it was trained; torchvision's weights for ImageNet were with "
            f"--data.mean {as_text(IMAGENET_MEAN)} --data.std {as_text(IMAGENET_STD)}"
        )


def mean_of(data: DataConfig, images: ImageSet) -> tuple[float, ...]:
    """Return the mean of each channel; the data set's for runs that were recorded without."""
    return tuple(limits.numbers(data.mean)) or tuple(images.mean)


def std_of(data: DataConfig, images: ImageSet) -> tuple[float, ...]:
    """Return the deviation of each channel; the data set's for runs that were recorded without."""
    return tuple(limits.numbers(data.std)) or tuple(images.std)


def _short(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:.3f}" for value in values)

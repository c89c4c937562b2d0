"""What happens to one image between the shard and the batch, and to a batch on its device.

In: a decoded image, uint8 (C, H, W), and the sample's random generator. Out: uint8 (C, S, S). Invariant: the pixels
depend on (seed, epoch, sample index) alone, so not on rank, thread or batch size. Policies by name:

    none       short side to S * 256 / 224, centre crop; an image that is stored at S x S stays as it is
    paper      short side to S * 256 / 224, random crop, random mirror: Krizhevsky et al. 2012, section 4.1,
               without its colour shift
    reference  crop of random area and aspect, random mirror: Szegedy et al. 2014, with torchvision's constants
    shift      small stored images: move by at most one pixel each way, zeros come in, no mirror (digits)
"""

import math
from typing import Protocol

import numpy as np
import torch
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as F

from asgd_mpi.errors import ConfigError


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return the generator of one sample in one epoch; the trailing 1 keeps it apart from `Order`'s streams."""
    return np.random.default_rng([seed, epoch, index, 1])


def decode(data: np.ndarray) -> torch.Tensor:
    """Decode a JPEG file, uint8 (n,), to RGB uint8 (3, H, W), grey included; raise RuntimeError if it is none."""
    return decode_jpeg(torch.from_numpy(data), mode=ImageReadMode.RGB)


class Policy(Protocol):
    """What one image goes through; `size` is S."""

    size: int

    def __call__(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Return uint8 (C, S, S) for an image uint8 (C, H, W); may be a view of it."""


class CentreCrop:
    def __init__(self, size: int, image_shape: tuple[int, int, int] | None = None):
        self.size = size
        stored_to_size = image_shape is not None and image_shape[:2] == (size, size)
        self.short_side = size if stored_to_size else round(size * 256 / 224)

    def __call__(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        image = F.resize(image, [self.short_side], antialias=True)
        top, left = ((side - self.size) // 2 for side in image.shape[1:])
        return image[:, top : top + self.size, left : left + self.size]


class RandomCrop:
    def __init__(self, size: int, image_shape: tuple[int, int, int] | None = None):
        self.size = size
        self.short_side = round(size * 256 / 224)

    def __call__(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        image = F.resize(image, [self.short_side], antialias=True)
        top, left = (int(rng.integers(side - self.size + 1)) for side in image.shape[1:])
        return _maybe_mirror(image[:, top : top + self.size, left : left + self.size], rng)


class RandomResizedCrop:
    AREA = (0.08, 1.0)  # fraction of the image
    ASPECT = (3 / 4, 4 / 3)  # width / height, log-uniform

    def __init__(self, size: int, image_shape: tuple[int, int, int] | None = None):
        self.size = size

    def __call__(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        top, left, height, width = self._box(*image.shape[1:], rng)
        pixels = image.permute(1, 2, 0).numpy()[top : top + height, left : left + width].copy()  # see _maybe_mirror
        image = F.resize(torch.from_numpy(pixels).permute(2, 0, 1), [self.size, self.size], antialias=True)
        return _maybe_mirror(image, rng)

    def _box(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Return (top, left, height, width) of a crop; after ten boxes that do not fit, the largest centred one."""
        for _ in range(10):
            area = height * width * rng.uniform(*self.AREA)
            aspect = math.exp(rng.uniform(math.log(self.ASPECT[0]), math.log(self.ASPECT[1])))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
        w = min(width, round(height * self.ASPECT[1]))
        h = min(height, round(width / self.ASPECT[0]))
        return (height - h) // 2, (width - w) // 2, h, w


class Shift:
    def __init__(self, size: int, image_shape: tuple[int, int, int] | None = None):
        if image_shape is None or image_shape[:2] != (size, size):
            raise ConfigError(
                f"augmentation shift does not resize, so it needs raw images stored at {size} x {size}, and these are "
                f"{'JPEG files' if image_shape is None else image_shape}; choose another augmentation or image size"
            )
        self.size = size

    def __call__(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        top, left = rng.integers(0, 3, size=2).tolist()  # 1 is no shift
        padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
        return padded[:, top : top + self.size, left : left + self.size]


POLICIES = {"none": CentreCrop, "paper": RandomCrop, "reference": RandomResizedCrop, "shift": Shift}


def make_policy(name: str, size: int, image_shape: tuple[int, int, int] | None = None) -> Policy:
    """Return the policy of that name for S = size; `image_shape` is the ShardSet's: (H, W, C), or None for JPEG."""
    if name not in POLICIES:
        raise ConfigError(f"there is no augmentation {name!r}; choose one of {', '.join(sorted(POLICIES))}")
    return POLICIES[name](size, image_shape)


def _maybe_mirror(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Mirror left-right half of the time; numpy copies, because torch's would wake its own threads for one image."""
    if rng.random() < 0.5:
        return image
    return torch.from_numpy(image.numpy()[..., ::-1].copy())


class Normalise:
    """Turn a uint8 batch into float32 with zero mean and unit variance, on the device where the batch is."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        """Take mean and std per channel, of images in 0..1."""
        mean, std = (torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1) for values in (mean, std))
        self._scale = 1 / (255 * std)
        self._bias = -mean / std

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return (images / 255 - mean) / std, float32 (B, C, H, W), for images uint8 (B, C, H, W)."""
        self._scale = self._scale.to(images.device)  # copies on the first call only
        self._bias = self._bias.to(images.device)
        return images.to(torch.float32).mul_(self._scale).add_(self._bias)

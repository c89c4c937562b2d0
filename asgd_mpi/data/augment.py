"""What happens to one image between the shard and the batch, and to a batch on its device.

In: a decoded image, uint8 (H, W, C), and the sample's random generator. Out: uint8 (S, S, C). Invariant: the pixels
depend on (seed, epoch, sample index) alone, so not on rank, thread, batch size or device. A policy crops and resizes, image
by image; mirror and colour (`Touch`) follow on the image or, with the same result to the bit, on the batch where it then is
(`Touches`): a GPU does them at no cost. Crops stay where the decoder is, for what is cut off need not travel, and a resize
elsewhere rounds otherwise. Policies by name:

    none       short side to R, centre crop
    paper      short side to R, random crop, random mirror, random colour along the principal components of
               ImageNet's RGB values: Krizhevsky et al. 2012, section 4.1
    reference  crop of random area and aspect, random mirror: Szegedy et al. 2014, with torchvision's constants
    pad_crop   short side to R, zeros around it (S / 8 wide: 4 of 32 pixels), random crop, random mirror: He et al. 2016,
               section 4.2, for CIFAR
    shift      small stored images: move by at most one pixel each way, zeros come in, no mirror (digits)

R is one number for a data set, so that an image has one scale in training and validation, packed or not, whatever its
encoding (`short_side`): sets of photographs are shrunk (or enlarged, as torchvision does) to S * 256 / 224 and lose their
margin, sets of images that are no larger than S keep it.
Resizing is bilinear and antialiased, in validation to the bit as Pillow does it, and torchvision with it; elsewhere to the rounding,
which takes half the time. All steps are torchvision's to one level.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from asgd_mpi.data.channels import flat_channels
from asgd_mpi.errors import ConfigError

# Krizhevsky's principal components, column by column, each times its eigenvalue: values of images in 0..1 (the usual
# constants of fb.resnet.torch). A sample's colour moves by their sum, weighted by normal deviates of deviation 0.1.
COLOUR = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]) * (
    0.2175, 0.0188, 0.0045,
)  # fmt: skip
COLOUR_DEVIATION = 0.1


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return the generator of one sample in one epoch; the trailing 1 keeps it apart from `Order`'s streams."""
    return np.random.default_rng([seed, epoch, index, 1])


@dataclass(frozen=True)
class Touch:
    """What is left to do to an image once it has its size."""

    mirror: bool = False  # left-right
    levels: np.ndarray | None = None  # int16 (3,): added to the colours, which stay within 0..255

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Return uint8 (S, S, C) for an image uint8 (S, S, C)."""
        image = image if self.levels is None else add_levels(image, self.levels)
        return image[:, ::-1] if self.mirror else image


class Touches:
    """The same for the images of a batch, on their device."""

    def __init__(self, touches: Sequence[Touch]):
        self._mirror = torch.tensor([touch.mirror for touch in touches]).view(-1, 1, 1, 1)
        self._levels = None  # int16 (B, 3, 1, 1)
        if any(touch.levels is not None for touch in touches):
            levels = [
                np.zeros(3, dtype=np.int16) if touch.levels is None else touch.levels
                for touch in touches
            ]
            self._levels = torch.from_numpy(np.stack(levels)).view(-1, 3, 1, 1)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return uint8 (B, C, S, S) for images uint8 (B, C, S, S) on any device."""
        if self._levels is not None:
            levels = self._levels.to(images.device, non_blocking=True)
            images = images.to(torch.int16).add_(levels).clamp_(0, 255).to(torch.uint8)
        return torch.where(
            self._mirror.to(images.device, non_blocking=True), images.flip(3), images
        )


class Policy:
    """What one image goes through; `size` is S."""

    size: int

    def crop(self, image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Touch]:
        """Return uint8 (S, S, C) for an image uint8 (H, W, C), maybe a view with any strides, and what remains to do."""
        raise NotImplementedError

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return uint8 (S, S, C) for an image uint8 (H, W, C); may be a view of it, with any strides."""
        image, touch = self.crop(image, rng)
        return touch(image)


class CentreCrop(Policy):
    def __init__(self, size: int, image_shape: tuple[int, int, int] | None = None, resize: int = 0):
        self.size = size
        stored_to_size = image_shape is not None and image_shape[:2] == (size, size)
        self.short_side = resize or (size if stored_to_size else with_margin(size))

    def crop(self, image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Touch]:
        image = _resize_short_side(image, self.short_side, as_pillow)
        # half a pixel goes where torchvision's goes
        top, left = (round((side - self.size) / 2) for side in image.shape[:2])
        return image[top : top + self.size, left : left + self.size], Touch()


class RandomCrop(Policy):
    def __init__(self, size: int, image_shape: tuple[int, int, int] | None = None, resize: int = 0):
        self.size = size
        self.short_side = resize or with_margin(size)

    def crop(self, image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Touch]:
        image = _resize_short_side(image, self.short_side)
        top, left = (int(rng.integers(side - self.size + 1)) for side in image.shape[:2])
        if image.shape[2] == 3:
            levels = whole_levels(COLOUR @ rng.normal(0, COLOUR_DEVIATION, size=3))
        else:
            levels = None
        return image[top : top + self.size, left : left + self.size], Touch(
            rng.random() >= 0.5, levels
        )


class RandomResizedCrop(Policy):
    AREA = (0.08, 1.0)  # fraction of the image
    ASPECT = (3 / 4, 4 / 3)  # width / height, log-uniform

    def __init__(self, size: int, image_shape: tuple[int, int, int] | None = None, resize: int = 0):
        self.size = size

    def crop(self, image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Touch]:
        top, left, height, width = self._box(*image.shape[:2], rng)
        image = resize(image[top : top + height, left : left + width], self.size, self.size)
        return image, Touch(rng.random() >= 0.5)

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


class PadCrop(Policy):
    def __init__(self, size: int, image_shape: tuple[int, int, int] | None = None, resize: int = 0):
        self.size = size
        self.padding = max(1, size // 8)
        self.short_side = resize or size

    def crop(self, image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Touch]:
        image = padded(_resize_short_side(image, self.short_side), self.padding)
        top, left = (int(rng.integers(side - self.size + 1)) for side in image.shape[:2])
        return image[top : top + self.size, left : left + self.size], Touch(rng.random() >= 0.5)


class Shift(Policy):
    def __init__(self, size: int, image_shape: tuple[int, int, int] | None = None, resize: int = 0):
        if image_shape is None or image_shape[:2] != (size, size):
            raise ConfigError(
                f"--data.augment shift does not resize, so it needs raw images stored at {size} x {size}, and these are "
                f"{'JPEG files' if image_shape is None else image_shape}; choose another augmentation or image size"
            )
        self.size = size

    def crop(self, image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Touch]:
        top, left = rng.integers(0, 3, size=2).tolist()  # 1 is no shift
        return padded(image, 1)[top : top + self.size, left : left + self.size], Touch()


POLICIES = {
    "none": CentreCrop,
    "paper": RandomCrop,
    "reference": RandomResizedCrop,
    "pad_crop": PadCrop,
    "shift": Shift,
}


def make_policy(
    name: str, size: int, image_shape: tuple[int, int, int] | None = None, resize: int = 0
) -> Policy:
    """Return the policy of that name for S = size; `image_shape` is the ShardSet's: (H, W, C), or None for JPEG.

    `resize`: R. 0 stands for what runs before 0.5 did, whose record has no R: S * 256 / 224, but for `none` S with raw images
    stored at S x S.
    """
    if name not in POLICIES:
        raise ConfigError(
            f"there is no augmentation {name!r}; choose one of {', '.join(sorted(POLICIES))}"
        )
    return POLICIES[name](size, image_shape, resize)


def short_side(size: int, typical: float) -> int:
    """Return R, the short side that the images of a set are brought to for S = size, from their typical short side.

    With the margin that torchvision's evaluation cuts off, unless they have nothing to spare: a set of 32-pixel images is seen
    whole, and not enlarged to 37 pixels and cropped.
    """
    return size if typical <= size else with_margin(size)


def with_margin(size: int) -> int:
    return round(size * 256 / 224)


def padded(image: np.ndarray, width: int) -> np.ndarray:
    """Return uint8 (H + 2 width, W + 2 width, C): zeros around an image uint8 (H, W, C)."""
    height, length, channels = image.shape
    # np.pad takes 20 times as long
    larger = np.zeros((height + 2 * width, length + 2 * width, channels), dtype=np.uint8)
    larger[width:-width, width:-width] = image
    return larger


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return uint8 (height, width, C), bilinear and antialiased, for an image uint8 (H, W, C) with any strides."""
    if image.shape[:2] == (height, width):
        return image
    # a view in channels-last order, which torch is fast at
    planes = torch.from_numpy(image).permute(2, 0, 1)[None]
    return (
        interpolate(planes, (height, width), mode="bilinear", antialias=True)[0]
        .permute(1, 2, 0)
        .numpy()
    )


def as_pillow(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return what `resize` does, rounded as Pillow rounds: slower, for what is compared with the accuracy that others publish."""
    if image.shape[:2] == (height, width) or image.shape[2] not in (1, 3):
        return resize(image, height, width)
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    return np.array(picture.resize((width, height), Image.Resampling.BILINEAR)).reshape(
        height, width, image.shape[2]
    )


def _resize_short_side(
    image: np.ndarray,
    short_side: int,
    method: Callable[[np.ndarray, int, int], np.ndarray] = resize,
) -> np.ndarray:
    height, width = image.shape[:2]
    shortest = min(height, width)
    # rounds as torchvision's
    return method(image, short_side * height // shortest, short_side * width // shortest)


def whole_levels(shift: np.ndarray) -> np.ndarray:
    """Return int16 (3,) in -255..255 for a shift of colours, float (3,), of images in 0..1."""
    return np.rint(np.clip(shift, -1, 1) * 255).astype(np.int16)


def add_levels(image: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Return uint8 (H, W, 3) with `levels`, int16 (3,), added, staying within 0..255."""
    levels = np.tile(levels, image.shape[1])  # a whole row: 4x faster
    up, down = np.maximum(levels, 0).astype(np.uint8), np.maximum(-levels, 0).astype(np.uint8)
    rows = np.minimum(image.reshape(len(image), -1), 255 - up)
    rows += up
    np.maximum(rows, down, out=rows)
    rows -= down
    return rows.reshape(image.shape)


class Normalise:
    """Turn a uint8 batch into float32 with zero mean and unit variance, on the device where the batch is."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        """Take mean and std per channel, of images in 0..1; a channel without variation is centred and not scaled."""
        std = [
            1.0 if number in flat_channels(std) else deviation
            for number, deviation in enumerate(std)
        ]
        mean, std = (
            torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1) for values in (mean, std)
        )
        self._scale = 1 / (255 * std)
        self._bias = -mean / std
        self._room = torch.empty(0)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return (images / 255 - mean) / std, float32 (B, C, H, W), for images uint8 (B, C, H, W).

        On the CPU the result lies in memory that the next call uses again: fresh memory costs five times the arithmetic.
        There it goes image by image, which stays in the cache.
        """
        self._scale = self._scale.to(images.device)  # copies on the first call only
        self._bias = self._bias.to(images.device)
        if images.device.type != "cpu":
            return images.to(torch.float32).mul_(self._scale).add_(self._bias)
        if self._room.numel() < images.numel():
            self._room = torch.empty(images.numel())
        room = self._room[: images.numel()].view(images.shape)
        for image, out in zip(images, room, strict=True):
            out.copy_(image).mul_(self._scale[0]).add_(self._bias[0])
        return room

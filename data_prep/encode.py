"""One image file -> what a shard stores of it.

In: the bytes of a JPEG or PNG file. Out: mode `jpeg`: a grey or RGB JPEG file, with its own bytes wherever possible;
mode `raw`: RGB pixels, uint8 (S, S, 3). CMYK files, other formats and, with a short side, larger images are encoded again.
What is kept is decoded as a run will decode it, so all that packs trains.
"""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from asgd_mpi.data.decode import check_end, decode, to_8_bits, why_unreadable
from data_prep.sources import Photo
from data_prep.writer import Sample

ORIENTATION = 0x0112  # of EXIF: 1 is upright
# what is remarked of an image
AGAIN, TURNED, ENLARGED = "encoded again", "EXIF orientation", "enlarged"
REMARKS = AGAIN, TURNED, ENLARGED


class BadImage(Exception):
    """An image file that does not decode."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name} is no readable image: {reason}")
        self.name = name


@dataclass(frozen=True)
class Encoding:
    mode: str  # "jpeg" or "raw"
    short_side: int | None  # of jpeg: larger images are shrunk to it
    raw_size: int  # S of raw: short side to S, centre crop
    quality: int  # of JPEG files that have to be encoded again
    # "full" decodes every image; "header" trusts those that it keeps but for their first and last bytes
    check: str
    orientation: str = "keep"  # or "turn": turn photos as their EXIF header says

    def sample(self, photo: Photo, data: bytes, label: int) -> Sample:
        """Return what is stored of a photo; raise BadImage if it does not decode."""
        try:
            image = Image.open(io.BytesIO(data))
            remarks = tuple(self._remarks(image))
            if self._keeps(image):
                self._check(data)
                pixels, size = np.frombuffer(data, dtype=np.uint8), image.size
            else:
                check_end(data)
                if self.orientation == "turn" and TURNED in remarks:
                    image = ImageOps.exif_transpose(image)
                encode = self._raw if self.mode == "raw" else self._jpeg
                pixels, size = encode(to_8_bits(image))
            return Sample(pixels, label, size, photo.name, remarks)
        except (
            Exception
        ) as error:  # Pillow raises what it likes: RuntimeError, struct.error, KeyError, ...
            raise BadImage(
                photo.name, f"{why_unreadable(error, data)} ({len(data)} bytes)"
            ) from error

    def _remarks(self, image: Image.Image) -> Iterator[str]:
        if self.mode == "jpeg" and not _is_usual(image):
            yield AGAIN
        if is_turned(image):
            yield TURNED
        if self.mode == "raw" and min(image.size) < self.raw_size:
            yield ENLARGED

    def _keeps(self, image: Image.Image) -> bool:
        small = self.short_side is None or min(image.size) <= self.short_side
        turns = self.orientation == "turn" and is_turned(image)
        return self.mode == "jpeg" and _is_usual(image) and small and not turns

    def _check(self, data: bytes) -> None:
        check_end(data)
        if self.check == "full":
            decode(np.frombuffer(data, dtype=np.uint8))

    def _jpeg(self, image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
        """Return the bytes of a file, uint8 (n,), and width and height."""
        if self.short_side is not None and self.short_side < min(image.size):
            image = _to_short_side(image, self.short_side)
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=self.quality)
        return np.frombuffer(encoded.getvalue(), dtype=np.uint8), image.size

    def _raw(self, image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
        """Return uint8 (S, S, 3), and width and height."""
        image = _to_short_side(image.convert("RGB"), self.raw_size)
        # half a pixel goes where torchvision's centre crop has it
        left, top = (round((side - self.raw_size) / 2) for side in image.size)
        image = image.crop((left, top, left + self.raw_size, top + self.raw_size))
        return np.array(image), image.size


def is_turned(image: Image.Image) -> bool:
    """Return whether its EXIF header says that an image is not stored upright; a damaged header says nothing."""
    try:
        return image.getexif().get(ORIENTATION, 1) in range(2, 9)
    except Exception:  # Pillow raises what it likes; whoever decodes the image tells
        return False


def _is_usual(image: Image.Image) -> bool:
    """Return whether an image is a grey or RGB JPEG file; MPO is one with more pictures after it."""
    return image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB")


def _to_short_side(image: Image.Image, short_side: int) -> Image.Image:
    """Resize as torchvision's Resize does, so that validation sees what it would see of the file itself."""
    shortest = min(image.size)
    size = [short_side * side // shortest for side in image.size]
    return image.resize(size, Image.Resampling.BILINEAR)


def histogram(sample: Sample) -> np.ndarray:
    """Return how many pixels of each channel have each value, int64 (3, 256)."""
    pixels = sample.image if sample.image.ndim == 3 else decode(sample.image)
    return np.array(Image.fromarray(pixels).histogram(), dtype=np.int64).reshape(3, 256)


def mean_and_std(counts: np.ndarray) -> tuple[list[float], list[float]]:
    """Return each channel's mean and deviation, of images in 0..1, from a histogram (3, 256)."""
    mean, std = [], []
    # whole numbers: the deviation of a single value is 0, and not what rounding leaves
    for channel in counts.tolist():
        total = sum(channel)
        first = sum(count * level for level, count in enumerate(channel))
        second = sum(count * level**2 for level, count in enumerate(channel))
        mean.append(first / total / 255)
        std.append(math.sqrt(total * second - first**2) / total / 255)
    return mean, std

"""One image file -> what a shard stores of it.

In: the bytes of a JPEG or PNG file. Out: mode `jpeg`: a grey or RGB JPEG file, with its own bytes wherever possible;
mode `raw`: RGB pixels, uint8 (S, S, 3). CMYK and PNG files and, with a short side, larger images are encoded again.
"""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_prep.sources import Photo
from data_prep.writer import Sample

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)  # Pillow's, for a bad file


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
    check: str  # "full" decodes every image; "header" trusts those that it keeps but for their first and last bytes

    def sample(self, photo: Photo, data: bytes, label: int) -> Sample:
        """Return what is stored of a photo; raise BadImage if it does not decode."""
        try:
            image = Image.open(io.BytesIO(data))
            if self._keeps(image):
                self._check(image, data)
                return Sample(np.frombuffer(data, dtype=np.uint8), label, image.size, photo.name)
            image = image.convert("RGB") if image.mode not in ("L", "RGB") else image
            return self._raw(image, photo, label) if self.mode == "raw" else self._jpeg(image, photo, label)
        except UNREADABLE as error:
            reason = str(error).split(" <_io.BytesIO")[0] or type(error).__name__
            raise BadImage(photo.name, f"{reason} ({len(data)} bytes)") from error

    def _keeps(self, image: Image.Image) -> bool:
        small = self.short_side is None or min(image.size) <= self.short_side
        is_jpeg = image.format in ("JPEG", "MPO")  # MPO: a JPEG file with more pictures after it
        return self.mode == "jpeg" and is_jpeg and image.mode in ("L", "RGB") and small

    def _check(self, image: Image.Image, data: bytes) -> None:
        if self.check == "full":
            image.load()
        elif b"\xff\xd9" not in data[-64:]:
            raise ValueError("image file is truncated: it has no end mark")

    def _jpeg(self, image: Image.Image, photo: Photo, label: int) -> Sample:
        if self.short_side is not None and self.short_side < min(image.size):
            image = _shrink(image, self.short_side)
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=self.quality)
        return Sample(np.frombuffer(encoded.getvalue(), dtype=np.uint8), label, image.size, photo.name)

    def _raw(self, image: Image.Image, photo: Photo, label: int) -> Sample:
        image = _shrink(image.convert("RGB"), self.raw_size)
        left, top = ((side - self.raw_size) // 2 for side in image.size)
        image = image.crop((left, top, left + self.raw_size, top + self.raw_size))
        return Sample(np.array(image), label, image.size, photo.name)


def _shrink(image: Image.Image, short_side: int) -> Image.Image:
    scale = short_side / min(image.size)
    return image.resize([max(short_side, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)


def histogram(sample: Sample) -> np.ndarray:
    """Return how many pixels of each channel have each value, int64 (3, 256)."""
    image = Image.fromarray(sample.image) if sample.image.ndim == 3 else Image.open(io.BytesIO(sample.image))
    return np.array(image.convert("RGB").histogram(), dtype=np.int64).reshape(3, 256)


def mean_and_std(counts: np.ndarray) -> tuple[list[float], list[float]]:
    """Return each channel's mean and deviation, of images in 0..1, from a histogram (3, 256)."""
    values, total = np.arange(256) / 255, counts.sum(axis=1)
    mean = counts @ values / total
    return mean.tolist(), np.sqrt(counts @ values**2 / total - mean**2).tolist()

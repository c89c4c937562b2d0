"""A look at some photos before packing: whether raw squares would be enlarged, and whether EXIF says that photos are turned.

In: the photos and the encoding. Out: lines to print, or ConfigError. Only headers are decoded; what does not open is left to the packing.
"""

import io
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from asgd_mpi.errors import ConfigError
from data_prep.encode import Encoding, is_turned
from data_prep.sources import Photo

NUM_LOOKED_AT = 256


def survey(photos: Sequence[Photo], encoding: Encoding) -> Iterator[str]:
    """Yield what should be known before the packing; raise ConfigError if most photos would be enlarged."""
    seen = [
        one
        for one in map(_look_at, photos[:: max(1, len(photos) // NUM_LOOKED_AT)][:NUM_LOOKED_AT])
        if one
    ]
    if not seen:
        return
    sides, pixels, turned = (np.array(column) for column in zip(*seen, strict=True))
    side = encoding.raw_size
    if encoding.mode == "raw":
        here, there = (len(photos) * number for number in (3 * side**2, int(np.mean(pixels)) * 3))
        if np.median(sides) < side:
            raise ConfigError(
                f"--raw-size {side}: the photos are smaller, {np.median(sides):g} pixels on the short side (median of {len(seen)}), and would "
                f"be enlarged: {_size(here)} in place of {_size(there)}, with nothing new in them; give --raw-size {np.median(sides):.0f} or "
                "less, or --mode jpeg"
            )
        if small := int((sides < side).sum()):
            yield f"{small} of {len(seen)} photos that were looked at are smaller than --raw-size {side} and are enlarged to it"
    if count := int(turned.sum()):
        does = (
            "they are turned (--orientation turn)"
            if encoding.orientation == "turn"
            else (
                "they are kept as they are stored, as torchvision reads them; --orientation turn turns them"
            )
        )
        yield f"{count} of {len(seen)} photos that were looked at have an EXIF orientation, so lie on their side or are mirrored: {does}"


def _look_at(photo: Photo) -> tuple[int, int, bool] | None:
    """Return the short side, the number of pixels, and whether EXIF says it is turned; None if it does not open."""
    try:
        with Image.open(io.BytesIO(photo.read())) as image:
            return min(image.size), image.width * image.height, is_turned(image)
    except Exception:  # Pillow raises what it likes; the packing tells
        return None


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"

"""JPEG bytes -> pixels, by the fastest well-kept decoder that is installed.

In: a file's bytes, uint8 (n,). Out: RGB, uint8 (H, W, 3), grey expanded. Both decoders are libjpeg-turbo with its
accurate inverse DCT, so the pixels do not depend on which one is used.

    simplejpeg  threads run side by side
    pillow      for platforms without a wheel of simplejpeg; threads wait for each other

A stream that a decoder can only guess at (a truncated file) counts as decodable here: what is decodable was settled
when the shards were made, and the samples' checksums show that the bytes are still those.
"""

import io

import numpy as np
from PIL import Image

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

CMYK = "it is a CMYK file; data_prep converts those"


def decode_simplejpeg(data: np.ndarray) -> np.ndarray:
    """Return uint8 (H, W, 3) for a JPEG file, uint8 (n,); raise ValueError if it is none."""
    if simplejpeg.decode_jpeg_header(data, strict=False)[2] in ("CMYK", "YCCK"):
        raise ValueError(CMYK)
    return simplejpeg.decode_jpeg(data, "RGB", strict=False)  # strict would refuse files that ImageNet has


def decode_pillow(data: np.ndarray) -> np.ndarray:
    """Return uint8 (H, W, 3) for a JPEG file, uint8 (n,); raise ValueError if it is none."""
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            if image.mode == "CMYK":
                raise ValueError(CMYK)
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(str(error)) from error


DECODER = "pillow" if simplejpeg is None else "simplejpeg"  # the name of `decode`
decode = decode_pillow if simplejpeg is None else decode_simplejpeg

"""Image files -> pixels: one opinion of what an image is, for packing, for checking and for reading.

In: a file's bytes, uint8 (n,). Out: RGB, uint8 (H, W, 3), grey expanded. JPEG files go through simplejpeg, whose threads
run side by side; what it does not take (odd sampling factors, CMYK, any other format) goes through Pillow, and so does
everything where simplejpeg is not installed. Both are libjpeg-turbo with its accurate inverse DCT, so the pixels do not
depend on which one is used.

A JPEG stream that a decoder can only guess at (a truncated file) counts as decodable here; `check_end` is what finds it.
"""

import io

import numpy as np
from PIL import Image

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

DECODER = "pillow" if simplejpeg is None else "simplejpeg"  # of ordinary JPEG files

START, END, SCAN = b"\xff\xd8", b"\xff\xd9", 0xDA  # of a JPEG file; its markers
USUAL_TRAILER = 64  # bytes after the end mark that need no closer look
HEIF = (b"heic", b"heix", b"hevc", b"mif1", b"msf1")  # brands of its files


def decode(data: np.ndarray) -> np.ndarray:
    """Return the pixels, uint8 (H, W, 3), of an image file, uint8 (n,); raise ValueError if it is none."""
    if simplejpeg is not None and is_jpeg(data):
        try:  # strict would refuse files that ImageNet has
            # Pillow rounds those otherwise
            if simplejpeg.decode_jpeg_header(data, strict=False)[2] not in ("CMYK", "YCCK"):
                return simplejpeg.decode_jpeg(data, "RGB", strict=False)
        except (ValueError, KeyError):  # KeyError: of a sampling that it has no name for
            pass  # Pillow may know more of it, or says what is wrong
    return decode_pillow(data)


def decode_pillow(data: np.ndarray) -> np.ndarray:
    """Return the pixels, uint8 (H, W, 3), of an image file, uint8 (n,); raise ValueError if it is none."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.array(to_8_bits(image).convert("RGB"))
    except Exception as error:
        raise ValueError(why_unreadable(error, data)) from error


def to_8_bits(image: Image.Image) -> Image.Image:
    """Return an image of 8 bits a channel, grey ("L") or "RGB"; raise ValueError if its range cannot be known.

    Pillow's own conversion clips at 255, which turns 16-bit images white.
    """
    if image.mode in ("L", "RGB"):
        return image
    # I: of older Pillows
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        levels = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "F":
        values = np.asarray(image)
        if not (np.isfinite(values).all() and 0 <= values.min() and values.max() <= 1):
            raise ValueError(
                "its pixels are float numbers outside of 0..1, so which one is white is not known; scale them to 0..1"
            )
        return Image.fromarray(np.rint(values * 255).astype(np.uint8))
    if image.mode == "I":
        raise ValueError(
            "its pixels are 32-bit integers, so which one is white is not known; convert it to 8 or 16 bits"
        )
    return image.convert("RGB")


def why_unreadable(error: Exception, data: bytes | np.ndarray) -> str:
    """Say in a few words why an image file was not read; decoders raise whatever comes to their minds."""
    if bytes(data[4:8]) == b"ftyp" and bytes(data[8:12]) in HEIF:
        return "it is a HEIF file (HEIC), which Pillow does not read; convert it to JPEG or PNG"
    return str(error).split(" <_io.BytesIO")[0] or type(error).__name__


def is_jpeg(data: bytes | np.ndarray) -> bool:
    return bytes(data[:2]) == START


def check_end(data: bytes | np.ndarray) -> None:
    """Raise ValueError if a JPEG file has no end mark, so was cut off; anything may follow the mark, as phones write it.

    Other formats pass if they hold anything: their decoders notice.
    """
    if not len(data):
        raise ValueError("the file is empty")
    if is_jpeg(data) and END not in bytes(data[-USUAL_TRAILER:]) and not _ends(bytes(data)):
        raise ValueError("image file is truncated: it has no end mark")


def _ends(data: bytes) -> bool:
    """Walk a JPEG file from marker to marker; a preview in its header has an end mark, too, which is not the file's."""
    at = 2
    while 0 <= at < len(data) - 3:
        if data[at] != 0xFF:
            return False
        marker = data[at + 1]
        if marker == END[1]:
            return True
        if marker == 0xFF:  # a filling byte
            at += 1
            continue
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == SCAN:
            at = _next_marker(data, at)
    return data[at : at + 2] == END


def _next_marker(data: bytes, at: int) -> int:
    """Return where the compressed data that begin at `at` end; -1 if they do not."""
    while (at := data.find(b"\xff", at)) != -1 and at + 1 < len(data):
        # a stuffed byte, or a restart: within the data
        if data[at + 1] not in (0x00, *range(0xD0, 0xD8)):
            return at
        at += 2
    return -1

"""Small photo-like JPEG trees for tests: smooth colour fields with texture, tinted by class so that a net can learn."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def photo(rng: np.random.Generator, width: int, height: int, tint: float = 0.5) -> Image.Image:
    """Return an RGB image: noise at three scales around a class-dependent colour (tint in 0..1)."""
    total = np.zeros((height, width, 3))
    for cells, weight in ((3, 0.5), (12, 0.3), (40, 0.2)):
        noise = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        total += weight * np.asarray(
            Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        )
    colour = 255 * np.array([tint, 1 - tint, abs(2 * tint - 1)])
    return Image.fromarray(np.clip(0.6 * total + 0.4 * colour, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind, quality=90)
    return file.getvalue()


def write_tree(
    root: Path, num_classes: int = 3, train: int = 8, val: int = 3, seed: int = 0
) -> Path:
    """Write `root`/{train,val}/<synset>/*.JPEG with `train` and `val` photos of different sizes a class."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        for label in range(num_classes):
            directory = root / split / f"n{label:08d}"
            directory.mkdir(parents=True)
            for number in range(count):
                width, height = (int(side) for side in rng.integers(40, 90, size=2))
                image = photo(rng, width, height, tint=label / max(1, num_classes - 1))
                (directory / f"{split}_{label}_{number}.JPEG").write_bytes(encoded(image))
    return root


def write_odd_files(root: Path) -> None:
    """Add a grey JPEG, a CMYK JPEG, a PNG named .JPEG (as ImageNet has one) and a .png to the first train class."""
    rng, directory = np.random.default_rng(99), root / "train" / "n00000000"
    (directory / "grey.jpg").write_bytes(encoded(photo(rng, 50, 60).convert("L")))
    (directory / "cmyk.JPEG").write_bytes(encoded(photo(rng, 60, 50).convert("CMYK")))
    (directory / "really_png.JPEG").write_bytes(encoded(photo(rng, 44, 52), "PNG"))
    (directory / "alpha.png").write_bytes(encoded(photo(rng, 52, 44).convert("RGBA"), "PNG"))

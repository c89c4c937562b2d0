"""A small data set in the shape of ILSVRC2012: archives, development kit, tree; for tests, demos and benchmarks.

Out: `archives/` with ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, and `tree/` with
the same images as train/<synset>/ and val/<synset>/. The images have the spectrum of photographs (1/f, with some noise),
ImageNet's mean and colour covariance and, at the default size, its bytes per image and decoding time; a class has a
tint, so that a network can learn them. Everything is a function of the seed.
"""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

from asgd_mpi.config import limits
from asgd_mpi.errors import ConfigError, tell
from data_prep import run
from data_prep.devkit import GROUND_TRUTH, META
from data_prep.devkit import NAME as DEVKIT

MEAN = np.array([0.485, 0.456, 0.406])
COLOURS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)
CONTRAST = (0.25, 0.045, 0.02)  # deviation along each colour axis
SLOPE = 1.2  # of the spectrum's amplitude
NOISE = 3.0  # levels
_SIDE = limits.at_least(1, 30000), "give pixels, 1 to 30000"
_IMAGES = limits.at_least(1, 2**24), "a class has 1 image or more; 2^24 at most"
RANGES = {
    "classes": (limits.at_least(1, 2**20), "give 1 class or more; 2^20 at most"),
    "train": _IMAGES,
    "val": _IMAGES,
    "width": _SIDE,
    "height": _SIDE,
    "seed": limits.RANGES["run.seed"],
    "broken": (limits.at_least(0), "give images, or 0 for none"),
}


def generate(
    out: Path, classes: int = 10, train: int = 20, val: int = 5, width: int = 500, height: int = 375, seed: int = 0,
    odd: bool = True, broken: int = 0,
) -> None:  # fmt: skip
    """Write an ILSVRC-like set as archives and as a tree.

    Args:
        out: directory; refused if it already holds such a set
        classes: number of classes
        train: training images per class
        val: validation images per class
        width: of a typical image, in pixels; some are upright, and sizes vary by a tenth
        height: of a typical image, in pixels
        seed: of everything
        odd: make the first images of the first class what ImageNet also has: a grey one, a CMYK one, a PNG named .JPEG
        broken: training images that are cut off, from the last class backwards; one of them is empty
    """
    limits.demand(
        not odd or train >= 3,
        "--train",
        train,
        "the odd images are the first 3 of a class; give 3 or more, or --odd false",
    )
    limits.demand(
        broken <= classes * train,
        "--broken",
        broken,
        f"that is more than there are, {classes} classes of {train}",
    )
    archives, tree = out / "archives", out / "tree"
    if archives.exists() or tree.exists():
        raise ConfigError(f"{out} already holds archives or a tree; choose another --out")
    archives.mkdir(parents=True)
    synsets = [f"n{1000 + 7 * label:08d}" for label in range(classes)]
    maker = _Maker(seed, classes, width, height)
    _write_train(archives, tree, synsets, maker, train, odd, broken)
    # Class ids are not in the order of the synsets, as in the real kit.
    ids = np.random.default_rng([seed, 7]).permutation(classes) + 1
    truth = np.random.default_rng([seed, 8]).permutation(np.repeat(np.arange(classes), val))
    _write_val(archives, tree, synsets, maker, truth)
    _write_devkit(archives, synsets, ids, [int(ids[label]) for label in truth])
    tell(
        f"{archives} and {tree}: {classes * train} train and {classes * val} val images of {classes} classes"
    )


class _Maker:
    """Makes image files; each is a function of the seed and its own number."""

    def __init__(self, seed: int, classes: int, width: int, height: int):
        self.seed, self.classes, self.width, self.height = seed, classes, width, height

    def file(self, number: int, label: int, odd: str = "") -> bytes:
        rng = np.random.default_rng([self.seed, 9, number])
        width, height = (
            max(1, round(side * rng.uniform(0.9, 1.1))) for side in (self.width, self.height)
        )
        if rng.random() < 0.25:
            width, height = height, width
        image = photo(rng, width, height, label / max(1, self.classes - 1))
        # 77 % of ImageNet's files keep the full colour resolution
        subsampling = 0 if rng.random() < 0.77 else 2
        kind = {"grey": "L", "cmyk": "CMYK"}.get(odd, "RGB")
        file = io.BytesIO()
        options = (
            {}
            if odd == "png"
            else {"quality": 93} | ({"subsampling": subsampling} if kind == "RGB" else {})
        )
        image.convert(kind).save(file, "PNG" if odd == "png" else "JPEG", **options)
        return file.getvalue()


def photo(rng: np.random.Generator, width: int, height: int, tint: float = 0.5) -> Image.Image:
    """Return an RGB image with a photograph's spectrum; `tint`, 0 to 1, colours it."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf  # no mean
    axes = []
    for contrast in CONTRAST:
        spectrum = frequency**-SLOPE * np.exp(2j * np.pi * rng.random(frequency.shape))
        field = np.fft.irfft2(spectrum, s=(height, width))
        axes.append(field * (contrast / max(field.std(), 1e-12)))
    pixels = 255 * (MEAN + np.stack(axes, axis=-1) @ COLOURS.T)
    pixels += 25 * np.array([np.cos(3 * tint), np.sin(3 * tint), np.cos(3 * tint + 2)])
    pixels += NOISE * rng.standard_normal((height, width, 1))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _write_train(
    archives: Path, tree: Path, synsets: list, maker: _Maker, train: int, odd: bool, broken: int
) -> None:
    oddities = {0: "grey", 1: "cmyk", 2: "png"} if odd else {}
    total = len(synsets) * train
    with tarfile.open(archives / "ILSVRC2012_img_train.tar", "w") as outer:
        for label, synset in enumerate(synsets):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for place in range(train):
                    number = label * train + place
                    data = maker.file(number, label, oddities.get(number, ""))
                    if number >= total - broken:
                        data = data[: len(data) // 2] if number < total - 1 else b""
                    name = f"{synset}_{place}.JPEG"
                    _add(tar, name, data)
                    _put(tree / "train" / synset / name, data)
            _add(outer, f"{synset}.tar", inner.getvalue())


def _write_val(
    archives: Path, tree: Path, synsets: list[str], maker: _Maker, truth: np.ndarray
) -> None:
    with tarfile.open(archives / "ILSVRC2012_img_val.tar", "w") as tar:
        for number, label in enumerate(truth.tolist(), start=1):
            data, name = maker.file(-number % 2**32, label), f"ILSVRC2012_val_{number:08d}.JPEG"
            _add(tar, name, data)
            _put(tree / "val" / synsets[label] / name, data)


def _write_devkit(archives: Path, synsets: list[str], ids: np.ndarray, truth: list[int]) -> None:
    """Write the two files that are read, with the real kit's fields; one synset more is an ancestor of all."""
    fields = [
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    ]
    rows = [(int(number), synset, f"class {synset}, tint {synset}", "made up", 0, np.zeros(0), 0, 0)
            for number, synset in sorted(zip(ids, synsets, strict=True))]  # fmt: skip
    rows.append(
        (
            len(synsets) + 1,
            "n00000001",
            "anything",
            "made up",
            len(synsets),
            ids.astype(float),
            1,
            0,
        )
    )
    table = np.array(rows, dtype=[(name, object) for name in fields]).reshape(-1, 1)
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": table})
    with (
        gzip.GzipFile(archives / f"{DEVKIT}.tar.gz", "wb", mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as tar,
    ):
        _add(tar, f"{DEVKIT}/{META}", meta.getvalue())
        _add(tar, f"{DEVKIT}/{GROUND_TRUTH}", "".join(f"{number}\n" for number in truth).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def _put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


if __name__ == "__main__":
    run(generate, RANGES)

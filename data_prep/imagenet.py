"""An ImageNet-style tree as shards: `train/<synset>/*.JPEG` and `val/<synset>/*.JPEG`.

In: a directory tree. Out: JPEG shards. All images of a split are shuffled once with the seed before they are written,
so every shard holds every class and a run may read in blocks. A grey or RGB JPEG file is kept byte for byte; CMYK
files, PNG files and, with --short-side, larger images become RGB or grey JPEG files. Every image is decoded once.
"""

import io
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from asgd_mpi.data.shards import Manifest, SplitEntry
from asgd_mpi.errors import ConfigError, DataError
from data_prep import run
from data_prep.writer import Sample, make_root, software, write_manifest, write_split

SPLITS = ("train", "val")
EXTENSIONS = (".jpeg", ".jpg", ".png")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet's train images in 0..1, the usual constants


def prepare(
    source: Path,
    out: Path,
    shard_size: int = 8192,
    seed: int = 0,
    short_side: int | None = None,
    quality: int = 90,
    on_bad_image: Literal["stop", "skip"] = "stop",
    workers: int | None = None,
) -> None:
    """Pack an ImageNet-style tree of JPEG files into HDF5 shards.

    Args:
        source: directory with train/<synset>/*.JPEG and val/<synset>/*.JPEG
        out: directory for the data set; created if missing, refused if it already holds one
        shard_size: images per shard; one shard is held in memory (8192 ImageNet images: 0.9 GB)
        seed: of the shuffle before writing; the same seed gives the same shards
        short_side: shrink larger images to this many pixels on the short side; files are kept as they are if not given
        quality: of the JPEG files that have to be encoded again, 1 to 95
        on_bad_image: stop at an image that does not decode, or skip it, name it and list it in the manifest
        workers: threads that read and check images; one per core if not given
    """
    at_least_one = [number for number in (shard_size, short_side, workers) if number is not None]
    if min(at_least_one) < 1 or seed < 0 or not 1 <= quality <= 95:
        raise ConfigError(
            f"--shard-size {shard_size}, --short-side {short_side} and --workers {workers} must be 1 or more, "
            f"--seed {seed} 0 or more, --quality {quality} 1 to 95"
        )
    synsets = find_classes(source)
    photos = {split: find_photos(source, split, synsets) for split in SPLITS}
    for number, split in enumerate(SPLITS):
        np.random.default_rng([seed, number]).shuffle(photos[split])
    make_root(out, num_bytes=sum(_estimate_bytes(photos[split]) for split in SPLITS))
    splits: dict[str, SplitEntry] = {}
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        for split in SPLITS:
            packer = Packer(pool, partial(read_photo, source, short_side, quality), on_bad_image == "skip", [])
            num_shards = -(-len(photos[split]) // shard_size)
            shards = packer.shards(split, photos[split], shard_size)
            entries = write_split(out, split, shards, num_shards, len(synsets), seed)
            splits[split] = SplitEntry(sum(entry.num_samples for entry in entries), entries, packer.skipped)
    names = class_names(synsets)
    write_manifest(
        out,
        Manifest(encoding="jpeg", image_shape=None, class_names=names, synsets=synsets, mean=MEAN, std=STD, seed=seed,
                 splits=splits, software=software()),
    )  # fmt: skip
    for split, entry in splits.items():
        num_bytes = sum(shard.num_bytes for shard in entry.shards)
        print(f"{split}: {entry.num_samples} images of {len(synsets)} classes in {len(entry.shards)} shards, "
              f"{num_bytes / 1e6:,.1f} MB, {len(entry.skipped)} skipped")  # fmt: skip


@dataclass(frozen=True)
class Photo:
    path: str
    label: int


class BadImage(Exception):
    """An image file that does not decode."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name} is no readable image: {reason}")
        self.name = name


@dataclass(frozen=True)
class Packer:
    """Reads photos in a thread pool, one shard's worth at a time."""

    pool: ThreadPoolExecutor
    read: partial  # read_photo with all arguments but the photo
    skip: bool
    skipped: list[str]  # grows by one file name an image left out

    def shards(self, split: str, photos: list[Photo], shard_size: int) -> Iterator[list[Sample]]:
        """Yield the samples of each shard; raise DataError at a bad image, unless skipping."""
        with tqdm(total=len(photos), desc=split, unit="img") as progress:
            for begin in range(0, len(photos), shard_size):
                samples = []
                for result in self.pool.map(partial(_try, self.read), photos[begin : begin + shard_size]):
                    progress.update()
                    if isinstance(result, BadImage):
                        self._leave_out(result)
                    else:
                        samples.append(result)
                if not samples:
                    raise DataError(
                        f"not one of {len(photos[begin : begin + shard_size])} {split} images in a row decodes; "
                        f"the source is damaged, so skipping does not help; restore it and start again"
                    )
                yield samples

    def _leave_out(self, bad: BadImage) -> None:
        if not self.skip:
            raise DataError(f"{bad}; replace the file, or leave such images out with --on-bad-image skip") from bad
        self.skipped.append(bad.name)
        tqdm.write(f"skipped: {bad}", file=sys.stderr)


def find_classes(source: Path) -> list[str]:
    """Return the sorted class directories of train; their positions are the labels."""
    return _class_directories(source, "train")


def find_photos(source: Path, split: str, synsets: list[str]) -> list[Photo]:
    """Return the images of a split, sorted by class and name; raise DataError if classes are empty or unknown."""
    found = _class_directories(source, split)
    unknown = sorted(set(found) - set(synsets))
    if unknown:
        raise DataError(
            f"{source / split} has {len(unknown)} classes that are not in train ({_some(unknown)}), so they have no "
            f"label; train and val need the same {len(synsets)} class directories"
        )
    photos, empty, others = [], [], []
    for synset in found:
        names = sorted(entry.name for entry in _listing(source / split / synset))
        images = [name for name in names if name.lower().endswith(EXTENSIONS)]
        others += [f"{synset}/{name}" for name in names if not name.lower().endswith(EXTENSIONS)]
        photos += [Photo(str(source / split / synset / name), synsets.index(synset)) for name in images]
        if not images:
            empty.append(synset)
    if empty:
        raise DataError(
            f"{len(empty)} of {len(found)} classes in {source / split} have no image ({_some(empty)}); images end in "
            f"{', '.join(EXTENSIONS)}; unpack the archive again, or delete the empty class directories"
        )
    if others:
        print(f"{split}: {len(others)} files are no images and stay out ({_some(others)})", file=sys.stderr)
    return photos


def _class_directories(source: Path, split: str) -> list[str]:
    if not (source / split).is_dir():
        raise DataError(f"{source} has no directory {split}; images are expected in {source}/{split}/<synset>/*.JPEG")
    entries = _listing(source / split)
    found = sorted(entry.name for entry in entries if entry.is_dir())
    if not found:
        raise DataError(
            f"{source / split} has {len(entries)} files and no class directory; images are expected in "
            f"{source}/{split}/<synset>/*.JPEG. ImageNet's validation archive comes without them: sort its files "
            f"into one directory per synset first"
        )
    return found


def read_photo(source: Path, short_side: int | None, quality: int, photo: Photo) -> Sample:
    """Return a photo as a JPEG file, with its own bytes if possible; raise BadImage if it does not decode."""
    name = os.path.relpath(photo.path, source)
    with _readable(photo.path):  # a file that cannot be read is no bad image: it always stops the packing
        data = Path(photo.path).read_bytes()
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise BadImage(name, f"{str(error) or type(error).__name__} ({len(data)} bytes)") from error
    keep = image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB")
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    if short_side is not None and short_side < min(image.size):
        scale = short_side / min(image.size)
        image, keep = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC), False
    if not keep:
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=quality)
        data = encoded.getvalue()
    return Sample(np.frombuffer(data, dtype=np.uint8), photo.label, image.size, name)


def _try(read: partial, photo: Photo) -> Sample | BadImage:
    try:
        return read(photo)
    except BadImage as error:
        return error


def class_names(synsets: list[str]) -> list[str]:
    """Return names to show: ImageNet's if these are its 1000 synsets, else the directories' own."""
    if len(synsets) != 1000 or (synsets[0], synsets[-1]) != ("n01440764", "n15075141"):
        return synsets
    from torchvision.models import ResNet50_Weights  # slow to import, and only here

    return ResNet50_Weights.IMAGENET1K_V1.meta["categories"]


def _estimate_bytes(photos: list[Photo]) -> int:
    """Estimate the size of shuffled photos from the first thousand; exact below that, and enough when shrinking."""
    some, num_bytes = photos[:1000], 0
    for photo in some:
        with _readable(photo.path):
            num_bytes += os.path.getsize(photo.path)
    return num_bytes * len(photos) // len(some)


def _listing(directory: Path) -> list[os.DirEntry]:
    with _readable(directory), os.scandir(directory) as entries:
        return list(entries)


@contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check its permissions and its disk") from error


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


if __name__ == "__main__":
    run(prepare)

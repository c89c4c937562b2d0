"""Small images that are arrays already, as shards: raw uint8, no encoding. Shared by the data sets that come with packages."""

from pathlib import Path

import numpy as np

from asgd_mpi.errors import tell
from asgd_mpi.data.manifest import Manifest, SplitEntry
from data_prep.writer import Sample, check_space, make_root, software, write_manifest, write_split

SEED = 0

# images (N, H, W, C) uint8, labels (N,), names (N,)
Split = tuple[np.ndarray, np.ndarray, list[str]]


def write(out: Path, splits: dict[str, Split], class_names: list[str], shard_size: int) -> None:
    """Write a data set of one image size, with a fixed order. Raises UserError if `out` holds one, or has no room."""
    train = splits["train"][0]
    make_root(out)
    check_space(out, num_bytes=sum(images.nbytes for images, _, _ in splits.values()))
    entries = {
        name: _write(out, name, split, len(class_names), shard_size)
        for name, split in splits.items()
    }
    channels = range(train.shape[3])
    write_manifest(
        out,
        Manifest(
            encoding="raw",
            image_shape=train.shape[1:],
            class_names=class_names,
            synsets=[],
            mean=[float(train[..., channel].mean() / 255) for channel in channels],
            std=[float(train[..., channel].std() / 255) for channel in channels],
            seed=SEED,
            splits=entries,
            software=software(),
        ),
    )
    counts = " and ".join(f"{len(images)} {name}" for name, (images, _, _) in splits.items())
    tell(f"{out}: {counts} images of {len(class_names)} classes")


def _write(out: Path, name: str, split: Split, num_classes: int, shard_size: int) -> SplitEntry:
    images, labels, names = split
    samples = [
        Sample(image, int(label), image.shape[1::-1], name)
        for image, label, name in zip(images, labels, names)
    ]
    shards = [samples[begin : begin + shard_size] for begin in range(0, len(samples), shard_size)]
    return SplitEntry(
        len(samples), write_split(out, name, shards, num_classes=num_classes, seed=SEED)
    )

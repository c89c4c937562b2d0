"""scikit-learn's digits as shards: 1797 real 8 x 8 grey images, enough to see a run learn in seconds, offline.

Out: raw uint8 (8, 8, 1) shards; 1437 train and 360 val images, split per class with a fixed seed; several train shards,
so that a trial takes the same path as ImageNet.
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from asgd_mpi.data.shards import Manifest, SplitEntry
from data_prep import run
from data_prep.writer import Sample, check_space, make_root, software, write_manifest, write_split

SEED = 0
SHARD_SIZE = 512
NUM_VAL = 360


def prepare(out: Path) -> None:
    """Write the digits of scikit-learn as a small data set.

    Args:
        out: directory for the data set; created if missing, refused if it already holds one
    """
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]  # values 0..16 become 0..255
    train, val = train_test_split(
        np.arange(len(images)), test_size=NUM_VAL, stratify=digits.target, random_state=SEED
    )
    make_root(out)
    check_space(out, num_bytes=2 * images.nbytes)
    splits = {name: _write(out, name, rows, images, digits.target) for name, rows in (("train", train), ("val", val))}
    write_manifest(
        out,
        Manifest(
            encoding="raw",
            image_shape=images.shape[1:],
            class_names=[str(name) for name in digits.target_names],
            synsets=[],
            mean=[float(images[train].mean() / 255)],
            std=[float(images[train].std() / 255)],
            seed=SEED,
            splits=splits,
            software=software(),
        ),
    )
    print(f"{out}: {len(train)} train and {len(val)} val images of {len(digits.target_names)} classes")


def _write(out: Path, split: str, rows: np.ndarray, images: np.ndarray, labels: np.ndarray) -> SplitEntry:
    samples = [Sample(images[row], int(labels[row]), images.shape[2:0:-1], f"digits/{row}") for row in rows]
    shards = [samples[begin : begin + SHARD_SIZE] for begin in range(0, len(samples), SHARD_SIZE)]
    entries = write_split(out, split, shards, num_classes=10, seed=SEED)
    return SplitEntry(num_samples=len(samples), shards=entries)


if __name__ == "__main__":
    run(prepare)

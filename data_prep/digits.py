"""scikit-learn's digits as shards: 1797 real 8 x 8 grey images, enough to see a run learn in seconds, offline.

Out: raw uint8 (8, 8, 1) shards; 1437 train and 360 val images, split per class with a fixed seed; several train shards,
so that a trial takes the same path as ImageNet.
"""

import fcntl
from contextlib import suppress
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from asgd_mpi.data.manifest import MANIFEST
from data_prep import arrays, run
from data_prep.writer import explained

SHARD_SIZE = 512
NUM_VAL = 360


def prepare(out: Path) -> None:
    """Write the digits of scikit-learn as a small data set.

    Args:
        out: directory for the data set; created if missing, refused if it already holds one
    """
    digits = load_digits()
    # values 0..16 become 0..255
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    train, val = train_test_split(
        np.arange(len(images)), test_size=NUM_VAL, stratify=digits.target, random_state=arrays.SEED
    )
    splits = {
        name: (images[rows], digits.target[rows], [f"digits/{row}" for row in rows])
        for name, rows in (("train", train), ("val", val))
    }
    arrays.write(out, splits, [str(name) for name in digits.target_names], SHARD_SIZE)


def prepare_once(out: Path) -> None:
    """`prepare`, however many jobs want the data set at the same moment; returns when it is there."""
    with explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = open(out.with_name(f".{out.name}.lock"), "w")
    with lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / MANIFEST).exists():
            prepare(out)


if __name__ == "__main__":
    run(prepare)

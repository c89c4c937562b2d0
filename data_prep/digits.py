"""scikit-learn's digits as shards: 1797 real 8 x 8 grey images, enough to see a run learn in seconds, offline.

Out: raw uint8 (8, 8, 1) shards; 1437 train and 360 val images, split per class with a fixed seed; several train shards,
so that a trial takes the same path as ImageNet.
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from data_prep import arrays, run

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
        np.arange(len(images)), test_size=NUM_VAL, stratify=digits.target, random_state=arrays.SEED
    )
    splits = {name: (images[rows], digits.target[rows], [f"digits/{row}" for row in rows])
              for name, rows in (("train", train), ("val", val))}
    arrays.write(out, splits, [str(name) for name in digits.target_names], SHARD_SIZE)


if __name__ == "__main__":
    run(prepare)

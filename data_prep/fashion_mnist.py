"""Fashion-MNIST as shards: 70 000 real 28 x 28 grey images of clothes, harder than digits (Xiao et al. 2017, arXiv:1708.07747).

    apt-get install dataset-fashion-mnist        # Debian; or the four IDX files from anywhere else
    python -m data_prep.fashion_mnist --out data/fashion-mnist

Out: raw uint8 (28, 28, 1) shards, 60 000 train and 10 000 val images (its test split).
"""

from pathlib import Path

from asgd_mpi.config import limits
from asgd_mpi.errors import UserError
from data_prep import arrays, run
from data_prep.idx import read_idx

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
FILES = {"train": "train", "val": "t10k"}
SHARD_SIZE = 8192
RANGES = {"limit": (limits.at_least(0), "give images of each split, or 0 for all")}


def prepare(out: Path, source: Path = DEBIAN, limit: int = 0) -> None:
    """Write Fashion-MNIST as a data set.

    Args:
        out: directory for the data set; created if missing, refused if it already holds one
        source: directory with the IDX files, compressed by gzip or not (default: that of Debian's package dataset-fashion-mnist)
        limit: images of each split, from the beginning; 0 for all
    """
    splits = {}
    for split, stem in FILES.items():
        images, labels = (
            read_idx(source, f"{stem}-images-idx3-ubyte"),
            read_idx(source, f"{stem}-labels-idx1-ubyte"),
        )
        if len(images) != len(labels) or labels.max(initial=0) >= len(CLASSES):
            raise UserError(
                f"{source}: the {split} split has {len(images)} images and {len(labels)} labels up to "
                f"{labels.max(initial=0)}; it must have one label from 0 to 9 for each. Fetch the files again."
            )
        count = limit or len(images)
        names = [f"{stem}/{row}" for row in range(len(images))]
        splits[split] = images[:count, ..., None], labels[:count], names[:count]
    arrays.write(out, splits, CLASSES, SHARD_SIZE)


if __name__ == "__main__":
    run(prepare, RANGES)

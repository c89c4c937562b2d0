"""Sets of small images as they lie on disk after their download, as shards: CIFAR-10 and -100, SVHN, MNIST and its like.

    python -m data_prep.small --source DIR --out data/cifar10

In: a directory, or the directory that torchvision downloaded into, with one of

    data_batch_1.bin ... test_batch.bin, batches.meta.txt      CIFAR-10, "binary version"
    train.bin, test.bin, fine_label_names.txt                  CIFAR-100, "binary version"
    train_32x32.mat, test_32x32.mat                            SVHN, cropped digits
    train-images-idx3-ubyte, t10k-..., compressed or not       MNIST, Fashion-MNIST, KMNIST

Out: raw uint8 shards, the test split as `val`. The "python version" of CIFAR is refused: it is pickled, and to unpickle a file
runs what it says.
"""

import os
from pathlib import Path

import numpy as np
import scipy.io

from asgd_mpi.config import limits
from asgd_mpi.errors import DataError
from data_prep import arrays, run
from data_prep.idx import read_idx

SHARD_SIZE = 8192
RANGES = {"limit": (limits.at_least(0), "give images of each split, or 0 for all")}
PIXELS = 3 * 32 * 32  # bytes of an image of CIFAR: the red, the green, the blue plane
BINARY = "https://www.cs.toronto.edu/~kriz/cifar.html has it"
PICKLED = ("data_batch_1", "cifar-10-batches-py", "cifar-100-python")


def prepare(out: Path, source: Path, limit: int = 0) -> None:
    """Write a set of small images as a data set; which one it is, its files say.

    Args:
        out: directory for the data set; created if missing, refused if it already holds one
        source: directory with the files of the set, or one above it
        limit: images of each split, from the beginning; 0 for all
    """
    splits, class_names = read(source)
    if limit:
        splits = {name: tuple(part[:limit] for part in split) for name, split in splits.items()}
    arrays.write(out, splits, class_names, SHARD_SIZE)


def read(source: Path) -> tuple[dict[str, arrays.Split], list[str]]:
    """Return the splits and the names of the classes; raise DataError if no known set lies there, or it is damaged."""
    for marker, reader in READERS.items():
        found = _find(source, marker)
        if found:
            return reader(found)
    if any(_find(source, name) for name in PICKLED):
        raise DataError(f"{source} holds the python version of CIFAR, which is pickled: to read it would run what the file says. "
                        f"Get the binary version ({BINARY}) and give its directory.")  # fmt: skip
    raise DataError(
        f"{source} holds none of {', '.join(READERS)}, so no set that is known here; give the directory with the "
        # fmt: skip
        f"files of CIFAR-10 or -100 (binary version), SVHN (cropped) or MNIST, or a tree to data_prep.imagenet"
    )


def _find(source: Path, marker: str) -> Path | None:
    """Return the directory, `source` or one at most two below it, that holds a file or directory of this name."""
    if not os.path.isdir(source):
        raise DataError(
            f"{source} is not a directory; give the one that holds the files of the set"
        )
    for pattern in (marker, f"*/{marker}", f"*/*/{marker}"):
        for path in sorted(source.glob(pattern)):
            return path.parent
    return None


def _cifar10(directory: Path) -> tuple[dict[str, arrays.Split], list[str]]:
    names = _names(directory / "batches.meta.txt")
    batches = {
        "train": [f"data_batch_{number}.bin" for number in range(1, 6)],
        "val": ["test_batch.bin"],
    }
    return {
        split: _records(directory, files, label_at=0, num_labels=1, num_classes=len(names))
        for split, files in batches.items()
    }, names


def _cifar100(directory: Path) -> tuple[dict[str, arrays.Split], list[str]]:
    names = _names(directory / "fine_label_names.txt")
    batches = {"train": ["train.bin"], "val": ["test.bin"]}
    return {
        split: _records(directory, files, label_at=1, num_labels=2, num_classes=len(names))
        for split, files in batches.items()
    }, names


def _records(
    directory: Path, files: list[str], label_at: int, num_labels: int, num_classes: int
) -> arrays.Split:
    """Return the records of some files: `num_labels` labels, a byte each, and the planes of an image."""
    images, labels, names = [], [], []
    for file in files:
        data = _bytes(directory / file)
        if not len(data) or len(data) % (num_labels + PIXELS):
            raise DataError(f"{directory / file} has {len(data)} bytes, no multiple of {num_labels + PIXELS}: it was cut off; "
                            "get it again")  # fmt: skip
        records = data.reshape(-1, num_labels + PIXELS)
        images.append(records[:, num_labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(records[:, label_at])
        names += [f"{file}/{row}" for row in range(len(records))]
    return _checked(
        directory,
        np.ascontiguousarray(np.concatenate(images)),
        np.concatenate(labels),
        names,
        num_classes,
    )


def _svhn(directory: Path) -> tuple[dict[str, arrays.Split], list[str]]:
    splits = {}
    for split, file in (("train", "train_32x32.mat"), ("val", "test_32x32.mat")):
        try:
            found = scipy.io.loadmat(directory / file)
            images = np.ascontiguousarray(found["X"].transpose(3, 0, 1, 2), dtype=np.uint8)
            labels = found["y"].reshape(-1) % 10  # a zero is written as 10
        except Exception as error:  # scipy raises what it likes on a file that is cut off
            raise DataError(
                f"{directory / file} is missing or damaged ({type(error).__name__}: {error}); get it again"
            ) from error
        names = [f"{file}/{row}" for row in range(len(images))]
        splits[split] = _checked(directory, images, labels, names, 10)
    return splits, [str(digit) for digit in range(10)]


def _mnist(directory: Path) -> tuple[dict[str, arrays.Split], list[str]]:
    splits = {}
    for split, stem in (("train", "train"), ("val", "t10k")):
        images, labels = (
            read_idx(directory, f"{stem}-images-idx3-ubyte"),
            read_idx(directory, f"{stem}-labels-idx1-ubyte"),
        )
        names = [f"{stem}/{row}" for row in range(len(images))]
        splits[split] = _checked(directory, images[..., None], labels, names, 10)
    return splits, [str(label) for label in range(10)]


READERS = {  # by a file that tells the set
    "data_batch_1.bin": _cifar10, "fine_label_names.txt": _cifar100, "train_32x32.mat": _svhn,
    "train-images-idx3-ubyte": _mnist, "train-images-idx3-ubyte.gz": _mnist,
}  # fmt: skip


def _names(path: Path) -> list[str]:
    """Return the names of the classes, one a line."""
    names = [
        line.strip()
        for line in _bytes(path).tobytes().decode(errors="replace").splitlines()
        if line.strip()
    ]
    if not names:
        raise DataError(f"{path} names no classes; get it again")
    return names


def _bytes(path: Path) -> np.ndarray:
    try:
        return np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; get the set again") from error


def _checked(
    directory: Path, images: np.ndarray, labels: np.ndarray, names: list[str], num_classes: int
) -> arrays.Split:
    if len(images) != len(labels) or not len(labels) or int(labels.max()) >= num_classes:
        raise DataError(
            f"{directory}: {len(images)} images and {len(labels)} labels up to {labels.max(initial=0)} for "
            # fmt: skip
            f"{num_classes} classes do not fit together; get the set again"
        )
    return images, labels, names


if __name__ == "__main__":
    run(prepare, RANGES)

"""Two data sources for those who only want to try: a directory tree read directly, and images made up in memory.

Both have the face of a `ShardSet`, so everything behind it is the same. A tree has no checksums and opens a file for every
image. The synthetic images cost nothing, so a run with them measures everything but the disk and the decoder.
"""

import os
from pathlib import Path

import numpy as np
import xxhash
from PIL import Image

from asgd_mpi.data.decode import check_end
from asgd_mpi.data.shards import DamagedSample
from asgd_mpi.data.tree import Tree, directory_of, list_tree
from asgd_mpi.errors import DataError, few

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NUM_LOOKED_AT = 64  # headers of a tree


class FolderSet:
    """`root`/<split>/<class>/*.JPEG (or another format, see tree), in an order shuffled once, as shards would be."""

    encoding, image_shape = "jpeg", None  # "jpeg": whole files, to be decoded
    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, root: str | Path, split: str):
        """List the split; raises DataError. The classes are those of train, sorted."""
        self.root, self.split = Path(root), split
        found = self._list(split)
        classes = found.images if split == "train" else self._list("train").images
        self.class_names, self.notes = list(classes), found.notes
        unknown = sorted(set(found.images) - set(self.class_names))
        if unknown:
            raise DataError(
                f"{self.root / split} has {len(unknown)} classes that are not in train ({few(unknown)}), so they have no "
                f"label; remove them, or add their training images"
            )
        paths = [
            (path, label)
            for label, name in enumerate(self.class_names)
            for path in found.images.get(name, [])
        ]
        if not paths:
            raise DataError(
                f"{self.root / split} has no image in <class>/*.JPEG; give a directory of images in directories of their classes"
            )
        order = np.random.default_rng(0).permutation(len(paths))
        self._paths = [paths[place][0] for place in order]
        self._label = np.array([paths[place][1] for place in order], dtype=np.int64)
        self.num_samples, self.num_classes = len(paths), len(self.class_names)
        self.fingerprint = xxhash.xxh3_64_hexdigest(
            "\n".join(map(self.source, range(len(paths)))).encode()
        )

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """Return the labels, int64, of some samples."""
        return self._label[indices]

    def short_sides(self) -> np.ndarray:
        """Return the short sides of the first images, a random draw, in pixels; 0 of those that cannot be read."""
        return np.array([_short_side(path) for path in self._paths[:NUM_LOOKED_AT]])

    def expect(self, indices: np.ndarray) -> None:
        pass

    def read(self, index: int) -> np.ndarray:
        """Return a file's bytes, uint8 (n,); raise DataError if it cannot be read, DamagedSample if it was cut off."""
        try:
            data = np.fromfile(self._paths[index], dtype=np.uint8)
        except OSError as error:
            raise DataError(
                f"{self._paths[index]} cannot be read: {error.strerror}; check the file and its disk"
            ) from error
        try:
            check_end(data)
        except ValueError as error:
            raise DamagedSample(
                f"{self._paths[index]} was cut off ({len(data)} bytes): {error}"
            ) from error
        return data

    def source(self, index: int) -> str:
        return str(Path(self._paths[index]).relative_to(self.root))

    def close(self) -> None:
        pass

    def _list(self, split: str) -> Tree:
        directory = directory_of(self.root, split)
        if not os.path.isdir(directory):
            raise DataError(
                f"{self.root} is no tree of train/<class>/*.JPEG and val/<class>/*.JPEG: it has no directory {split}; "
                f"give the directory that holds both"
            )
        return list_tree(directory)


class SyntheticSet:
    """Made-up images of ImageNet's size: raw squares cut from one block of noise, with a label each."""

    encoding, fingerprint, root, notes = "raw", "synthetic", Path("synthetic"), []
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    NUM_SAMPLES = {"train": 1_281_167, "val": 50_000}

    def __init__(self, split: str, side: int = 256, num_classes: int = 1000):
        self.split, self.num_samples, self.num_classes = split, self.NUM_SAMPLES[split], num_classes
        self.image_shape = (side, side, 3)
        self.class_names = [f"class {label}" for label in range(num_classes)]
        noise = np.random.default_rng(split == "train").integers(
            0, 256, side * side * 3 + 4096, dtype=np.uint8
        )
        self._noise = noise  # sample i starts at byte i % 4096

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """Return the labels, int64, of some samples."""
        return np.asarray(indices, dtype=np.int64) * 7919 % self.num_classes

    def short_sides(self) -> np.ndarray:
        return np.array([min(self.image_shape[:2])])

    def expect(self, indices: np.ndarray) -> None:
        pass

    def read(self, index: int) -> np.ndarray:
        """Return a raw image, uint8 (side, side, 3)."""
        first = index % 4096
        return self._noise[first : first + int(np.prod(self.image_shape))].reshape(self.image_shape)

    def source(self, index: int) -> str:
        return f"synthetic/{self.split}/{index}"

    def close(self) -> None:
        pass


def _short_side(path: str) -> int:
    try:
        with Image.open(path) as image:
            return min(image.size)
    except Exception:  # Pillow raises what it likes; whoever reads the image tells
        return 0

"""ILSVRC2012 as Kaggle's imagenet-object-localization-challenge has it.

    ILSVRC/Data/CLS-LOC/train/<synset>/*.JPEG, ILSVRC/Data/CLS-LOC/val/*.JPEG
    LOC_val_solution.csv      ImageId,PredictionString: ILSVRC2012_val_00048981,n03995372 85 1 499 272
    LOC_synset_mapping.txt    n01440764 tench, Tinca tinca

In: a directory, its own or the one of the images. Out: the same words and classes that the development kit gives.
"""

import csv
import os
from dataclasses import dataclass
from pathlib import Path

from asgd_mpi.data.tree import readable
from asgd_mpi.errors import DataError, few

IMAGES = Path("ILSVRC/Data/CLS-LOC")
SOLUTION, WORDS = "LOC_val_solution.csv", "LOC_synset_mapping.txt"


@dataclass(frozen=True)
class Kaggle:
    path: Path  # of the solution
    words: dict[str, str]  # of a synset: `tench, Tinca tinca`
    truth: dict[str, str]  # the synset of each validation image, by its name without extension

    def classes_of(self, names: list[str]) -> list[str]:
        """Return the synset of each validation image; raise DataError if some have none."""
        stems = [os.path.splitext(name)[0] for name in names]
        unknown = [name for name, stem in zip(names, stems, strict=True) if stem not in self.truth]
        if unknown or len(names) != len(self.truth):
            raise DataError(
                f"there are {len(names)} validation images, and {self.path} has the classes of {len(self.truth)}; "
                # fmt: skip
                f"{len(unknown)} have none ({few(unknown)}); get both again"
            )
        return [self.truth[stem] for stem in stems]


def directory_of_images(root: Path) -> Path:
    """Return where train and val lie, which is `root` itself unless it is Kaggle's."""
    return root / IMAGES if (root / IMAGES).is_dir() else root


def read_words(root: Path) -> dict[str, str]:
    """Return the words of each synset, empty if no file has them."""
    path = _find(root, WORDS)
    if path is None:
        return {}
    with readable(path):
        lines = path.read_text(errors="replace").splitlines()
    return dict(line.strip().split(" ", 1) for line in lines if " " in line.strip())


def read_kaggle(root: Path) -> Kaggle | None:
    """Return what Kaggle's files say, None if they are not there; raise DataError if they are damaged."""
    path = _find(root, SOLUTION)
    if path is None:
        return None
    with readable(path), path.open(newline="", errors="replace") as file:
        rows = list(csv.DictReader(file))
    try:
        truth = {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
    except (KeyError, AttributeError, IndexError):
        raise DataError(
            f"{path} is not Kaggle's table of ImageId,PredictionString, or is damaged; get it again"
        ) from None
    return Kaggle(path, read_words(root), truth)


def _find(root: Path, name: str) -> Path | None:
    """Return a file of Kaggle's, which lies in its own directory, three above the images."""
    places = [root, *([root.parents[2]] if root.resolve().parts[-3:] == IMAGES.parts else [])]
    return next((place / name for place in places if (place / name).is_file()), None)

"""Images with numbers for labels, in many files that hold many of them: tars of webdataset, parquet files of Hugging Face.

    imagenet1k-train-0000.tar: n01440764_10026.jpg, n01440764_10026.cls      (timm/imagenet-1k-wds)
    data/train-00000-of-00294.parquet: image {bytes, path}, label            (ILSVRC/imagenet-1k)

In: a directory that holds such files, or has them in `data`, `train` and `val`. Out: rows, and with them the synsets of the
labels, by the images' names or by LOC_synset_mapping.txt; else a class is called by its number.
"""

import os
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from asgd_mpi.data.tree import is_image
from asgd_mpi.errors import DataError, few, tell
from data_prep.archives import members, read_at
from data_prep.classes import numbered, official_name, synsets_of_labels
from data_prep.kaggle import read_words

PLACES = ("", "data", "train", "val", "validation", "test")
MAX_LABEL_BYTES = 32


class Row(NamedTuple):
    file: str
    at: int
    num_bytes: int
    stem: str  # the name without its extension
    extension: str
    label: int


def files_of(root: Path, extension: str) -> dict[str, list[Path]]:
    """Return the files of train and val with an extension, sorted; val may be called test if there is no other."""
    found: dict[str, list[Path]] = {"train": [], "val": [], "test": []}
    for place in PLACES:
        directory = root / place
        names = sorted(os.listdir(directory)) if directory.is_dir() else []
        for name in names:
            if name.endswith(extension) and not name.startswith((".", "ILSVRC2012_img_")):
                split = next((split for split in found if split in f"{place}/{name}".lower()), None)
                if split:
                    found[split].append(directory / name)
    if not found["train"]:
        return {}
    return {"train": found["train"], "val": found["val"] or found["test"]}


def rows_of_tar(archive: Path) -> list[Row]:
    """Return the images of a tar of webdataset with their labels; raise DataError if one has none."""
    images, labels, others = {}, {}, Counter()
    for member in members(archive):
        directory, base = os.path.split(member.name)
        stem, _, extension = base.partition(".")
        key = os.path.join(directory, stem)
        if extension.lower() == "cls":
            labels[key] = _label(
                read_at(member.file, member.at, min(member.num_bytes, MAX_LABEL_BYTES)),
                archive,
                member.name,
            )
        elif is_image(base):
            if key in images:
                raise DataError(
                    f"{archive} has two images of the name {key}; name each otherwise, or get it again"
                )
            images[key] = (member, stem, extension)
        else:
            others[extension] += 1
    if images.keys() != labels.keys():
        alone = sorted(images.keys() ^ labels.keys())
        raise DataError(f"{archive}: {len(images)} images and {len(labels)} labels (.cls) are no pairs ({few(alone)}); give an image "
                        f"and a .cls of the same name for each")  # fmt: skip
    if set(others) - {"json"}:
        tell(f"{archive.name}: other files stay out: {dict(others)}", file=sys.stderr)
    return [Row(member.file, member.at, member.num_bytes, stem, extension, labels[key])
            for key, (member, stem, extension) in images.items()]  # fmt: skip


def _label(text: bytes, archive: Path, name: str) -> int:
    if not text.strip().isdigit():
        raise DataError(
            f"{name} in {archive} holds {text!r} and no number of a class; pack the tar again"
        )
    return int(text)


def synsets_of(
    root: Path, rows: dict[str, list[Row]], words: dict[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Return the synset of each label, and words of the synsets if they are known. `words` are by number."""
    num_classes = 1 + max(row.label for part in rows.values() for row in part)
    absent = set(range(num_classes)) - {row.label for row in rows["train"]}
    if absent:
        raise DataError(f"{len(absent)} of {num_classes} labels have no training image ({few(sorted(absent))}); "
                        f"see that all files of {root} are there, and get the set again")  # fmt: skip
    by_synset = read_words(root)
    synsets = synsets_of_labels(((row.stem, row.label) for row in rows["train"]), num_classes)
    if synsets is None and len(by_synset) == num_classes:
        synsets = sorted(by_synset)
    if synsets is None:
        synsets = numbered(num_classes)
    if synsets != sorted(synsets):
        raise DataError(f"the labels of {root} are not in the order of the synsets, so a label would change its meaning; unpack "
                        f"them into train/<synset>/ and val/<synset>/")  # fmt: skip
    by_number = {
        synset: words[str(label)] for label, synset in enumerate(synsets) if str(label) in words
    }
    return synsets, by_synset if set(synsets) <= set(by_synset) else by_number


def name_of(split: str, synset: str, row: Row) -> str:
    return f"{split}/{synset}/{official_name(row.stem, row.extension)}"

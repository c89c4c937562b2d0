"""Classes of ILSVRC2012 by whatever a source has: a label's number, an image's name, words that two synsets share.

In: names, numbers and words as they are published. Out: synsets, names of images as the official archives have them (so that
every source of the same images gives the same shards), names of classes that are all different.
"""

import re
from collections import Counter
from collections.abc import Iterable

from asgd_mpi.errors import DataError, few

# n01440764_10026, or ILSVRC2012_val_00000001; Hugging Face puts the synset after both.
NAME = re.compile(
    r"(?:(?P<of_train>n\d{8})_\d+|ILSVRC2012_val_(?P<number>\d{8}))(?:_(?P<added>n\d{8}))?"
)


def unique_names(synsets: list[str], words: dict[str, str]) -> list[str]:
    """Return the first word of each synset; all its words where two share the first (maillot), and the synset itself where
    they share all (crane)."""
    first = [words[synset].split(",")[0] for synset in synsets]
    count = Counter(first)
    names = [
        word if count[word] == 1 else words[synset]
        for word, synset in zip(first, synsets, strict=True)
    ]
    count = Counter(names)
    return [
        name if count[name] == 1 else f"{name} ({synset})"
        for name, synset in zip(names, synsets, strict=True)
    ]


def official_name(stem: str, extension: str) -> str:
    """Return an image's name as the official archives have it, if it is one of theirs; else as it is."""
    match = NAME.fullmatch(stem)
    if not match:
        return f"{stem}.{extension}" if extension else stem
    return f"{stem.removesuffix('_' + match['added']) if match['added'] else stem}.JPEG"


def number_of(name: str) -> int | None:
    """Return the number of an official validation image, None if it is none."""
    match = NAME.match(name)
    return int(match["number"]) if match and match["number"] else None


def synsets_of_labels(labelled: Iterable[tuple[str, int]], num_classes: int) -> list[str] | None:
    """Return the synset of each label, from (name, label) of training images; None if the names do not tell.

    Raise DataError if a label has two synsets, or two labels have one.
    """
    found: dict[int, str] = {}
    for stem, label in labelled:
        match = NAME.fullmatch(stem)
        synset = match and (match["of_train"] or match["added"])
        if not synset:
            return None
        if found.setdefault(label, synset) != synset:
            raise DataError(f"label {label} is {found[label]} by one image's name and {synset} by that of {stem}: names and labels do "
                            f"not belong together; get the set again")  # fmt: skip
    if len(set(found.values())) != len(found):
        twice = [synset for synset, count in Counter(found.values()).items() if count > 1]
        raise DataError(
            f"{len(twice)} synsets have two labels ({few(sorted(twice))}); get the set again"
        )
    return [found[label] for label in range(num_classes)] if len(found) == num_classes else None


def numbered(num_classes: int) -> list[str]:
    """Return names for classes of which only the numbers are known, which sort as the numbers do."""
    return [f"{label:0{len(str(num_classes - 1))}d}" for label in range(num_classes)]

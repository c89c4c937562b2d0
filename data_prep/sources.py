"""Where the images of a data set lie: in archives as they are distributed, or in a directory tree.

In: a directory. Out: one `Photo` an image, which says in which file it lies and at which byte, so an archive is read in
place and never unpacked. The first of these that there is, for each split where splits may differ:

    ILSVRC2012_img_train.tar   a tar of one tar per synset, named n01440764.tar
    ILSVRC2012_img_val.tar     a flat tar; needs the development kit (see devkit)
    *train*.parquet, *val*.parquet, also in data/     as Hugging Face ships image sets (see parquet)
    *train*.tar, *val*.tar, also in train/ and val/   pairs of an image and a .cls, as webdataset has them (see labelled)
    train/<synset>/*.JPEG, val/<synset>/*.JPEG
    val/*.JPEG                 flat, as the archive unpacks; needs the development kit, or what Kaggle adds (see kaggle)

`val` may be called `test`, as small sets have it. Train and val may lie in ILSVRC/Data/CLS-LOC, as Kaggle has them.

Invariant: the same images give the same photos in the same order, with the same names, from each of these.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from asgd_mpi.data.tree import (
    directory_of,
    is_class,
    is_image,
    list_tree,
    listing,
    note_files,
    readable,
)
from asgd_mpi.errors import DataError, few, tell
from data_prep import labelled, parquet
from data_prep.archives import OFFICIAL, check_md5, is_official, members, read_at
from data_prep.classes import number_of, unique_names
from data_prep.devkit import NAME as DEVKIT
from data_prep.devkit import Devkit, read_devkit
from data_prep.kaggle import SOLUTION, Kaggle, directory_of_images, read_kaggle, read_words
from data_prep.writer import check_space

SPLITS = ("train", "val")
ARCHIVE = "ILSVRC2012_img_{}.tar"
WHOLE = -1  # bytes of a photo that is a file of its own: listing does not ask for its size

Tick = Callable[[str, int], None]  # told of what is listed, and how many more images there are
Entry = tuple[str, int, int, str]  # file, at, bytes, base name


class Photo(NamedTuple):
    file: str  # the image's own file, or an archive
    at: int  # its first byte there
    num_bytes: int  # or WHOLE
    synset: str
    name: str  # train/n01440764/n01440764_10026.JPEG, wherever it lies

    def read(self) -> bytes:
        """Return the image file's bytes; raise DataError if it cannot be read: that is no bad image."""
        with readable(self.file):
            if self.num_bytes == WHOLE:
                with open(self.file, "rb", buffering=0) as file:
                    return file.readall()
            data = read_at(self.file, self.at, self.num_bytes)
        if len(data) != self.num_bytes:
            raise DataError(f"{self.file} was cut while in use: {len(data)} of {self.num_bytes} bytes of {self.name} at byte "
                            f"{self.at}; restore it and start again")  # fmt: skip
        return data

    def size(self) -> int:
        """Return the number of bytes, asking for it where that was not done."""
        if self.num_bytes != WHOLE:
            return self.num_bytes
        with readable(self.file):
            return os.stat(self.file).st_size


@dataclass(frozen=True)
class Source:
    photos: dict[str, list[Photo]]  # by split; sorted by synset and name
    synsets: list[str]  # sorted: the label of a synset is its place here
    class_names: list[str]
    official: list[str] = field(default_factory=list)  # archives whose md5 sums are known


def find_source(
    root: Path, scratch: Path | None = None, tick: Tick = lambda what, images: None
) -> Source:
    """List all images under `root`; raise DataError if classes are missing, empty or unknown.

    What cannot be read in place is unpacked into `scratch`.
    """
    for extension, lister in ((".parquet", _from_parquet), (".tar", _from_tars)):
        files = (
            labelled.files_of(root, extension)
            if not (root / ARCHIVE.format("train")).exists()
            else {}
        )
        if files:
            return _checked(root, lister(root, files, scratch, tick))
    kit = root / f"{DEVKIT}.tar.gz"
    if kit.exists() and _said_official(kit):
        check_md5(kit, lambda num_bytes: None)
    truth = read_devkit(root) or read_kaggle(root)
    images = directory_of_images(root)
    photos = {
        split: sorted(_find(images, split, truth, tick), key=lambda photo: photo.name)
        for split in SPLITS
    }
    synsets = sorted({photo.synset for photo in photos["train"]})
    words = truth.words if truth else read_words(root)
    archives = [root / ARCHIVE.format(split) for split in SPLITS]
    official = [
        str(archive) for archive in archives if archive.exists() and _said_official(archive)
    ]
    return _checked(root, Source(photos, synsets, _class_names(synsets, words), official))


def leave_out(photos: list[Photo], numbers: set[int]) -> list[Photo]:
    """Return the validation photos without those of some numbers; raise DataError if they are not all there."""
    kept = [photo for photo in photos if number_of(os.path.basename(photo.name)) not in numbers]
    if len(photos) - len(kept) != len(numbers):
        raise DataError(
            f"{len(photos) - len(kept)} of the {len(numbers)} validation images to leave out are there: images are known by "
            # fmt: skip
            f"names like ILSVRC2012_val_00000001.JPEG, and the source has {few([photo.name for photo in photos])}; "
            "give the validation images under their names, or no list"
        )
    return kept


def _checked(root: Path, source: Source) -> Source:
    """Raise DataError if val has other classes than train, or two images have the same name."""
    unknown = sorted({photo.synset for photo in source.photos["val"]} - set(source.synsets))
    if unknown:
        raise DataError(
            f"val has {len(unknown)} classes that are not in train ({few(unknown)}), so they have no label; "
            f"train and val of {root} need the same {len(source.synsets)} classes"
        )
    for split, photos in source.photos.items():
        if not photos:
            raise DataError(f"{root} has no {split} images")
        if len({photo.name for photo in photos}) != len(photos):
            twice = sorted(
                name for name, count in Counter(photo.name for photo in photos).items() if count > 1
            )
            raise DataError(
                f"{split} of {root} has {len(twice)} names twice ({few(twice)}); rename one of each"
            )
    return source


def _from_parquet(
    root: Path, files: dict[str, list[Path]], scratch: Path | None, tick: Tick
) -> Source:
    if scratch is None:
        raise DataError(
            f"{root} holds parquet files, which are unpacked before they are packed: python -m data_prep.imagenet does it"
        )
    check_space(scratch, sum(path.stat().st_size for part in files.values() for path in part))
    rows = {split: [row for path in part for row in parquet.unpack(path, scratch, lambda num, path=path: tick(path.name, num))]
            for split, part in files.items()}  # fmt: skip
    return _of_rows(root, rows, parquet.class_words(files["train"][0]))


def _from_tars(
    root: Path, files: dict[str, list[Path]], scratch: Path | None, tick: Tick
) -> Source:
    rows: dict[str, list[labelled.Row]] = {}
    for split, part in files.items():
        rows[split] = []
        for path in part:
            rows[split] += (found := labelled.rows_of_tar(path))
            tick(path.name, len(found))
    return _of_rows(root, rows, {})


def _of_rows(root: Path, rows: dict[str, list[labelled.Row]], words: dict[str, str]) -> Source:
    synsets, words = labelled.synsets_of(root, rows, words)
    photos = {}
    for split, part in rows.items():
        if not part:
            raise DataError(
                f"{root} has no {split} images; put the files with {split} in their names beside the others"
            )
        found = (Photo(row.file, row.at, row.num_bytes, synsets[row.label], labelled.name_of(split, synsets[row.label], row))
                 for row in part)  # fmt: skip
        photos[split] = sorted(found, key=lambda photo: photo.name)
    return Source(photos, synsets, _class_names(synsets, words))


def _find(root: Path, split: str, truth: Devkit | Kaggle | None, tick: Tick) -> Iterator[Photo]:
    archive, directory = root / ARCHIVE.format(split), directory_of(root, split)
    if os.path.exists(archive):
        return (
            _train_archive(archive, tick)
            if split == "train"
            else _flat(root, _images("val", _members(archive)), truth, tick)
        )
    if not os.path.isdir(directory):
        raise DataError(
            f"{root} has neither {archive.name} nor a directory {split}; put that archive there, or unpack it into "
            f"{directory}/<synset>/*.JPEG"
        )
    entries = listing(directory)
    if any(entry.is_dir() and is_class(entry.name) for entry in entries):
        return _tree(directory, tick)
    if split == "train":
        raise DataError(f"{directory} has {len(entries)} files and no class directory; put the images into "
                        f"{directory}/<synset>/*.JPEG")  # fmt: skip
    files = [(entry.path, 0, WHOLE, entry.name) for entry in entries if entry.is_file()]
    return _flat(root, _images(split, files), truth, tick)


def _train_archive(archive: Path, tick: Tick) -> Iterator[Photo]:
    for _, begin, num_bytes, name in _members(archive):
        if not name.endswith(".tar"):
            tell(
                f"train: {name} in {archive.name} is no archive of a class and stays out",
                file=sys.stderr,
            )
            continue
        synset = name.removesuffix(".tar")
        images = _images(f"train/{synset}", _members(archive, begin, num_bytes))
        if not images:
            raise DataError(f"{name} in {archive} has no image; get the archive again")
        tick(archive.name, len(images))
        yield from (
            Photo(file, at, size, synset, f"train/{synset}/{image}")
            for file, at, size, image in images
        )


def _members(archive: Path, begin: int = 0, num_bytes: int | None = None) -> list[Entry]:
    return [
        (file, at, size, os.path.basename(name))
        for file, at, size, name in members(archive, begin, num_bytes)
    ]


def _flat(
    root: Path, files: list[Entry], truth: Devkit | Kaggle | None, tick: Tick
) -> Iterator[Photo]:
    """Yield the validation images, with the synsets that the development kit or Kaggle's table gives them."""
    if truth is None:
        raise DataError(
            f"the {len(files)} validation images of {root} do not lie in class directories, so their classes are in the "
            f"development kit: put {DEVKIT}.tar.gz into {root}, or {SOLUTION} if the images are Kaggle's"
        )
    tick("val", len(files))
    for synset, (file, at, num_bytes, name) in zip(
        truth.classes_of([entry[3] for entry in files]), files, strict=True
    ):
        yield Photo(file, at, num_bytes, synset, f"val/{synset}/{name}")


def _tree(directory: Path, tick: Tick) -> Iterator[Photo]:
    found = list_tree(directory)
    for note in found.notes:
        tell(note, file=sys.stderr)
    for synset, paths in found.images.items():
        tick(directory.name, len(paths))
        for path in paths:
            yield Photo(
                path, 0, WHOLE, synset, f"{directory.name}/{synset}/{os.path.basename(path)}"
            )


def _images(where: str, files: list[Entry]) -> list[Entry]:
    """Return those files that are images; say which are not."""
    for note in note_files(where, [name for _, _, _, name in files if not is_image(name)]):
        tell(note, file=sys.stderr)
    return [entry for entry in files if is_image(entry[3])]


def _said_official(archive: Path) -> bool:
    """Return whether an archive is the official one by its size; say what its size would be if it is not."""
    if is_official(archive):
        return True
    tell(f"{archive.name} has {archive.stat().st_size:,} bytes, the official one {OFFICIAL[archive.name].num_bytes:,}: so it is another, "
          f"and no md5 sum of it is known", file=sys.stderr)  # fmt: skip
    return False


def _class_names(synsets: list[str], words: dict[str, str]) -> list[str]:
    """Return names to show: by their words, ImageNet's if these are its 1000 synsets, or the synsets."""
    if words and set(synsets) <= set(words):
        return unique_names(synsets, words)
    if len(synsets) == 1000 and (synsets[0], synsets[-1]) == ("n01440764", "n15075141"):
        from torchvision.models import ResNet50_Weights  # slow to import, and only here

        names = ResNet50_Weights.IMAGENET1K_V1.meta["categories"]  # some versions have two cranes
        return unique_names(synsets, dict(zip(synsets, names, strict=True)))
    return synsets

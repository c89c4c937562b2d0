"""Where the images of a data set lie: in the archives of ILSVRC2012, or in a directory tree.

In: a directory. Out: one `Photo` an image, which says in which file it lies and at which byte, so an archive is read in
place and never unpacked. For each split, the first of these that there is:

    ILSVRC2012_img_train.tar   a tar of one tar per synset, named n01440764.tar
    ILSVRC2012_img_val.tar     a flat tar; needs the development kit (see devkit)
    train/<synset>/*.JPEG, val/<synset>/*.JPEG
    val/*.JPEG                 flat, as the archive unpacks; needs the development kit

`val` may be called `test`, as small sets have it.

Invariant: archives and a tree of the same images give the same photos in the same order, with the same names.
"""

import os
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from asgd_mpi.data.tree import directory_of, is_class, is_image, list_tree, listing, note_files, readable, some
from asgd_mpi.errors import DataError
from data_prep.devkit import NAME as DEVKIT
from data_prep.devkit import Devkit, read_devkit

SPLITS = ("train", "val")
ARCHIVE = "ILSVRC2012_img_{}.tar"


class Photo(NamedTuple):
    file: str  # the image's own file, or an archive
    at: int  # its first byte there
    num_bytes: int
    synset: str
    name: str  # train/n01440764/n01440764_10026.JPEG, wherever it lies

    def read(self) -> bytes:
        """Return the image file's bytes; raise DataError if it cannot be read: that is no bad image."""
        with readable(self.file), open(self.file, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), self.num_bytes, self.at)
        if len(data) != self.num_bytes:
            raise DataError(f"{self.file} was cut while in use: {len(data)} of {self.num_bytes} bytes of {self.name} at "
                            f"byte {self.at}; restore it and start again")  # fmt: skip
        return data


@dataclass(frozen=True)
class Source:
    photos: dict[str, list[Photo]]  # by split; sorted by synset and name
    synsets: list[str]  # sorted: the label of a synset is its place here
    class_names: list[str]


def find_source(root: Path) -> Source:
    """List all images under `root`; raise DataError if classes are missing, empty or unknown."""
    kit = read_devkit(root)
    photos = {split: sorted(_find(root, split, kit), key=lambda photo: photo.name) for split in SPLITS}
    synsets = sorted({photo.synset for photo in photos["train"]})
    unknown = sorted({photo.synset for photo in photos["val"]} - set(synsets))
    if unknown:
        raise DataError(
            f"val has {len(unknown)} classes that are not in train ({some(unknown)}), so they have no label; "
            f"train and val of {root} need the same {len(synsets)} classes"
        )
    return Source(photos, synsets, _class_names(synsets, kit))


def _find(root: Path, split: str, kit: Devkit | None) -> Iterator[Photo]:
    archive, directory = root / ARCHIVE.format(split), directory_of(root, split)
    if archive.exists():
        return _train_archive(archive) if split == "train" else _flat(root, _images("val", _members(archive)), kit)
    if not directory.is_dir():
        raise DataError(
            f"{root} has neither {archive.name} nor a directory {split}; images are expected in that archive, or in "
            f"{directory}/<synset>/*.JPEG"
        )
    entries = listing(directory)
    if any(entry.is_dir() and is_class(entry.name) for entry in entries):
        return _tree(directory)
    if split == "train":
        raise DataError(f"{directory} has {len(entries)} files and no class directory; images are expected in "
                        f"{directory}/<synset>/*.JPEG")  # fmt: skip
    files = [(entry.path, 0, entry.stat().st_size, entry.name) for entry in entries if entry.is_file()]
    return _flat(root, _images(split, files), kit)


def _train_archive(archive: Path) -> Iterator[Photo]:
    for _, begin, num_bytes, name in _members(archive):
        if not name.endswith(".tar"):
            print(f"train: {name} in {archive.name} is no archive of a class and stays out", file=sys.stderr)
            continue
        synset = name.removesuffix(".tar")
        images = _images(f"train/{synset}", _members(archive, begin, num_bytes))
        if not images:
            raise DataError(f"{name} in {archive} has no image; get the archive again")
        yield from (Photo(file, at, size, synset, f"train/{synset}/{image}") for file, at, size, image in images)


def _members(archive: Path, begin: int = 0, num_bytes: int | None = None) -> list[tuple[str, int, int, str]]:
    """Return (file, at, bytes, base name) of each file in a tar, which may lie inside another file."""
    what = f"{archive}, the archive at byte {begin}," if begin else str(archive)
    with readable(archive), open(archive, "rb") as file:
        end = begin + num_bytes if num_bytes is not None else os.fstat(file.fileno()).st_size
        file.seek(begin)
        try:
            tar = tarfile.open(fileobj=file, mode="r:")  # its offsets count from the start of `file`
            found = [(str(archive), entry.offset_data, entry.size, os.path.basename(entry.name)) for entry in tar
                     if entry.isfile()]  # fmt: skip
            whole = bool(found) and found[-1][1] + found[-1][2] <= end and tar.offset + 512 <= end
        except tarfile.TarError as error:
            raise DataError(f"{what} is no tar or is cut off ({error}); get it again and compare its size") from error
    if not whole:
        raise DataError(f"{what} is cut off or empty: {len(found)} files, and no end mark in {end - begin} bytes; get it "
                        f"again and compare its size")  # fmt: skip
    return [entry for entry in found if entry[1] < end]


def _flat(root: Path, files: list[tuple[str, int, int, str]], kit: Devkit | None) -> Iterator[Photo]:
    """Yield the validation images, with the synsets of the development kit."""
    if kit is None:
        raise DataError(
            f"the {len(files)} validation images of {root} do not lie in class directories, so their classes are in the "
            f"development kit: put {DEVKIT}.tar.gz into {root}"
        )
    if len(files) != len(kit.truth):
        raise DataError(f"{root} has {len(files)} validation images, but the development kit has the classes of "
                        f"{len(kit.truth)}; get the archive again")  # fmt: skip
    for synset, (file, at, num_bytes, name) in zip(kit.truth, sorted(files, key=lambda entry: entry[3]), strict=True):
        yield Photo(file, at, num_bytes, synset, f"val/{synset}/{name}")


def _tree(directory: Path) -> Iterator[Photo]:
    found = list_tree(directory)
    for note in found.notes:
        print(note, file=sys.stderr)
    for synset, paths in found.images.items():
        for path in paths:
            with readable(path):
                num_bytes = os.stat(path).st_size
            yield Photo(path, 0, num_bytes, synset, f"{directory.name}/{synset}/{os.path.basename(path)}")


def _images(where: str, files: list[tuple[str, int, int, str]]) -> list[tuple[str, int, int, str]]:
    """Return those of (file, at, bytes, base name) that are images; say which are not."""
    for note in note_files(where, [name for _, _, _, name in files if not is_image(name)]):
        print(note, file=sys.stderr)
    return [entry for entry in files if is_image(entry[3])]


def _class_names(synsets: list[str], kit: Devkit | None) -> list[str]:
    """Return names to show: the development kit's, ImageNet's if these are its 1000 synsets, or the synsets."""
    if kit and set(synsets) <= set(kit.words):
        return kit.class_names(synsets)
    if len(synsets) == 1000 and (synsets[0], synsets[-1]) == ("n01440764", "n15075141"):
        from torchvision.models import ResNet50_Weights  # slow to import, and only here

        return ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    return synsets

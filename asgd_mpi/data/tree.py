"""A directory tree of images: which directories are classes, which files are images, and what stays out.

In: a directory with one directory a class. Out: `Tree`: the files of each class and, in words, everything that was left
out. data_prep packs what this lists, and `data.source folder` reads it, so both see the same classes and images.
"""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from asgd_mpi.errors import DataError, few

EXTENSIONS = (
    ".jpeg",
    ".jpg",
    ".png",
    ".webp",
    ".bmp",
    ".ppm",
    ".pgm",
    ".tif",
    ".tiff",
    ".avif",
    ".heic",
    ".heif",
)
# directories that systems leave behind
NO_CLASSES = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN")
NO_IMAGES = {
    ".DS_Store": "of macOS's Finder",
    "Thumbs.db": "of Windows' Explorer",
    "desktop.ini": "of Windows' Explorer",
}


@dataclass(frozen=True)
class Tree:
    # class (its name in Unicode's NFC form) -> paths, sorted by file name; sorted by class
    images: dict[str, list[str]]
    notes: list[str]  # what was left out


def directory_of(root: Path, split: str) -> Path:
    """Return where a split of a tree lies: `val` may be called test, as small sets have it."""
    directory = root / split
    if split == "val" and not os.path.isdir(directory) and os.path.isdir(root / "test"):
        return root / "test"
    return directory


def is_image(name: str) -> bool:
    """Return whether a file is taken for an image: by its extension, unless it is hidden."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def is_class(name: str) -> bool:
    """Return whether a directory is taken for a class: unless it is hidden (.ipynb_checkpoints) or a system's."""
    return not name.startswith(".") and name not in NO_CLASSES


def list_tree(directory: Path) -> Tree:
    """List the classes of a directory and their images; raise DataError if a class is empty or a name cannot be used."""
    entries = listing(directory)
    images: dict[str, list[str]] = {}
    left_out = [entry.name for entry in entries if not entry.is_dir()]
    no_classes = [entry.name for entry in entries if entry.is_dir() and not is_class(entry.name)]
    nested = []
    for entry in entries:
        if entry.is_dir() and is_class(entry.name):
            inside = listing(entry.path)
            files = [one for one in inside if not one.is_dir()]
            nested += [f"{entry.name}/{one.name}" for one in inside if one.is_dir()]
            left_out += [f"{entry.name}/{one.name}" for one in files if not is_image(one.name)]
            images.setdefault(unicodedata.normalize("NFC", entry.name), []).extend(
                one.path for one in files if is_image(one.name)
            )
    _check_classes(directory, images)
    in_order = {name: sorted(images[name], key=os.path.basename) for name in sorted(images)}
    return Tree(
        in_order,
        [*_notes(directory.name, no_classes, nested), *note_files(directory.name, left_out)],
    )


def listing(directory: str | Path) -> list[os.DirEntry]:
    """Return the entries of a directory, sorted by name; raise DataError."""
    with readable(directory), os.scandir(directory) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        try:
            entry.name.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{os.fsencode(entry.path)!r} has a name that is not UTF-8, so it cannot be written into "
                # fmt: skip
                "manifests and logs; rename it (convmv does that for whole trees)"
            ) from None
    return entries


def note_files(where: str, names: list[str]) -> list[str]:
    """Say which files are no images and stay out, by kind."""
    kinds = Counter(_kind(os.path.basename(name)) for name in names)
    if not names:
        return []
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return [
        f"{where}: {len(names)} files are no images and stay out: {counts} ({few(sorted(names))})"
    ]


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Turn the operating system's errors into DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}; check its permissions and its disk"
        ) from error


def _kind(name: str) -> str:
    if name.startswith("._"):
        return "of macOS's resource forks (._*)"
    if name in NO_IMAGES:
        return NO_IMAGES[name]
    if name.startswith("."):
        return "hidden"
    return os.path.splitext(name)[1].lower() or "without an extension"


def _notes(where: str, no_classes: list[str], nested: list[str]) -> Iterator[str]:
    if no_classes:
        yield f"{where}: {len(no_classes)} directories are hidden or a system's, so no classes, and stay out ({few(no_classes)})"
    if nested:
        yield f"{where}: {len(nested)} directories inside of classes stay out with all that is in them ({few(nested)})"


def _check_classes(directory: Path, images: dict[str, list[str]]) -> None:
    empty = sorted(name for name, files in images.items() if not files)
    if empty:
        raise DataError(
            f"{len(empty)} of {len(images)} classes in {directory} have no image ({few(empty)}); images end in "
            f"{', '.join(EXTENSIONS)}; unpack the archive again, or delete the empty class directories"
        )
    for name, files in images.items():
        twice = [file for file, count in Counter(map(os.path.basename, files)).items() if count > 1]
        if twice:
            raise DataError(
                f"{directory} has the class {name} twice, spelled in Unicode's composed and decomposed form, and "
                f"{len(twice)} files are in both ({few(twice)}); merge the two directories"
            )

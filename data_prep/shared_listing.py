"""Lists a source once for all tasks and restarts: one task lists, the others wait for it and read what it found.

In: the data set directory, which all tasks see, and the source. Out: the same Source for all. The listing lies in
`.listing-<state>/`, where `state` stands for the files or directories of the source with their sizes and times, so a source
that was changed is listed again. Who lists says in `.listing-<state>.claim` how far it is; if that stands still for
PATIENCE_S, or its process is gone, another one lists. Two that list at once do no harm (see takeover).
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

import msgspec
import xxhash

from asgd_mpi.data.tree import directory_of, readable
from asgd_mpi.errors import tell
from data_prep.kaggle import SOLUTION, WORDS, directory_of_images
from data_prep.labelled import files_of
from data_prep.sources import SPLITS, Photo, Source, Tick, find_source
from data_prep.takeover import fsync, is_alive, making, remove, take, whoami
from data_prep.writer import explained

PREFIX = ".listing-"
LISTING = "listing.msgpack"
PATIENCE_S = 60.0  # the longest that one directory or archive of a class may take
TOLD_EVERY_S = 10.0


class _Photos(msgspec.Struct):
    """Columns, one value a photo; files and synsets by their places in the lists of _Listing."""

    file: list[int]
    at: list[int]
    num_bytes: list[int]
    synset: list[int]
    name: list[str]


class _Listing(msgspec.Struct):
    files: list[str]
    photos: dict[str, _Photos]
    synsets: list[str]
    class_names: list[str]
    official: list[str]


def list_once(root: Path, out: Path) -> Source:
    """Return the images of a source, from the listing of another task or an earlier start if there is one."""
    place = out / f"{PREFIX}{_state(root)}"
    claim = place.with_name(f"{place.name}.claim")
    while not (place / LISTING).exists():
        with _claimed(claim) as note:
            if note:
                _list(root, place, note)
            else:
                _wait(place, claim)
    return _read(place / LISTING)


def remove_listings(out: Path) -> None:
    for entry in list(os.scandir(out)):
        if entry.name.startswith(PREFIX):
            remove(Path(entry.path))


def _list(root: Path, place: Path, note: Callable[[str], None]) -> None:
    with explained(place), making(place) as mine:
        found = find_source(root, mine, _ticker(note))
        # What was unpacked lies in our directory until it is taken.
        moved = {split: [photo._replace(file=photo.file.replace(str(mine), str(place), 1)) for photo in photos]
                 for split, photos in found.photos.items()}  # fmt: skip
        _write(mine / LISTING, Source(moved, found.synsets, found.class_names, found.official))
        fsync(mine / LISTING)
        take(mine, place)


def _wait(place: Path, claim: Path) -> None:
    """Return when there is a listing, or nobody is at it any more."""
    said, since, told = "", time.monotonic(), time.monotonic()
    while not (place / LISTING).exists():
        word = _word(claim)
        if word is None:
            return
        if word != said:
            said, since = word, time.monotonic()
        owner, _, progress = word.partition(" ")
        if not is_alive(owner) or time.monotonic() - since > PATIENCE_S:
            tell(f"the task that lists the source ({progress or 'nothing so far'}) is gone or has said nothing for {PATIENCE_S:.0f} s; "
                  "another one lists", file=sys.stderr)  # fmt: skip
            remove(claim)
            return
        if time.monotonic() - told > TOLD_EVERY_S:
            told = time.monotonic()
            tell(f"waiting for the task that lists the source: {progress}", file=sys.stderr)
        time.sleep(0.2 if time.monotonic() - since < 5 else 1)


@contextmanager
def _claimed(claim: Path) -> Iterator[Callable[[str], None] | None]:
    """Yield what tells the others how far we are, None if another one lists."""
    with explained(claim):
        try:
            file = os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            file = None
    if file is None:
        yield None
        return

    def note(progress: str) -> None:
        os.pwrite(file, f"{whoami()} {progress}".ljust(300).encode(), 0)

    try:
        note("")
        yield note
    finally:
        os.close(file)
        remove(claim)


def _word(claim: Path) -> str | None:
    with suppress(FileNotFoundError):
        return claim.read_text().strip()
    return None


def _ticker(note: Callable[[str], None]) -> Tick:
    """Return what counts images, tells the other tasks each second, and the user every ten."""
    counts: dict[str, int] = {}
    told = {"others": time.monotonic(), "user": time.monotonic()}

    def tick(what: str, images: int) -> None:
        counts["images"] = counts.get("images", 0) + images
        now, progress = time.monotonic(), f"{counts['images']:,} images, in {what}"
        if now - told["others"] > 1:
            told["others"] = now
            note(progress)
        if now - told["user"] > TOLD_EVERY_S:
            told["user"] = now
            tell(f"listing: {progress}", file=sys.stderr)

    return tick


def _state(root: Path) -> str:
    """Return 12 hex digits of the paths, sizes and times of a source's files; of a tree, of its directories."""
    root = root.resolve()
    digest = xxhash.xxh3_64()
    images = directory_of_images(root)
    paths = (
        [entry.path for entry in os.scandir(root) if entry.is_file()] if os.path.isdir(root) else []
    )
    paths += [
        str(path)
        for extension in (".parquet", ".tar")
        for path in chain(*files_of(root, extension).values())
    ]
    paths += [
        str(path)
        for name in (SOLUTION, WORDS)
        for path in (root.parents[2:3] and [root.parents[2] / name])
        if path.is_file()
    ]
    for split in SPLITS:
        directory = directory_of(images, split)
        if directory.is_dir():
            paths += [
                str(directory),
                *(entry.path for entry in os.scandir(directory) if entry.is_dir()),
            ]
    for path in sorted(set(paths)):
        with readable(path):
            status = os.stat(path)
        digest.update(
            f"{path} {status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape")
        )
    return digest.hexdigest()[:12]


def _write(path: Path, source: Source) -> None:
    files: dict[str, int] = {}
    labels = {synset: label for label, synset in enumerate(source.synsets)}
    photos = {split: _Photos(*map(list, zip(*((files.setdefault(photo.file, len(files)), photo.at, photo.num_bytes,
                                               labels[photo.synset], photo.name) for photo in part), strict=True)))
              for split, part in source.photos.items()}  # fmt: skip
    listing = _Listing(list(files), photos, source.synsets, source.class_names, source.official)
    path.write_bytes(msgspec.msgpack.encode(listing))


def _read(path: Path) -> Source:
    with readable(path):
        listing = msgspec.msgpack.decode(path.read_bytes(), type=_Listing)
    photos = {split: [Photo(listing.files[file], at, num_bytes, listing.synsets[synset], name)
                      for file, at, num_bytes, synset, name in zip(part.file, part.at, part.num_bytes, part.synset, part.name, strict=True)]
              for split, part in listing.photos.items()}  # fmt: skip
    return Source(photos, listing.synsets, listing.class_names, listing.official)

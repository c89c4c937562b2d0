"""The manifest of a data set: what it says of its shards, and whether that can be true.

In: `manifest.json`. Out: a `Manifest` whose every number is in its range and whose counts fit each other and the sizes of the
files: what is made room for later is bounded by what lies on the disk. The shards themselves are compared with it in `shards`.
"""

import os
import re
from collections import Counter
from pathlib import Path

import msgspec
import xxhash

from asgd_mpi.errors import DataError, one_line
from asgd_mpi.untrusted import bounded
from asgd_mpi.untrusted.plausible import (
    MAX_CHANNELS,
    MAX_CLASSES,
    MAX_SIDE,
    impossible_moments,
    out_of_range,
)

FORMAT = "asgd-shard"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LEAST_BYTES = 14  # of a sample: its label, size and checksum
_FILE = re.compile(r"[^./\x00][^/\x00]*")  # a name in this directory, and none that leads out of it


class ShardEntry(msgspec.Struct, frozen=True):
    file: str
    num_samples: int
    num_bytes: int  # of the file
    xxh3: str  # of the file, 16 hex digits


class SplitEntry(msgspec.Struct, frozen=True):
    num_samples: int
    shards: list[ShardEntry]
    skipped: list[str] = []  # images that were left out because they could not be decoded


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    encoding: str  # "jpeg" or "raw"
    image_shape: tuple[int, int, int] | None  # (H, W, C) of raw images
    class_names: list[str]
    # the class directories, sorted: label i is synsets[i]; empty if there are none
    synsets: list[str]
    mean: list[float]  # per channel, of images in 0..1
    std: list[float]
    seed: int  # of the shuffle
    splits: dict[str, SplitEntry]
    software: dict[str, str]


class _Version(msgspec.Struct):
    format: str
    format_version: int


def read_manifest(root: Path) -> tuple[Manifest, str]:
    """Return the manifest of a data set and its fingerprint (16 hex digits); raise DataError."""
    path = root / MANIFEST
    try:
        text = bounded.read(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        if os.path.isdir(root):
            what = "has no manifest.json, so it is no data set or its preparation did not finish"
        else:
            what = "is not a directory"
        raise DataError(
            f"{root} {what}; make it with `python -m data_prep.imagenet --source DIR --out {root}` "
            f"or, for a quick trial, `python -m data_prep.digits --out {root}`; a tree of <split>/<class>/*.JPEG is read "
            f"as it is with --data.source folder"
        ) from error
    except bounded.OutOfBounds as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}; prepare the data set again"
        ) from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}; check the file's permissions and disk"
        ) from error
    try:
        found = bounded.decode_json(text, msgspec.json.Decoder(_Version))
        if (found.format, found.format_version) != (FORMAT, FORMAT_VERSION):
            raise DataError(
                f"{path} says {found.format} version {found.format_version}, but this program reads {FORMAT} version "
                f"{FORMAT_VERSION}; prepare the data again, or use the program that wrote it"
            )
        manifest = bounded.decode_json(text, msgspec.json.Decoder(Manifest))
    except msgspec.DecodeError as error:
        raise DataError(
            f"{path} is damaged or was edited: {error}; prepare the data set again"
        ) from error
    if wrong := impossible(manifest):
        raise DataError(f"{path} cannot be true: {one_line(wrong)}; prepare the data set again")
    return manifest, xxhash.xxh3_64_hexdigest(text)


def impossible(manifest: Manifest) -> str:
    """Return what no data set says of itself, in a few words; empty if there is nothing."""
    if (manifest.encoding, manifest.image_shape is not None) not in (
        ("jpeg", False),
        ("raw", True),
    ):
        return f"its encoding is {manifest.encoding!r} with images of shape {manifest.image_shape}; it is jpeg without, or raw with one"
    height, width, channels = manifest.image_shape or (1, 1, 3)
    ranges = [
        ("height of an image", height, 1, MAX_SIDE),
        ("width of an image", width, 1, MAX_SIDE),
        ("number of channels", channels, 1, MAX_CHANNELS),
        ("number of classes", len(manifest.class_names), 1, MAX_CLASSES),
    ]
    return (
        out_of_range(ranges)
        or impossible_moments(manifest.mean, manifest.std, channels)
        or _impossible_classes(manifest)
        or next(
            filter(
                None, (_impossible_split(name, split) for name, split in manifest.splits.items())
            ),
            "",
        )
    )


def _impossible_classes(manifest: Manifest) -> str:
    """Return what is wrong with the names; two of ImageNet's classes are called crane, but each has a synset of its own."""
    if manifest.synsets and len(manifest.synsets) != len(manifest.class_names):
        return f"it has {len(manifest.synsets)} synsets for {len(manifest.class_names)} classes"
    if manifest.synsets:
        kind, names = "synset", manifest.synsets
    else:
        kind, names = "class", manifest.class_names
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        return f"{count} classes have the same {kind} {name!r}"
    return ""


def _impossible_split(name: str, split: SplitEntry) -> str:
    for shard in split.shards:
        if not _FILE.fullmatch(shard.file):
            return f"{shard.file!r} is not the name of a file beside it"
        if not 0 <= shard.num_samples * LEAST_BYTES <= shard.num_bytes:
            return f"{shard.file} has {shard.num_samples} samples in {shard.num_bytes} bytes, and each takes {LEAST_BYTES} or more"
    if len({shard.file for shard in split.shards}) < len(split.shards):
        return f"the split {name} has a shard twice"
    counted = sum(shard.num_samples for shard in split.shards)
    if split.num_samples != counted:
        return f"the split {name} has {split.num_samples} samples, and its shards have {counted}"
    return ""

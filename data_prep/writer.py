"""Writes shards and the manifest in the format of `asgd_mpi.data.shards`.

In: samples, already in their final order. Out: files in the data set directory. Invariants: a file appears under its
name only when it is whole and on disk (temporary file, fsync, rename), the manifest is the last one, and equal samples
give byte-identical shards.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import h5py
import msgspec
import numpy as np
import xxhash

from asgd_mpi import __version__
from asgd_mpi.data.manifest import FORMAT, FORMAT_VERSION, MANIFEST, Manifest, ShardEntry
from asgd_mpi.data.shards import checksum
from asgd_mpi.errors import DataError
from data_prep.takeover import fsync


@dataclass(frozen=True)
class Sample:
    image: np.ndarray  # uint8: the bytes of a JPEG file (n,), or a raw image (H, W, C)
    label: int
    size: tuple[int, int]  # width, height
    source: str  # e.g. train/n01440764/n01440764_10026.JPEG
    remarks: tuple[str, ...] = ()  # what is told of it afterwards (see encode); not stored


def make_root(root: Path) -> None:
    """Create the data set directory; raise DataError if it holds a data set."""
    if (root / MANIFEST).exists():
        raise DataError(
            f"{root} already holds a complete data set, and nothing is overwritten; "
            f"choose another --out, or delete that directory first"
        )
    with explained(root):
        root.mkdir(parents=True, exist_ok=True)


def check_space(root: Path, num_bytes: int) -> None:
    """Raise DataError if the data set directory has no room for num_bytes."""
    free = shutil.disk_usage(root).free
    if free < num_bytes:
        raise DataError(
            f"{root} needs about {num_bytes / 1e9:.3f} GB, and its disk has {free / 1e9:.3f} GB free; "
            f"free some space, choose an --out on another disk, or shrink the images with --short-side"
        )


def write_shard(path: Path, name: str, samples: list[Sample], split: str, number: int, num_shards: int,
                num_classes: int, seed: int) -> ShardEntry:  # fmt: skip
    """Write one shard to `path` and return its manifest entry under `name`."""
    attributes = {
        "format": FORMAT, "version": FORMAT_VERSION, "split": split, "shard": number, "num_shards": num_shards,
        "num_samples": len(samples), "seed": seed, "encoding": "jpeg" if samples[0].image.ndim == 1 else "raw",
    }  # fmt: skip
    _write_shard(path, samples, attributes, num_classes)
    return ShardEntry(name, len(samples), path.stat().st_size, file_xxh3(path))


def write_split(
    root: Path, split: str, shards: list[list[Sample]], num_classes: int, seed: int
) -> list[ShardEntry]:
    """Write all shards of a small split and return their manifest entries; raise DataError."""
    entries = []
    for number, samples in enumerate(shards):
        name = f"{split}-{number:05d}-of-{len(shards):05d}.h5"
        with replacing(root / name) as temporary:
            entries.append(
                write_shard(temporary, name, samples, split, number, len(shards), num_classes, seed)
            )
    return entries


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write the manifest; from then on the data set is complete."""
    with replacing(root / MANIFEST) as temporary:
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")


def software() -> dict[str, str]:
    """Return the versions that the content of the shards depends on."""
    return {"asgd_mpi": __version__} | {
        name: version(name) for name in ("h5py", "numpy", "pillow", "scikit-learn")
    }


def _write_shard(path: Path, samples: list[Sample], attributes: dict, num_classes: int) -> None:
    """Let HDF5 lay the file out and write the small arrays, then fill in the images with plain writes.

    HDF5 2.0 crashes when the program ends if one of its own writes met a full disk; a plain write just raises.
    """
    index = _index(samples, num_classes)
    # room for all that HDF5 will write
    path.write_bytes(bytes(sum(array.nbytes for array in index.values()) + 65536))
    if attributes["encoding"] == "jpeg":
        name, shape = b"jpeg", (int(index["offset"][-1]),)
    else:
        name, shape = b"image", (len(samples), *samples[0].image.shape)
        del index["offset"]
    # Format v110 has checksums on HDF5's own structures; locks fail on Lustre and NFS without flock.
    with h5py.File(path, "w", libver=("v110", "v110"), locking=False) as file:
        file.attrs.update(attributes | {"complete": 0})
        for column, array in index.items():
            file[column] = array
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        layout.set_obj_track_times(False)  # or the second it was made is written into the file
        space = h5py.h5s.create_simple(shape)
        images_at = h5py.h5d.create(file.id, name, h5py.h5t.STD_U8LE, space, layout).get_offset()
    with path.open("r+b") as plain:
        plain.seek(images_at)
        for sample in samples:
            plain.write(sample.image)
    with h5py.File(path, "r+", libver=("v110", "v110"), locking=False) as file:
        file.attrs.modify("complete", 1)  # in place: needs no space


def _index(samples: list[Sample], num_classes: int) -> dict[str, np.ndarray]:
    """Return a shard's small arrays by name."""
    labels = [sample.label for sample in samples]
    return {
        "offset": np.cumsum([0] + [sample.image.nbytes for sample in samples], dtype=np.uint64),
        "label": np.array(labels, dtype=np.uint16 if num_classes <= 1 << 16 else np.int32),
        "size": np.array([sample.size for sample in samples], dtype=np.uint16),
        "xxh3": np.array(
            [checksum(sample.image, sample.label) for sample in samples], dtype=np.uint64
        ),
        "source": np.array([os.fsencode(sample.source) for sample in samples]),
    }


def file_xxh3(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def replacing(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Yield a temporary name, beside `path` if not given; afterwards the file is on disk as `path`, or nothing is."""
    temporary = temporary or path.with_name(path.name + ".tmp")
    with explained(path):
        try:
            yield temporary
            fsync(temporary)
            os.replace(temporary, path)
            fsync(path.parent)
        except BaseException:
            if temporary.exists():
                temporary.unlink()
            raise


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the operating system's errors into DataError; HDF5 may hide a full disk in a RuntimeError's text."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        code, text = getattr(error, "errno", None), str(error)
        if (
            code in (errno.ENOSPC, errno.EDQUOT)
            or "No space left" in text
            or "quota exceeded" in text.lower()
        ):
            raise DataError(
                f"the disk or quota is full while writing {path}; nothing incomplete was kept under that name; "
                f"free some space or choose an --out on another disk, and start again"
            ) from error
        if isinstance(error, RuntimeError):
            raise
        raise DataError(
            f"cannot write {path}: {os.strerror(code) if code else text}; "
            f"choose an --out in a directory where you may write"
        ) from error

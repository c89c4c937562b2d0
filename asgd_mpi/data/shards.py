"""The shard format and its reader: sample index -> bytes and label, each one verified.

A data set is a directory with HDF5 shards and one `manifest.json`, which is written last. A shard holds n samples:

    /jpeg    uint8 (total,)      encoding "jpeg": the files end to end; sample i is bytes offset[i] to offset[i + 1]
    /offset  uint64 (n + 1,)
    /image   uint8 (n, H, W, C)  encoding "raw", instead of the two above
    /label   uint16 (n,)         index into the manifest's class_names; int32 above 65,536 classes
    /size    uint16 (n, 2)       width, height
    /xxh3    uint64 (n,)         xxh3_64 of the sample's bytes, seeded with its label, so that it guards both
    /source  bytes (n,)          where the sample came from; fixed length

All are contiguous and unfiltered, so HDF5 only says where the bytes lie. `ShardSet.open` reads the small arrays through
h5py and closes the file; samples are read by `preadv` (see patient), which takes neither h5py's lock nor the
interpreter's, so any number of threads may read at once. Invariant: `read` returns what was packed, or raises.
"""

import os
import warnings
import weakref
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import xxhash

from asgd_mpi.data.channels import note_flat_channels
from asgd_mpi.data.manifest import FORMAT, FORMAT_VERSION, MANIFEST, Manifest, read_manifest
from asgd_mpi.data.retrying_file import RetryingFile
from asgd_mpi.errors import DataError
from asgd_mpi.untrusted import bounded


class DamagedSample(DataError):
    """One sample whose bytes are not what was packed, or do not decode; the others may be fine."""


def checksum(data: np.ndarray, label: int) -> int:
    """Return xxh3_64 of a sample's bytes (C-contiguous uint8), seeded with its label."""
    return xxhash.xxh3_64_intdigest(data, seed=int(label))


@dataclass(frozen=True)
class _Shard:
    """Where one shard's samples lie: an open file and the small arrays."""

    path: Path
    file: RetryingFile
    offset: np.ndarray  # (n + 1,) uint64: sample i is bytes offset[i] to offset[i + 1] of the file
    label: np.ndarray  # (n,) int64
    xxh3: np.ndarray  # (n,) uint64
    source_at: int  # first byte of /source in the file
    source_width: int

    def place(self, row: int) -> tuple[int, int]:
        """Return the first byte of a sample in the file, and its length."""
        at = self.offset.item(row)  # .item: five times faster than indexing
        return at, self.offset.item(row + 1) - at


class ShardSet:
    """One split of a data set, read-only; sample indices are 0..num_samples-1 over all its shards in order."""

    def __init__(
        self, root: Path, split: str, manifest: Manifest, fingerprint: str, shards: list[_Shard]
    ):
        self.root = root
        self.split = split
        self.fingerprint = fingerprint
        self.encoding = manifest.encoding
        self.image_shape = manifest.image_shape
        self.class_names = manifest.class_names
        self.num_classes = len(manifest.class_names)
        self.mean = tuple(manifest.mean)
        self.std = tuple(manifest.std)
        self.num_samples = manifest.splits[split].num_samples
        # to be told before a run
        self.notes = note_flat_channels(self.std) if split == "train" else []
        self._shards = shards
        self._first = np.cumsum([0] + [len(shard.label) for shard in shards]).tolist()
        self._label = np.concatenate([shard.label for shard in shards])
        self._close = weakref.finalize(self, _close_all, shards)

    @classmethod
    def open(
        cls, root: str | Path, split: str, on_retry: Callable[[str], None] = warnings.warn
    ) -> "ShardSet":
        """Open every shard of a split, reading labels, offsets and checksums; raise DataError.

        `on_retry` gets a message each time a read has to be repeated, from any thread.
        """
        root = Path(root)
        manifest, fingerprint = read_manifest(root)
        if split not in manifest.splits:
            raise DataError(
                f"{root} has no split {split!r}; it has {', '.join(sorted(manifest.splits))}; "
                f"give one of them, or prepare the data set again with it"
            )
        entries = manifest.splits[split].shards
        shards: list[_Shard] = []
        try:
            for number, entry in enumerate(entries):
                expected = {
                    "format": FORMAT, "version": FORMAT_VERSION, "split": split, "shard": number,
                    "num_shards": len(entries), "num_samples": entry.num_samples, "encoding": manifest.encoding,
                    "complete": 1,
                }  # fmt: skip
                shards.append(
                    _open_shard(root / entry.file, entry.num_bytes, manifest, expected, on_retry)
                )
            shard_set = cls(root, split, manifest, fingerprint, shards)
        except BaseException:
            _close_all(shards)
            raise
        shard_set._check_counts()
        return shard_set

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """Return the labels, int64, of some samples."""
        return self._label[indices]

    def short_sides(self) -> np.ndarray:
        """Return the short sides of some images, in pixels: those of the first shard, which are a random draw."""
        if self.image_shape is not None:
            return np.array([min(self.image_shape[:2])])
        with h5py.File(self._shards[0].path, "r", locking=False) as file:
            return file["size"][:].min(axis=1).astype(np.int64)

    def expect(self, indices: np.ndarray) -> None:
        """Tell the disk of samples that are read soon, in the order in which they lie there.

        A cold disk then reads as fast as if they were read in that order.
        """
        for index in np.sort(indices).tolist():
            shard, row = self._locate(index)
            shard.file.expect(*shard.place(row))

    def read(self, index: int) -> np.ndarray:
        """Return a sample, uint8: the JPEG file's bytes (n,) or the raw image (H, W, C).

        Raises DamagedSample if the checksum does not match and DataError if the file cannot be read at all.
        """
        shard, row = self._locate(index)
        at, num_bytes = shard.place(row)
        data = shard.file.read(at, num_bytes, f"sample {row}")
        if checksum(data, shard.label.item(row)) != shard.xxh3.item(row):
            raise DamagedSample(
                f"sample {row} of {shard.path} ({self.source(index)}, {num_bytes} bytes) does not match its "
                f"checksum: it was damaged after packing; copy the shard again from a good copy or prepare the data "
                f"again, or leave damaged samples out (on_bad_image: skip)"
            )
        if self.image_shape is None:
            return data
        return data.reshape(self.image_shape)

    def source(self, index: int) -> str:
        """Return where a sample came from, e.g. `train/n01440764/n01440764_10026.JPEG`."""
        shard, row = self._locate(index)
        name = shard.file.read(
            shard.source_at + row * shard.source_width,
            shard.source_width,
            f"the name of sample {row}",
        )
        return name.tobytes().rstrip(b"\0").decode(errors="replace")

    def close(self) -> None:
        """Close the shards' files; reading is an error afterwards."""
        self._close()

    def _locate(self, index: int) -> tuple[_Shard, int]:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        number = bisect_right(self._first, index) - 1
        return self._shards[number], index - self._first[number]

    def _check_counts(self) -> None:
        counted, least, largest = (
            len(self._label),
            int(self._label.min(initial=0)),
            int(self._label.max(initial=0)),
        )
        if counted != self.num_samples or counted == 0 or least < 0 or largest >= self.num_classes:
            labels = f"up to {largest}" if least >= 0 else f"from {least}"
            raise DataError(
                f"{self.root / MANIFEST} promises {self.num_samples} {self.split} samples of {self.num_classes} "
                f"classes, but the shards hold {counted} with labels {labels}; prepare the data set again"
            )


def _open_shard(
    path: Path, num_bytes: int, manifest: Manifest, expected: dict, on_retry: Callable[[str], None]
) -> _Shard:
    """Check one shard against the manifest and return where its samples lie."""
    again = "copy it again from a good copy, or prepare the data set again"
    try:
        with bounded.open_plain(path) as plain:
            on_disk = os.fstat(plain.fileno()).st_size
    except OSError as error:
        raise DataError(
            f"shard {path}, listed in {MANIFEST}, cannot be read: {error.strerror}; {again}"
        ) from error
    if on_disk != num_bytes:
        raise DataError(
            f"shard {path} is truncated or was changed: {on_disk} bytes on disk, {num_bytes} in {MANIFEST}; {again}"
        )
    try:
        # locking fails on Lustre and NFS without flock
        with h5py.File(path, "r", locking=False) as file:
            found = {name: _attribute(file, name) for name in expected}
            wrong = [
                f"{name} is {found[name]}, not {want}"
                for name, want in expected.items()
                if found[name] != want
            ]
            if wrong:
                raise DataError(
                    f"shard {path} is not the one in {MANIFEST}: {'; '.join(wrong)}; {again}"
                )
            return _read_index(path, file, manifest, expected["num_samples"], num_bytes, on_retry)
    except ValueError as error:
        raise DataError(f"shard {path} cannot be true: {error}; {again}") from error
    except (OSError, KeyError, RuntimeError, TypeError) as error:
        raise DataError(f"shard {path} is damaged: {error}; {again}") from error


def _attribute(file: h5py.File, name: str) -> object:
    """Return a single value that a shard says of itself; None if it is missing, or there are many."""
    if name in file.attrs and file.attrs.get_id(name).shape == ():
        return file.attrs.get(name)
    return None


def _read_index(
    path: Path,
    file: h5py.File,
    manifest: Manifest,
    num_samples: int,
    num_bytes: int,
    on_retry: Callable[[str], None],
) -> _Shard:
    """Read where the samples of a shard lie, and check that they lie in it. Raises ValueError, KeyError."""
    if manifest.image_shape is None:
        samples, starts = (
            _placed(file, "jpeg", (None,), num_bytes),
            _placed(file, "offset", (num_samples + 1,), num_bytes),
        )
        offset = starts[:].astype(np.uint64)
    else:
        samples = _placed(file, "image", (num_samples, *manifest.image_shape), num_bytes)
        offset = np.arange(num_samples + 1, dtype=np.uint64) * np.uint64(
            np.prod(manifest.image_shape)
        )
    label, xxh3 = (_placed(file, name, (num_samples,), num_bytes)[:] for name in ("label", "xxh3"))
    source = _placed(file, "source", (num_samples,), num_bytes, kind="S")
    if np.any(offset[1:] < offset[:-1]) or offset[-1] > samples.size:
        raise ValueError(
            f"its samples end at byte {offset.max()} of {samples.size}, or before they begin"
        )
    return _Shard(
        path=path,
        file=RetryingFile(path, on_retry),
        offset=offset + np.uint64(samples.id.get_offset()),
        label=label.astype(np.int64),
        xxh3=xxh3,
        source_at=source.id.get_offset(),
        source_width=source.dtype.itemsize,
    )


def _placed(
    file: h5py.File, name: str, shape: tuple[int | None, ...], num_bytes: int, kind: str = "iu"
) -> h5py.Dataset:
    """Return an array of a shard of so many bytes, which lies in it as it is; raise ValueError, KeyError.

    It may claim any shape, or lie compressed, or be a link to another file: what it claims is not read before that is known.
    shape: None for any length.
    """
    link, found = file.get(name, getlink=True), None
    if isinstance(link, h5py.HardLink):
        found = file[name]
    if not isinstance(found, h5py.Dataset):
        raise ValueError(f"{name} is no array of its own" if link else f"it has no {name}")
    at = found.id.get_offset()
    if at is None or found.chunks or found.is_virtual or found.external:
        raise ValueError(
            f"{name} is not contiguous: it was repacked with chunks or filters, which have no byte offsets"
        )
    if len(found.shape) != len(shape) or any(
        want not in (None, have) for want, have in zip(shape, found.shape)
    ):
        raise ValueError(f"{name} has the shape {found.shape}, not {shape}")
    if found.dtype.kind not in kind:
        raise ValueError(f"{name} is of type {found.dtype}")
    if at + found.nbytes > num_bytes:
        raise ValueError(f"{name} claims {found.nbytes} bytes at byte {at} of {num_bytes}")
    return found


def _close_all(shards: list[_Shard]) -> None:
    while shards:
        shards.pop().file.close()

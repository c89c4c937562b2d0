"""Checks a finished data set: `python -m data_prep.verify DIR`; exit status 2 and every fault by name if it is bad.

The manifest and the shards' headers are checked as a run checks them; then each shard's checksum, every sample's
checksum, whether it decodes, whether a source occurs twice, that no class is empty, and that the samples stand in the
order of the manifest's seed.
"""

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from asgd_mpi.config import limits
from asgd_mpi.data.decode import decode
from asgd_mpi.data.manifest import Manifest, read_manifest
from asgd_mpi.data.shards import DamagedSample, ShardSet
from asgd_mpi.errors import DataError, tell
from asgd_mpi.record import progress
from data_prep import run
from data_prep.imagenet import shuffled
from data_prep.writer import file_xxh3

SHOWN = 20  # faults that are listed
PIECE = 256  # samples a thread takes at a time
RANGES = {
    "workers": (
        limits.at_least(1, 1024),
        "somebody has to check; give 1 thread or more, 1024 at most",
    )
}


def verify(root: Path, decode_all: bool = True, workers: int | None = None) -> None:
    """Check every byte of a data set.

    Args:
        root: directory of the data set
        decode_all: decode every JPEG file as well (about 1 ms of a core for an image of ImageNet)
        workers: threads; one per core if not given
    """
    manifest, _ = read_manifest(root)
    faults: list[str] = []
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        for split, entry in manifest.splits.items():
            shards = ShardSet.open(root, split)  # refuses shards that are missing or short
            digests = pool.map(lambda shard: file_xxh3(root / shard.file), entry.shards)
            for shard, digest in zip(
                entry.shards,
                progress.Counter(len(entry.shards), "shards", split).over(digests),
                strict=True,
            ):
                if digest != shard.xxh3:
                    faults.append(f"{shard.file}: its checksum is {digest}, not {shard.xxh3}")
            pieces = [
                range(first, min(first + PIECE, shards.num_samples))
                for first in range(0, shards.num_samples, PIECE)
            ]
            found = pool.map(partial(_check_samples, shards, decode_all), pieces)
            faults += chain.from_iterable(
                progress.Counter(len(pieces), "batches", split).over(found)
            )
            faults += _check_order(manifest, split, shards)
            tell(
                f"{split}: {shards.num_samples} samples in {len(entry.shards)} shards, {_class_counts(shards)}"
            )
    if faults:
        listed = "\n  ".join(faults[:SHOWN])
        raise DataError(
            f"{root} has {len(faults)} faults, the first of them:\n  {listed}\n"
            # fmt: skip
            f"copy the data set again from a good copy, or prepare it again"
        )
    tell(f"{root} is whole")


def _check_samples(shards: ShardSet, decode_all: bool, piece: range) -> list[str]:
    faults = []
    for index in piece:
        try:
            data = shards.read(index)
            if decode_all and shards.encoding == "jpeg":
                decode(data)
        except DamagedSample as error:
            faults.append(str(error).split(";")[0])
        except ValueError as error:
            faults.append(f"{shards.source(index)} does not decode: {error}")
    return faults


def _check_order(manifest: Manifest, split: str, shards: ShardSet) -> Iterator[str]:
    """Yield what is wrong with the sources: twice the same, or not in the order of the seed."""
    sources = [shards.source(index) for index in range(shards.num_samples)]
    repeated = [source for source, count in Counter(sources).items() if count > 1]
    if repeated:
        yield f"{split}: {len(repeated)} sources occur more than once, {repeated[0]} first"
    counts = np.bincount(shards.labels(np.arange(shards.num_samples)), minlength=shards.num_classes)
    if split == "train" and counts.min() == 0:
        yield f"{split}: {(counts == 0).sum()} classes have no sample, {shards.class_names[counts.argmin()]} first"
    if manifest.synsets:  # packed by data_prep.imagenet
        skipped = set(manifest.splits[split].skipped)
        expected = [
            name
            for name in shuffled(sorted([*sources, *skipped]), manifest.seed, split)
            if name not in skipped
        ]
        if sources != expected:
            place = next(
                place
                for place, pair in enumerate(zip(sources, expected, strict=True))
                if pair[0] != pair[1]
            )
            yield f"{split}: sample {place} is {sources[place]}, but by seed {manifest.seed} {expected[place]} stands there"


def _class_counts(shards: ShardSet) -> str:
    counts = np.bincount(shards.labels(np.arange(shards.num_samples)), minlength=shards.num_classes)
    return f"{shards.num_classes} classes of {counts.min()} to {counts.max()} samples"


if __name__ == "__main__":
    run(verify, RANGES, positional=True)

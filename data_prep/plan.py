"""What is to be packed: every shard is a function of a plan.

In: the photos of each split, shuffled, and the options. Out: shards by split and number, their photos and file names.
"""

from dataclasses import dataclass
from pathlib import Path

import msgspec
import xxhash

from asgd_mpi.data.manifest import ShardEntry
from data_prep.encode import Encoding
from data_prep.sources import Photo

LAYOUT = 3  # of what packing keeps beside the shards until all are done


class Done(msgspec.Struct, frozen=True):
    """One finished shard."""

    entry: ShardEntry
    skipped: list[str]
    histogram: list[list[int]]  # (3, 256): of the images that mean and std are measured on
    remarks: dict[str, list[str]] = {}  # names of images, by what is remarked of them (see encode)


class PlanFile(msgspec.Struct, frozen=True):
    options: dict[str, str]
    # xxh3 of every photo's name, in order; not of its size, so that a bad file may be replaced
    photos: str


@dataclass(frozen=True)
class Plan:
    """Everything that the shards depend on."""

    out: Path
    photos: dict[str, list[Photo]]  # by split, shuffled
    synsets: list[str]
    encoding: Encoding
    shard_size: int
    seed: int
    num_measured: int  # images that mean and std are measured on
    official: tuple[str, ...] = ()  # archives that are read once as a whole, for their md5 sums

    @property
    def shards(self) -> list[tuple[str, int]]:
        """(split, number) of every shard."""
        return [
            (split, number) for split in self.photos for number in range(self.num_shards(split))
        ]

    def num_shards(self, split: str) -> int:
        return -(-len(self.photos[split]) // self.shard_size)

    def slice(self, split: str, number: int) -> list[Photo]:
        return self.photos[split][number * self.shard_size : (number + 1) * self.shard_size]

    def file(self, split: str, number: int) -> str:
        return f"{split}-{number:05d}-of-{self.num_shards(split):05d}.h5"

    def measured(self, split: str, number: int) -> range:
        """The places in a shard of images that mean and std are measured on: every n-th of train."""
        stride = max(1, len(self.photos["train"]) // self.num_measured)
        first = -(number * self.shard_size) % stride
        return range(first, self.shard_size if split == "train" else 0, stride)

    def describe(self) -> PlanFile:
        digest = xxhash.xxh3_64()
        for photos in self.photos.values():
            digest.update("\n".join(photo.name for photo in photos).encode())
        options = {
            "layout": LAYOUT,
            "shard_size": self.shard_size,
            "seed": self.seed,
            "num_measured": self.num_measured,
        } | vars(self.encoding)
        return PlanFile({name: str(value) for name, value in options.items()}, digest.hexdigest())

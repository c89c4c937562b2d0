"""ImageNet, or any tree of class directories, as shards.

In: the archives of ILSVRC2012 as they are distributed, or a tree (see sources). Out: shards, in the format of
asgd_mpi.data.shards. All images of a split are shuffled once with the seed before they are written, so every shard
holds every class and a run may read in blocks. Under `srun` or `mpirun`, the tasks share the shards out.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from asgd_mpi.config import limits
from asgd_mpi.data.channels import note_flat_channels
from asgd_mpi.data.manifest import Manifest, SplitEntry
from asgd_mpi.data.tree import readable
from asgd_mpi.errors import DataError, tell
from data_prep import run
from data_prep.encode import BadImage, Encoding, mean_and_std
from data_prep.forecast import forecast, in_words, remarked
from data_prep.packing import (
    clear,
    REPORT,
    finish,
    is_complete,
    pack,
    read_done,
    start,
    unchecked,
    unfinished,
)
from data_prep.plan import Done, Plan
from data_prep.shared_listing import list_once
from data_prep.sources import SPLITS, WHOLE, Source, leave_out
from data_prep.survey import survey
from data_prep.tasks import end_with_parent, rank_and_size
from data_prep.writer import check_space, make_root, software

T = TypeVar("T")
SAMPLED = 1000  # files that are asked for their sizes

RANGES = {
    "short-side": (
        limits.at_least(1, 65500),
        "give pixels, 1 or more; a JPEG file has 65,500 at most",
    ),
    "quality": (limits.at_least(1, 95), "the quality of a JPEG file is 1 to 95"),
    "raw-size": (limits.at_least(1, 8192), "give the side of a square in pixels, 1 to 8192"),
    "shard-size": (limits.at_least(1), "a shard has 1 image or more"),
    "seed": limits.RANGES["run.seed"],
    "num-measured": (limits.at_least(1), "mean and deviation need 1 image or more"),
    "workers": (
        limits.at_least(1, 1024),
        "somebody has to pack; give 1 process or more, 1024 at most",
    ),
}


def prepare(
    source: Path,
    out: Path,
    mode: Literal["jpeg", "raw"] = "jpeg",
    short_side: int | None = None,
    quality: int = 90,
    raw_size: int = 256,
    shard_size: int = 8192,
    seed: int = 0,
    orientation: Literal["keep", "turn"] = "keep",
    check: Literal["full", "header"] = "full",
    on_bad_image: Literal["fail", "skip"] = "fail",
    num_measured: int = 20_000,
    workers: int | None = None,
    blacklist: Path | None = None,
    check_md5: bool = True,
) -> None:
    """Pack ImageNet into HDF5 shards. If it is killed, the same command goes on where it stopped.

    Args:
        source: directory with ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, or with
            train/<synset>/*.JPEG and val/<synset>/*.JPEG, or as Kaggle has it, or with webdataset's tars or Hugging Face's parquet
            files; archives are read in place, parquet files are unpacked into --out until it is done
        out: directory for the data set; created if missing, refused if it already holds one
        mode: jpeg keeps the files' bytes wherever possible; raw stores pixels, short side to --raw-size and centre crop
        short_side: of jpeg: shrink larger images to this many pixels on the short side; else files are kept as they are
        quality: of the JPEG files that have to be encoded again, 1 to 95
        raw_size: of raw: side of the stored squares, in pixels
        shard_size: images per shard; each worker holds one shard in memory (8192 ImageNet images: 0.9 GB)
        seed: of the shuffle before writing; the same seed gives the same shards
        orientation: of photos that EXIF says lie on their side: keep them as they are stored, as torchvision does, or turn them
        check: full decodes every image once; header trusts kept images but for their headers and end marks
        on_bad_image: stop at an image that does not decode, or skip it, name it and list it in the manifest
        num_measured: training images, evenly spread, that mean and std are measured on
        workers: processes that read, check and write; one per core if not given
        blacklist: file with the numbers of validation images to leave out, one a line, as the development kit of 2014 has it
            (ILSVRC2014_clsloc_validation_blacklist.txt, 1762 images); they are not left out by default, nor elsewhere
        check_md5: read the official archives once more, beside the packing, and compare their md5 sums with the published ones
    """
    rank, size = rank_and_size()
    if size > 1:
        end_with_parent()
    encoding = Encoding(mode, short_side, raw_size, quality, check, orientation)
    if is_complete(out):
        clear(out)
    if size > 1 and is_complete(out):
        tell(f"{out} holds a complete data set; task {rank} of {size} has nothing to do")
        return
    out, found = _list(source, out)
    if blacklist:
        found.photos["val"] = leave_out(found.photos["val"], read_numbers(blacklist))
    photos = {split: shuffled(found.photos[split], seed, split) for split in SPLITS}
    official = tuple(found.official) if check_md5 else ()
    plan = Plan(out, photos, found.synsets, encoding, shard_size, seed, num_measured, official)
    for line in survey(photos["train"], encoding):
        if rank == 0:
            tell(line)
    num_bytes = _estimate_bytes(plan, unfinished(plan))
    check_space(out, num_bytes)
    left = start(plan)
    processes = workers or len(os.sched_getaffinity(0))
    if rank == 0:
        tell(forecast(plan, left, num_bytes, processes * size))
    mine = [
        shard for place, shard in enumerate(plan.shards) if place % size == rank and shard in left
    ]
    archives = [archive for place, archive in enumerate(unchecked(plan)) if place % size == rank]
    pack(
        plan,
        mine,
        on_bad_image == "skip",
        processes,
        f"task {rank} of {size}" if size > 1 else "packing",
        archives,
    )
    _finish_if_done(plan, found)


def _list(source: Path, out: Path) -> tuple[Path, Source]:
    """Make the data set directory and list the source; if that fails, leave nothing new behind."""
    was_there = out.exists()
    make_root(out)
    try:
        return out.resolve(), list_once(source, out.resolve())
    except DataError:
        if not was_there:
            with suppress(OSError):  # other tasks are at it
                out.rmdir()
        raise


def read_numbers(path: Path) -> set[int]:
    """Return the numbers in a file, one a line; raise DataError."""
    with readable(path):
        words = path.read_text(errors="replace").split()
    if not words or not all(word.isdigit() for word in words):
        raise DataError(
            f"{path} is no list of validation images to leave out; give one with a number on each line, like "
            # fmt: skip
            f"ILSVRC2014_clsloc_validation_blacklist.txt of the development kit of 2014"
        )
    return {int(word) for word in words}


def shuffled(photos: list[T], seed: int, split: str) -> list[T]:
    """Return the photos of a split, or their names, sorted by name, in the order in which they are packed."""
    order = np.random.default_rng([seed, SPLITS.index(split)]).permutation(len(photos))
    return [photos[place] for place in order]


def _estimate_bytes(plan: Plan, shards: set[tuple[str, int]]) -> int:
    """Return the size of some shards: exact but for images that are shrunk, of which a few are tried."""
    photos = [photo for shard in shards for photo in plan.slice(*shard)]
    if plan.encoding.mode == "raw":
        return len(photos) * 3 * plan.encoding.raw_size**2
    few = (
        photos[:: max(1, len(photos) // SAMPLED)]
        if any(photo.num_bytes == WHOLE for photo in photos)
        else photos
    )
    total = sum(photo.size() for photo in few) * len(photos) // max(1, len(few))
    if plan.encoding.short_side is None:
        return total
    before, after = 1, 1
    for photo in photos[:64]:
        try:
            after += plan.encoding.sample(photo, photo.read(), 0).image.nbytes
            before += photo.size()
        except BadImage:
            pass  # it is reported when its turn comes
    return total * after // before


def _finish_if_done(plan: Plan, found: Source) -> None:
    done = {shard: read_done(plan, *shard) for shard in plan.shards}
    missing = sum(one is None for one in done.values())
    waiting = unchecked(plan)
    if is_complete(plan.out):
        tell(f"{plan.out} is complete: another packer has finished it")
        clear(plan.out)
        return
    if missing:
        tell(f"{plan.out}: {missing} of {len(done)} shards are still left to other tasks")
        return
    if waiting:
        tell(
            f"{plan.out}: the md5 sum of {', '.join(map(os.path.basename, waiting))} is still left to another task"
        )
        return
    splits = {
        split: _entry([done[shard] for shard in plan.shards if shard[0] == split])
        for split in SPLITS
    }
    counts = np.sum([one.histogram for one in done.values()], axis=0)
    if not counts.any():
        raise DataError(
            f"not one of the training images that mean and deviation are measured on decodes (--num-measured "
            # fmt: skip
            f"{plan.num_measured}); delete {plan.out} and pack again with more of them"
        )
    mean, std = mean_and_std(counts)
    for note in note_flat_channels(std):
        tell(note)
    side = plan.encoding.raw_size
    raw = plan.encoding.mode == "raw"
    remarks = {
        split: remarked(
            [done[shard] for shard in plan.shards if shard[0] == split], splits[split].skipped
        )
        for split in SPLITS
    }
    manifest = Manifest(
        encoding=plan.encoding.mode, image_shape=(side, side, 3) if raw else None, class_names=found.class_names,
        synsets=found.synsets, mean=mean, std=std, seed=plan.seed, splits=splits, software=software(),
    )  # fmt: skip
    finish(plan, manifest, remarks)
    for split, entry in splits.items():
        for note in in_words(split, remarks[split], plan.encoding):
            tell(note)
        num_bytes = sum(shard.num_bytes for shard in entry.shards)
        tell(f"{split}: {entry.num_samples} images of {len(found.synsets)} classes in {len(entry.shards)} shards, "
              f"{num_bytes / 1e6:,.1f} MB, {len(entry.skipped)} skipped")  # fmt: skip
    if any(remarks.values()):
        tell(f"{plan.out / REPORT} lists them all")


def _entry(shards: list[Done]) -> SplitEntry:
    return SplitEntry(
        num_samples=sum(done.entry.num_samples for done in shards),
        shards=[done.entry for done in shards],
        skipped=[name for done in shards for name in done.skipped],
    )


if __name__ == "__main__":
    run(prepare, RANGES)

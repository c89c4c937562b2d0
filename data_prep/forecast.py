"""What packing will take, before it starts: images, files, disk, and time by a sample that is packed and thrown away."""

import time

from asgd_mpi.data.tree import some
from data_prep.encode import BadImage
from data_prep.plan import Done, Plan

SAMPLED = 32  # images


def forecast(plan: Plan, left: set[tuple[str, int]], num_bytes: int, processes: int) -> str:
    """Return in words what is left to do; `processes` of all tasks share it, and the disk is taken to keep up with them."""
    photos = [photo for shard in sorted(left) for photo in plan.slice(*shard)]
    what = f"{len(photos):,} images to pack into {len(left)} files, {num_bytes / 1e9:,.2f} GB"
    sample = photos[:: max(1, len(photos) // SAMPLED)][:SAMPLED]
    begin = time.perf_counter()
    for photo in sample:
        try:
            plan.encoding.sample(photo, photo.read(), 0)
        except BadImage:
            pass  # it is reported when its turn comes
    if not sample:
        return what
    each_s = (time.perf_counter() - begin) / len(sample)
    return (f"{what}: {1e3 * each_s:.1f} ms each in a sample of {len(sample)}, so about {_minutes(each_s * len(photos) / processes)} with "
            f"{processes} processes, if the disk keeps up")  # fmt: skip


def encoded_again(split: str, shards: list[Done]) -> list[str]:
    """Say how many images were not kept as they were, and which first; nothing if all were."""
    names = [name for done in shards for name in done.encoded_again]
    return [f"{split}: {len(names)} images were encoded again, not being grey or RGB JPEGs: {some(names)}"] if names else []


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"

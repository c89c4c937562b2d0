"""What packing will take, before it starts: images, files, disk, and time by a sample that is packed and thrown away."""

import time

from asgd_mpi.errors import few
from data_prep.encode import AGAIN, ENLARGED, REMARKS, TURNED, BadImage, Encoding
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


def remarked(shards: list[Done], skipped: list[str]) -> dict[str, list[str]]:
    """Return the names of the images that something is remarked of, by what it is, in the order of packing."""
    found = {
        remark: [name for done in shards for name in done.remarks.get(remark, [])]
        for remark in REMARKS
    }
    return {what: names for what, names in (found | {"skipped": skipped}).items() if names}


def in_words(split: str, remarks: dict[str, list[str]], encoding: Encoding) -> list[str]:
    """Say how many images were not kept as they were, why, and which first; nothing if all were."""
    if encoding.orientation == "turn":
        turned = "have an EXIF orientation and were turned"
    else:
        turned = "have an EXIF orientation and were kept as they are stored (--orientation turn turns them)"
    words = {
        AGAIN: "were encoded again, not being grey or RGB JPEGs",
        TURNED: turned,
        ENLARGED: f"were smaller than --raw-size {encoding.raw_size} and were enlarged",
    }
    return [
        f"{split}: {len(remarks[what])} images {said}: {few(remarks[what])}"
        for what, said in words.items()
        if what in remarks
    ]


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"

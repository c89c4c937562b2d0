"""Packs a plan of shards, in several processes and from several tasks, so that it can be killed at any moment.

In: the photos of each split, already shuffled, and the options. Out: shards, then the manifest. While it goes on, the
data set directory holds `.packing/`: `plan.json` (what is packed, so that nothing else is ever mixed in) and, for each
shard that is whole and on disk, a directory of its name with the shard and `done.json`, its manifest entry. Tasks share
the shards out by number and send no messages: whoever finds that every shard is done moves them out and writes the manifest.

Invariant: a shard and its entry come into place together, at once, and only the first of several packers' (see takeover).
So tasks that a killed launcher left behind may go on beside the same command started again: what one has finished, all take.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from asgd_mpi.data.manifest import MANIFEST, Manifest, ShardEntry
from asgd_mpi.errors import DataError
from asgd_mpi.record import progress
from data_prep.archives import OFFICIAL, check_md5
from data_prep.encode import REMARKS, BadImage, histogram
from data_prep.plan import Done, Plan, PlanFile
from data_prep.shared_listing import remove_listings
from data_prep.takeover import fsync, making, own, put_away, sweep, take
from data_prep.tasks import end_with_parent
from data_prep.writer import explained, replacing, write_shard

ROOM = ".packing"  # inside the data set directory
PLAN, DONE = "plan.json", "done.json"  # inside of it, and of the directory of a shard there
REPORT = "packed.json"  # beside the manifest
COUNT_EVERY = 16  # images between two signs of life of a worker process


def start(plan: Plan) -> set[tuple[str, int]]:
    """Make `.packing`, or check that what it holds belongs to this plan; return the shards that are left to do."""
    room = plan.out / ROOM
    with explained(room):
        if not room.exists():
            with making(room) as mine:
                write_json(mine / PLAN, plan.describe())
                take(mine, room)
        sweep(plan.out)
        sweep(room)
    _check_plan(plan, room / PLAN)
    return unfinished(plan, discard_damaged=True)


def _check_plan(plan: Plan, path: Path) -> None:
    theirs, ours = msgspec.json.decode(path.read_bytes(), type=PlanFile), plan.describe()
    differ = [f"{name} {theirs.options.get(name)} there, {value} here" for name, value in ours.options.items()
              if theirs.options.get(name) != value]  # fmt: skip
    if theirs.photos != ours.photos:
        differ.append("other images")
    if differ:
        raise DataError(
            f"{plan.out} holds part of a data set that was packed otherwise ({'; '.join(differ)}); go on "
            # fmt: skip
            f"with the options from there, choose another --out, or delete that directory"
        )


def unfinished(plan: Plan, discard_damaged: bool = False) -> set[tuple[str, int]]:
    """Return the shards that are left to do: those that are not in their place, or have another size than they had."""
    room = plan.out / ROOM
    there = set(os.listdir(room)) if room.is_dir() else set()
    left = {shard for shard in plan.shards if plan.file(*shard) not in there}
    for shard in set(plan.shards) - left:
        if read_done(plan, *shard) is None:
            left.add(shard)
            if discard_damaged:
                put_away(room / plan.file(*shard))
    return left


def unchecked(plan: Plan) -> list[str]:
    """Return the official archives whose md5 sums are still to be compared."""
    return [archive for archive in plan.official if not _word_of(plan, archive).exists()]


def _word_of(plan: Plan, archive: str) -> Path:
    return plan.out / ROOM / f"{os.path.basename(archive)}.md5.json"


class Report(msgspec.Struct, frozen=True):
    """What the packing was asked for, and what it did to which images."""

    options: dict[str, str]
    images: dict[
        str, dict[str, list[str]]
    ]  # names, by split and remark (see encode); those skipped, too


class DamagedArchive(DataError):
    """An official archive with another md5 sum: whatever was packed from it may be damaged, too."""


def check_archive(plan: Plan, archive: str, count: Callable[[int], None]) -> list[str]:
    """Compare an archive's md5 sum and write down that it is right; raise DamagedArchive."""
    try:
        check_md5(Path(archive), lambda num_bytes: count(0))
    except DataError as damaged:
        raise DamagedArchive(
            f"{damaged}. What was packed from it is dropped: start again."
        ) from damaged
    write_json(_word_of(plan, archive), OFFICIAL[os.path.basename(archive)].md5)
    return []


def read_done(plan: Plan, split: str, number: int) -> Done | None:
    """Return what is known of a finished shard, None if it is not finished."""
    name = plan.file(split, number)
    room = plan.out / ROOM / name
    try:
        done = msgspec.json.decode((room / DONE).read_bytes(), type=Done)
        return done if _size(room / name, plan.out / name) == done.entry.num_bytes else None
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def _size(*places: Path) -> int:
    """Return the size of the file at the first of the places that has one."""
    for place in places:
        with suppress(FileNotFoundError):
            return place.stat().st_size
    return -1


def is_complete(out: Path) -> bool:
    return (out / MANIFEST).exists()


def pack(plan: Plan, shards: list[tuple[str, int]], skip: bool, workers: int, label: str,
         archives: Sequence[str] = ()) -> None:  # fmt: skip
    """Write some shards and check some archives; raise DataError at an image that does not decode, unless skipping.

    Images a second and the time left are shown after `label`.
    """
    total = sum(len(plan.slice(*shard)) for shard in shards)
    try:
        _pack(plan, shards, archives, skip, workers, total, label)
    except DamagedArchive:
        put_away(plan.out / ROOM)
        raise
    except DataError as error:
        if is_complete(plan.out):
            # `.packing` has gone from under a shard: another packer has finished the set, and ours is not needed
            return
        if not (plan.out / ROOM).exists():
            raise DataError(f"{plan.out / ROOM} has gone while shards were written: another task found an archive damaged (its error says "
                            f"which), or somebody removed it; start again") from error  # fmt: skip
        raise


def _pack(
    plan: Plan,
    shards: list,
    archives: Sequence[str],
    skip: bool,
    workers: int,
    total: int,
    label: str,
) -> None:
    with progress.Counter(total, "images", label) as counter:
        if workers == 1:
            for shard in shards:
                _report(pack_shard(plan, *shard, skip, counter.update), counter)
            for archive in archives:
                check_archive(plan, archive, counter.update)
        else:
            _pack_in_processes(plan, [*archives, *shards], skip, workers, counter)


def pack_shard(
    plan: Plan, split: str, number: int, skip: bool, count: Callable[[int], None]
) -> list[str]:
    """Write one shard and then the word that it is done; return what was skipped, and why.

    `count` is told of images as they are read.
    """
    photos, samples, skipped = plan.slice(split, number), [], []
    if (plan.out / ROOM / plan.file(split, number)).is_dir() or is_complete(plan.out):
        count(len(photos))  # by another packer
        return []
    labels = {synset: label for label, synset in enumerate(plan.synsets)}
    remarks: dict[str, list[str]] = {remark: [] for remark in REMARKS}
    counts, measured = np.zeros((3, 256), dtype=np.int64), set(plan.measured(split, number))
    for place, photo in enumerate(photos):
        try:
            data = photo.read()
            sample = plan.encoding.sample(photo, data, labels[photo.synset])
            for remark in sample.remarks:
                remarks[remark].append(photo.name)
            if place in measured:
                counts += histogram(sample)
            samples.append(sample)
        except BadImage as bad:
            if not skip:
                raise DataError(
                    f"{bad}; replace the file, or leave such images out with --on-bad-image skip"
                ) from bad
            skipped.append(bad)
        if place % COUNT_EVERY == COUNT_EVERY - 1:
            count(COUNT_EVERY)
    count(len(photos) % COUNT_EVERY)
    if not samples:
        raise DataError(f"not one of {len(photos)} {split} images in a row decodes; the source is damaged, so skipping "
                        f"does not help; restore it and start again")  # fmt: skip
    name = plan.file(split, number)
    place = plan.out / ROOM / name
    with explained(place), making(place) as mine:
        entry = write_shard(
            mine / name,
            name,
            samples,
            split,
            number,
            plan.num_shards(split),
            len(plan.synsets),
            plan.seed,
        )
        fsync(mine / name)
        (mine / DONE).write_bytes(
            as_json(Done(entry, [bad.name for bad in skipped], counts.tolist(), remarks))
        )
        fsync(mine / DONE)
        fsync(mine)
        take(mine, place)  # or it has come into place meanwhile, and ours is dropped
    return [str(bad) for bad in skipped]


def write_json(path: Path, content: Any) -> None:
    """Put a file in its place at once, even if several tasks do so."""
    with replacing(path, own(path)) as temporary:
        temporary.write_bytes(as_json(content))


def as_json(content: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"


def finish(plan: Plan, manifest: Manifest, remarks: dict[str, dict[str, list[str]]]) -> None:
    """Move the shards out of `.packing`, write the report and the manifest, which completes the data set, and clear up.

    Several tasks may be at it: they move the same shards and write the same manifest.
    """
    with explained(plan.out):
        for entry in manifest.splits.values():
            for shard in entry.shards:
                _move_out(plan.out, shard)
    write_json(plan.out / REPORT, Report(plan.describe().options, remarks))
    write_json(plan.out / MANIFEST, manifest)
    room = plan.out / ROOM
    for shard in plan.shards:  # with fewer operations on metadata than `clear` would need
        with suppress(OSError):
            os.unlink(room / plan.file(*shard) / DONE)
            os.rmdir(room / plan.file(*shard))
    clear(plan.out)


def _move_out(out: Path, shard: ShardEntry) -> None:
    try:
        os.rename(out / ROOM / shard.file / shard.file, out / shard.file)
    except FileNotFoundError:  # another task has moved it
        if _size(out / shard.file) != shard.num_bytes:
            raise DataError(f"{out / shard.file} was taken away while the last task put the data set together; start again, and "
                            f"what is missing is packed") from None  # fmt: skip


def clear(out: Path) -> None:
    """Clear away what packers have left in a complete data set.

    `.packing` is renamed first, so that whoever is still at a shard finds no place to put it.
    """
    with explained(out):
        put_away(out / ROOM)
        remove_listings(out)
        sweep(out)


class Stopped(Exception):
    """Another shard failed, or the user stopped the packing."""


_in_process: tuple = ()  # (plan, skip, counter, stop), handed to a worker process by its fork


def _pack_in_processes(
    plan: Plan, work: list, skip: bool, workers: int, shown: progress.Counter
) -> None:
    # the plan is inherited and not sent; neither MPI nor a thread runs here
    fork = multiprocessing.get_context("fork")
    counter, stop = fork.Value("q", 0), fork.Event()
    with ProcessPoolExecutor(
        workers, fork, _start_process, (os.getpid(), plan, skip, counter, stop)
    ) as pool:
        futures = [pool.submit(_pack_in_process, one) for one in work]
        try:
            for done in _as_they_finish(futures, lambda: shown.update(counter.value - shown.n)):
                _report(done.result(), shown)
        except BrokenProcessPool as error:
            raise DataError(
                "a packing process was killed, most likely for want of memory: each holds one shard; give "
                # fmt: skip
                "fewer --workers or a smaller --shard-size, and start again to go on"
            ) from error
        finally:
            stop.set()
            for future in futures:
                future.cancel()


def _as_they_finish(futures: list[Future], meanwhile) -> Iterator[Future]:
    waiting = set(futures)
    while waiting:
        finished, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
        meanwhile()
        yield from finished


def _start_process(parent: int, *inherited) -> None:
    global _in_process
    _in_process = inherited
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent takes it, and stops
    end_with_parent()  # or a killed parent would leave them behind, writing
    # it was killed before, and nobody will ever send this process work, or a signal
    if os.getppid() != parent:
        os._exit(1)


def _pack_in_process(work: tuple[str, int] | str) -> list[str]:
    plan, skip, counter, stop = _in_process

    def count(images: int) -> None:
        if stop.is_set():
            raise Stopped
        with counter.get_lock():
            counter.value += images

    return (
        check_archive(plan, work, count)
        if isinstance(work, str)
        else pack_shard(plan, *work, skip, count)
    )


def _report(skipped: list[str], shown: progress.Counter) -> None:
    for reason in skipped:
        shown.say(f"skipped: {reason}")

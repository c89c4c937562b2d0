"""What is measured of the loader alone: threads, waiting, packing, mixing, and what a flipped bit meets.

In: the benchmark's work directory, with its packed data. Out: one figure each.
"""

import hashlib
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from statistics import median

import numpy as np

from asgd_mpi.data.augment import make_policy
from asgd_mpi.data.loader import Loader
from asgd_mpi.data.order import Order
from asgd_mpi.data.shards import DamagedSample, ShardSet
from benchmarks.loader_peers import open_and_read, read_shards
from data_prep import imagenet

SLICE = 32  # images of a batch: short, so that both sides of a ratio meet the same neighbours


def _loader(work: Path, threads: int) -> Loader:
    shards = ShardSet.open(work / "original", "train")
    return Loader(shards, Order(shards.num_samples, 0), make_policy("reference", 224), 0, threads)


def thread_scaling(work: Path, pairs: int = 25) -> tuple[float, float]:
    """Return work per wall second of 2 threads over that of 1: of the loader, and of a hash, which needs no lock.

    The second figure is what this machine has to give at the moment; if it is far below 2, the first says nothing.
    Medians over interleaved pairs.
    """
    loaders, blob = {threads: _loader(work, threads) for threads in (1, 2)}, bytes(50_000_000)
    pools = {threads: ThreadPoolExecutor(threads) for threads in (1, 2)}
    found: dict[str, list[float]] = {"loader": [], "hash": []}
    for pair in range(pairs):
        for kind, ratios in found.items():
            wall = {}
            for threads in (1, 2) if pair % 2 else (2, 1):
                begin = time.perf_counter()
                if kind == "loader":
                    futures = [
                        loaders[threads].submit(pair, at, at + SLICE)
                        for at in range(0, 4 * SLICE, SLICE)
                    ]
                else:
                    futures = [pools[threads].submit(hashlib.sha256, blob) for _ in range(4)]
                wait(futures)
                wall[threads] = time.perf_counter() - begin
            ratios.append(wall[1] / wall[2])
    return median(found["loader"]), median(found["hash"])


def data_wait(work: Path, share: float = 0.9, batches: int = 25, rounds: int = 5) -> float:
    """Return the share of time that an emulated GPU, as fast as `share` of the loader's rate, waits for data.

    The loader's rate is measured in the same round, with 1 thread; the GPU sleeps, and 8 batches are made ahead, as
    the leases of a worker are. The median over the rounds.
    """
    loader, found = _loader(work, 1), []
    for number in range(rounds):
        ranges = [(number, start, start + SLICE) for start in range(0, batches * SLICE, SLICE)]
        begin = time.perf_counter()
        for future in [loader.submit(*one) for one in ranges]:
            future.result()
        busy_s = (time.perf_counter() - begin) / batches / share
        waiting, waited = [loader.submit(*one) for one in ranges[:8]], 0.0
        waiting[-1].result()  # the first leases are read before the first step
        begin = time.perf_counter()
        for place in range(batches):
            asked = time.perf_counter()
            waiting.pop(0).result()
            waited += time.perf_counter() - asked
            if place + 8 < batches:
                waiting.append(loader.submit(*ranges[place + 8]))
            time.sleep(busy_s)
        found.append(waited / (time.perf_counter() - begin))
    return median(found)


def cold_reading(work: Path, rounds: int = 5) -> float:
    """Return the wall time of opening and reading files over that of reading shards, when neither is in the page cache.

    The directories still are. Median of the ratios within each round.
    """
    tree, shards = work / "set" / "tree" / "train", work / "original"
    contenders = {"files": open_and_read(tree.parent), "shards": read_shards(shards)}
    paths, ratios = [*tree.rglob("*.JPEG"), *shards.glob("*.h5")], []
    for _ in range(rounds):
        wall = {}
        for name, contender in contenders.items():
            for path in paths:
                _evict(path)
            begin = time.perf_counter()
            contender()
            wall[name] = time.perf_counter() - begin
        ratios.append(wall["files"] / wall["shards"])
    return median(ratios)


def _evict(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # only what is on disk can be dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def packing_rate(work: Path, num_images: int) -> float:
    """Return the images per CPU second of one process that packs without encoding again or decoding."""
    out = work / "packed_again"
    shutil.rmtree(out, ignore_errors=True)
    cpu = time.process_time()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        imagenet.prepare(
            work / "set/archives", out, shard_size=256, check="header", num_measured=10, workers=1
        )
    cpu = time.process_time() - cpu
    shutil.rmtree(out)
    return num_images / cpu


def shuffle_quality(
    num_samples: int = 1_281_167, classes: int = 1000, batch: int = 256, batches: int = 4000
) -> float:
    """Return chi2 per degree of freedom of the classes in batches; 1 for batches drawn at random."""
    # as data_prep packs
    labels = np.random.default_rng(1).permutation(np.arange(num_samples) * classes // num_samples)
    order = Order(num_samples, seed=0).indices(0, 0, batches * batch).reshape(batches, batch)
    expected = batch / classes
    counts = np.stack([np.bincount(labels[row], minlength=classes) for row in order])
    return float((((counts - expected) ** 2 / expected).sum(axis=1) / (classes - 1)).mean())


def detected(work: Path, flips: int = 300) -> float:
    """Return the share of single flipped bits, anywhere in the images of a shard, that are noticed when it is read."""
    copy, rng, noticed = work / "damaged", np.random.default_rng(0), 0
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(work / "original", copy)
    shards = ShardSet.open(copy, "train")
    lengths = [shards.read(index).nbytes for index in range(64)]
    path = sorted(copy.glob("train-*.h5"))[0]
    contents = path.read_bytes()
    first = contents.find(shards.read(0).tobytes())  # the samples lie end to end
    for _ in range(flips):
        index = int(rng.integers(64))
        at = first + sum(lengths[:index]) + int(rng.integers(lengths[index]))
        with path.open("r+b") as file:
            # damage it, read it, mend it
            for value in (contents[at] ^ 1 << int(rng.integers(8)), contents[at]):
                file.seek(at)
                file.write(bytes([value]))
                file.flush()
                if value != contents[at]:
                    try:
                        shards.read(index)
                    except DamagedSample:
                        noticed += 1
    shutil.rmtree(copy)
    return noticed / flips

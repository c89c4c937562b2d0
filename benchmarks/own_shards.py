"""What this machine and its file system give of a data set: `python -m benchmarks.loader --data DIR --gpus 4 --gpu-rate 1200`.

In: a packed data set, the number of GPUs of a node and the images a second that one of them takes (as a run tells). Out: images
a second read from the file system with nothing in this host's page cache, and decoded and cropped with all cores, as a training
that leaves the options of its data open does it.
"""

import os
import time
from pathlib import Path

import numpy as np

from asgd_mpi.config import options as configuration, parse
from asgd_mpi.data.augment import make_policy
from asgd_mpi.data.loader import Loader
from asgd_mpi.data.manifest import read_manifest
from asgd_mpi.data.order import Order
from asgd_mpi.data.shards import ShardSet
from asgd_mpi.task import complete

BLOCK = 32  # images that lie side by side, as an epoch reads them
SECONDS = 5.0


def tell(data: Path, gpus: int, gpu_rate: float) -> None:
    """Print what was measured, and whether it feeds the GPUs."""
    for shard in read_manifest(data)[0].splits["train"].shards:
        _evict(data / shard.file)
    shards = ShardSet.open(data, "train")
    read, megabytes = _reading(shards)
    settings = complete(parse.parse(["--data", str(data), "--model", "resnet50"])).data
    decoded, threads = _decoding(shards, settings)
    print(f"{data}: {read:,.0f} images/s ({megabytes:,.0f} MB/s) read by one thread, with nothing in this host's "
          f"page cache; a file server's own cache may have helped")  # fmt: skip
    print(f"{decoded:,.0f} images/s read, decoded and cropped to {settings.image_size} pixels "
          f"(augment {settings.augment}) with {threads} threads")  # fmt: skip
    if gpus and gpu_rate:
        asked = gpus * gpu_rate
        verdict = "is enough" if min(decoded, read * threads) >= asked else "is not enough"
        less = (
            ""
            if verdict == "is enough"
            else "; more cores, --short-side 256 or fewer GPUs a node would help"
            if decoded < asked
            else ""
        )
        print(f"{gpus} GPUs at {gpu_rate:,.0f} images/s ask for {asked:,.0f}: this {verdict}{less}")


def _evict(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _reading(shards: ShardSet) -> tuple[float, float]:
    """Return images and MB a second of blocks in a random order, each once."""
    blocks = np.random.default_rng().permutation(-(-shards.num_samples // BLOCK))
    images, num_bytes, begin = 0, 0, time.perf_counter()
    for block in blocks.tolist():
        for index in range(block * BLOCK, min((block + 1) * BLOCK, shards.num_samples)):
            num_bytes += shards.read(index).nbytes
            images += 1
        if time.perf_counter() - begin > SECONDS:
            break
    elapsed = time.perf_counter() - begin
    return images / elapsed, num_bytes / elapsed / 1e6


def _decoding(shards: ShardSet, settings: configuration.DataConfig) -> tuple[float, int]:
    threads = len(os.sched_getaffinity(0))
    policy = make_policy(
        settings.augment, settings.image_size, shards.image_shape, settings.resize or 0
    )
    loader = Loader(shards, Order(shards.num_samples, 0), policy, 0, threads)
    batch, images, epoch, begin = min(BLOCK, shards.num_samples), 0, 0, time.perf_counter()
    while time.perf_counter() - begin < SECONDS:
        starts = range(0, shards.num_samples - batch + 1, batch)[: 8 * threads]
        images += sum(
            len(future.result().images)
            for future in [loader.submit(epoch, at, at + batch) for at in starts]
        )
        epoch += 1
    return images / (time.perf_counter() - begin), threads

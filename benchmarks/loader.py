"""How fast the loader is, beside torchvision, webdataset, ffcv and the decoder alone.

    python -m benchmarks.loader --work DIR            # some minutes; the result goes to benchmarks/results/loader.json

Makes 1000 photo-like JPEGs of about 110 kB (data_prep.synthetic) in DIR, packs them, and runs every contender in turn,
`rounds` times over. The measure is the CPU time of the whole process per image, which a busy machine hardly changes; a
figure is the median of the ratios within each round. A peer that is not installed is left out, and said to be.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch

from asgd_mpi.config import limits
from asgd_mpi.data.decode import DECODER
from benchmarks import loader_peers, loader_properties, own_shards
from benchmarks.loader_peers import Contender
from data_prep import imagenet, run, synthetic

RESULTS = Path(__file__).parent / "results" / "loader.json"
PACKAGES = (
    "torch",
    "torchvision",
    "simplejpeg",
    "pillow",
    "h5py",
    "numpy",
    "webdataset",
    "ffcv",
    "xxhash",
)
CLASSES, PER_CLASS = 10, 100
# figure -> (whose time, over whose time, at least)
TARGETS = {
    "original JPEGs, float32, against torchvision": ("image_folder", "ours", 1.8),
    "short side 256, float32, against torchvision": ("image_folder", "ours_256", 3.8),
    "original JPEGs, against webdataset": ("web_dataset", "ours", 2.0),
    "max side 500, quality 90, against ffcv": ("ffcv", "ours_500", 1.0),
    "decode and crop alone, over the loader's uint8 batches": (
        "decoder_alone",
        "ours_uint8",
        1 / 1.1,
    ),
    "reading, against opening and reading files": ("open_and_read", "read_shards", 4.0),
    "  the same of a copy out of the page cache: the limit": (
        "open_and_read",
        "copy_from_cache",
        4.0,
    ),
}


def make_data(work: Path) -> Path:
    """Make and pack the images, once; return their tree."""
    tree = work / "set" / "tree"
    if not tree.exists():
        synthetic.generate(work / "set", CLASSES, PER_CLASS, 2, odd=False)
    for name, options in (("original", {}), ("short256", {"short_side": 256})):
        if not (work / name / "manifest.json").exists():
            imagenet.prepare(tree, work / name, shard_size=256, **options)
    if not (work / "max500" / "manifest.json").exists():
        loader_peers.shrink_tree(tree, work / "tree500", 500, 90)
        shutil.copytree(tree / "val", work / "tree500" / "val", dirs_exist_ok=True)
        imagenet.prepare(work / "tree500", work / "max500", shard_size=256)
    return tree


def contenders(work: Path, tree: Path, only: str = "") -> dict[str, Contender]:
    """Make every contender that can be had here, or only one."""
    makers = {
        "image_folder": lambda: loader_peers.image_folder(tree),
        "ours": lambda: loader_peers.ours(work / "original"),
        "ours_uint8": lambda: loader_peers.ours(work / "original", threads=0, normalise=False),
        "decoder_alone": lambda: loader_peers.decoder_alone(work / "original"),
        "ours_256": lambda: loader_peers.ours(work / "short256"),
        "web_dataset": lambda: loader_peers.web_dataset(tree, work),
        "ours_500": lambda: loader_peers.ours(work / "max500"),
        "ffcv": lambda: loader_peers.ffcv(tree, work),
        "open_and_read": lambda: loader_peers.open_and_read(tree),
        "read_shards": lambda: loader_peers.read_shards(work / "original"),
        "copy_from_cache": lambda: loader_peers.copy_from_cache(work / "original"),
    }
    made = {}
    for name in [only] if only else makers:
        try:
            made[name] = makers[name]()
        except ImportError as error:
            print(f"{name} is left out: {error}")
    return made


def measure(made: dict[str, Contender], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return CPU and wall milliseconds per image of each contender in each round, after a round to warm up."""
    times = {name: {"cpu_ms": [], "wall_ms": []} for name in made}
    for number in range(rounds + 1):
        for name, contender in made.items():
            cpu, wall = time.process_time(), time.perf_counter()
            images = contender()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if number:
                times[name]["cpu_ms"].append(1e3 * cpu / images)
                times[name]["wall_ms"].append(1e3 * wall / images)
        print(f"round {number} of {rounds} done, load {os.getloadavg()[0]:.1f}", flush=True)
    return times


def compare(times: dict) -> dict[str, tuple[float, float]]:
    """Return (median ratio, target) of each figure whose contenders there are."""
    table = {}
    for name, (over, under, least) in TARGETS.items():
        if over in times and under in times:
            pairs = zip(times[over]["cpu_ms"], times[under]["cpu_ms"], strict=True)
            table[name] = (median(a / b for a, b in pairs), least)
    return table


def memory(work: Path, name: str) -> float:
    """Return the peak MB of a process that makes one pass with one contender."""
    command = [sys.executable, "-m", "benchmarks.loader", "--work", str(work), "--only", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def benchmark(work: Path = Path("loader_benchmark"), rounds: int = 5, out: Path = RESULTS, only: str = "", data: Path | None = None,
              gpus: int = 0, gpu_rate: float = 0.0) -> None:  # fmt: skip
    """Measure the loader beside its peers.

    Args:
        work: directory for the data (about 500 MB), made if missing and kept
        rounds: interleaved rounds after one to warm up
        out: JSON file to write
        only: make one pass with this contender, print the process's peak memory in MB and stop
        data: a data set of yours: measure only what this machine and its file system give of it
        gpus: of data: GPUs on this host
        gpu_rate: of data: images a second that one of them takes, as a run tells
    """
    if data:
        own_shards.tell(data, gpus, gpu_rate)
        return
    torch.set_num_threads(1)
    tree = make_data(work)
    made = contenders(work, tree, only)
    if only:
        made[only]()
        # Not getrusage: its peak counts what the process was forked from.
        print(
            next(
                int(line.split()[1]) / 1e3
                for line in Path("/proc/self/status").open()
                if line.startswith("VmHWM")
            )
        )
        return
    load = [os.getloadavg()[0]]
    times = measure(made, rounds)
    num_images = CLASSES * (PER_CLASS + 2)
    scaling, limit = loader_properties.thread_scaling(work)
    table = compare(times) | {
        "1 to 2 decode threads, images per wall second": (scaling, 1.8),
        "  the same of a hash without locks: the machine's limit now": (limit, 2.0),
        "waiting of an emulated GPU at 90 % of the rate, at most": (
            loader_properties.data_wait(work),
            0.02,
        ),
        "reading from a cold disk, against files, wall time": (
            loader_properties.cold_reading(work),
            1.0,
        ),
        "packing as it is, images per CPU second": (
            median(loader_properties.packing_rate(work, num_images) for _ in range(5)),
            4000,
        ),
        "class chi2/df of batches of 256, 1000 classes (0.98 to 1.02)": (
            loader_properties.shuffle_quality(),
            1.0,
        ),
        "share of flipped bits noticed": (loader_properties.detected(work), 1.0),
    }
    peak_mb = {
        name: memory(work, name)
        for name in ("ours", "image_folder", "web_dataset", "ffcv")
        if name in made
    }
    for name, (figure, target) in table.items():
        print(f"{name:62}{figure:10.3f}   target {target:.2f}")
    for name, one in times.items():
        print(f"{name:20}{median(one['cpu_ms']):8.3f} CPU-ms/image ({min(one['cpu_ms']):.3f} to {max(one['cpu_ms']):.3f})"
              + (f"{peak_mb[name]:8.0f} MB at most" if name in peak_mb else ""))  # fmt: skip
    result = {"machine": machine() | {"load": [*load, os.getloadavg()[0]]}, "rounds": rounds, "table": table, "times": times,
              "peak_mb": peak_mb}  # fmt: skip
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {out}")


def machine() -> dict:
    """Return where this was measured, with what."""
    model = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    versions = {"python": platform.python_version(), "decoder": DECODER}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {"cpu": model[0] if model else platform.machine(), "cores": len(os.sched_getaffinity(0)),
            "date": time.strftime("%Y-%m-%d"), "versions": versions,
            "command": "python -m benchmarks.loader --work DIR"}  # fmt: skip


if __name__ == "__main__":
    run(benchmark, {"rounds": (limits.at_least(1), "give 1 round or more"), "gpus": (limits.at_least(0), "give the GPUs of this host"),
                    "gpu-rate": (limits.at_least(0), "give images a second")})  # fmt: skip

"""`asgd_mpi.train` that leaves in the directory ASGD_BENCH_MEMORY how much memory each rank took: rank3.json.

    before    bytes of its own memory (RssAnon) after the imports
    peak      the most that they were, looked at every 10 ms
    resident  the most that the process had in sight (VmHWM): with the slots of the server's ring that it has read

A training on few made-up images: ASGD_BENCH_IMAGES of them.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

import torchvision.models  # noqa: F401 - imported before it is weighed

from asgd_mpi import train
from asgd_mpi.data.folder import SyntheticSet
from benchmarks.networks import RANKS

MEMORY, IMAGES = "ASGD_BENCH_MEMORY", "ASGD_BENCH_IMAGES"


def status(name: str) -> int:
    """A line of /proc/self/status in bytes, such as VmHWM."""
    [line] = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(f"{name}:")
    ]
    return 1024 * int(line.split()[1])


def watch(seen: list[int]) -> None:
    """Keep the most in seen[0]."""
    while True:
        seen[0] = max(seen[0], status("RssAnon"))
        time.sleep(0.01)


if __name__ == "__main__":
    before = status("RssAnon")
    threading.Thread(target=watch, args=[seen := [before]], daemon=True).start()
    SyntheticSet.NUM_SAMPLES = dict.fromkeys(("train", "val"), int(os.environ[IMAGES]))
    left = train.main()
    rank = next(os.environ[name] for name in RANKS if name in os.environ)
    found = {"before": before, "peak": seen[0], "resident": status("VmHWM")}
    (Path(os.environ[MEMORY]) / f"rank{rank}.json").write_text(json.dumps(found))
    sys.exit(left)

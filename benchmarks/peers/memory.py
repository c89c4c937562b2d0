"""The limit that memory sets: STREAM's triad and copy in torch, into arrays that exist and are far larger than the cache.

Prints the median bytes/s of each, with 1 and 2 threads; the bytes counted are those that the kernel names, as STREAM does
(triad 3, copy 2 an element of 4 bytes), not what the cache reads before it writes.
"""

import json
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.peers import protocol

FLOATS = 64 << 20  # 256 MB an array


def bandwidth(act: Callable[[], object], num_bytes: int, seconds: float) -> float:
    """Median bytes/s of repetitions within `seconds`."""
    act()
    times, ends = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < ends:
        started = time.perf_counter()
        act()
        times.append(time.perf_counter() - started)
    return num_bytes / statistics.median(times)


def main() -> None:
    options = protocol.options()
    a, b, c = (torch.full((FLOATS,), value) for value in (0.0, 1.0, 2.0))
    measured = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        measured[f"triad_{threads}"] = bandwidth(
            lambda: torch.add(b, c, alpha=3.0, out=a), 12 * FLOATS, options.seconds / 4
        )
        measured[f"copy_{threads}"] = bandwidth(lambda: a.copy_(b), 8 * FLOATS, options.seconds / 4)
    print(json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()

"""Packing under killed launchers whose tasks live on: `python -m tests.chaos.packers --times 50` (about two minutes).

Each time a set is packed by two tasks, again and again, into one directory: the launcher is killed at a random moment; its
tasks end with it or, in every second start, live on beside the next start, as they do behind a wrapper; single tasks are
killed, too. In the end every file has to be what one undisturbed packer makes, to the byte, and every checksum right.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from tqdm import tqdm

from asgd_mpi.data.manifest import MANIFEST
from asgd_mpi.errors import DataError
from data_prep import imagenet, synthetic
from data_prep.verify import verify

TASKS = 2
STARTS = 8  # that are killed; then one process does what is left


def killed_again_and_again(source: Path, out: Path, shard_size: int, dice: random.Random) -> int:
    """Pack `source` until it is done, killing launchers; return how many were killed before they had ended."""
    alive, inherited = os.pipe()
    kills = 0
    for start in range(STARTS):
        launcher = _launch(source, out, shard_size, dice, live_on=start % 2 == 0)
        time.sleep(dice.uniform(0, 0.2))
        if os.waitpid(launcher, os.WNOHANG) == (0, 0):
            os.kill(launcher, signal.SIGKILL)
            os.waitpid(launcher, 0)
            kills += 1
        if (out / MANIFEST).exists():
            break
    os.close(inherited)
    while os.read(alive, 1):  # until all that inherited it, tasks and their processes, have ended
        pass
    os.close(alive)
    try:
        imagenet.prepare(source, out, shard_size=shard_size, workers=1)
    except DataError as complete:  # and what a killed launcher could not clear away has gone
        assert "already holds a complete data set" in str(complete)
    return kills


def _launch(source: Path, out: Path, shard_size: int, dice: random.Random, live_on: bool) -> int:
    """Start a launcher and its tasks, which may live on when it is killed."""
    workers = dice.choice([1, 1, 2])
    launcher = os.fork()
    if launcher:
        return launcher
    os.setsid()
    tasks = []
    for rank in range(TASKS):
        task = os.fork()
        if not task:
            _run_task(source, out, shard_size, rank, workers, live_on)
        tasks.append(task)
    if dice.random() < 0.3:
        time.sleep(dice.uniform(0, 0.15))
        os.kill(tasks[0], signal.SIGKILL)
    for task in tasks:
        os.waitpid(task, 0)
    os._exit(0)


def _run_task(
    source: Path, out: Path, shard_size: int, rank: int, workers: int, live_on: bool
) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    # its own is shared by all that a process has forked: a killed one may hold it for ever
    tqdm.set_lock(threading.RLock())
    imagenet.rank_and_size = lambda: (rank, TASKS)
    if live_on:
        imagenet.end_with_parent = lambda: None
    status = 1
    try:
        imagenet.prepare(source, out, shard_size=shard_size, workers=workers)
        status = 0
    finally:
        os._exit(status)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kills = 0
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        synthetic.generate(root, classes=6, train=20, val=4, width=120, height=90)
        imagenet.prepare(root / "archives", root / "packed", shard_size=8, workers=1)
        right = {path.name: path.read_bytes() for path in (root / "packed").iterdir()}
        for number in range(options.times):
            out = root / str(number)
            kills += killed_again_and_again(
                root / "archives", out, 8, random.Random(options.seed + number)
            )
            found = {path.name: path.read_bytes() for path in out.iterdir()}
            verify(out)
            if found != right:
                print(
                    f"seed {options.seed + number}: {sorted(found)} differ from {sorted(right)}",
                    file=sys.stderr,
                )
                return 1
    print(f"{options.times} sets packed, {kills} launchers killed, every file as it should be")
    return 0


if __name__ == "__main__":
    sys.exit(main())

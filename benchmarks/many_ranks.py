"""Time and memory of a report on many ranks: `python benchmarks/many_ranks.py --out DIR [--ranks 1000] [--minutes 5]`.

Writes a run directory as that many ranks would have, with a line a second each and a push a second from each worker, and
reports it in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

from asgd_mpi.process import ending
from asgd_mpi.record.events import End, EventLog, Interval, Push, Start, Validation
from asgd_mpi.record.rundir import RunDir

T0, BATCH, EPOCH = 1_700_000_000.0, 128, 128 * 10_009


def write_run(path: Path, num_ranks: int, seconds: int) -> RunDir:
    """A run of `num_ranks - 1` workers; every 50th is at a third of the speed of the others."""
    run, clock, workers = RunDir.create(path, "many"), random.Random(1), num_ranks - 1
    run.config.write_text(
        json.dumps({"model": {"name": "resnet50"}, "data": {"batch_size": BATCH}})
    )
    run.versions.write_text(
        json.dumps({"torch": "2", "ranks": [{"rank": rank} for rank in range(num_ranks)]})
    )
    held, log, version = [0] * workers, EventLog(run.pushes), 0
    for second in range(seconds):
        for worker in range(workers):
            if worker % 50 or second % 3 == 0:
                start = version * BATCH % EPOCH
                log.write(
                    Push(
                        T0 + second + worker / workers,
                        version,
                        worker,
                        held[worker],
                        version * BATCH // EPOCH,
                        start,
                        start + BATCH,
                        0.1,
                        6.9 - 1e-6 * version,
                    )
                )
                version += 1
                held[worker] = version
    log.close()
    for rank in range(num_ranks):
        log = EventLog(run.metrics_of(rank))
        log.write(
            Start(
                T0,
                rank,
                "worker" if rank else "server",
                f"node{rank // 8}",
                f"cuda:{rank % 8}" if rank else "cpu",
                workers,
                25_557_032,
                EPOCH,
                90 * EPOCH,
            )
        )
        for second in range(seconds):
            own = (
                dict(compute=clock.uniform(0.6, 0.8), push=0.1, fetch=0.05)
                if rank
                else dict(apply=clock.uniform(0.5, 0.9))
            )
            pushes = workers if rank == 0 else int((rank - 1) % 50 > 0 or second % 3 == 0)
            log.write(
                Interval(
                    T0 + second,
                    T0 + second + 1,
                    **own,
                    idle=1 - sum(own.values()),
                    images=BATCH * pushes,
                    pushes=pushes,
                    fetches=pushes,
                    bytes_pushed=102_228_128 * pushes,
                    bytes_fetched=102_228_128 * pushes,
                )
            )
            if rank == 0 and second % 20 == 19:
                log.write(
                    Validation(
                        T0 + second,
                        second * workers,
                        second * workers * BATCH,
                        second * workers * BATCH / EPOCH,
                        50_000,
                        max(0.25, 0.99 - second / 600),
                        0.1,
                        2.0,
                    )
                )
        log.write(End(T0 + seconds, "finished"))
        log.close()
    return run


@ending.of_command
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=5.0)
    options = parser.parse_args()
    run = write_run(options.out, options.ranks, round(60 * options.minutes))
    num_bytes = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "asgd_mpi.report", str(run.path)],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{options.ranks} ranks, {options.minutes:g} minutes, {num_bytes / 1e6:.0f} MB of records: reported in "
        f"{time.monotonic() - started:.1f} s ({usage.ru_utime + usage.ru_stime:.1f} s of CPU), at most {usage.ru_maxrss / 1024:.0f} MiB"
    )
    for path in sorted(run.report.iterdir()):
        print(f"  {path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    sys.exit(main())

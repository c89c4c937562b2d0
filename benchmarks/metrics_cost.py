"""What the metrics and the watchdog cost: `python -m benchmarks.metrics_cost`, with mpirun on the PATH.

Trains the embedded digits, whose steps take a few milliseconds, so that the metrics weigh more than in any serious run: with
them, without them (see unmetered.py), with every phase written one by one (`--record.spans`), and without the watchdog
(unwatched.py), in turn. The figures are the time of the run over that of the run without metrics, or without the watchdog, in
the same round, and the bytes of metrics, a rank and a rank and hour; and, since neighbours on the machine change the first by more than
these do, the time that a meter takes for what a worker does with it in a step, and that of a look of the watchdog, in a process
that does nothing else. Medians.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from asgd_mpi.process import ending
from asgd_mpi.record.events import EventLog
from asgd_mpi.record.meter import Meter
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.watchdog import LOOK_S, Watch
from benchmarks import machine, training

DEADLINE_S = 300.0
KINDS = {
    "without": ("benchmarks.unmetered", []),
    "with": ("asgd_mpi.train", []),
    "with spans": ("asgd_mpi.train", ["--record.spans", "1000000"]),
    "unwatched": ("benchmarks.unwatched", []),
}


@ending.of_command
def main() -> int:
    options = _parse()
    described = machine.describe("benchmarks.metrics_cost")
    found: dict[str, list[float]] = {}
    for number in range(options.rounds):
        order = list(KINDS) if number % 2 else list(KINDS)[::-1]  # no kind always comes first
        speed: dict[str, float] = {}
        for kind in order:
            speed[kind], num_bytes, seconds = _measure(kind, options)
            found.setdefault(f"{kind}: kB a rank", []).append(num_bytes / 1e3)
            found.setdefault(f"{kind}: MB a rank and hour", []).append(
                num_bytes / 1e6 * 3600 / seconds
            )
        for kind in ("with", "with spans"):
            found.setdefault(f"{kind}: time over that without", []).append(
                speed["without"] / speed[kind]
            )
        found.setdefault("with: time over that of unwatched", []).append(
            speed["unwatched"] / speed["with"]
        )
        print(
            f"round {number + 1}: "
            + ", ".join(f"{kind} {rate:.0f} images/s" for kind, rate in speed.items()),
            flush=True,
        )
        found.setdefault("the meter's time for a step (us)", []).append(1e6 * meter_s())
        found.setdefault(f"a look of the watchdog, every {LOOK_S:g} s (us)", []).append(
            1e6 * look_s()
        )
    result = {name: machine.summary(values) for name, values in found.items()}
    for name, values in result.items():
        print(
            f"{name:32}{values['median']:10.4f} ({values['min']:.4f} to {values['max']:.4f}, n = {values['n']})"
        )
    machine.write(options.out, described | {"result": result})
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.metrics_cost", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--epochs", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "metrics_cost.json")
    return parser.parse_args()


def _measure(kind: str, options: argparse.Namespace) -> tuple[float, float, float]:
    """Return (images/s, bytes of metrics a rank, seconds they are of) of a training's middle. Raises launch.Failed."""
    module, more = KINDS[kind]
    arguments = [
        "--epochs",
        str(options.epochs),
        "--run.validate_every",
        str(2 * options.epochs),
        *more,
    ]
    with training.run(options.workers, arguments, {}, DEADLINE_S, module) as run:
        start, stop = training.middle_times(run)
        return training.images_per_s(run), _num_bytes(run, options.workers + 1), stop - start


def meter_s(steps: int = 20_000) -> float:
    """Seconds that a meter takes for one step of a worker without overlap."""
    with tempfile.TemporaryDirectory() as place:
        log = EventLog(Path(place) / "log.jsonl")
        meter = Meter(log, interval_s=1.0)
        started = time.perf_counter()
        for _ in range(steps):
            for name in ("data", "compute", "compute"):
                with meter.phase(name):
                    pass
            meter.add(images=32, skipped_images=0)
            meter.add(pushes=1, bytes_pushed=4000)
            meter.add(push=0.001, fetch=0.001)
            meter.add(fetches=1, torn_reads=0, bytes_fetched=4000)
            meter.tick()
        found = (time.perf_counter() - started) / steps
        log.close()
    return found


def look_s(looks: int = 2000) -> float:
    """Seconds that a look of the watchdog takes on a rank of a run that has never stalled."""
    with tempfile.TemporaryDirectory() as place:
        meter = Meter(EventLog(Path(place) / "log.jsonl"), interval_s=1.0)
        watch = Watch(RunDir(Path(place)), 1, "host", meter, 1e9, lambda: None, lambda: 0)
        started = time.perf_counter()
        for _ in range(looks):
            watch.look()
        found = (time.perf_counter() - started) / looks
        watch.close()
    return found


def _num_bytes(run: RunDir, num_ranks: int) -> float:
    """Return the bytes of the metrics lines in the middle of the run, for one rank."""
    lines = [
        line
        for rank in range(num_ranks)
        for line in run.metrics_of(rank).read_bytes().splitlines(keepends=True)
    ]
    middle = 1 - training.HEAD - training.TAIL
    return middle * sum(map(len, lines)) / num_ranks


if __name__ == "__main__":
    sys.exit(main())

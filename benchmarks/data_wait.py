"""How long emulated GPUs wait for images: `python -m benchmarks.data_wait --work DIR`, with mpirun on the PATH.

Trains on the loader benchmark's packed photos (original JPEGs of about 110 kB, random crops of 224 pixels, mirror) with
emulated GPUs (see emulated.py), twice a round: with steps of no time, which shows the rate that the loader can give, and
at once after that with steps so long that, with the exchange, the workers ask for 90 % of it. The share of the workers'
time spent waiting for data is read from the metrics, from the middle of the run. Medians.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from asgd_mpi.process import ending
from asgd_mpi.record.events import Interval, read_events
from asgd_mpi.record.rundir import RunDir
from benchmarks import launch, loader, machine, training
from benchmarks.networks import PARAMETERS, STEPS_MS

STARTUP_S = 120.0
SLOWEST = 10  # times the seconds asked for: then a run is given up
BATCH = 32  # images: short, so that many batches fit in a run
NUM_IMAGES = loader.CLASSES * loader.PER_CLASS


@ending.of_command
def main() -> int:
    options = _parse()
    described = machine.describe("benchmarks.data_wait")
    loader.make_data(options.work)
    found: list[dict[str, float]] = []
    failures = []
    epochs = options.seconds * 500 / NUM_IMAGES  # until a rate is known
    for number in range(options.rounds):
        try:
            free = _measure(0.0, epochs, options)
            # of a worker, a batch
            period_ms = 1e3 * BATCH * options.workers / free["images_per_s"]
            # less the exchange
            step_ms = period_ms / options.share - (1 - free["data_wait"]) * period_ms
            asked = _measure(step_ms, options.seconds * free["images_per_s"] / NUM_IMAGES, options)
        except launch.Failed as failure:
            failures.append(f"round {number + 1}: {failure}")
            print(failures[-1], file=sys.stderr)
            continue
        found.append(
            {
                "loader_images_per_s": free["images_per_s"],
                "step_ms": step_ms,
                "images_per_s": asked["images_per_s"],
                "over_loader": asked["images_per_s"] / free["images_per_s"],
                "data_wait": asked["data_wait"],
                "data_wait_without_steps": free["data_wait"],
            }
        )
        print(
            f"round {number + 1}: "
            + ", ".join(f"{key} {value:.4g}" for key, value in found[-1].items()),
            flush=True,
        )
    result = (
        {key: machine.summary([one[key] for one in found]) for key in found[0]} if found else {}
    )
    if result:
        wait = result["data_wait"]
        print(
            f"waiting for data at {100 * options.share:.0f} % of the loader's rate: {100 * wait['median']:.2f} % of the time "
            f"({100 * wait['min']:.2f} to {100 * wait['max']:.2f}, n = {wait['n']})"
        )
    machine.write(
        options.out,
        described | {"failures": failures, "workers": options.workers, "result": result},
    )
    return int(bool(failures))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data_wait", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument(
        "--work",
        type=Path,
        required=True,
        help="directory of the loader benchmark's data, made if missing",
    )
    parser.add_argument(
        "--share",
        type=float,
        default=0.9,
        help="of the loader's rate that the emulated GPUs ask for",
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="loader threads of each worker")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "data_wait.json")
    return parser.parse_args()


def _measure(step_ms: float, epochs: float, options: argparse.Namespace) -> dict[str, float]:
    """Raises launch.Failed."""
    arguments = [
        "--data",
        str((options.work / "original").resolve()),
        "--model",
        "benchmarks.networks:vector",
        "--epochs",
        str(epochs),
        "--batch-size",
        str(BATCH),
        "--lr",
        "0.01",
        "--data.augment",
        "reference",
        "--data.threads",
        str(options.threads),
        "--run.validate_every",
        str(2 * epochs),
        "--record.interval_s",
        "0.25",
    ]
    with training.run(
        options.workers,
        arguments,
        {PARAMETERS: "100000", STEPS_MS: str(step_ms)},
        STARTUP_S + SLOWEST * options.seconds,
        "benchmarks.emulated",
    ) as run:
        return {
            "images_per_s": training.images_per_s(run),
            "data_wait": data_wait(run, options.workers),
        }


def data_wait(run: RunDir, workers: int) -> float:
    """The share of the workers' time that they waited for data, in the middle of the run."""
    start, stop = training.middle_times(run)
    inside = [
        event
        for rank in range(1, workers + 1)
        for event in read_events(run.metrics_of(rank))
        if isinstance(event, Interval) and event.t0 >= start and event.t1 <= stop
    ]
    return sum(interval.data for interval in inside) / sum(
        interval.t1 - interval.t0 for interval in inside
    )


if __name__ == "__main__":
    sys.exit(main())

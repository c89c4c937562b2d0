"""What a checkpoint costs while it is written: `python -m benchmarks.checkpoint`, with mpirun on the PATH.

Emulated GPUs (a step sleeps) push and fetch a network of so many parameters; every few seconds the run is saved, with the
momentum of every worker. Within one run, the pushes a second while a checkpoint is being written are compared with those
before and after: their ratio is what a user loses for that time. Medians over the checkpoints of all rounds.
"""

from __future__ import annotations

import argparse
import sys
from bisect import bisect
from pathlib import Path

from asgd_mpi.process import ending
from asgd_mpi.record.events import Checkpoint, read_events, read_pushes
from asgd_mpi.record.rundir import RunDir
from benchmarks import machine, training
from benchmarks.networks import PARAMETERS, STEPS_MS

DEADLINE_S = 300.0
BATCH, DIGITS_IMAGES = 16, 1437


@ending.of_command
def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoint", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--parameters", type=int, default=11_700_000)
    parser.add_argument("--step-ms", type=float, default=100.0)
    parser.add_argument("--every-s", type=float, default=6.0)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "checkpoint.json")
    options = parser.parse_args()
    described = machine.describe("benchmarks.checkpoint")
    environment = {PARAMETERS: str(options.parameters), STEPS_MS: str(options.step_ms)}
    ratios: list[float] = []
    shares: list[float] = []
    sizes: list[float] = []
    for number in range(options.rounds):
        with training.run(
            options.workers, _options(options), environment, DEADLINE_S, "benchmarks.emulated"
        ) as run:
            found = compare(run)
        ratios += [ratio for ratio, _, _ in found]
        shares += [seconds for _, seconds, _ in found]
        sizes += [num_bytes / 1e6 for _, _, num_bytes in found]
        print(
            f"round {number + 1}: "
            + ", ".join(f"{ratio:.3f} over {seconds:.2f} s" for ratio, seconds, _ in found),
            flush=True,
        )
    result = {
        "pushes/s while it is written, over before and after": machine.summary(ratios),
        "seconds": machine.summary(shares),
        "MB": machine.summary(sizes),
    }
    for name, values in result.items():
        print(
            f"{name:56}{values['median']:10.3f} ({values['min']:.3f} to {values['max']:.3f}, n = {values['n']})"
        )
    machine.write(options.out, described | {"result": result})
    return 0


def _options(options: argparse.Namespace) -> list[str]:
    images = options.workers * BATCH * options.seconds / (options.step_ms / 1e3)
    return [
        "--model",
        "benchmarks.networks:vector",
        "--batch-size",
        str(BATCH),
        "--epochs",
        str(images / DIGITS_IMAGES),
        "--lr",
        "0.01",
        "--run.validate_every",
        "1e9",
        "--data.augment",
        "none",
        "--data.threads",
        "1",
        "--checkpoint.every_s",
        str(options.every_s),
    ]


def compare(run: RunDir) -> list[tuple[float, float, int]]:
    """For each checkpoint on the way (ratio of the rates, seconds, bytes); a rate is of pushes a second."""
    times = [push.t for push in read_pushes(run.pushes)]
    found = []
    for event in [
        event for event in read_events(run.metrics_of(0)) if isinstance(event, Checkpoint)
    ][:-1]:
        began, length = event.t - event.seconds, max(event.seconds, 1.0)
        if began - length < times[0] or event.t + length > times[-1]:
            continue
        beside = (
            _count(times, began - length, began) + _count(times, event.t, event.t + length)
        ) / (2 * length)
        found.append(
            (_count(times, began, began + length) / length / beside, event.seconds, event.num_bytes)
        )
    return found


def _count(times: list[float], start: float, stop: float) -> int:
    return bisect(times, stop) - bisect(times, start)


if __name__ == "__main__":
    sys.exit(main())

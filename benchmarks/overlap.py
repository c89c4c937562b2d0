"""How much of the computing power is used beside emulated GPUs, by model size and n_push: `python -m benchmarks.overlap`.

N workers whose step sleeps; the exchange is the training's own (see emulated.py). Ideal is N batches a step. The apply
share says where the server saturates. Rounds are interleaved, medians.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

from asgd_mpi.process import ending
from benchmarks import launch, machine, training
from benchmarks.networks import PARAMETERS, STEPS_MS

STARTUP_S = 240.0  # on top of a run's own time
SLOWEST = 30  # times the ideal: then a run is given up
BATCH = 16  # images; what a batch holds does not matter here
DIGITS_IMAGES = 1437
# of workers: their GPUs would do that
WITHOUT_VECTORS = ("--rule.momentum_at", "server", "--rule.max_drift", "0")


@ending.of_command
def main() -> int:
    options = _parse()
    described = machine.describe("benchmarks.overlap")
    cells = list(itertools.product(options.parameters, options.steps_ms, options.n_push))
    found: dict[tuple, list[dict]] = {cell: [] for cell in cells}
    failures = []
    # a cell comes again after all others
    for round_, cell in itertools.product(range(options.rounds), cells):
        name = f"round {round_ + 1}, P = {cell[0]}, {cell[1]:g} ms, n_push {cell[2]}"
        try:
            found[cell].append(_measure(*cell, options))
        except launch.Failed as failure:
            failures.append(f"{name}: {failure}")
            print(failures[-1], file=sys.stderr)
            continue
        print(
            f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in found[cell][-1].items()),
            flush=True,
        )
    result = [
        {"parameters": cell[0], "step_ms": cell[1], "n_push": cell[2]}
        | {key: machine.summary([run[key] for run in runs]) for key in runs[0]}
        for cell, runs in found.items()
        if runs
    ]
    print("\n" + _table(result))
    machine.write(options.out, described | {"failures": failures, "cells": result})
    return int(bool(failures))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overlap", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument(
        "--parameters", type=machine.integers, default=[1_000_000, 11_700_000, 61_000_000]
    )
    parser.add_argument(
        "--steps-ms",
        type=lambda text: [float(part) for part in text.split(",")],
        default=[50.0, 100.0, 200.0],
    )
    parser.add_argument(
        "--n-push", type=lambda text: text.split(","), default=["1", "2", "10", "auto"]
    )
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=15.0, help="of a run at the ideal speed")
    parser.add_argument(
        "--train",
        default="",
        help="more options for the training, such as '--exchange.overlap true'",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "overlap.json")
    return parser.parse_args()


def _measure(
    num_parameters: int, step_ms: float, n_push: str, options: argparse.Namespace
) -> dict[str, float]:
    """Raises launch.Failed."""
    ideal = options.workers * BATCH / step_ms * 1e3  # images/s
    epochs = options.seconds * ideal / DIGITS_IMAGES
    arguments = [
        *training.unprepared("benchmarks.networks:vector", epochs, BATCH),
        "--exchange.n_push",
        n_push,
        *WITHOUT_VECTORS,
        *options.train.split(),
    ]
    with training.run(
        options.workers,
        arguments,
        {PARAMETERS: str(num_parameters), STEPS_MS: str(step_ms)},
        STARTUP_S + SLOWEST * options.seconds,
        "benchmarks.emulated",
    ) as run:
        speed = training.images_per_s(run)
        return {
            "images_per_s": speed,
            "over_ideal": speed / ideal,
            "pushes_per_s": training.pushes_per_s(run),
            "apply_share": training.apply_share(run),
        }


def _table(cells: list[dict]) -> str:
    return machine.table(
        [
            "parameters",
            "step",
            "n_push",
            "images/s over the ideal (range)",
            "pushes/s",
            "server applies",
        ],
        [
            [
                cell["parameters"],
                f"{cell['step_ms']:g} ms",
                cell["n_push"],
                _percent(cell["over_ideal"]),
                f"{cell['pushes_per_s']['median']:.1f}",
                f"{100 * cell['apply_share']['median']:.0f} % of the time",
            ]
            for cell in cells
        ],
    )


def _percent(found: dict) -> str:
    return f"{100 * found['median']:.1f} % ({100 * found['min']:.1f}-{100 * found['max']:.1f})"


if __name__ == "__main__":
    sys.exit(main())

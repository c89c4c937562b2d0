"""What cutting a network over several ranks brings: `python -m benchmarks.stages`, with mpirun on the PATH.

Speed: images/s of one replica of S stages and M micro-batches a batch, on emulated GPUs: the layers of a network sleep, the
gradient is small but real, and all else is the training itself. Ideal is S times one GPU; the bubble of the schedule takes
(S - 1) / (M + S - 1) of it. Cells are interleaved, medians. Memory (`--parts memory`): the most that each rank took of its own
beside what its process had after the imports, and its part of the gradient, which lies in memory that it shares with the
server; next to what the plan says, for networks cut by memory, and AlexNet by columns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from asgd_mpi.config import parse as configuration
from asgd_mpi.pipeline.schedule import SCHEDULES, bubble
from asgd_mpi.process import ending
from asgd_mpi.record.summary import summarize
from asgd_mpi.task import complete, open_task
from benchmarks import launch, machine, training
from benchmarks.networks import IMAGE_MS, NUM_LINKS
from benchmarks.weighed import IMAGES, MEMORY

STARTUP_S = 240.0  # on top of a run's own time
SLOWEST = 10  # times the ideal: then a run is given up
BATCH = 16  # images, so that 8 micro-batches have two each
DIGITS_IMAGES = 1437
HEAVY_S = 600.0
Cell = tuple[int, int, str]  # stages, micro-batches, schedule


class Heavy(NamedTuple):
    """A network whose memory is measured, in 1, 2, ... stages."""

    model: str
    stages: tuple[int, ...] = (1, 2, 3)
    cut: tuple[str, ...] = ("--stages.balance", "memory")
    batch: int = 4
    parts: int = 2
    side: int = 64  # of the images, in pixels


HEAVY = {
    "ResNet-152": Heavy("torchvision:resnet152"),
    "VGG-16": Heavy("torchvision:vgg16"),
    "AlexNet": Heavy("alexnet2", (1, 2), ("--stages.cut", "columns"), batch=16, parts=1, side=224),
}


@ending.of_command
def main() -> int:
    options = _parse()
    described = machine.describe("benchmarks.stages")
    # the other part, measured before
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    for part in options.parts:
        failures: list[str] = []
        cells = {"speed": _speed, "memory": _memory}[part](options, failures)
        print("\n" + {"speed": _speed_table, "memory": _memory_table}[part](cells))
        found[part] = described | {"failures": failures, "cells": cells}
    machine.write(options.out, found)
    return int(any(found[part]["failures"] for part in options.parts))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stages", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("--parts", type=lambda text: text.split(","), default=["speed", "memory"])
    parser.add_argument(
        "--stages", type=machine.integers, default=[1, 2, 4], help="divisors of 4, for the speed"
    )
    parser.add_argument("--micro-batches", type=machine.integers, default=[1, 2, 4, 8])
    parser.add_argument("--schedules", type=lambda text: text.split(","), default=list(SCHEDULES))
    parser.add_argument("--step-ms", type=float, default=480.0, help="of a batch on one GPU")
    parser.add_argument("--seconds", type=float, default=8.0, help="of a run at the ideal speed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--networks", type=lambda text: text.split(","), default=list(HEAVY), help="for the memory"
    )
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "stages.json")
    return parser.parse_args()


def _speed(options: argparse.Namespace, failures: list[str]) -> list[dict]:
    cells = [
        cell
        for cell in itertools.product(options.stages, options.micro_batches, options.schedules)
        if cell[0] > 1 or cell[2] == options.schedules[0]
    ]  # one stage has no schedule
    runs: dict[Cell, list[dict]] = {cell: [] for cell in cells}
    # a cell comes again after all others
    for round_, cell in itertools.product(range(options.rounds), cells):
        name = f"round {round_ + 1}, {cell[0]} stages, {cell[1]} micro-batches, {cell[2]}"
        try:
            runs[cell].append(_train(*cell, options))
        except launch.Failed as failure:
            failures.append(f"{name}: {failure}")
            print(failures[-1], file=sys.stderr)
            continue
        print(
            f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in runs[cell][-1].items()),
            flush=True,
        )
    return [
        {
            "stages": cell[0],
            "micro_batches": cell[1],
            "schedule": cell[2],
            "bubble": bubble(*cell[:2]),
        }
        | {key: machine.summary([run[key] for run in each]) for key in each[0]}
        for cell, each in runs.items()
        if each
    ]


def _train(
    num_stages: int, micro_batches: int, schedule: str, options: argparse.Namespace
) -> dict[str, float]:
    """Raises launch.Failed."""
    ideal = num_stages * BATCH / options.step_ms * 1e3  # images/s
    epochs = options.seconds * ideal / DIGITS_IMAGES
    width = NUM_LINKS // num_stages
    arguments = [
        *training.unprepared("benchmarks.networks:chain", epochs, BATCH),
        "--compute.micro_batches",
        str(micro_batches),
        "--stages",
        str(num_stages),
    ]
    if num_stages > 1:
        arguments += [
            "--stages.schedule",
            schedule,
            "--stages.balance",
            "memory",
            "--stages.at",
            ",".join(str(width * stage) for stage in range(1, num_stages)),
        ]
    with training.run(
        num_stages,
        arguments,
        {IMAGE_MS: str(options.step_ms / BATCH)},
        STARTUP_S + SLOWEST * options.seconds,
    ) as run:
        speed = training.images_per_s(run)
        found = summarize(run).pipelines
        return {
            "images_per_s": speed,
            "over_ideal": speed / ideal,
            "waited": found.measured if found else 0.0,
        }


def _speed_table(cells: list[dict]) -> str:
    return machine.table(
        [
            "stages",
            "micro-batches",
            "schedule",
            "images/s",
            "over the ideal (range)",
            "1 - bubble",
            "stages wait",
            "bubble",
        ],
        [
            [
                cell["stages"],
                cell["micro_batches"],
                cell["schedule"] if cell["stages"] > 1 else "",
                f"{cell['images_per_s']['median']:.1f}",
                _percent(cell["over_ideal"]),
                f"{100 - 100 * cell['bubble']:.1f} %",
                f"{100 * cell['waited']['median']:.1f} %",
                f"{100 * cell['bubble']:.1f} %",
            ]
            for cell in cells
        ],
    )


def _percent(found: dict) -> str:
    return f"{100 * found['median']:.1f} % ({100 * found['min']:.1f}-{100 * found['max']:.1f})"


def _memory(options: argparse.Namespace, failures: list[str]) -> list[dict]:
    rows = []
    for name, num_stages in (
        (each, number) for each in options.networks for number in HEAVY[each].stages
    ):
        try:
            rows += _weigh(name, num_stages)
        except launch.Failed as failure:
            failures.append(f"{name}, {num_stages} stages: {failure}")
            print(failures[-1], file=sys.stderr)
    return rows


def _weigh(name: str, num_stages: int) -> list[dict]:
    """A row for each stage. Raises launch.Failed."""
    heavy = HEAVY[name]
    arguments = [
        "--model",
        heavy.model,
        "--data.source",
        "synthetic",
        "--data.image_size",
        str(heavy.side),
        "--batch-size",
        str(heavy.batch),
        "--compute.micro_batches",
        str(heavy.parts),
        "--stages",
        str(num_stages),
        *(heavy.cut if num_stages > 1 else ()),
        "--epochs",
        "1",
        "--run.validate_every",
        "1e9",
        "--checkpoint.every_s",
        "0",
    ]
    task = open_task(complete(configuration.parse(arguments)))
    if task.config.stages.cut == "columns":
        planned = task.rows_of_columns(task.outline())
    else:
        plan = task.stage_plan(task.outline())
        planned = plan.rows(task.cuts(plan, "memory") if num_stages > 1 else [])
    with tempfile.TemporaryDirectory() as place:
        environment = {MEMORY: place, IMAGES: str(2 * heavy.batch)}
        with training.run(num_stages, arguments, environment, HEAVY_S, "benchmarks.weighed"):
            weights = [
                json.loads((Path(place) / f"rank{rank}.json").read_text())
                for rank in range(1, num_stages + 1)
            ]
    return [
        {
            "network": name,
            "stages": num_stages,
            "stage": stage,
            "parameters": row.parameters,
            "planned_mb": row.memory_bytes / 1e6,
            "resident_mb": found["resident"] / 1e6,
            "before_mb": found["before"] / 1e6,
            "measured_mb": (found["peak"] - found["before"] + 4 * row.parameters) / 1e6,
        }
        for stage, (row, found) in enumerate(zip(planned, weights))
    ]


def _memory_table(rows: list[dict]) -> str:
    return machine.table(
        ["network", "stages", "planned MB of each", "measured MB of each"],
        [
            [
                name,
                number,
                *(
                    ", ".join(
                        f"{row[key]:.0f}"
                        for row in rows
                        if (row["network"], row["stages"]) == (name, number)
                    )
                    for key in ("planned_mb", "measured_mb")
                ),
            ]
            for name, number in dict.fromkeys((row["network"], row["stages"]) for row in rows)
        ],
    )


if __name__ == "__main__":
    sys.exit(main())

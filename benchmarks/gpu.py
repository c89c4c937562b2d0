"""What a step costs on a real GPU beside a plain PyTorch loop, and whether copies hide behind compute: `python -m benchmarks.gpu`.

A server and 1, 2, 4 workers that share one GPU, on made-up images, next to benchmarks.peers.loop: the same network, images
and batch without us. Rounds are interleaved, medians. Then one worker under torch's profiler: of the seconds in which its GPU
copied, how many passed while it computed; `--trace FILE` keeps that trace, to open in Perfetto (ui.perfetto.dev).
`--device cpu` tries all of it without a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from asgd_mpi.data.folder import SyntheticSet
from asgd_mpi.process import ending
from benchmarks import launch, machine, training
from benchmarks.profiled import TRACE

PLAIN = 0  # workers of the plain loop
DEADLINE_S = 900.0  # of a run
COPIES, KERNELS = ("gpu_memcpy",), ("kernel",)  # categories of the profiler's events


@ending.of_command
def main() -> int:
    options = _parse()
    described = machine.describe("benchmarks.gpu") | {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    }
    cells = [(model, workers) for model in options.models for workers in (PLAIN, *options.workers)]
    speeds: dict[tuple[str, int], dict[int, float]] = {cell: {} for cell in cells}  # by round
    failures = []
    for round_, (model, workers) in itertools.product(range(options.rounds), cells):
        name = f"round {round_ + 1}, {model}, {f'{workers} workers' if workers else 'plain loop'}"
        try:
            speed = _ours(model, workers, options, {}) if workers else _plain(model, options)
        except launch.Failed as failure:
            failures.append(f"{name}: {failure}")
            print(failures[-1], file=sys.stderr)
            continue
        speeds[model, workers][round_] = speed
        print(f"{name}: {speed:.0f} images/s", flush=True)
    result = [
        _cell(model, workers, speeds, options.batch_size)
        for model, workers in cells
        if speeds[model, workers]
    ]
    hidden = {model: _hidden(model, options, failures) for model in options.models}
    print("\n" + _table(result))
    for model, share in hidden.items():
        print(
            f"{model}: "
            + (
                "no copies in the trace"
                if share is None
                else f"{share:.0%} of the copying passed behind kernels"
            )
        )
    machine.write(
        options.out, described | {"failures": failures, "cells": result, "copies_hidden": hidden}
    )
    return int(bool(failures))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument(
        "--models", type=lambda text: text.split(","), default=["alexnet", "resnet50"]
    )
    parser.add_argument("--workers", type=machine.integers, default=[1, 2, 4])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=300, help="of each worker")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--train", default="--exchange.n_push auto", help="more options for the training"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--threads", type=int, default=2, help="of each loader")
    parser.add_argument("--trace", type=Path, help="keep the trace of the first model here")
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "gpu.json")
    return parser.parse_args()


def _task(model: str, options: argparse.Namespace) -> list[str]:
    """Return what ours and the plain loop train, and on which data."""
    return [
        "--model",
        model,
        "--data.source",
        "synthetic",
        "--data.image_size",
        str(options.image_size),
        "--batch-size",
        str(options.batch_size),
        "--data.threads",
        str(options.threads),
        "--compute.device",
        options.device,
        "--lr",
        "0.001",
    ]


def _plain(model: str, options: argparse.Namespace) -> float:
    """Images a second. Raises launch.Failed."""
    command = launch.python(
        "benchmarks.peers.loop",
        "--steps",
        options.steps,
        "--compute.threads",
        1,
        *_task(model, options),
    )
    return launch.last_json(launch.run(command, DEADLINE_S))["images_per_s"]


def _ours(model: str, workers: int, options: argparse.Namespace, env: dict[str, str]) -> float:
    """Images a second of all workers. Raises launch.Failed."""
    epochs = options.steps * workers * options.batch_size / SyntheticSet.NUM_SAMPLES["train"]
    arguments = [
        *_task(model, options),
        "--compute.workers_per_gpu",
        str(workers),
        "--epochs",
        str(epochs),
        "--run.validate_every",
        str(2 * epochs),
        "--checkpoint.every_s",
        "0",
        *options.train.split(),
    ]
    with training.run(workers, arguments, env, DEADLINE_S, "benchmarks.profiled") as run:
        return training.images_per_s(run)


def _hidden(model: str, options: argparse.Namespace, failures: list[str]) -> float | None:
    with tempfile.TemporaryDirectory() as place:
        trace = (
            options.trace
            if options.trace and model == options.models[0]
            else Path(place) / "trace.json"
        )
        try:
            _ours(model, 1, options, {TRACE: str(trace.absolute())})
        except launch.Failed as failure:
            failures.append(f"{model}, profiled: {failure}")
            return None
        return hidden_share(json.loads(trace.read_text())["traceEvents"])


def hidden_share(events: Sequence[dict]) -> float | None:
    """Return the share of the copying seconds, to or from the GPU, in which a kernel runs; None: no copies."""
    copies, kernels, either = (
        _seconds(events, categories) for categories in (COPIES, KERNELS, COPIES + KERNELS)
    )
    return (copies + kernels - either) / copies if copies else None


def _seconds(events: Sequence[dict], categories: Sequence[str]) -> float:
    """How long at least one event of these categories is going on, in the trace's unit."""
    total, until = 0.0, -math.inf
    for start, stop in sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") in categories
    ):
        total += max(0.0, stop - max(start, until))
        until = max(until, stop)
    return total


def _cell(
    model: str, workers: int, speeds: dict[tuple[str, int], dict[int, float]], batch_size: int
) -> dict:
    """With the time of a step of one GPU, whoever shares it, over the plain loop's of the same round."""
    plain, own = speeds[model, PLAIN], speeds[model, workers]
    # either may have failed
    over = [plain[round_] / own[round_] for round_ in own if round_ in plain]
    return {
        "model": model,
        "workers": workers,
        "images_per_s": machine.summary(list(own.values())),
        "batch_ms": machine.summary([1e3 * batch_size / speed for speed in own.values()]),
        "time_over_plain": machine.summary(over) if over else None,
    }


def _table(cells: list[dict]) -> str:
    return machine.table(
        [
            "network",
            "workers on the GPU",
            "images/s",
            "ms a batch",
            "time over the plain loop (range)",
        ],
        [
            [
                cell["model"],
                cell["workers"] or "plain loop",
                f"{cell['images_per_s']['median']:.0f}",
                f"{cell['batch_ms']['median']:.1f}",
                _ratio(cell["time_over_plain"]),
            ]
            for cell in cells
        ],
    )


def _ratio(found: dict | None) -> str:
    return f"{found['median']:.3f} ({found['min']:.3f}-{found['max']:.3f})" if found else ""


if __name__ == "__main__":
    sys.exit(main())

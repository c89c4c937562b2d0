"""What it costs to code a push: `python -m benchmarks.compression`.

Codes and decodes a gradient of normal numbers, and the same with the residual that a worker keeps, on one thread, or a GPU
(`--device cuda`): GB/s of float32, and how many passes over the gradient that takes. A pass is a copy of it, measured in turn with
the rest. CPU seconds of the thread, which neighbours on the machine change less; of a GPU seconds until it is done. Medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from asgd_mpi.optim.error_feedback import ErrorFeedback
from asgd_mpi.optim.formats import kept_of
from asgd_mpi.process import ending
from asgd_mpi.vector.partition import pieces
from asgd_mpi.vector.vector_format import VectorFormat
from benchmarks import machine


@ending.of_command
def main() -> int:
    options = _parse()
    torch.set_num_threads(1)
    cases = {"pass": _copy(options), **_codings(options)}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(options.rounds):
        for name, act in cases.items():
            seconds[name].append(_timed(act, options.device))
    one_pass, gigabytes = statistics.median(seconds["pass"]), 4e-9 * options.parameters
    rows = [
        {
            "what": name,
            "ms": 1e3 * statistics.median(times),
            "GB/s": gigabytes / statistics.median(times),
            "passes": statistics.median(times) / one_pass,
            "passes_of_rounds": [time_ / there for time_, there in zip(times, seconds["pass"])],
        }
        for name, times in seconds.items()
    ]
    for row in rows:
        print(
            f"{row['what']:28} {row['ms']:8.2f} ms {row['GB/s']:7.2f} GB/s {row['passes']:6.2f} passes"
        )
    if options.out:
        described = machine.describe("benchmarks.compression")
        found = {**described, "parameters": options.parameters, "device": options.device}
        Path(options.out).write_text(json.dumps({**found, "rows": rows}, indent=1))
    return 0


def _copy(options: argparse.Namespace) -> Callable[[], object]:
    vector = torch.randn(options.parameters, device=options.device)
    other = torch.empty_like(vector)
    return lambda: other.copy_(vector)


def _codings(options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""
    cases: dict[str, Callable[[], object]] = {}
    kept = kept_of(options.density)
    for wire in ("int8", "int4", "topk"):
        form = VectorFormat(options.parameters, wire, most=kept if wire == "topk" else 0)
        cases |= _coding(form, form.most, options.device)
    return cases


def _coding(form: VectorFormat, kept: int, device: str) -> dict[str, Callable[[], object]]:
    gradient = torch.randn(form.num_floats, device=device)
    pushed, feedback = gradient.clone(), ErrorFeedback(form, gradient)
    memory = torch.zeros(form.longest, dtype=torch.uint8, device=device)
    vector = form.vector_in(memory, kept)

    def code() -> None:
        for piece in pieces(form.num_floats):
            vector[piece] = gradient[piece]

    def decode() -> None:
        for piece in pieces(form.num_floats):
            pushed[piece] = vector[piece]

    def push() -> None:
        feedback.push_(pushed, kept)

    return {f"{form.wire} coded": code, f"{form.wire} decoded": decode, f"{form.wire} pushed": push}


def _timed(act: Callable[[], object], device: str) -> float:
    act()  # what is done once only
    is_gpu = device != "cpu"
    clock = time.perf_counter if is_gpu else time.thread_time
    _wait(is_gpu)
    started = clock()
    act()
    _wait(is_gpu)
    return clock() - started


def _wait(is_gpu: bool) -> None:
    if is_gpu:
        torch.cuda.synchronize()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compression", description=__doc__)
    parser.add_argument("--parameters", type=int, default=11_700_000, help="Of the gradient.")
    parser.add_argument("--density", type=float, default=0.01, help="Of topk.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="", help="JSON file for the figures.")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

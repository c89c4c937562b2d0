"""One of the workers is slower: ours against gloo DistributedDataParallel, on the digits: `python -m benchmarks.straggler`.

A step of a worker sleeps 20 ms, of the slow one 5 times as long, beside the computation itself. Two questions: images/s over
the sum of the workers' single speeds (a plain loop alone on the machine), and, without a slow one, seconds to an accuracy,
each system at the best of the learning rates offered. Rounds are interleaved, medians.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path

from asgd_mpi.model.networks import DIGITS
from asgd_mpi.process import ending
from benchmarks import launch, machine, training
from benchmarks.networks import STEPS_MS

STARTUP_S = 90.0  # on top of a run's own time
DIGITS_IMAGES = 1437  # of an epoch
SYSTEMS = ("ours", "ddp")
NEVER = math.inf  # seconds to an accuracy that was not reached


@ending.of_command
def main() -> int:
    options = _parse()
    described = machine.describe("benchmarks.straggler")
    even = [options.step_ms] * options.workers
    uneven = [*even[1:], options.slower * options.step_ms]
    speeds: dict[str, list[float]] = {"fast alone": [], "slow alone": [], "ours": [], "ddp": []}
    seconds: dict[tuple[str, float], list[float]] = {}
    for round_ in range(options.rounds):
        speeds["fast alone"].append(_ddp_speed(even[:1], options))
        speeds["slow alone"].append(_ddp_speed(uneven[-1:], options))
        speeds["ours"].append(_our_speed(uneven, speeds, options))
        speeds["ddp"].append(_ddp_speed(uneven, options))
        print(
            f"round {round_ + 1}: images/s: "
            + ", ".join(f"{name} {found[-1]:.0f}" for name, found in speeds.items()),
            flush=True,
        )
        for rate in options.rates:
            seconds.setdefault(("ours", rate), []).append(_our_seconds(even, rate, options))
            seconds.setdefault(("ddp", rate), []).append(_ddp_seconds(even, rate, options))
            print(
                f"round {round_ + 1}: seconds to {options.accuracy:.0%} at rate {rate}: "
                + ", ".join(f"{system} {seconds[system, rate][-1]:.2f}" for system in SYSTEMS),
                flush=True,
            )
    result = _result(speeds, seconds, options)
    print("\n" + _table(result, options))
    machine.write(options.out, described | result)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.straggler", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--slower", type=float, default=5.0, help="times, of the last worker")
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="of each measurement of images/s"
    )
    parser.add_argument("--accuracy", type=float, default=0.95)
    parser.add_argument(
        "--epochs",
        type=float,
        default=10.0,
        help="length of the schedule of the runs to the accuracy",
    )
    parser.add_argument(
        "--rates",
        type=lambda text: [float(part) for part in text.split(",")],
        default=[0.01, 0.02, 0.04, 0.08],
        help="learning rates that both may choose from",
    )
    parser.add_argument(
        "--train", default="", help="more options for ours, such as '--exchange.n_push auto'"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "straggler.json")
    return parser.parse_args()


def _ddp(steps_ms: list[float], *arguments: object, deadline_s: float) -> dict:
    command = launch.python(
        "benchmarks.peers.ddp", "--steps-ms", ",".join(map(str, steps_ms)), *arguments
    )
    return launch.last_json(launch.run(command, STARTUP_S + deadline_s))


def _ddp_speed(steps_ms: list[float], options: argparse.Namespace) -> float:
    """Images/s; so many steps that they take about --seconds."""
    steps = round(1e3 * options.seconds / max(steps_ms))
    epochs = math.ceil(steps * len(steps_ms) * DIGITS.batch_size / DIGITS_IMAGES) + 1
    return _ddp(steps_ms, "--max-steps", steps, "--epochs", epochs, deadline_s=4 * options.seconds)[
        "images_per_s"
    ]


def _ddp_seconds(steps_ms: list[float], rate: float, options: argparse.Namespace) -> float:
    found = _ddp(
        steps_ms,
        "--accuracy",
        options.accuracy,
        "--epochs",
        options.epochs,
        "--rate",
        rate,
        deadline_s=_longest_s(options),
    )["seconds_to_accuracy"]
    return NEVER if found is None else found


def _our_speed(
    steps_ms: list[float], speeds: dict[str, list[float]], options: argparse.Namespace
) -> float:
    """Images/s; so many epochs that they take about --seconds at the sum of the single speeds."""
    ideal = (len(steps_ms) - 1) * speeds["fast alone"][-1] + speeds["slow alone"][-1]
    epochs = options.seconds * ideal / DIGITS_IMAGES
    with _ours(
        steps_ms,
        DIGITS.lr,
        epochs,
        4 * options.seconds,
        options,
        "--run.validate_every",
        str(2 * epochs),
    ) as run:
        return training.images_per_s(run)


def _our_seconds(steps_ms: list[float], rate: float, options: argparse.Namespace) -> float:
    with _ours(steps_ms, rate, options.epochs, _longest_s(options), options) as run:
        found = training.seconds_to(run, options.accuracy)
    return NEVER if found is None else found


def _ours(
    steps_ms: list[float],
    rate: float,
    epochs: float,
    deadline_s: float,
    options: argparse.Namespace,
    *more: str,
):
    return training.run(
        len(steps_ms),
        [
            "--model",
            "benchmarks.networks:sleeping",
            *training.recipe(rate, epochs),
            *options.train.split(),
            *more,
        ],
        {STEPS_MS: ",".join(map(str, steps_ms))},
        STARTUP_S + deadline_s,
    )


def _longest_s(options: argparse.Namespace) -> float:
    """A deadline for a run to the accuracy: 10 times what its steps sleep."""
    return (
        10
        * options.epochs
        * DIGITS_IMAGES
        / DIGITS.batch_size
        / options.workers
        * options.step_ms
        / 1e3
    )


def _result(speeds: dict, seconds: dict, options: argparse.Namespace) -> dict:
    ideal = (options.workers - 1) * statistics.median(speeds["fast alone"]) + statistics.median(
        speeds["slow alone"]
    )
    best = {
        system: min(options.rates, key=lambda rate: statistics.median(seconds[system, rate]))
        for system in SYSTEMS
    }
    return {
        "images_per_s": {name: machine.summary(found) for name, found in speeds.items()},
        "sum_of_single_speeds": ideal,
        "seconds_to_accuracy": [
            {"system": system, "rate": rate}
            | {
                name: None if value == NEVER else value
                for name, value in machine.summary(found).items()
            }
            for (system, rate), found in seconds.items()
        ],
        "best_rate": best,
        "best_seconds": {
            system: _none_if_never(statistics.median(seconds[system, best[system]]))
            for system in SYSTEMS
        },
    }


def _none_if_never(value: float) -> float | None:
    return None if value == NEVER else value


def _table(result: dict, options: argparse.Namespace) -> str:
    rows = []
    for system, name in (("ours", "asgd_mpi"), ("ddp", "gloo DistributedDataParallel")):
        speed, took = result["images_per_s"][system], result["best_seconds"][system]
        rows.append(
            [
                name,
                f"{speed['median']:.0f} ({speed['min']:.0f}-{speed['max']:.0f})",
                f"{100 * speed['median'] / result['sum_of_single_speeds']:.0f} %",
                "never" if took is None else f"{took:.2f} (rate {result['best_rate'][system]})",
            ]
        )
    return machine.table(
        [
            "system",
            f"images/s, one {options.slower:g} times slower",
            "over the sum of the single speeds",
            f"seconds to {options.accuracy:.0%}, none slower",
        ],
        rows,
    )


if __name__ == "__main__":
    sys.exit(main())

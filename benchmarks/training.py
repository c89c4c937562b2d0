"""Start a training of ours in a run directory that is thrown away, and read from its files what the benchmarks ask."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from asgd_mpi.model.networks import DIGITS
from asgd_mpi.record.events import Interval, Push, Start, Validation, read_events, read_pushes
from asgd_mpi.record.rundir import RunDir
from benchmarks import launch

# shares of the pushes left out of a rate: loading and warming up, the last leases
HEAD, TAIL = 0.2, 0.1


@contextmanager
def run(
    workers: int,
    options: list[str],
    env: dict[str, str],
    deadline_s: float,
    module: str = "asgd_mpi.train",
    launcher: str = "mpirun --bind-to none",
) -> Iterator[RunDir]:
    """Train with so many workers. Raises launch.Failed."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "run"
        launch.run(
            launch.mpirun(workers + 1, launcher)
            + launch.python(
                module,
                "--run.dir",
                path,
                "--run.progress",
                "none",
                "--compute.device",
                "cpu",
                "--compute.threads",
                1,
                *options,
            ),
            deadline_s,
            env,
        )
        yield RunDir.open(path)


def recipe(rate: float, epochs: float, momentum: bool = True) -> list[str]:
    """Return the options that train any network on the digits as their own recipe says; or with the momentum that the rule has."""
    kept = ["--rule.momentum", str(DIGITS.momentum)] if momentum else []
    return [
        "--epochs",
        str(epochs),
        "--batch-size",
        str(DIGITS.batch_size),
        "--data.augment",
        DIGITS.augment,
        *kept,
        "--rule.weight_decay",
        str(DIGITS.weight_decay),
        "--lr",
        str(rate),
        "--schedule.name",
        DIGITS.schedule,
        "--schedule.warmup_epochs",
        str(DIGITS.warmup_epochs),
    ]


def unprepared(network: str, epochs: float, batch: int) -> list[str]:
    """Return options of a training on digits whose images cost nothing to prepare, validated at its end only."""
    return [
        "--model",
        network,
        "--epochs",
        str(epochs),
        "--batch-size",
        str(batch),
        "--lr",
        "0.01",
        "--data.augment",
        "none",
        "--data.threads",
        "1",
        "--run.validate_every",
        str(2 * epochs),
    ]


def images_per_s(run_dir: RunDir) -> float:
    """Images a second that the server applied, in the middle of the run."""
    pushes = _middle(run_dir)
    return sum(push.positions for push in pushes[1:]) / (pushes[-1].t - pushes[0].t)


def pushes_per_s(run_dir: RunDir) -> float:
    pushes = _middle(run_dir)
    return (len(pushes) - 1) / (pushes[-1].t - pushes[0].t)


def apply_share(run_dir: RunDir) -> float:
    """The share of the run's time in which the server applied pushes: near 1 it is saturated."""
    pushes = _middle(run_dir)
    intervals = [
        event
        for event in read_events(run_dir.metrics_of(0))
        if isinstance(event, Interval) and event.t0 >= pushes[0].t and event.t1 <= pushes[-1].t
    ]
    seconds = sum(interval.t1 - interval.t0 for interval in intervals)
    return sum(interval.apply for interval in intervals) / seconds if seconds else math.nan


def seconds_to(run_dir: RunDir, accuracy: float) -> float | None:
    """From when all ranks were ready until the first version was made that has that top-1 accuracy; None if there is none."""
    events = [event for path in sorted(run_dir.metrics.iterdir()) for event in read_events(path)]
    ready = max(event.t for event in events if isinstance(event, Start))
    scores = sorted(
        (event for event in events if isinstance(event, Validation)),
        key=lambda score: score.version,
    )
    return next((score.when - ready for score in scores if score.top1_error <= 1 - accuracy), None)


def middle_times(run_dir: RunDir) -> tuple[float, float]:
    """When the part of a run begins and ends that rates are read from, Unix seconds."""
    pushes = _middle(run_dir)
    return pushes[0].t, pushes[-1].t


def _middle(run_dir: RunDir) -> list[Push]:
    pushes = list(read_pushes(run_dir.pushes))
    return pushes[int(HEAD * len(pushes)) : len(pushes) - int(TAIL * len(pushes))]

"""The run for TensorBoard (`--record.tensorboard true`), from the server's events as they are written; steps are samples.

Needs the package tensorboard or tensorboardX. Pushes are averaged over an interval of the metrics, so the files grow by some
hundred bytes a second, whatever the rate of the pushes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asgd_mpi.errors import ConfigError
from asgd_mpi.record.disk import make_directory
from asgd_mpi.record.events import End, Event, Interval, Push, Resume, Validation

WRITERS = ("torch.utils.tensorboard", "tensorboardX")  # modules that have a SummaryWriter


def find_writer() -> Any:
    """Return the class SummaryWriter. Raises ConfigError if no package has it."""
    for name in WRITERS:
        try:
            return importlib.import_module(name).SummaryWriter
        except ImportError:
            continue
    raise ConfigError(
        "--record.tensorboard true: neither tensorboard nor tensorboardX is installed. "
        "pip install 'asgd_mpi[tensorboard]', or leave the option out."
    )


class TensorBoard:
    """Takes the server's events with `add`; it writes to `path`. Raises ConfigError.

    What the disk refuses, or the writer's package makes of that in its own thread, is told once, with `tell`, and ends the board only.
    """

    def __init__(self, path: Path, tell: Callable[[str], None] = lambda text: None):
        self._make_writer, self._path, self._tell = find_writer(), path, tell
        self._writer: Any = None  # made with the first value
        self._has_ended = False
        self._samples = 0  # applied, over all starts
        self._fresh()

    def add(self, event: Event | Push | Resume) -> None:
        if self._has_ended:
            return
        try:
            self._add(event)
        except Exception as error:  # each package has errors of its own for a disk that refuses
            self._has_ended = True
            self._tell(
                f"nothing more is written for TensorBoard: {type(error).__name__}: {error}. The training goes on"
            )

    def _add(self, event: Event | Push | Resume) -> None:
        match event:
            case Resume():
                self._samples = event.samples
            case Push():
                images = event.positions - event.skipped
                self._samples += event.positions
                self._pushes += 1
                self._images += images
                self._loss += event.loss * images
                self._lr += event.lr
                self._staleness += event.staleness
            case Interval() if self._pushes and event.t1 > event.t0:
                seconds = event.t1 - event.t0
                self._write(
                    event.t1,
                    self._samples,
                    {
                        "training/loss": self._loss / max(1, self._images),
                        "training/learning rate": self._lr / self._pushes,
                        "exchange/images per s": self._images / seconds,
                        "exchange/staleness": self._staleness / self._pushes,
                        "exchange/server busy": (event.apply + event.checkpoint) / seconds,
                    },
                )
                self._fresh()
            case Validation():
                results = self._results(event)
                if event.loss is not None:
                    results["validation/loss"] = event.loss
                self._write(event.when, event.samples, results)
            case End() if self._writer:
                self._writer.close()

    def _results(self, event: Validation) -> dict[str, float]:
        """Return what a validation measured, beside the loss."""
        if event.top1_error is not None and event.top5_error is not None:
            return {
                "validation/top-1 accuracy": 1 - event.top1_error,
                "validation/top-5 accuracy": 1 - event.top5_error,
            }
        found = {f"validation/{name}": value for name, value in event.metrics.items()}
        return {name: value for name, value in found.items() if value is not None}

    def _fresh(self) -> None:
        self._pushes = self._images = self._staleness = 0
        self._loss = self._lr = 0.0

    def _write(self, t: float, samples: int, values: dict[str, float]) -> None:
        # what an earlier start wrote beyond here was forgotten by the run, too
        if self._writer is None:
            make_directory(self._path)
            self._writer = self._make_writer(str(self._path), purge_step=samples)
        for name, value in values.items():
            self._writer.add_scalar(name, value, samples, walltime=t)

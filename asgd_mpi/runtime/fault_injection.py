"""Failures on purpose, to rehearse what a run does about them; `config.failures` reads what is asked for."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time

import torch

from asgd_mpi.config.failures import Failure

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}


class InjectedError(RuntimeError):
    """Raised on purpose."""


class Injector:
    """The failures of one rank; call `step` at each of its steps."""

    def __init__(self, failures: list[Failure], rank: int):
        self.failures = [failure for failure in failures if failure.rank == rank]
        self._steps = 0
        self._last = time.monotonic()
        for failure in self.failures:
            if failure.t is not None or failure.step is None and failure.kind in SIGNALS:
                timer = threading.Timer(failure.t or 0.0, _signal, [failure])
                timer.daemon = True
                timer.start()

    def step(self, gradient: torch.Tensor | None = None) -> None:
        """A step is over; `gradient`: what it computed. Raises InjectedError."""
        self._steps += 1
        for failure in self.failures:
            if failure.kind == "slow":
                time.sleep((failure.amount - 1) * max(0.0, time.monotonic() - self._last))
            elif (
                failure.kind == "nan"
                and failure.step <= self._steps < failure.step + failure.amount
            ):
                if gradient is not None:
                    gradient[0] = float("nan")
            elif failure.step == self._steps:
                _act(failure)
        self._last = time.monotonic()


def _act(failure: Failure) -> None:
    if failure.kind == "raise":
        raise InjectedError(f"raised on purpose at step {failure.step} (--run.inject)")
    if failure.kind == "stall":
        time.sleep(failure.amount)
    elif failure.kind in SIGNALS:
        _signal(failure)


def _signal(failure: Failure) -> None:
    if failure.kind == "stop":  # somebody else has to wake us up
        subprocess.Popen(
            ["sh", "-c", f"sleep {failure.amount}; kill -CONT {os.getpid()}"],
            start_new_session=True,
        )
    os.kill(os.getpid(), SIGNALS[failure.kind])

"""Where a rank's time goes: phases are timed, things counted, and every so often one Interval is written."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from asgd_mpi.record.events import PHASES, EventLog, Interval, Span
from asgd_mpi.record.nvml import Gauge


class Meter:
    """Times the phases of one rank; what no phase covers is idle. Any thread may `add`; one thread does the rest."""

    def __init__(self, log: EventLog, interval_s: float, spans: int = 0):
        # of the rank's GPU: read at the end of every interval
        self.gauge: Gauge | None = None
        self._log = log
        self._interval_s = interval_s
        self.doing = "the start"  # a phase, for the watchdog,
        self.last_progress = time.monotonic()  # ... and when something was last counted
        self._spans_left = spans  # stretches of phases to write one by one
        self._lock = threading.Lock()  # of the interval under way
        self._fresh()

    @contextmanager
    def phase(self, name: str) -> Iterator[dict[str, float]]:
        """Time the body as `name`, one of the time fields of Interval. Phases do not nest.

        Yields a dict to put seconds of the body in that belong to other phases; they are no part of this one.
        """
        started, self.doing = time.perf_counter(), name
        others: dict[str, float] = {}
        yield others
        self.add(**{name: time.perf_counter() - started - sum(others.values())}, **others)

    def add(self, **amounts: float) -> None:
        """Add to fields of Interval: seconds of a phase that was timed elsewhere, or counts."""
        self.last_progress = time.monotonic()
        with self._lock:
            for name, amount in amounts.items():
                setattr(self._now, name, getattr(self._now, name) + amount)
        if self._spans_left > 0:
            self._write_spans(
                {
                    name: seconds
                    for name, seconds in amounts.items()
                    if name in PHASES and seconds > 0
                }
            )

    def _write_spans(self, phases: dict[str, float]) -> None:
        """Write phases that have just ended, one after the other."""
        t = time.time() - sum(phases.values())
        for name, seconds in phases.items():
            self._log.write(Span(t, name, seconds))
            self._spans_left -= 1
            t += seconds

    def tick(self) -> None:
        """Write the interval if it is over."""
        if time.perf_counter() - self._started >= self._interval_s:
            self.flush()

    def flush(self) -> None:
        """Write what there is."""
        with self._lock:
            interval, elapsed = self._now, time.perf_counter() - self._started
            self._fresh()
        interval.t1 = interval.t0 + elapsed
        interval.idle = max(
            0.0, elapsed - sum(getattr(interval, phase) for phase in PHASES if phase != "idle")
        )
        self._log.write(interval)
        self._read_gauge()

    def begin(self) -> None:
        """Write the first reading of the rank's GPU, after its Start: what it uses from here on is told as of the run."""
        self._read_gauge(utilisation=None)  # of the second before

    def _read_gauge(self, **changes: None) -> None:
        if self.gauge and (reading := self.gauge.read()):
            self._log.write(msgspec.structs.replace(reading, **changes))

    def _fresh(self) -> None:
        self._started = time.perf_counter()
        self._now = Interval(t0=time.time(), t1=0.0)

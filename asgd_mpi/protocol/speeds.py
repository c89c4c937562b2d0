"""Batches that each worker makes of a push, by its speed, so that all of them push at about one pace.

Pure: the time is told. A speed is measured at the server, from a worker's push to its next one: so what the exchange takes is a part
of it, too, and a worker behind a slow link makes fewer batches as a slow one does. (Liu et al. 2024, arXiv:2401.09135, dynamic local
updates: H_i = H v_i / max v.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

RECENT = 4  # pushes that a speed is measured over


def batches_by_speed(most: int, speed: float, fastest: float) -> int:
    """Return how many batches a worker makes in the time that the fastest one takes for `most`: 1 at least."""
    return max(1, min(most, round(most * speed / fastest)))


class Speeds:
    """Samples a second of each worker; most: batches of a push of the fastest one, 0 where speeds are of no account."""

    def __init__(self, num_workers: int, most: int):
        self._most = most
        # when what each works on began; None: it did something else in between
        self._began: list[float | None] = [None] * num_workers
        # samples and seconds of the last pushes
        self._recent: list[deque[tuple[int, float]]] = [
            deque(maxlen=RECENT) for _ in range(num_workers)
        ]

    def begin(self, worker: int, now: float) -> None:
        """Take note that a worker begins with its next push."""
        self._began[worker] = now

    def pushed(self, worker: int, samples: int, now: float) -> None:
        """Take note of a push, after which its worker begins with the next one."""
        if not self._most:
            return
        began = self._began[worker]
        if began is not None and now > began:
            self._recent[worker].append((samples, now - began))
        self._began[worker] = now

    def pause(self, worker: int) -> None:
        """Take note that a worker does something else, or nothing: the time to its next push tells no speed."""
        self._began[worker] = None

    def forget(self, worker: int) -> None:
        """Take note that a worker is lost: what was measured is of no account when it is back."""
        self._began[worker] = None
        self._recent[worker].clear()

    def batches(self, worker: int, members: Iterable[int]) -> int:
        """Return how many batches a worker's next pushes hold; 0 if that does not go by speeds."""
        if not self._most:
            return 0
        speed = self._speed(worker)
        if not speed:
            return self._most
        return batches_by_speed(self._most, speed, max(speed, *map(self._speed, members)))

    def _speed(self, worker: int) -> float:
        """Return samples a second; 0 if that was not measured yet."""
        recent = self._recent[worker]
        seconds = sum(took for _, took in recent)
        return sum(samples for samples, _ in recent) / seconds if seconds else 0.0

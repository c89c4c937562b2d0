"""Which stretches of a trace belong to one gradient: the worker's push, the update that it is in, the worker's next fetch.

A push of the log is in the stretch `push` of its worker that holds the moment in which the server wrote it down, since the
worker waits there until it is told; its update is the server's last `apply` before that moment. With overlap no worker waits,
and there are no arrows. Times are seconds on the clock of rank 0, right to SLACK_S.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator

from asgd_mpi.record.events import Push, Span

SLACK_S = 0.002
PHASES_THREAD = 1


class Arrows:
    def __init__(self) -> None:
        # worker's rank -> (moment, push), as logged
        self._logged: dict[int, list[tuple[float, Push]]] = defaultdict(list)
        # (rank, phase) -> beginnings of its stretches
        self._begins: dict[tuple[int, str], list[float]] = defaultdict(list)
        # (rank, beginning of its stretch, moment in which the server wrote it down)
        self._found: list[tuple[int, float, float]] = []

    def add_push(self, push: Push, moment: float) -> None:
        self._logged[push.worker + 1].append((moment, push))

    def add_span(self, rank: int, span: Span, begin: float) -> dict | None:
        """Add a stretch, after all pushes; returns what is known of the push in it."""
        if span.phase not in ("push", "fetch", "apply"):
            return None
        self._begins[rank, span.phase].append(begin)
        if span.phase != "push":
            return None
        logged = self._logged[rank]
        at = bisect_left(logged, begin, key=lambda one: one[0])
        if at == len(logged) or logged[at][0] > begin + span.seconds + SLACK_S:
            return None
        moment, push = logged[at]
        self._found.append((rank, begin, moment))
        return push_facts(push)

    def laid(self) -> Iterator[dict]:
        """Yield the arrows as flow events: from the push (s) by the update (t) to the fetch (f)."""
        updates = sorted(self._begins[0, "apply"])
        for number, (rank, begin, moment) in enumerate(self._found):
            update = _latest(updates, moment)
            if update is None or update < begin - SLACK_S:
                continue  # its stretch was not written
            fetch = _first(self._begins[rank, "fetch"], begin)
            following = _first(self._begins[rank, "push"], begin + 1e-9)
            yield _flow("s", number, rank, begin)
            if fetch is None or following is not None and fetch > following:
                yield _flow("f", number, 0, update)
            else:
                yield _flow("t", number, 0, update)
                yield _flow("f", number, rank, fetch)


def push_facts(push: Push) -> dict:
    """Return what a push is told with."""
    return {
        "version": push.version,
        "rank": push.worker + 1,
        "staleness": push.staleness,
        "images": push.positions,
        "lr": push.lr,
        "loss": push.loss,
    }


def _latest(times: list[float], moment: float) -> float | None:
    at = bisect_right(times, moment)
    return times[at - 1] if at else None


def _first(times: list[float], moment: float) -> float | None:
    at = bisect_left(times, moment)
    return times[at] if at < len(times) else None


def _flow(kind: str, number: int, rank: int, t: float) -> dict:
    bound = {}
    if kind == "f":
        bound["bp"] = "e"
    return {
        "name": "gradient",
        "cat": "flow",
        "ph": kind,
        "id": number,
        "pid": rank,
        "tid": PHASES_THREAD,
        "ts": round(1e6 * t, 1),
        **bound,
    }

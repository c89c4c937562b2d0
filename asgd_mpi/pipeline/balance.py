"""Where to cut a chain of nodes so that the largest part is as small as can be. Pure: numbers in, cuts out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Optional

SLACK = 0.05  # the largest part may be larger by this if less then crosses the cuts


# of a part 0, 1, ... that is [start, stop); None: it may not be that
Cost = Callable[[int, int, int], Optional[float]]


def balance(
    num_parts: int, end: int, crossing: Mapping[int, float], cost: Cost
) -> list[int] | None:
    """Return the num_parts - 1 cuts of [0, end), in order; None if there are too few places to cut.

    crossing: what crosses each possible cut.
    The largest cost is within SLACK of the least possible; of all such cuts, those that the least crosses.
    """

    def best(join: Callable[[float, float], float], of: Cost) -> tuple[float, list[int]] | None:
        """Return the best cuts if a part costs `of` and `join` adds a part to the others."""
        # the best for what lies before a place
        ways: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
        for part in range(num_parts):
            further = {}
            for stop in sorted(crossing) if part < num_parts - 1 else [end]:
                options = (
                    (join(before, price), [*cuts, start])
                    for start, (before, cuts) in ways.items()
                    if start < stop and (price := of(part, start, stop)) is not None
                )
                if found := min(options, default=None):
                    further[stop] = found
            ways = further
        return (ways[end][0], ways[end][1][1:]) if end in ways else None

    costs = {
        (part, start, stop): cost(part, start, stop)
        for part in range(num_parts)
        for start in (0, *crossing)
        for stop in (*crossing, end)
        if start < stop
    }
    least = best(max, lambda *part: costs[part])
    if least is None:
        return None
    limit = least[0] * (1 + SLACK)

    def crossed(part: int, start: int, stop: int) -> float | None:
        """Return what enters a part that keeps to the limit; None for others."""
        price = costs[part, start, stop]
        if price is None or price > limit:
            return None
        return crossing.get(start, 0.0)

    within = best(
        lambda before, price: before + price,
        crossed,
    )
    return within[1]

"""Numbers as a reader wants them: with their unit, a few digits, and `n/a` for what the files do not give."""

from __future__ import annotations

from collections.abc import Sequence

from asgd_mpi.errors import plural

NONE = "n/a"


def number(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"


def count(number: int, thing: str, things: str = "") -> str:
    """`1 worker`, `1,200 workers`, `2 pushes`."""
    return f"{number:,} {plural(number, thing, things)}"


def workers(crews: Sequence[int]) -> str:
    """`1 worker`; of a run whose starts had different numbers of them, `3, then 2 workers`."""
    return ", then ".join([*(f"{crew:,}" for crew in crews[:-1]), count(crews[-1], "worker")])


def rate(value: float | None) -> str:
    return NONE if value is None else f"{value:.4g}"


def percent(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else f"{100 * value:.{digits}f} %"


def seconds(value: float | None) -> str:
    """A duration of a second or so up: `0.35 s`, `24.0 s`, `2 min 05 s`, `1 h 02 min 05 s`."""
    if value is None:
        return NONE
    if value < 120:
        digits = 1 if value >= 1 else 2
        return f"{value:.{digits}f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} min {rest:02d} s"
    return f"{minutes} min {rest:02d} s"


def short(value: float | None) -> str:
    """A duration from microseconds up: `0.24 ms`."""
    if value is None:
        return NONE
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale or unit == "us":
            return f"{value / scale:.3g} {unit}"
    raise AssertionError("the last unit takes everything")


def size(num_bytes: float | None) -> str:
    if num_bytes is None:
        return NONE
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"

"""Numbers as a reader wants them: with their unit, a few digits, and `n/a` for what the files do not give."""

from __future__ import annotations

NONE = "n/a"


def number(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"


def count(number: int, thing: str) -> str:
    """`1 worker`, `1,200 workers`."""
    return f"{number:,} {thing}{'s' * (number != 1)}"


def rate(value: float | None) -> str:
    return NONE if value is None else f"{value:.4g}"


def percent(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else f"{100 * value:.{digits}f} %"


def seconds(value: float | None) -> str:
    if value is None:
        return NONE
    if value < 120:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"


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

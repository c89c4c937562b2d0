"""Counts of samples in words. `Task.unit` is the plural of their name, such as images, windows, queries."""

from __future__ import annotations

import re

SAME = ("series", "species", "ss")  # one and many


def one_of(unit: str) -> str:
    """Return the name of one sample: image of images, query of queries, box of boxes."""
    if unit.endswith(SAME):
        return unit
    if re.search("[^aeiou]ies$", unit) and not unit.endswith("movies"):
        return f"{unit[:-3]}y"
    return unit[:-2] if unit.endswith(("sses", "shes", "ches", "xes")) else unit.removesuffix("s")


def counted(number: int, unit: str) -> str:
    """Return a number of samples in words: 1 image, 2 images."""
    return f"{number} {one_of(unit) if number == 1 else unit}"

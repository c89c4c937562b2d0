"""Parameter groups: ranges of the (P,) vector that have a rate, a weight decay and betas of their own, as torch.optim's param_groups.

A parameter that no group covers has the rule's settings. A range is one parameter's, from where it begins (a multiple of ALIGNMENT
floats, see vector.flat) to its own end; the gap behind it is zero and stays zero.
Pure: no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import NamedTuple, Optional


ALIGNMENT = 16  # floats = 64 bytes
LONGEST_TOLD = 3000  # characters: an option's value has 4096 bytes at most


class Settings(NamedTuple):
    """What may differ from group to group; None: as the rule has it."""

    rate: float = 1.0  # times the rate of the schedule
    weight_decay: Optional[float] = None
    betas: Optional[tuple[float, float]] = None


def told(settings: Mapping[str, Settings]) -> str:
    """Return the settings of parameters, by name, as a short text that others do not have: `rate 0.1: 2 (a.weight to b.bias, 1f00a2b7)`."""
    names: dict[Settings, list[str]] = {}
    for name, one in settings.items():
        names.setdefault(one, []).append(name)
    parts = [f"{_in_words(one)}: {_few(those)}" for one, those in names.items()]
    text = "; ".join(parts)
    return text if len(text) < LONGEST_TOLD else f"{len(parts)} groups ({_hash(text)})"


def _in_words(one: Settings) -> str:
    own = {"rate": one.rate, "weight decay": one.weight_decay, "betas": one.betas}
    plain = {"rate": 1.0, "weight decay": None, "betas": None}
    return ", ".join(f"{name} {value}" for name, value in own.items() if value != plain[name])


def _few(names: Sequence[str]) -> str:
    """Return one name, or how many there are, the first, the last, and a hash of all."""
    if len(names) == 1:
        return names[0]
    return f"{len(names)} ({names[0]} to {names[-1]}, {_hash(' '.join(names))})"


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class ParameterGroup:
    """A parameter in [start, stop) of the flat vector, and its settings. A group of torch.optim is several of these."""

    start: int
    stop: int
    settings: Settings


def within(groups: Iterable[ParameterGroup], part: slice) -> list[ParameterGroup]:
    """Return the groups of a part of the vector, such as a server's slice, counted from its beginning."""
    clipped = (
        replace(
            group,
            start=max(group.start, part.start) - part.start,
            stop=min(group.stop, part.stop) - part.start,
        )
        for group in groups
    )
    return [group for group in clipped if group.start < group.stop]


def spread(
    groups: Sequence[ParameterGroup], places: Iterable[tuple[slice, slice]]
) -> list[ParameterGroup]:
    """Return the groups of a part whose ranges lie apart: places are (in the whole, in the part), as of flat.places_of."""
    return [
        replace(group, start=group.start + here.start, stop=group.stop + here.start)
        for there, here in places
        for group in within(groups, there)
    ]


class Ranges:
    """A vector of `num_floats`, cut by settings: `of(piece)` are the ranges of a piece, those with one settings together.

    only: the settings of all of it, if it has but one range; who asks that first saves itself the cutting, piece by piece.

    by_parameter: a range for each group, without the gap behind it, as torch's own call for that parameter; for a kernel that
    rounds the last numbers of a tensor in another way than the others. Else neighbours with the same settings are one range.
    """

    def __init__(
        self, num_floats: int, groups: Sequence[ParameterGroup] = (), by_parameter: bool = False
    ):
        self._num_floats = num_floats
        groups = sorted(groups, key=lambda group: group.start)
        for before, group in zip(groups, groups[1:]):
            if group.start < before.stop:
                raise ValueError(f"two groups share what begins at {group.start} of the vector")
        if by_parameter and groups:
            self._whole = groups
        else:
            self._whole = _covering(num_floats, groups)
        # None: there are several, or gaps
        self.only: Settings | None = None
        if len(self._whole) == 1 and (self._whole[0].start, self._whole[0].stop) == (0, num_floats):
            self.only = self._whole[0].settings
        # what does not change from call to call
        self._known: dict[tuple[int, int], list[tuple[Settings, list[slice]]]] = {}

    def of(self, piece: slice) -> list[tuple[Settings, list[slice]]]:
        """Return the settings of a piece, each with its ranges, counted from the piece's beginning."""
        start, stop, _ = piece.indices(self._num_floats)
        if (start, stop) not in self._known:
            found: dict[Settings, list[slice]] = {}
            for group in within(self._whole, slice(start, stop)):
                found.setdefault(group.settings, []).append(slice(group.start, group.stop))
            self._known[start, stop] = list(found.items())
        return self._known[start, stop]


def _covering(num_floats: int, groups: Sequence[ParameterGroup]) -> list[ParameterGroup]:
    """Return ranges that cover the vector in order; neighbours with the same settings are one."""
    found: list[ParameterGroup] = []

    def append(start: int, stop: int, settings: Settings) -> None:
        if found and found[-1].settings == settings:
            start = found.pop().start
        if start < stop:
            found.append(ParameterGroup(start, stop, settings))

    at = 0
    for group in groups:
        append(at, group.start, Settings())
        at = min(num_floats, -(-group.stop // ALIGNMENT) * ALIGNMENT)
        append(group.start, at, group.settings)
    append(at, num_floats, Settings())
    return found

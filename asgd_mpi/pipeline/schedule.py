"""In which order each stage of a pipeline computes the forward and backward passes of the micro-batches. Pure.

Both orders make one step of synchronous SGD out of M micro-batches on S stages, and leave each stage idle for the same
share of the time, (S - 1) / (M + S - 1) if all stages take the same (Huang et al. 2019, arXiv:1811.06965, section 2.3).
They differ in how many micro-batches a stage holds the activations of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Step(NamedTuple):
    """A pass of micro-batch 0, 1, ..."""

    is_forward: bool
    part: int
    segment: int = 0  # of a column, which computes a micro-batch in several steps

    def __str__(self) -> str:
        name = f"F{self.part}" if self.is_forward else f"B{self.part}"
        if self.segment:
            name += f".{self.segment}"
        return name


def gpipe(stage: int, num_stages: int, num_parts: int) -> list[Step]:
    """All forward passes, then all backward passes; M micro-batches are held.

    Huang et al. 2019, figure 2c; the backward passes in the order of Narayanan et al. 2021 (arXiv:2104.04473), figure 3, so
    that gradients are summed up as without stages.
    """
    return [Step(is_forward, part) for is_forward in (True, False) for part in range(num_parts)]


def one_f_one_b(stage: int, num_stages: int, num_parts: int) -> list[Step]:
    """Backward as soon as possible; stage s of 0, 1, ... holds min(M, S - s) micro-batches.

    PipeDream-Flush: Narayanan et al. 2021, section 2.2.1 and figure 4, above.
    """
    ahead = min(num_stages - 1 - stage, num_parts)
    steps = gpipe(0, 1, ahead)[:ahead]
    for part in range(num_parts):
        steps += [Step(True, ahead + part)] * (ahead + part < num_parts) + [Step(False, part)]
    return steps


Schedule = Callable[[int, int, int], list[Step]]  # (stage, S, M) -> what the stage does, in order
SCHEDULES: dict[str, Schedule] = {"gpipe": gpipe, "1f1b": one_f_one_b}


def by_segments(num_pairs: int) -> Schedule:
    """That of two columns (see columns): one micro-batch after the other, through all segments and back.

    The last column has one segment more than there are pairs, the head.
    """

    def schedule(stage: int, num_stages: int, num_parts: int) -> list[Step]:
        segments = range(num_pairs + (stage == num_stages - 1))
        return [
            Step(is_forward, part, segment)
            for part in range(num_parts)
            for is_forward, way in ((True, segments), (False, reversed(segments)))
            for segment in way
        ]

    return schedule


def held(steps: Sequence[Step]) -> int:
    """Return the most micro-batches whose activations a stage holds at a time."""
    now = most = 0
    for step in steps:
        now += 1 if step.is_forward else -1
        most = max(most, now)
    return most


def bubble(num_stages: int, num_parts: int) -> float:
    """Return the share of the time in which a stage is idle, if all stages take the same."""
    return (num_stages - 1) / (num_parts + num_stages - 1)


class Pass(NamedTuple):
    """When a step is done."""

    step: Step
    start: float
    stop: float


def timeline(
    schedule: Schedule,
    forward: Sequence[float],
    backward: Sequence[float],
    num_parts: int,
    transfer: float = 0.0,
) -> list[list[Pass]]:
    """When each stage does its steps, from the seconds of one forward and one backward pass of each stage.

    transfer: seconds from the end of a pass until the next stage has its result.
    """
    num_stages = len(forward)
    todo = [schedule(stage, num_stages, num_parts)[::-1] for stage in range(num_stages)]
    done: list[list[Pass]] = [[] for _ in todo]
    ends: dict[tuple[int, Step], float] = {}
    while any(todo):
        before = len(ends)
        for stage, steps in enumerate(todo):
            while steps:
                step = steps[-1]
                source = stage - 1 if step.is_forward else stage + 1
                needs = [(source, step)] if 0 <= source < num_stages else []
                if any(key not in ends for key in needs):
                    break
                free = done[stage][-1].stop if done[stage] else 0.0
                start = max([*(ends[key] + transfer for key in needs), free])
                seconds = forward if step.is_forward else backward
                ends[stage, step] = start + seconds[stage]
                done[stage].append(Pass(steps.pop(), start, ends[stage, step]))
        if len(ends) == before:
            raise ValueError(
                f"the stages wait for each other for ever: {[str(steps[-1]) for steps in todo if steps]}"
            )
    return done


def idle_share(passes: Sequence[Sequence[Pass]]) -> float:
    """Return the share of all stages' time in which they do nothing."""
    whole = max(each.stop for stage in passes for each in stage)
    busy = sum(each.stop - each.start for stage in passes for each in stage)
    return 1 - busy / (whole * len(passes))

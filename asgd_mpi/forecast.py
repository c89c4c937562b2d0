"""A model of the exchange: how many images/s, how stale, how busy a server, for any number of workers.

Pure discrete-event simulation, one heap, three events for each push:

    SEND    a worker's gradient takes its turn on the link to the server
    SERVE   the server applies it, one after the other in order of arrival: `apply_s + overhead_s` each
    FETCH   the worker, told of it, reads the latest weights over the link from the server, then computes a step

What it leaves out: ranks that share cores (but see `calibrate`), validation, the end of a run, the loader falling behind,
and links other than the server's.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

MIN_PUSHES = 2000     # simulated at least, and PUSHES_EACH for each worker
PUSHES_EACH = 12
WARM_UP = 1 / 3       # of the pushes: not counted
SEND, SERVE, FETCH = range(3)


@dataclass(frozen=True)
class Costs:
    """What one push costs, in seconds on an exchange without queues."""

    batch: float                               # images a push
    step_s: float                              # data and compute on a worker
    apply_s: float                             # the update, on the server
    fetch_s: float                             # one read of the weights
    travel_s: float = 0.0                      # from the end of a step to the server's turn, and back to the worker's notice
    overhead_s: float = 0.0                    # for a push, beside the update: nobody else is served
    spread: float = 0.0                        # standard deviation of a step over its mean
    link_s: float = 0.0                        # the weights' or a gradient's time on the server's link, one at a time

    @property
    def cycle_s(self) -> float:
        """A worker's time from push to push when it never queues."""
        return self.step_s + self.travel_s + self.serve_s + self.fetch_s + 2 * self.link_s

    @property
    def serve_s(self) -> float:
        return self.apply_s + self.overhead_s

    @property
    def slowest_s(self) -> float:
        """What the most loaded shared part (server, link in, link out) needs for a push."""
        return max(self.serve_s, self.link_s)

    @property
    def limit(self) -> float:
        """Images/s that no number of workers exceeds."""
        return self.batch / self.slowest_s if self.slowest_s else math.inf

    @property
    def knee(self) -> float:
        """Workers whose pushes would keep the slowest shared part busy all the time."""
        return self.cycle_s / self.slowest_s if self.slowest_s else math.inf


@dataclass(frozen=True)
class Outcome:
    """What the model predicts for a number of workers."""

    num_workers: int
    images_per_s: float
    staleness: float                           # mean
    staleness_max: int
    server_busy: float                         # 0..1, with updates: what a report measures
    queue_busy: float                          # 0..1, with updates and overhead: at 1 it is the limit
    wait_s: float                              # mean time that a push waits for the server's turn


def simulate(costs: Costs, num_workers: int, seed: int = 0) -> Outcome:
    """Play MIN_PUSHES or more pushes through the exchange."""
    clock, order = random.Random(seed), itertools.count()
    step = _steps(costs, clock)
    heap = [(step() * clock.random(), next(order), SEND, worker) for worker in range(num_workers)]
    heapq.heapify(heap)
    total = max(MIN_PUSHES, PUSHES_EACH * num_workers)
    counted_from = int(WARM_UP * total)
    done: list[float] = []                     # time at which version n + 1 was there
    read = [0] * num_workers                   # the version that each worker computes on
    server_free = in_free = out_free = 0.0
    waits, staleness = 0.0, []
    while len(done) < total:
        t, _, event, worker = heapq.heappop(heap)
        if event == SEND:
            in_free = max(t, in_free) + costs.link_s
            following = (in_free + costs.travel_s / 2, SERVE)
        elif event == SERVE:
            start = max(t, server_free)
            server_free = start + costs.serve_s
            if len(done) >= counted_from:
                staleness.append(len(done) - read[worker])
                waits += start - t
            done.append(server_free)
            following = (server_free + costs.travel_s / 2, FETCH)
        else:
            read[worker] = bisect_right(done, t)
            out_free = max(t, out_free) + costs.link_s
            following = (out_free + costs.fetch_s + step(), SEND)
        heapq.heappush(heap, (following[0], next(order), following[1], worker))
    pushes, elapsed = total - counted_from, done[-1] - done[counted_from - 1]
    return Outcome(num_workers, costs.batch * pushes / elapsed, sum(staleness) / pushes, max(staleness),
                   min(1.0, costs.apply_s * pushes / elapsed), min(1.0, costs.serve_s * pushes / elapsed), waits / pushes)


def _steps(costs: Costs, clock: random.Random):
    """Step times: log-normal with the given mean and spread, or constant."""
    if not costs.spread or not costs.step_s:
        return lambda: costs.step_s
    sigma2 = math.log(1 + costs.spread ** 2)
    mu, sigma = math.log(costs.step_s) - sigma2 / 2, math.sqrt(sigma2)
    return lambda: clock.lognormvariate(mu, sigma)


@dataclass(frozen=True)
class Observation:
    """What was measured of a run: its costs without travel and overhead, and how fast it trained."""

    costs: Costs
    num_workers: int
    images_per_s: float                        # while training: without validation and the wait for a last lease


def calibrate(observations: Sequence[Observation]) -> Costs:
    """Fill in what no clock measures, so that the model gives the measured images/s of the smallest and the largest run.

    The smallest run gives `travel_s`: what its cycle holds beside step, update and fetch. A larger one gives what of that
    cycle the workers cannot do at the same time: its update, slower where ranks share cores and memory, and `overhead_s`,
    the server's other work and the rest of such sharing. Both come off travel, step and fetch, in this order.
    """
    smallest = min(observations, key=lambda observation: observation.num_workers)
    largest = max(observations, key=lambda observation: observation.num_workers)

    def travel(seconds: float) -> Costs:
        return replace(smallest.costs, travel_s=seconds)

    cycle_s = smallest.num_workers * smallest.costs.batch / smallest.images_per_s   # queues included
    alone = travel(_solve(lambda seconds: simulate(travel(seconds), smallest.num_workers).images_per_s,
                          smallest.images_per_s, cycle_s))
    if largest.num_workers == smallest.num_workers:
        return alone
    shared = _move(alone, "apply_s", largest.costs.apply_s - alone.apply_s)
    return _move(shared, "overhead_s", _solve(
        lambda seconds: simulate(_move(shared, "overhead_s", seconds), largest.num_workers).images_per_s,
        largest.images_per_s, shared.cycle_s - shared.serve_s))


def _move(costs: Costs, into: str, seconds: float) -> Costs:
    """Move up to `seconds` of a push's cycle from where workers are independent to where only one at a time can be."""
    changed, rest = {}, max(0.0, seconds)
    for name in ("travel_s", "step_s", "fetch_s"):
        taken = min(rest, getattr(costs, name))
        changed[name], rest = getattr(costs, name) - taken, rest - taken
    changed[into] = getattr(costs, into) + max(0.0, seconds) - rest
    return replace(costs, **changed)


def _solve(rate, target: float, high: float) -> float:
    """The argument in [0, high] at which the falling function `rate` is `target`; 0 if it is lower even there."""
    low = 0.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if rate(middle) > target else (low, middle)
    return low


CHANGES = (
    ("the update twice as fast", lambda costs: replace(costs, apply_s=costs.apply_s / 2)),
    ("what is done one worker at a time beside the update, halved",
     lambda costs: replace(costs, overhead_s=costs.overhead_s / 2)),
    ("messages twice as fast", lambda costs: replace(costs, travel_s=costs.travel_s / 2, link_s=costs.link_s / 2)),
    ("fetches twice as fast", lambda costs: replace(costs, fetch_s=costs.fetch_s / 2)),
    ("twice the batch, in steps twice as long",
     lambda costs: replace(costs, batch=2 * costs.batch, step_s=2 * costs.step_s)),
    ("workers twice as fast", lambda costs: replace(costs, step_s=costs.step_s / 2)),
)


def what_moves(costs: Costs, num_workers: int) -> list[tuple[str, float, float]]:
    """(change, relative gain in images/s at `num_workers`, the knee with it), the largest gain first."""
    now = simulate(costs, num_workers).images_per_s
    found = []
    for name, change in CHANGES:
        changed = change(costs)
        if changed != costs:
            found.append((name, simulate(changed, num_workers).images_per_s / now - 1, changed.knee))
    return sorted(found, key=lambda row: -row[1])

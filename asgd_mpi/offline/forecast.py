"""A model of the exchange: how many images/s, how stale, how busy a server, for any number of workers and servers.

Pure discrete-event simulation, one heap, three events for each push:

    SEND    a worker has computed `n_push` batches; their gradient takes its turn on the link to the servers
    SERVE   each server applies its part of it, one push after the other in order of arrival: `serve_s` each
    BACK    the worker, told of it by the slowest server, reads the latest weights if a fetch is due, then goes on computing;
            with overlap it has gone on at SEND, and sends again when both are done

When a push and a fetch are due a worker's `protocol.client.Cadence` says, as in a run. To drive the whole of `protocol.client`
takes 6 to 8 microseconds a batch, and a push here takes 10: for leases, membership and checkpoints, which are left out.

S servers hold equal parts of the vector and see all pushes in the same order, so one event serves for all of them: their
queues are a vector, and differ by the spread of their updates; the few words by which they keep step are left out. A worker may
be a replica of several stages, each on a GPU: its step is that of one GPU, shared out, and longer by the bubble of the schedule.

What it leaves out: the way of activations between stages, ranks that share cores (but see `calibrate`), validation, the end of
a run, the loader falling behind, workers that share a link, and that a server applies waiting pushes in one pass.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from asgd_mpi.config.exchange_choice import WIRES, bytes_of_push, fetch_wire, kept_fetch_wire
from asgd_mpi.protocol.client import Cadence

MIN_PUSHES = 2000  # simulated at least, and PUSHES_EACH for each worker
PUSHES_EACH = 12
WARM_UP = 1 / 3  # of the pushes: not counted
MANY = 256  # batches whose times are drawn one by one; more are normal, by their number
GRAIN = 64  # moments, while a push is under way, at which a worker under n_push auto can send the next one
SEND, SERVE, BACK = range(3)


@dataclass(frozen=True)
class Costs:
    """What a batch and a push cost, in seconds on an exchange without queues, and how the exchange is set."""

    batch: float  # images a batch
    step_s: float  # data and compute of a batch on a worker
    apply_s: float  # the update of the whole vector
    fetch_s: float  # one read of the weights
    # from the end of a step to the server's turn, and back to the worker's notice
    travel_s: float = 0.0
    # for a push, beside the update: nobody else is served
    overhead_s: float = 0.0
    # for a batch, the same: what ranks that share cores cannot compute at a time
    shared_s: float = 0.0
    spread: float = 0.0  # standard deviation of a batch's step over its mean
    apply_spread: float = 0.0  # ... and of an update
    # the whole vector in float32 on a server's link, one at a time each way
    link_s: float = 0.0
    latency_s: float = 0.0  # of that link, each way
    # batches a push; auto: as many as a worker computes while one is under way
    n_push: int | Literal["auto"] = 1
    # batches between two fetches; None: one with every push
    n_fetch: int | None = None
    overlap: bool = False  # compute while a push is under way
    wire: str = "float32"  # of what is pushed: one of WIRES, or topk,
    density: float = 0.01  # ... which sends this share
    # of what is fetched; None: the same, bfloat16 if that is of pushes alone
    fetch_wire: str | None = None
    num_servers: int = 1
    # ranks of a worker; `step_s` is that of all of them together
    num_stages: int = 1
    micro_batches: int = 1  # parts of a batch
    # 0..1: mean time of a stage over that of the slowest one
    balance: float = 1.0

    @property
    def bubble(self) -> float:
        """Share of a step in which a stage waits for the others, if all take the same (Huang et al. 2019, section 2.3)."""
        return (self.num_stages - 1) / (self.micro_batches + self.num_stages - 1)

    @property
    def step_share(self) -> float:
        """A step over that of one GPU, which runs all stages: the slowest of them sets the pace."""
        return 1 / (self.num_stages * self.balance * (1 - self.bubble))

    def cut(self, num_stages: int, micro_batches: int, balance: float = 1.0) -> Costs:
        """Return the same network on the same GPUs, cut into so many stages."""
        other = replace(
            self,
            num_stages=num_stages,
            micro_batches=micro_batches,
            balance=balance if num_stages > 1 else 1.0,
        )
        return replace(other, step_s=self.step_s * other.step_share / self.step_share)

    def num_ranks(self, num_workers: int) -> int:
        return self.num_servers + self.num_stages * num_workers

    @property
    def overlaps(self) -> bool:
        return self.overlap or self.n_push == "auto"

    @property
    def push_batches(self) -> int:
        """Batches in a push; of auto the least."""
        return 1 if self.n_push == "auto" else self.n_push

    @property
    def fetches(self) -> float:
        """For each push."""
        return self.push_batches / (self.n_fetch or self.push_batches)

    @property
    def sent_s(self) -> float:
        """The whole vector on a worker's link, which is as wide as a server's."""
        return self.link_s * bytes_of_push(self.wire, self.density) / WIRES["float32"]

    @property
    def read_s(self) -> float:
        """Return the seconds of the whole vector, as it is fetched, on a worker's link."""
        wire = self.fetch_wire or fetch_wire(self.wire)
        return self.link_s * WIRES[wire] / WIRES["float32"]

    @property
    def serve_s(self) -> float:
        """A server's time for a push: its part of the update, and what it does for any message."""
        return self.apply_s / self.num_servers + self.overhead_s + self.push_batches * self.shared_s

    @property
    def trip_s(self) -> float:
        """A push and its answer, when nothing queues."""
        return (
            self.travel_s
            + 2 * self.latency_s
            + self.sent_s
            + self.serve_s
            + self.fetches * (self.fetch_s + self.read_s)
        )

    @property
    def cycle_s(self) -> float:
        """A worker's time from push to push when it never queues."""
        step_s = self.push_batches * self.step_s
        if self.overlaps:
            return max(step_s, self.trip_s)
        return step_s + self.trip_s

    @property
    def alone(self) -> float:
        """Images/s of a worker that never queues."""
        if self.n_push == "auto":
            return self.batch / self.step_s
        return self.batch * self.push_batches / self.cycle_s

    @property
    def slowest_s(self) -> float:
        """Return what the most loaded shared part (a server, its link in, its link out) needs for a push."""
        shared_s = max(self.sent_s, self.fetches * self.read_s) / self.num_servers
        return max(self.serve_s, shared_s)

    @property
    def limit(self) -> float:
        """Images/s that no number of workers exceeds; under n_push auto pushes grow, and only what is shared limits them."""
        if self.n_push == "auto":
            seconds, batches = self.shared_s, 1
        else:
            seconds, batches = self.slowest_s, self.push_batches
        return self.batch * batches / seconds if seconds else math.inf

    @property
    def knee(self) -> float:
        """Workers whose pushes would keep the slowest shared part busy all the time."""
        if self.slowest_s:
            return self.cycle_s / self.slowest_s
        return math.inf


@dataclass(frozen=True)
class Outcome:
    """What the model predicts for a number of workers."""

    num_workers: int
    images_per_s: float
    staleness: float  # mean, in versions
    staleness_max: int
    server_busy: float  # 0..1, with updates: what a report measures
    # 0..1, with updates and overhead: at 1 it is the limit
    queue_busy: float
    # mean time that a push waits for the slowest server's turn
    wait_s: float
    batches: float = 1.0  # in a push, mean


@dataclass
class _Worker:
    """One worker of a simulation."""

    cadence: Cadence
    read: int = 0  # the version that it computes on,
    held: int = 0  # ... and the latest that it has fetched
    batches: int = 0  # summed up, not yet sent
    is_out: bool = False  # a push is under way,
    fetches: bool = False  # ... which brings newer weights,
    is_waiting: bool = False  # ... and the next one is ready


def simulate(costs: Costs, num_workers: int, seed: int = 0) -> Outcome:
    """Play MIN_PUSHES or more pushes through the exchange."""
    return _Simulation(costs, num_workers, seed).run()


class _Simulation:
    """The state of all workers, servers and links at a time."""

    def __init__(self, costs: Costs, num_workers: int, seed: int):
        self.costs, self.num_workers = costs, num_workers
        self.chance = random.Random(seed)
        self.step = steps(costs.step_s, costs.spread, self.chance)
        self.serve = _servers(costs, seed)
        self.workers = [
            _Worker(Cadence(costs.n_push, costs.n_fetch or 1)) for _ in range(num_workers)
        ]
        # batches between two looks at whether the push before is through; 1 but for steps that are very short beside it
        self.batches = costs.push_batches
        if costs.n_push == "auto" and costs.step_s:
            longest_s = costs.trip_s + num_workers * costs.slowest_s
            self.batches = max(1, int(min(longest_s / costs.step_s / GRAIN, 1e300)))
        self.order, self.heap = itertools.count(), []
        # time at which version n + 1 was there, on all servers
        self.done: list[float] = []
        self.in_free = self.out_free = 0.0  # the servers' links

    def run(self) -> Outcome:
        costs, done = self.costs, self.done
        total = max(MIN_PUSHES, PUSHES_EACH * self.num_workers)
        counted_from = int(WARM_UP * total)
        batches, waits, staleness = 0, 0.0, []
        for number in range(self.num_workers):
            self._plan(self._compute_s() * self.chance.random(), SEND, number, self.batches)
        while len(done) < total:
            t, _, event, number, amount = heapq.heappop(self.heap)
            if event == SEND:
                self._computed(t, number, amount)
            elif event == SERVE:
                wait_s, finished = self.serve(t, amount[1])
                if len(done) >= counted_from:
                    staleness.append(len(done) - amount[0])
                    batches += amount[1]
                    waits += wait_s
                done.append(finished)
                self._plan(finished + costs.travel_s / 2 + costs.latency_s, BACK, number, amount[1])
            else:
                self._back(t, number)
        pushes, elapsed = total - counted_from, done[-1] - done[counted_from - 1]
        busy_s = costs.apply_s / costs.num_servers
        return Outcome(
            self.num_workers,
            costs.batch * batches / elapsed,
            sum(staleness) / pushes,
            max(staleness),
            min(1.0, busy_s * pushes / elapsed),
            min(1.0, costs.serve_s * pushes / elapsed),
            waits / pushes,
            batches / pushes,
        )

    def _plan(self, t: float, event: int, number: int, amount) -> None:
        heapq.heappush(self.heap, (t, next(self.order), event, number, amount))

    def _compute_s(self) -> float:
        if self.batches <= MANY:
            return sum(self.step() for _ in range(self.batches))
        spread = self.costs.spread / math.sqrt(self.batches)
        return self.batches * self.costs.step_s * max(0.0, self.chance.gauss(1, spread))

    def _compute(self, t: float, number: int) -> None:
        """Begin with the next batches, on the latest weights that are here."""
        worker = self.workers[number]
        worker.read = worker.held if not worker.batches else worker.read
        self._plan(t + self._compute_s(), SEND, number, self.batches)

    def _computed(self, t: float, number: int, batches: int) -> None:
        worker = self.workers[number]
        worker.batches += batches
        if not worker.cadence.is_due(worker.batches, not worker.is_out):
            self._compute(t, number)  # sums on
        elif worker.is_out:
            worker.is_waiting = True
        else:
            self._push(t, number)

    def _push(self, t: float, number: int) -> None:
        costs, worker = self.costs, self.workers[number]
        self.in_free = max(t, self.in_free) + costs.sent_s / costs.num_servers
        arrives = max(self.in_free, t + costs.sent_s) + costs.latency_s + costs.travel_s / 2
        self._plan(arrives, SERVE, number, (worker.read, worker.batches))
        worker.fetches = worker.cadence.push(worker.batches)
        worker.batches, worker.is_out, worker.is_waiting = 0, True, False
        if costs.overlaps:
            self._compute(t, number)

    def _back(self, t: float, number: int) -> None:
        """Take the answer: fetch if it is due, then the worker is free for the next push."""
        costs, worker = self.costs, self.workers[number]
        if worker.fetches:
            worker.held, worker.fetches = bisect_right(self.done, t), False
            worker.cadence.fetched()
            self.out_free = max(t, self.out_free) + costs.read_s / costs.num_servers
            t = max(self.out_free, t + costs.read_s) + costs.fetch_s
            self._plan(t, BACK, number, None)
            return
        worker.is_out = False
        if worker.is_waiting:
            self._push(t, number)
        elif not costs.overlaps:
            self._compute(t, number)


def steps(mean_s: float, spread: float, chance: random.Random) -> Callable[[], float]:
    """Step times: log-normal with the given mean and spread, or constant."""
    if not spread or not mean_s:
        return lambda: mean_s
    sigma2 = math.log(1 + spread**2)
    mu, sigma = math.log(mean_s) - sigma2 / 2, math.sqrt(sigma2)
    return lambda: chance.lognormvariate(mu, sigma)


def _servers(costs: Costs, seed: int) -> Callable[[float], tuple[float, float]]:
    """serve(t, batches): a push arrives at all servers; how long it waits for the last, and when the last is done with it."""
    apply_s = costs.apply_s / costs.num_servers
    free, chance = np.zeros(costs.num_servers), np.random.default_rng(seed)
    sigma2 = math.log(1 + costs.apply_spread**2)

    def serve(t: float, batches: int) -> tuple[float, float]:
        start = np.maximum(t, free)
        if sigma2:
            times = chance.lognormal(-sigma2 / 2, math.sqrt(sigma2), costs.num_servers)
        else:
            times = 1.0
        free[:] = start + apply_s * times + costs.overhead_s + batches * costs.shared_s
        return float(start.max()) - t, float(free.max())

    return serve


@dataclass(frozen=True)
class Observation:
    """What was measured of a run: its costs without travel and overhead, and how fast it trained."""

    costs: Costs
    num_workers: int
    # while training: without validation and the wait for a last lease
    images_per_s: float


def calibrate(observations: Sequence[Observation]) -> Costs:
    """Fill in what no clock measures, so that the model gives the measured images/s of the smallest and the largest run.

    The smallest run gives `travel_s`: what its cycle holds beside step, update and fetch. A larger one gives what of that
    cycle the workers cannot do at the same time: its update, slower where ranks share cores and memory, and the server's other
    work and the rest of such sharing: `overhead_s` as far as it comes off the travel of a push, `shared_s` off a batch's step.
    """
    smallest = min(observations, key=lambda observation: observation.num_workers)
    largest = max(observations, key=lambda observation: observation.num_workers)

    def travel(seconds: float) -> Costs:
        return replace(smallest.costs, travel_s=seconds)

    push_images = smallest.costs.batch * smallest.costs.push_batches
    # queues included
    cycle_s = smallest.num_workers * push_images / smallest.images_per_s
    alone = travel(
        _solve(
            lambda seconds: simulate(travel(seconds), smallest.num_workers).images_per_s,
            smallest.images_per_s,
            cycle_s,
        )
    )
    if largest.num_workers == smallest.num_workers:
        return alone
    shared = _move(alone, "apply_s", largest.costs.apply_s - alone.apply_s)
    return _move(
        shared,
        "overhead_s",
        _solve(
            lambda seconds: (
                simulate(
                    as_set(_move(shared, "overhead_s", seconds), largest), largest.num_workers
                ).images_per_s
            ),
            largest.images_per_s,
            shared.cycle_s - shared.serve_s,
        ),
    )


def as_set(costs: Costs, observation: Observation) -> Costs:
    """Return the costs with the batches, pushes and fetches of a run; what a batch takes is in proportion to its images."""
    of = observation.costs
    longer = of.batch / costs.batch
    return replace(
        costs,
        batch=of.batch,
        step_s=longer * costs.step_s,
        shared_s=longer * costs.shared_s,
        n_push=of.n_push,
        n_fetch=of.n_fetch,
    )


def _move(costs: Costs, into: Literal["apply_s", "overhead_s"], seconds: float) -> Costs:
    """Move up to `seconds` of a push's cycle from where workers are independent to where only one at a time can be."""
    travel_s = min(max(0.0, seconds), costs.travel_s)
    step_s = (
        min(max(0.0, seconds) - travel_s, costs.push_batches * costs.step_s) / costs.push_batches
    )
    left = replace(costs, travel_s=costs.travel_s - travel_s, step_s=costs.step_s - step_s)
    if into == "apply_s":
        return replace(left, apply_s=costs.apply_s + travel_s + costs.push_batches * step_s)
    return replace(left, overhead_s=costs.overhead_s + travel_s, shared_s=costs.shared_s + step_s)


def _solve(rate, target: float, high: float) -> float:
    """Return the argument in [0, high] at which the falling function `rate` is `target`; 0 if it is lower even there."""
    low = 0.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if rate(middle) > target else (low, middle)
    return low


CHANGES: tuple[tuple[str, Callable[[Costs], Costs]], ...] = (
    ("the update twice as fast", lambda costs: replace(costs, apply_s=costs.apply_s / 2)),
    (
        "what is done one worker at a time beside the update, halved",
        lambda costs: replace(costs, overhead_s=costs.overhead_s / 2),
    ),
    (
        "messages twice as fast",
        lambda costs: replace(
            costs,
            travel_s=costs.travel_s / 2,
            link_s=costs.link_s / 2,
            latency_s=costs.latency_s / 2,
        ),
    ),
    ("fetches twice as fast", lambda costs: replace(costs, fetch_s=costs.fetch_s / 2)),
    (
        "twice the batch, in steps twice as long",
        lambda costs: replace(costs, batch=2 * costs.batch, step_s=2 * costs.step_s),
    ),
    ("workers twice as fast", lambda costs: replace(costs, step_s=costs.step_s / 2)),
    (
        "4 times the batches in a push (--n-sync)",
        lambda costs: (
            costs
            if costs.n_push == "auto"
            else replace(
                costs, n_push=4 * costs.n_push, n_fetch=costs.n_fetch and 4 * costs.n_fetch
            )
        ),
    ),
    (
        "overlap (--exchange.overlap true)",
        lambda costs: costs if costs.num_stages > 1 else replace(costs, overlap=True),
    ),
    (
        "twice the micro-batches (--compute.micro_batches)",
        lambda costs: (
            costs
            if costs.num_stages == 1
            else costs.cut(costs.num_stages, 2 * costs.micro_batches, costs.balance)
        ),
    ),
    (
        "2 bytes a number on the links (--exchange.wire bfloat16)",
        lambda costs: (
            replace(costs, wire="bfloat16", fetch_wire=kept_fetch_wire(costs.fetch_wire))
            if costs.link_s and costs.wire == "float32"
            else costs
        ),
    ),
    (
        "twice the servers (--servers), each with cores of its own",
        lambda costs: replace(costs, num_servers=2 * costs.num_servers),
    ),
)


def what_moves(costs: Costs, num_workers: int) -> list[tuple[str, float, float]]:
    """(change, relative gain in images/s at `num_workers`, the knee with it), the largest gain first."""
    now = simulate(costs, num_workers).images_per_s
    found = []
    for name, change in CHANGES:
        changed = change(costs)
        if changed != costs:
            found.append(
                (name, simulate(changed, num_workers).images_per_s / now - 1, changed.knee)
            )
    return sorted(found, key=lambda row: -row[1])

"""Which exchange a link bears: the share of their time that workers spend in steps, by format, batches a push and overlap.

Pure: measurements in, a choice out. A run with `--exchange.wire auto` asks it, or `--rule diloco` with `--exchange.n_push auto`, and so
do the planner and the doctor. What it leaves out: the server's updates, and latencies (offline.forecast knows them).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, TypeVar

from asgd_mpi.config import rulebook
from asgd_mpi.config.options import Config, ExchangeConfig
from asgd_mpi.config.resolved import Resolved
from asgd_mpi.config.rulebook import fetch_wire
from asgd_mpi.errors import ConfigError

# bytes of a number that is pushed; topk's are of its density (see vector.vector_format)
WIRES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1 + 1 / 256, "int4": 0.5 + 1 / 256}
DENSE = ("float32", "bfloat16", "float16")
TOPK, KEPT_BYTES = "topk", 3.5  # a number and its place
# in the order in which they are tried: the next one loses more
TRIED = ("float32", "bfloat16", "int8", "int4", "topk")
ENOUGH = 0.95  # of the time in steps
# batches that n_push auto may sum up until diloco is named in its place: a judgement, since which trains better depends on the run
MOST_SUMMED = 4
C = TypeVar("C", bound=Config)
SPARE = 1.1  # of diloco's batches, for steps that are quicker than the one that was measured


@dataclass(frozen=True)
class Load:
    """The formats of a push and of the fetch after it."""

    wire: str  # of what is pushed
    density: float  # of topk
    fetched: str = ""  # of weights; "": what goes with `wire`

    @property
    def sent(self) -> float:
        """Return the bytes of a number that is pushed."""
        return bytes_of_push(self.wire, self.density)

    @property
    def read(self) -> float:
        """Return the bytes of a number that is fetched."""
        return WIRES[self.fetched or fetch_wire(self.wire)]


def load_of(exchange: ExchangeConfig) -> Load:
    """Return those of a run; what goes with `auto` is not known yet."""
    return Load(exchange.wire, exchange.density, exchange.fetch_wire or "")


@dataclass(frozen=True)
class Measured:
    """The measurements of a choice. Speeds are of the slowest worker while all send, or read; inf if all share the server's memory.

    num_small: parameters that travel in float32 beside the coded ones (see vector.vector_format).
    """

    num_parameters: int
    step_s: float  # of a batch
    send_bytes_per_s: float
    read_bytes_per_s: float
    num_small: int = 0

    def sent(self, load: Load) -> float:
        """Return the bytes of a push."""
        return self.num_parameters * load.sent + self._beside(load.wire)

    def read(self, load: Load) -> float:
        """Return the bytes of a fetch."""
        return self.num_parameters * load.read + self._beside(load.fetched)

    def _beside(self, wire: str) -> int:
        return 4 * self.num_small if wire in rulebook.COMPRESSED else 0

    def trip_s(self, load: Load) -> float:
        """Return the seconds that a push and the fetch after it travel."""
        return self.sent(load) / self.send_bytes_per_s + self.read(load) / self.read_bytes_per_s

    def hiding(self, load: Load) -> int:
        """Return how many batches take as long as that."""
        if not self.step_s:
            return 1
        return max(1, math.ceil(self.trip_s(load) / self.step_s))

    def in_steps(self, load: Load, n_push: int, overlap: bool) -> float:
        """Return the share of the time that workers spend in steps."""
        steps_s, trip_s = n_push * self.step_s, self.trip_s(load)
        whole_s = max(steps_s, trip_s) if overlap else steps_s + trip_s
        return steps_s / whole_s if whole_s else 1.0


@dataclass(frozen=True)
class Choice:
    """A way to exchange, as options of a training."""

    arguments: str
    load: Load
    n_push: int
    overlap: bool


def bytes_of_push(wire: str, density: float) -> float:
    """Return the bytes of a number that is pushed."""
    return density * KEPT_BYTES if wire == TOPK else WIRES[wire]


def kept_fetch_wire(wire: str | None) -> str | None:
    """Return the format of fetches that a run keeps with another one of pushes: int8, which is named by its user alone, or None."""
    return wire if wire in rulebook.COMPRESSED else None


def is_open(config: Config) -> bool:
    """Return whether a configuration leaves something to a measurement at the start of the run."""
    return config.exchange.wire == "auto" or _is_open_local(config)


def chosen(config: Resolved, measured: Measured, num_workers: int) -> Resolved:
    """Return a configuration with what it leaves open filled in: the first format that leaves ENOUGH of the time for steps, or the best."""
    n_push = config.exchange.n_push
    if config.exchange.wire == "auto":
        if _is_open_local(config):
            # as many as the papers take: behind enough of them any format is hidden
            batches = rulebook.RULEBOOK[config.rule.name].n_push
        elif n_push == "auto":
            batches = MOST_SUMMED
        else:
            batches = n_push

        def in_steps(wire: str) -> float:
            load = Load(wire, config.exchange.density)
            return measured.in_steps(load, batches, bool(config.exchange.overlap))

        allowed = [one for one in TRIED if _is_allowed(with_wire(config, one), num_workers)]
        good = [one for one in allowed if in_steps(one) >= ENOUGH]
        config = with_wire(config, good[0] if good else max(allowed, key=in_steps))
    if _is_open_local(config):
        n_push = _local_batches(measured, load_of(config.exchange))
        config = with_exchange(config, n_push=n_push, n_fetch=n_push)
    return config


def as_plain(config: Resolved) -> Resolved:
    """Return a configuration with what it leaves open as it is where nothing has to travel."""
    if _is_open_local(config):
        n_push = rulebook.LEAST_LOCAL_BATCHES
        config = with_exchange(config, n_push=n_push, n_fetch=n_push)
    if config.exchange.wire == "auto":
        config = with_wire(config, "float32")
    return config


def before_choice(old: Config, asked: Config) -> Config:
    """Return the configuration of a run that goes on without what followed from a choice, where the same is left open again."""
    if asked.exchange.wire == "auto":
        old = with_exchange(old, fetch_wire=None)
    if asked.exchange.n_push == "auto" and rulebook.steps_at_workers(old.rule):
        old = with_exchange(old, n_fetch=None)
    return old


def as_chosen_before(config: Config, old: Config) -> Config:
    """Return a configuration of a run that goes on, with what was chosen at its first start."""
    exchange = old.exchange
    if config.exchange.wire == "auto":
        config = with_exchange(config, wire=exchange.wire, fetch_wire=exchange.fetch_wire)
    if _is_open_local(config):
        config = with_exchange(config, n_push=exchange.n_push, n_fetch=exchange.n_fetch)
    return config


def with_wire(config: Resolved, wire: str) -> Resolved:
    """Return a configuration with a format of pushes, and that of fetches that goes with it."""
    return with_exchange(config, wire=wire, fetch_wire=fetch_wire(wire))


def told(config: Resolved, measured: Measured) -> str:
    """Say in a line what was measured and chosen."""
    exchange = config.exchange
    load, n_push = load_of(exchange), exchange.n_push
    batches = measured.hiding(load) if n_push == "auto" else n_push
    share = measured.in_steps(load, batches, bool(exchange.overlap))
    return (
        f"{_speeds(measured)}: --exchange.wire {exchange.wire} and --exchange.n_push {n_push} leave {share:.0%} of the time for "
        f"steps, {_bytes_a_batch(measured, load, batches)}"
    )


def advise(measured: Measured, density: float = 0.01) -> Choice:
    """Return the exchange that changes least of how a run trains and leaves ENOUGH of the time for steps."""
    float32, bfloat16, int8 = (Load(wire, density) for wire in ("float32", "bfloat16", "int8"))
    tried = (
        Choice("--exchange.wire float32", float32, 1, False),
        Choice("--exchange.wire bfloat16", bfloat16, 1, False),
        Choice("--exchange.wire bfloat16 --exchange.overlap true", bfloat16, 1, True),
        Choice("--exchange.wire int8 --exchange.n_push auto", int8, measured.hiding(int8), True),
    )
    for one in tried:
        is_enough = measured.in_steps(one.load, one.n_push, one.overlap) >= ENOUGH
        if is_enough and one.n_push <= MOST_SUMMED:
            return one
    return _local(measured, int8)


def _local(measured: Measured, load: Load) -> Choice:
    """Return diloco's exchange: with more than the fewest batches, what travels is narrower, since fewer batches train better."""
    if _local_batches(measured, load) > rulebook.LEAST_LOCAL_BATCHES:
        load = Load("int4", load.density, "int8")
    batches = _local_batches(measured, load)
    wires = f"--exchange.wire {load.wire}"
    if load.fetched:
        wires += f" --exchange.fetch_wire {load.fetched}"
    arguments = f"--rule diloco --n-sync {batches} --exchange.overlap true {wires}"
    return Choice(arguments, load, batches, True)


def advice_told(measured: Measured, density: float = 0.01) -> str:
    """Say in a line which exchange a link bears."""
    choice = advise(measured, density)
    share = measured.in_steps(choice.load, choice.n_push, choice.overlap)
    return (
        f"{_speeds(measured)}: {choice.arguments} leaves {share:.0%} of the time for steps, "
        f"{_bytes_a_batch(measured, choice.load, choice.n_push)}"
    )


def _speeds(measured: Measured) -> str:
    def rate(bytes_per_s: float) -> str:
        return f"{8e-6 * bytes_per_s:,.0f} Mbit/s"

    speeds = f"{rate(measured.send_bytes_per_s)} to the server and {rate(measured.read_bytes_per_s)} back"
    if math.isinf(measured.send_bytes_per_s):
        speeds = "all share the server's memory"
    return f"a step of {1e3 * measured.step_s:.4g} ms, {speeds}"


def _bytes_a_batch(measured: Measured, load: Load, batches: int) -> str:
    return f"{(measured.sent(load) + measured.read(load)) / batches / 1e6:.3g} MB a batch"


def _local_batches(measured: Measured, load: Load) -> int:
    """Return the batches that a worker trains on its own, enough to hide a trip to the server."""
    return max(rulebook.LEAST_LOCAL_BATCHES, math.ceil(SPARE * measured.hiding(load)))


def _is_open_local(config: Config) -> bool:
    """Return whether the batches that a worker trains on its own are open."""
    return config.exchange.n_push == "auto" and rulebook.steps_at_workers(config.rule)


def _is_allowed(config: Resolved, num_workers: int) -> bool:
    try:
        rulebook.check(as_plain(config), num_workers)
    except ConfigError:
        return False
    return True


def with_exchange(config: C, **exchange: Any) -> C:
    """Return a configuration with some options of its exchange replaced."""
    return dataclasses.replace(config, exchange=dataclasses.replace(config.exchange, **exchange))

"""The update rules by name: what each asks of the server, the ledger and the workers, its defaults, and its source.

Pure: no MPI, no torch. The vectors are moved in `optim.rules` (server) and `optim.replica`; who waits for whom, and which
gradients make a step together, is decided in `protocol.barrier`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Optional

from asgd_mpi.errors import ConfigError
from asgd_mpi.protocol.barrier import Pacing

if TYPE_CHECKING:
    from asgd_mpi.config.options import Config, RuleConfig

# A gradient is wrong by as much as the weights have moved since they were read, so that is what is limited: a step relative
# to the weights is what matters of it (LARS, You et al. 2017, arXiv:1708.03888), and where it is too long the gradient is
# scaled down (Pascanu et al. 2013, arXiv:1211.5063). With it the stock settings reach the accuracy of one worker with 32 of
# them, without it they do with 8 (docs/convergence.md).
MAX_DRIFT = 0.25

LEAST_STEPS = 5      # of an epoch, with which linear scaling of the rate is taken to hold (docs/convergence.md)
MOMENTA = ("dana", "worker", "server", "server_nag", "none")
# Of rules that wait for all workers. A velocity of each worker's own misses the steps that its worker has no part in (it validates, or
# came late), so that the mean of the velocities is not the velocity of the mean: with 32 workers that diverges where SGD does not.
_OF_THE_STEP = ("server_nag", "server", "dana", "worker", "none")


@dataclass(frozen=True)
class Entry:
    """One rule."""

    what: str                                       # in one line
    source: str
    server: str = "sgd"                             # how the server moves the weights: a class of `rules`
    moves: str = ""                                 # how a worker moves its own weights: "", descends or elastic
    momenta: tuple[str, ...] = MOMENTA              # where a velocity may be kept; the first is the default
    staleness: Optional[str] = None                 # weight of a stale gradient, where the rule prescribes it
    n_push: int = 1                                 # default
    may_overlap: bool = True                        # push and fetch behind the next gradient
    max_drift: float = MAX_DRIFT                    # default, for more workers than one
    pacing: Callable[[RuleConfig, int], Pacing] = lambda rule, num_workers: Pacing()


def _softsync(rule: RuleConfig, num_workers: int) -> Pacing:
    return Pacing(mean_of=max(1, num_workers // rule.splits))


def _ringmaster(rule: RuleConfig, num_workers: int) -> Pacing:
    return Pacing(max_staleness=rule.max_staleness or 2 * num_workers)


RULEBOOK = {
    "asgd": Entry("every gradient on arrival", "Downpour SGD with n_push = n_fetch = 1, Dean et al. 2012"),
    "sasgd": Entry("asgd, the rate divided by the staleness", "Zhang et al. 2016, arXiv:1511.05950, equation 3",
                   staleness="inverse"),
    "downpour": Entry("workers descend on their own weights between two fetches", "Dean et al. 2012, algorithm 1; Paine et al. "
                      "2013, arXiv:1312.6186", moves="descends", momenta=("none", "worker", "dana"), n_push=5,
                      may_overlap=False),
    "adagrad": Entry("a rate of its own for every weight", "Downpour SGD with Adagrad, Dean et al. 2012, section 4.1",
                     server="adagrad", momenta=("none",), max_drift=0.0),
    "softsync": Entry("a step is the mean of workers / splits gradients", "Zhang et al. 2016, arXiv:1511.05950, equation 2",
                      server="mean", pacing=_softsync),
    "ringmaster": Entry("gradients staler than max_staleness are dropped", "Maranjyan et al. 2025, arXiv:2501.16168",
                        pacing=_ringmaster),
    "ssp": Entry("a worker waits that is more than slack steps ahead", "Ho et al. 2013, stale synchronous parallel",
                 may_overlap=False, pacing=lambda rule, num_workers: Pacing(slack=rule.slack)),
    "dc_asgd_c": Entry("delay compensation, constant", "Zheng et al. 2017, arXiv:1609.08326, equation 10", server="dc",
                       momenta=("none", "server", "server_nag"), may_overlap=False),
    "dc_asgd_a": Entry("delay compensation, adaptive", "Zheng et al. 2017, arXiv:1609.08326, equations 10 and 14", server="dc",
                       momenta=("none", "server", "server_nag"), may_overlap=False),
    "easgd": Entry("workers descend on their own, tied to the centre by a spring", "Zhang, Choromanska, LeCun 2015, "
                   "arXiv:1412.6651, algorithm 1", server="elastic", moves="elastic", momenta=("none",), staleness="constant",
                   n_push=10, may_overlap=False, max_drift=0.0),
    "eamsgd": Entry("easgd with Nesterov momentum at the workers", "Zhang, Choromanska, LeCun 2015, arXiv:1412.6651, "
                    "algorithm 2", server="elastic", moves="elastic", momenta=("dana",), staleness="constant", n_push=10,
                    may_overlap=False, max_drift=0.0),
    "sync": Entry("a step is the mean of one gradient of each worker", "synchronous SGD, the line to meet", server="mean",
                  momenta=_OF_THE_STEP, staleness="constant", may_overlap=False, max_drift=0.0,
                  pacing=lambda rule, num_workers: Pacing(mean_of=0)),
    "sync_backup": Entry("sync that does not wait for the last workers", "Chen et al. 2016, arXiv:1604.00981", server="mean",
                         momenta=_OF_THE_STEP, staleness="constant", may_overlap=False, max_drift=0.0,
                         pacing=lambda rule, num_workers: Pacing(mean_of=0, backup=rule.backup)),
}

WAITING = ("sync", "sync_backup", "ssp")     # rules whose workers wait for each other


_NEEDS_FLOAT32 = {"dc": "the compensation is a difference of weights that are nearly the same",       # by Entry.server
                  "elastic": "what is pushed is a difference of weights that are nearly the same"}


def is_kept_by_workers(rule: RuleConfig) -> bool:
    """Whether the velocity is the workers'."""
    return bool(rule.momentum) and rule.momentum_at in ("dana", "worker")


def decays_at_workers(rule: RuleConfig) -> bool:
    """Return whether weight decay is part of the gradient that a worker computes: wd x_i for each batch, ahead of its momentum.

    So it is torch.optim.SGD's wherever the velocity is kept. Not where the server squares the gradient to compensate its delay.
    """
    return RULEBOOK[rule.name].server != "dc"


def workers_keep_state(rule: RuleConfig) -> bool:
    """Whether a checkpoint holds something of every worker's own; one that moves its own weights begins anew."""
    return is_kept_by_workers(rule) and not RULEBOOK[rule.name].moves


def pacing(rule: RuleConfig, num_workers: int) -> Pacing:
    return RULEBOOK[rule.name].pacing(rule, num_workers)


def max_drift(rule: RuleConfig, num_workers: int) -> float:
    """How far one push of each worker may move the weights, as a share of their norm; 0: no limit. One worker is plain SGD."""
    if rule.max_drift is not None:
        return rule.max_drift
    return RULEBOOK[rule.name].max_drift if num_workers > 1 else 0.0


def longest_push(rule: RuleConfig, num_workers: int) -> float:
    """lr times the norm of what a push adds up to, over that of the weights, is at most this; inf: no limit.

    A step that is the mean of m gradients moves the weights by 1 / m of each; with momentum m a gradient counts
    1 / (1 - m) times in the end.
    """
    drift = max_drift(rule, num_workers)
    return drift * (1 - rule.momentum) * (pacing(rule, num_workers).mean_of or num_workers) / num_workers if drift else math.inf


def in_flight(rule: RuleConfig, num_workers: int, overlaps: bool) -> float:
    """Return how many steps of the weights are under way at a time, in the unit of Pacing.staleness; at least 1.

    Every worker has a gradient under way, two if it overlaps; a step that is the mean of m gradients takes m of them.
    """
    return max(1.0, num_workers * (1 + overlaps) / (pacing(rule, num_workers).mean_of or num_workers))


def linear_scale(rule: RuleConfig, num_workers: int) -> int:
    """Return how many times schedule.lr, the rate of one worker's batch, a step is worth: 1, or the gradients of its mean.

    Where a step waits for one gradient of every worker its batch is that many times as large, and the rate grows with it, after
    a warm-up from the rate itself (linear scaling: Goyal et al. 2017, arXiv:1706.02677, section 2).
    """
    pacing_ = pacing(rule, num_workers)
    return 1 if pacing_.mean_of else max(1, num_workers - pacing_.backup)


def doubt_of_linear_scaling(rule: RuleConfig, num_workers: int, batch_size: int, num_samples: int) -> str:
    """Return what a user is to know whose scaled rate belongs to a batch too large for the data, or an empty text.

    batch_size: images of a worker's batch; num_samples: of an epoch.
    """
    scale, images = linear_scale(rule, num_workers), linear_scale(rule, num_workers) * batch_size
    if scale == 1 or num_samples >= LEAST_STEPS * images:
        return ""
    return (f"{rule.name}: a step is made of {images:,} of {num_samples:,} images, {images / num_samples:.0%} of an epoch. Linear scaling of the "
            f"rate is known to hold for small shares; on the digits it held at 18 %, and at 36 % it cost 25 points, where a quarter of the "
            f"rate cost 2 (docs/convergence.md). Take a lower --lr, smaller batches or fewer workers.")


def vectors(rule: RuleConfig, num_workers: int) -> tuple[int, int]:
    """How many (P,) float32 vectors the rule keeps: on the server, and on each worker."""
    entry, momentum = RULEBOOK[rule.name], bool(rule.momentum)
    server = int(momentum and rule.momentum_at.startswith("server")) + {
        "adagrad": 1, "mean": 1, "dc": num_workers * (2 if rule.name == "dc_asgd_a" else 1)}.get(entry.server, 0)
    worker = is_kept_by_workers(rule) * (2 if entry.pacing(rule, num_workers).may_drop else 1) + {
        "descends": 1, "elastic": 1}.get(entry.moves, 0)
    return server, worker


def check(config: Config, num_workers: int) -> None:
    """Refuse combinations that make no sense, with the reason. `config` is complete. Raises ConfigError."""
    rule, exchange = config.rule, config.exchange
    entry = RULEBOOK[rule.name]

    def demand(holds: bool, option: str, value: object, reason: str) -> None:
        if not holds:
            raise ConfigError(f"--{option} {value} with --rule.name {rule.name}: {reason}.")

    at = rule.momentum_at
    if rule.momentum and (at == "none" or at not in entry.momenta):
        places = [place for place in entry.momenta if place != "none"]
        why = {"dc": "the server needs the gradient itself, not a velocity", "adagrad": "its rates are of the gradients' squares",
               "elastic": "what is pushed is a difference of weights, not a gradient"}.get(
                   entry.server, "a worker that moves its own weights must know the whole step" if entry.moves else "it is set to none")
        demand(False, "rule.momentum_at", at, f"{why}; choose of {', '.join(places)}" if places else f"{why}; leave the momentum out")
    if entry.server == "dc":
        demand(exchange.n_push == 1, "exchange.n_push", exchange.n_push,
               "the compensation squares the gradient of one batch, and a sum over several has another square; leave n_push at 1")
        demand(not exchange.overlap and exchange.n_fetch == 1, *(
            ("exchange.overlap", "true") if exchange.overlap else ("exchange.n_fetch", exchange.n_fetch)),
            "the compensation is for the way from the weights that a gradient was computed on, and the server keeps those that "
            "a worker fetched after its last push; leave overlap and n_fetch out")
    demand(entry.may_overlap or not exchange.overlap, "exchange.overlap", "true",
           "a worker would compute while it is to wait, or on weights that it is about to move" + (
               "; n_push auto needs the overlap" if exchange.n_push == "auto" else ""))
    demand(exchange.wire == "float32" or entry.server not in _NEEDS_FLOAT32, "exchange.wire", exchange.wire,
           f"{_NEEDS_FLOAT32.get(entry.server)}, smaller than what rounding them loses; take float32")
    demand(entry.moves != "elastic" or exchange.n_fetch == exchange.n_push, "exchange.n_fetch", exchange.n_fetch,
           "the difference to the centre is of the weights that were just fetched; leave n_fetch out")
    demand(rule.staleness == entry.staleness or not entry.staleness, "rule.staleness", rule.staleness,
           f"the rule has its own weights ({entry.staleness})")
    demand(rule.name != "sync_backup" or rule.backup < num_workers, "rule.backup", rule.backup,
           f"of {num_workers} workers, none would be waited for")
    demand(rule.name != "softsync" or rule.splits <= num_workers, "rule.splits", rule.splits,
           f"there are {num_workers} workers, so a step cannot be the mean of less than a gradient")


def defaults(rule: RuleConfig, momentum: float, lr: float) -> tuple[dict[str, object], float]:
    """For the fields of `rule` that are None, and the rate; `momentum` and `lr`: the network's recipe.

    A rule without momentum gets the rate lr / (1 - momentum), at which a gradient moves the weights as far in the end.
    """
    entry = RULEBOOK[rule.name]
    at = entry.momenta[0]
    if at == "none" and rule.momentum and len(entry.momenta) > 1:
        at = entry.momenta[1]
    without = (rule.momentum_at or at) == "none"
    rate = lr / (1 - momentum) if without and rule.momentum is None and entry.server != "adagrad" else lr
    return {"momentum_at": at, "momentum": 0.0 if without else momentum, "staleness": entry.staleness or "delay_adaptive",
            "dc_lambda": 2.0 if rule.name == "dc_asgd_a" else 0.04}, rate


def expected_staleness(rule: RuleConfig, num_workers: int, in_flight: int) -> str:
    """What a user is to expect, in a line."""
    pacing_ = pacing(rule, num_workers)
    if not pacing_.mean_of:
        scale = linear_scale(rule, num_workers)
        times = f", at {scale} times the rate of one (linear scaling, Goyal et al. 2017), reached in the warm-up" if scale > 1 else ""
        return f"{num_workers} workers, {rule.name}: a step is the mean of {scale} gradients{times}"
    bound = [f"at most {pacing_.max_staleness - 1:g}"] if math.isfinite(pacing_.max_staleness) else []
    together = [f"{pacing_.mean_of} gradients a step"] if pacing_.mean_of > 1 else []
    return f"{num_workers} workers: expect a staleness of about {in_flight - 1}" + "".join(f", {text}" for text in bound + together)

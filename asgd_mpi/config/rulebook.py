"""The update rules by name: what each asks of the server, the ledger and the workers, its defaults, and its source.

Pure: no MPI, no torch. The vectors are moved in `optim.rules` (server) and `optim.replica`; who waits for whom, and which
gradients make a step together, is decided in `protocol.barrier`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Optional

from asgd_mpi.errors import ConfigError, plural
from asgd_mpi.protocol.barrier import Pacing

if TYPE_CHECKING:
    from asgd_mpi.config.options import Recipe, RuleConfig
    from asgd_mpi.config.resolved import Resolved, ResolvedExchange, ResolvedRule

# A gradient is wrong by as much as the weights have moved since they were read, so that is what is limited: a step relative
# to the weights is what matters of it (LARS, You et al. 2017, arXiv:1708.03888), and where it is too long the gradient is
# scaled down (Pascanu et al. 2013, arXiv:1211.5063). With it the stock settings reach the accuracy of one worker with 32 of
# them, without it they do with 8 (docs/convergence.md).
MAX_DRIFT = 0.25

# of an epoch, with which linear scaling of the rate is taken to hold (docs/convergence.md)
LEAST_STEPS = 5
# what makes a run short: pushes of each worker; and pushes of each that a worker's own means of AdamW need (docs/convergence.md)
LEAST_PUSHES, LEAST_OWN_PUSHES = 2000, 100
# of local training; with fewer 8 workers lost more than half a point on Fashion-MNIST (docs/slow-links.md)
ENOUGH_ROUNDS = 300
# batches that a worker trains on its own, where a measurement chooses them: with 10 in 32 epochs 8 workers lost nothing (docs/slow-links.md)
LEAST_LOCAL_BATCHES = 10
# images that are left in a batch with batch norm, whose statistics are inaccurate in small ones (Wu and He 2018, arXiv:1803.08494)
LEAST_NORMED_BATCH = 16


@dataclass(frozen=True)
class ManyWorkers:
    """Limits to the batches of many workers in a short run, which are smaller, at a lower rate (docs/convergence.md)."""

    from_workers: int
    recipe_batches: int  # that may be under way at a time, of the recipe's size,
    images: int  # ... or so many images, if that is more
    least_batch: int  # images that are left in one


# By optimizer. SGD keeps the accuracy of one worker so. AdamW gains with every step that it makes of the same samples, so that
# it is divided further.
MANY_WORKERS = {
    "sgd": ManyWorkers(from_workers=8, recipe_batches=4, images=128, least_batch=4),
    "adamw": ManyWorkers(from_workers=8, recipe_batches=2, images=1, least_batch=1),
}
# of diloco, that of Douillard et al. 2023
OUTER_RATE_WITH_MOMENTUM = 0.7
# a share of a worker's own way; more or less of it is stable for smaller outer rates only (tests/pure/test_diloco.py)
OUTER_AHEAD = 0.5
# Of the recipe's rate. At 4 times of it 8 workers were worse than at it with SGD, and better than at twice it with Adam, whose steps
# on small batches are mostly noise, which the mean takes out (docs/slow-links.md).
MOST_LOCAL_SCALE, MOST_LOCAL_SCALE_OF_ADAM = 2.0, 4.0
MOMENTA = ("dana", "worker", "server", "server_nag", "none")
# By optimizer, the (P,) vectors that it keeps at the server beside a velocity.
OPTIMIZERS = {"sgd": 0, "adagrad": 1, "adamw": 2, "adam": 2, "nadamw": 2}
ADAM = ("adamw", "adam", "nadamw")
# torch.optim's, for a network whose recipe is SGD's
ADAM_LR, ADAMW_DECAY = 1e-3, 1e-2
# Of rules that wait for all workers. A velocity of each worker's own misses the steps that its worker has no part in (it validates, or
# came late), so that the mean of the velocities is not the velocity of the mean: with 32 workers that diverges where SGD does not.
_OF_THE_STEP = ("server_nag", "server", "dana", "worker", "none")


@dataclass(frozen=True)
class Entry:
    """One rule."""

    what: str  # in one line
    source: str
    # how the server moves the weights: a class of `rules`
    server: str = "sgd"
    # how a worker moves its own weights: "", descends, elastic or local
    moves: str = ""
    # a name of OPTIMIZERS, if the rule is one for that alone
    optimizer: str = ""
    # where a velocity may be kept; the first is the default
    momenta: tuple[str, ...] = MOMENTA
    # weight of a stale gradient, where the rule prescribes it
    staleness: Optional[str] = None
    n_push: int = 1  # default
    may_overlap: bool = True  # push and fetch behind the next gradient
    keeps_reads: bool = False  # the server keeps the snapshot that each worker computes on
    max_drift: float = MAX_DRIFT  # default, for more workers than one
    pacing: Callable[[RuleConfig, int], Pacing] = lambda rule, num_workers: Pacing()


def _softsync(rule: RuleConfig, num_workers: int) -> Pacing:
    return Pacing(mean_of=max(1, num_workers // rule.splits))


def _ringmaster(rule: RuleConfig, num_workers: int) -> Pacing:
    return Pacing(max_staleness=rule.max_staleness or 2 * num_workers)


RULEBOOK = {
    "asgd": Entry(
        "every gradient on arrival", "Downpour SGD with n_push = n_fetch = 1, Dean et al. 2012"
    ),
    "sasgd": Entry(
        "asgd, the rate divided by the staleness",
        "Zhang et al. 2016, arXiv:1511.05950, equation 3",
        staleness="inverse",
    ),
    "downpour": Entry(
        "workers descend on their own weights between two fetches",
        "Dean et al. 2012, algorithm 1; Paine et al. 2013, arXiv:1312.6186",
        moves="descends",
        optimizer="sgd",
        momenta=("none", "worker", "dana"),
        n_push=5,
        may_overlap=False,
    ),
    "diloco": Entry(
        "workers train on their own, and the server steps with the way that they went",
        "DiLoCo, Douillard et al. 2023, arXiv:2311.08105; delayed Nesterov, Liu et al. 2024, arXiv:2401.09135",
        server="delayed_nesterov",
        moves="local",
        momenta=("dana", "worker", "none"),
        n_push=50,
        max_drift=0.0,
    ),
    "adagrad": Entry(
        "a rate of its own for every weight",
        "Downpour SGD with Adagrad, Dean et al. 2012, section 4.1",
        optimizer="adagrad",
        max_drift=0.0,
    ),
    "adamw": Entry(
        "asgd with Adam's step, weight decay apart from it",
        "Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2",
        optimizer="adamw",
    ),
    "adam": Entry(
        "asgd with Adam's step, weight decay part of the gradient",
        "Kingma and Ba 2015, arXiv:1412.6980, algorithm 1",
        optimizer="adam",
    ),
    "nadamw": Entry(
        "adamw that looks ahead by a step",
        "Dozat 2016; with stale gradients Ajanthan et al. 2025, arXiv:2505.01099",
        optimizer="nadamw",
    ),
    "softsync": Entry(
        "a step is the mean of workers / splits gradients",
        "Zhang et al. 2016, arXiv:1511.05950, equation 2",
        server="mean",
        pacing=_softsync,
    ),
    "ringmaster": Entry(
        "gradients staler than max_staleness are dropped",
        "Maranjyan et al. 2025, arXiv:2501.16168",
        pacing=_ringmaster,
    ),
    "ssp": Entry(
        "a worker waits that is more than slack steps ahead",
        "Ho et al. 2013, stale synchronous parallel",
        may_overlap=False,
        pacing=lambda rule, num_workers: Pacing(slack=rule.slack),
    ),
    "dc_asgd_c": Entry(
        "delay compensation, constant",
        "Zheng et al. 2017, arXiv:1609.08326, equation 10",
        server="dc",
        optimizer="sgd",
        keeps_reads=True,
        momenta=("none", "server", "server_nag"),
        may_overlap=False,
    ),
    "dc_asgd_a": Entry(
        "delay compensation, adaptive",
        "Zheng et al. 2017, arXiv:1609.08326, equations 10 and 14",
        server="dc",
        optimizer="sgd",
        keeps_reads=True,
        momenta=("none", "server", "server_nag"),
        may_overlap=False,
    ),
    "easgd": Entry(
        "workers descend on their own, tied to the centre by a spring",
        "Zhang, Choromanska, LeCun 2015, arXiv:1412.6651, algorithm 1",
        server="elastic",
        optimizer="sgd",
        moves="elastic",
        momenta=("none",),
        staleness="constant",
        n_push=10,
        may_overlap=False,
        max_drift=0.0,
    ),
    "eamsgd": Entry(
        "easgd with Nesterov momentum at the workers",
        "Zhang, Choromanska, LeCun 2015, arXiv:1412.6651, algorithm 2",
        server="elastic",
        optimizer="sgd",
        moves="elastic",
        momenta=("dana",),
        staleness="constant",
        n_push=10,
        may_overlap=False,
        max_drift=0.0,
    ),
    "sync": Entry(
        "a step is the mean of one gradient of each worker",
        "synchronous SGD, the line to meet",
        server="mean",
        momenta=_OF_THE_STEP,
        staleness="constant",
        may_overlap=False,
        max_drift=0.0,
        pacing=lambda rule, num_workers: Pacing(mean_of=0),
    ),
    "sync_backup": Entry(
        "sync that does not wait for the last workers",
        "Chen et al. 2016, arXiv:1604.00981",
        server="mean",
        momenta=_OF_THE_STEP,
        staleness="constant",
        may_overlap=False,
        max_drift=0.0,
        pacing=lambda rule, num_workers: Pacing(mean_of=0, backup=rule.backup),
    ),
}

# wire formats of pushes that leave something out, which a worker keeps (see optim.error_feedback)
COMPRESSED = ("int8", "int4", "topk")
WAITING = ("sync", "sync_backup", "ssp")  # rules whose workers wait for each other


# by Entry.server
_NEEDS_FLOAT32 = {
    "dc": "the compensation is a difference of weights that are nearly the same",
    "elastic": "what is pushed is a difference of weights that are nearly the same",
}


def optimizer_of(rule: RuleConfig) -> str:
    """Return whose step a gradient makes, a name of OPTIMIZERS."""
    return RULEBOOK[rule.name].optimizer or rule.optimizer or "sgd"


def is_adaptive(rule: RuleConfig) -> bool:
    """Return whether the length of a step is not that of its gradient (Adam): then a factor of the gradient limits nothing."""
    return optimizer_of(rule) in ADAM


def steps_at_workers(rule: RuleConfig) -> bool:
    """Return whether it is the workers who make the optimizer's steps, and keep its state from push to push (diloco)."""
    return RULEBOOK[rule.name].moves == "local"


def momenta(rule: RuleConfig) -> tuple[str, ...]:
    """Return where a velocity may be kept; the first is the default."""
    if rule.own:
        return ("none", "dana", "worker")
    entry, optimizer = RULEBOOK[rule.name], optimizer_of(rule)
    if optimizer == "sgd":
        return entry.momenta
    if optimizer == "adamw" and entry.server == "sgd":
        return ("none", "dana", "worker")
    return ("none",)


def fetch_wire(wire: str) -> str:
    """Return the format of fetched weights that goes with one of pushes."""
    return "bfloat16" if wire in COMPRESSED else wire


def momentum_of(rule: ResolvedRule) -> tuple[float, str]:
    """Return how much of the last step goes on into the next one, and where that is kept: Adam's mean is a momentum, too."""
    if is_kept_by_workers(rule) and is_adaptive(rule):
        return rule.beta1, rule.momentum_at
    if is_adaptive(rule):
        keeper = "server_nag" if optimizer_of(rule) == "nadamw" else "server"
        return rule.beta1, keeper
    return rule.momentum, rule.momentum_at


def momentum_option(rule: ResolvedRule) -> str:
    """Return the option that sets what `momentum_of` returns."""
    return "rule.beta1" if is_adaptive(rule) else "rule.momentum"


def optimizer_told(rule: ResolvedRule) -> str:
    """Say in a few words what a step is made of, such as `momentum 0.9, kept by the workers`."""
    optimizer = optimizer_of(rule)
    if rule.own:
        return f"{rule.own} {rule.own_options}".strip()
    if optimizer in ADAM:
        keeper = ", kept by the workers" * is_kept_by_workers(rule)
        return f"{optimizer} (betas {rule.beta1:g} and {rule.beta2:g}, eps {rule.eps:g}){keeper}"
    momentum = "no momentum"
    if rule.momentum:
        keeper = "server" if rule.momentum_at.startswith("server") else "workers"
        momentum = f"momentum {rule.momentum:g}, kept by the {keeper}"
    if optimizer == "sgd":
        return momentum
    return f"{optimizer}, {momentum}"


def is_kept_by_workers(rule: ResolvedRule) -> bool:
    """Return whether the velocity is the workers', or Adam's means are."""
    has_momentum = bool(rule.momentum) or is_adaptive(rule)
    return has_momentum and rule.momentum_at in ("dana", "worker")


def kept_at_server(rule: ResolvedRule) -> int:
    """Return how many (P,) vectors the optimizer keeps at the server."""
    if steps_at_workers(rule) or is_adaptive(rule) and is_kept_by_workers(rule):
        return 0
    return OPTIMIZERS[optimizer_of(rule)]


def decays_at_workers(rule: ResolvedRule) -> bool:
    """Return whether weight decay is part of the gradient that a worker computes: wd x_i for each batch, ahead of its momentum.

    So it is torch.optim.SGD's wherever the velocity is kept. Not where the server squares the gradient, to compensate its delay or
    for Adam, whose decay is apart from the gradient or, in torch's kernel, added to it.
    """
    return RULEBOOK[rule.name].server != "dc" and not is_adaptive(rule)


def workers_keep_state(config: Resolved) -> bool:
    """Return whether a checkpoint holds something of every worker's own."""
    return vectors_kept(config.rule, config.exchange.wire) > 0 and not begins_anew(config.rule)


def vectors_kept(rule: ResolvedRule, wire: str) -> int:
    """Return how many (P,) float32 vectors a worker keeps from push to push: its velocity or its optimizer's, and a residual."""
    has_velocity = is_kept_by_workers(rule) and not is_adaptive(rule)
    has_optimizer = steps_at_workers(rule) or is_kept_by_workers(rule) and is_adaptive(rule)
    num_vectors = has_velocity + (wire in (*COMPRESSED, "auto"))
    if has_optimizer:
        num_vectors += OPTIMIZERS[optimizer_of(rule)]
    return num_vectors


def begins_anew(rule: ResolvedRule) -> bool:
    """Return whether a worker begins anew when a run is resumed: its own weights, which no snapshot replaces, are not saved."""
    return RULEBOOK[rule.name].moves == "elastic"


def pacing(rule: RuleConfig, num_workers: int) -> Pacing:
    return RULEBOOK[rule.name].pacing(rule, num_workers)


def max_drift(rule: RuleConfig, num_workers: int) -> float:
    """How far one push of each worker may move the weights, as a share of their norm; 0: no limit. One worker is plain SGD."""
    if rule.max_drift is not None:
        return rule.max_drift
    if rule.own or optimizer_of(rule) == "adagrad":
        return 0.0
    return RULEBOOK[rule.name].max_drift if num_workers > 1 else 0.0


def longest_push(rule: ResolvedRule, num_workers: int) -> float:
    """lr times the norm of what a push adds up to (of Adam: of the step), over that of the weights, is at most this; inf: no limit.

    A step that is the mean of m gradients moves the weights by 1 / m of each; with momentum m a gradient counts
    1 / (1 - m) times in the end.
    """
    drift = max_drift(rule, num_workers)
    if not drift:
        return math.inf
    mean_of = pacing(rule, num_workers).mean_of or num_workers
    return drift * (1 - rule.momentum) * mean_of / num_workers


def in_flight(rule: RuleConfig, num_workers: int, overlaps: bool) -> float:
    """Return how many steps of the weights are under way at a time, in the unit of Pacing.staleness; at least 1.

    Every worker has a gradient under way, two if it overlaps; a step that is the mean of m gradients takes m of them.
    """
    return max(
        1.0, num_workers * (1 + overlaps) / (pacing(rule, num_workers).mean_of or num_workers)
    )


def linear_scale(rule: RuleConfig, num_workers: int) -> int:
    """Return how many times schedule.lr, the rate of one worker's batch, a step is worth: 1, or the gradients of its mean.

    Where a step waits for one gradient of every worker its batch is that many times as large, and the rate grows with it, after
    a warm-up from the rate itself (linear scaling: Goyal et al. 2017, arXiv:1706.02677, section 2).
    """
    pacing_ = pacing(rule, num_workers)
    return 1 if pacing_.mean_of else max(1, num_workers - pacing_.backup)


def rate_scale(rule: RuleConfig, num_workers: int) -> float:
    """Return what schedule.lr is multiplied by for a step of so many gradients: their number, or its root with Adam.

    Its steps are as long whatever their gradients; with a batch k times as large, sqrt(k) keeps their noise over a number of
    samples (Malladi et al. 2022, arXiv:2205.10782).
    """
    scale = linear_scale(rule, num_workers)
    return math.sqrt(scale) if is_adaptive(rule) else scale


def batch_divisor(
    config: Resolved, num_workers: int, num_samples: int, least_batch: int = 1
) -> int:
    """Return by how much a recipe's batch is to be divided for so many workers, a power of 2; 1 for the recipe itself.

    Stale are the images of the gradients under way, workers times batch. Smaller batches at a lower rate (`smaller_rate`) are the
    same training with less of it under way, for more exchanges. Where every worker pushes LEAST_PUSHES times or
    more, that many are a small part of the run. num_samples: of an epoch; least_batch: images that the network needs in a batch.
    Measured for SGD and AdamW with a step for every gradient; other rules and optimizers keep their batch.
    """
    rule, exchange, images = config.rule, config.exchange, config.data.batch_size
    entry, many = RULEBOOK[rule.name], MANY_WORKERS.get(optimizer_of(rule))
    n_push = exchange.n_push or entry.n_push
    if (
        many is None
        or rule.own
        or num_workers < many.from_workers
        or entry.server != "sgd"
        or entry.moves
        or entry.staleness
        or (n_push, exchange.n_fetch or n_push) != (1, 1)
        or config.compute.micro_batches > 1
    ):
        return 1
    least = max(least_batch, many.least_batch)
    under_way = max(many.recipe_batches * images, many.images)
    pushes, divisor = config.run.epochs * num_samples / (num_workers * images), 1
    while (
        num_workers * images > under_way * divisor
        and images >= 2 * divisor * least
        and pushes * divisor < LEAST_PUSHES
    ):
        divisor *= 2
    return divisor


def suits_dana(config: Resolved, pushes: float) -> bool:
    """Return whether AdamW's means are better kept by the workers, where their number has made the batches smaller.

    pushes: of each worker. With fewer than LEAST_OWN_PUSHES its means know too little; measured for rules without waiting, and
    a network in stages cannot (see runtime.prepare).
    """
    rule = config.rule
    return (
        optimizer_of(rule) == "adamw"
        and rule.name in ("asgd", "adamw")
        and config.stages.number == 1
        and pushes >= LEAST_OWN_PUSHES
    )


def smaller_rate(rule: RuleConfig, lr: float, divisor: int) -> float:
    """Return the rate of batches that are smaller by a divisor: lower by as much, or by its root with Adam (see `rate_scale`)."""
    if is_adaptive(rule):
        return lr / math.sqrt(divisor)
    return lr / divisor


def smaller_batch_drift(rule: RuleConfig, num_workers: int, divisor: int) -> float | None:
    """Return max_drift for batches that are smaller by a divisor: larger by its root, where it is left open; None: there is none.

    The gradient of a small batch is longer, by its noise. Steps of noise add up by the root of their number, but the limit adds up
    their lengths, and would hold back what moves the weights little. Measured for SGD (docs/convergence.md).
    """
    if rule.max_drift is not None or is_adaptive(rule):
        return rule.max_drift
    return round(max_drift(rule, num_workers) * math.sqrt(divisor), 3) or None


def outer_rate(rule: RuleConfig, overlaps: bool) -> float:
    """Return the share of the way of its workers that diloco's server goes, where it is left open.

    A worker that arrives within a push at what its weights are drawn to makes a step x <- x - (e / N) x of the server, N steps late.
    With 8 workers that is stable for e up to 1.65. With overlap, 2 N steps late, it is up to 1.6 where a worker goes half of its
    own way ahead (`outer_ahead`), and up to 0.9 where it knows of its own part alone (tests/pure/test_diloco.py).
    """
    if overlaps and (rule.outer_momentum or rule.outer_ahead == 0):
        return 0.5
    return OUTER_RATE_WITH_MOMENTUM if rule.outer_momentum else 1.0


def share_ahead(rule: ResolvedRule, num_workers: int) -> float:
    """Return by which share of its last push a worker of diloco moves what it has fetched meanwhile.

    What it fetched lacks that push, of which the server makes e / N. It lacks those of the others, too; the worker's own way stands
    for theirs. After eager updates (Kale, Douillard, Donchev 2025, arXiv:2502.12996), which go ahead by e / N.
    """
    return rule.outer_rate * max(rule.outer_ahead, 1 / (rule.outer_pushes or num_workers))


def local_scale(rule: RuleConfig, num_workers: int) -> float:
    """Return what the recipe's rate is multiplied by, if it is left open, where the ways of several workers are averaged.

    It is the root of their number, up to a limit: between two exchanges a worker bears the rate alone, however many others there are.
    """
    if not steps_at_workers(rule):
        return 1.0
    most = MOST_LOCAL_SCALE_OF_ADAM if is_adaptive(rule) else MOST_LOCAL_SCALE
    return min(most, math.sqrt(rule.outer_pushes or num_workers))


def doubts(config: Resolved, num_workers: int, num_samples: int) -> list[str]:
    """Return what a user is to know before a run, each a sentence or two; num_samples: of an epoch."""
    found = (
        doubt_of_linear_scaling(config.rule, num_workers, config.data.batch_size, num_samples),
        doubt_of_few_rounds(config, num_workers, num_samples),
    )
    return [doubt for doubt in found if doubt]


def doubt_of_few_rounds(config: Resolved, num_workers: int, num_samples: int) -> str:
    """Return what a user is to know whose workers train on their own and meet too seldom for it, or an empty text."""
    if not steps_at_workers(config.rule) or num_workers < 2:
        return ""
    n_push = config.exchange.n_push
    if n_push == "auto":
        n_push = LEAST_LOCAL_BATCHES
    samples = config.run.epochs * num_samples
    rounds = int(samples / (num_workers * config.data.batch_size * n_push))
    if rounds >= ENOUGH_ROUNDS:
        return ""
    return (
        f"{config.rule.name}: {rounds:,} rounds in which each worker trains {n_push} batches on its own. The fewer, the less accurate: "
        f"8 workers on Fashion-MNIST lost 2.4 points with 37 rounds, 0.8 with 150 and 0.5 with 300 (docs/slow-links.md). If the link bears "
        f"it, take a smaller --n-sync, or train for more epochs."
    )


def doubt_of_linear_scaling(
    rule: RuleConfig, num_workers: int, batch_size: int, num_samples: int
) -> str:
    """Return what a user is to know whose scaled rate belongs to a batch too large for the data, or an empty text.

    batch_size: images of a worker's batch; num_samples: of an epoch.
    """
    scale, images = linear_scale(rule, num_workers), linear_scale(rule, num_workers) * batch_size
    if scale == 1 or is_adaptive(rule) or num_samples >= LEAST_STEPS * images:
        return ""
    return (
        f"{rule.name}: a step is made of {images:,} of {num_samples:,} images, {images / num_samples:.0%} of an epoch. Linear scaling of the "
        f"rate is known to hold for small shares; on the digits it held at 18 %, and at 36 % it cost 25 points, where a quarter of the "
        f"rate cost 2 (docs/convergence.md). Take a lower --lr, smaller batches or fewer workers."
    )


def vectors(rule: ResolvedRule, num_workers: int, wire: str = "float32") -> tuple[int, int]:
    """Return how many (P,) float32 vectors the rule and what `wire` leaves out take: on the server, and on each worker."""
    entry = RULEBOOK[rule.name]
    has_velocity = bool(rule.momentum) and rule.momentum_at.startswith("server")
    server = int(has_velocity) + kept_at_server(rule) + bool(rule.ema_samples)
    if entry.server == "mean":
        server += 1
    elif entry.server == "dc":
        server += num_workers
        if rule.name == "dc_asgd_a":
            server += num_workers
    elif entry.server == "delayed_nesterov" and rule.outer_momentum:
        server += 2
    worker = vectors_kept(rule, wire)
    if entry.pacing(rule, num_workers).may_drop:
        worker *= 2
    if entry.moves in ("descends", "elastic", "local"):
        worker += 1
    return server, worker


def check(config: Resolved, num_workers: int) -> None:
    """Refuse combinations that make no sense, with the reason. `config` is complete. Raises ConfigError."""
    rule, exchange = config.rule, config.exchange
    _check_step(rule)
    _check_momentum(rule)
    if RULEBOOK[rule.name].server == "dc":
        _check_compensation(rule, exchange)
    _check_exchange(rule, exchange)
    if steps_at_workers(rule):
        _check_steps_of_workers(rule, config.stages.number)
    _check_staleness(rule, num_workers)
    _check_shares(rule, num_workers)


def _demand(rule: ResolvedRule, holds: bool, option: str, value: object, reason: str) -> None:
    """Raise ConfigError for an option, unless it holds what the rule asks of it."""
    if not holds:
        raise ConfigError(f"--{option} {value} with --rule.name {rule.name}: {reason}.")


def _check_step(rule: ResolvedRule) -> None:
    """Refuse another step of the server, or another optimizer, than the rule can have."""
    entry, optimizer = RULEBOOK[rule.name], optimizer_of(rule)
    plain = (entry.server, entry.moves, entry.optimizer) == ("sgd", "", "")
    _demand(
        rule,
        not rule.own or plain and optimizer == "sgd",
        "rule.own",
        rule.own,
        "a class of yours moves the weights in place of the rule's own step; take asgd, sasgd, ssp or ringmaster, without --rule.optimizer",
    )
    _demand(
        rule,
        bool(rule.own) or not rule.own_options,
        "rule.own_options",
        rule.own_options,
        "they are of a class of yours; name it with --rule package.module:Class",
    )
    _demand(
        rule,
        rule.optimizer in (None, optimizer),
        "rule.optimizer",
        rule.optimizer,
        f"the rule is one for {optimizer} alone; leave the optimizer out, or take it with another rule, such as asgd or sync",
    )


def _check_momentum(rule: ResolvedRule) -> None:
    """Refuse a momentum where the rule can have none, and a place where nobody may keep it."""
    entry, at = RULEBOOK[rule.name], rule.momentum_at
    optimizer, allowed = optimizer_of(rule), momenta(rule)
    if optimizer in ADAM:
        _demand(
            rule,
            not rule.momentum,
            "rule.momentum",
            rule.momentum,
            f"the momentum of {optimizer} is --rule.beta1; leave the momentum out",
        )
        why = f"who keeps the means of {optimizer} follows from the rule; leave it out"
        if len(allowed) > 1:
            why = (
                f"the server keeps the means of {optimizer}; dana and worker let the workers do so"
            )
        _demand(rule, at in allowed, "rule.momentum_at", at, why)
    elif rule.momentum and (at == "none" or at not in allowed):
        places = [place for place in allowed if place != "none"]
        why = "it is set to none"
        if entry.moves:
            why = "a worker that moves its own weights must know the whole step"
        reasons = {
            "dc": "the server needs the gradient itself, not a velocity",
            "adagrad": "its rates are of the gradients' squares",
            "elastic": "what is pushed is a difference of weights, not a gradient",
        }
        why = reasons.get(optimizer if optimizer != "sgd" else entry.server, why)
        remedy = f"choose of {', '.join(places)}" if places else "leave the momentum out"
        _demand(rule, False, "rule.momentum_at", at, f"{why}; {remedy}")


def _check_compensation(rule: ResolvedRule, exchange: ResolvedExchange) -> None:
    """Refuse exchanges that a compensation of delays is not defined for."""
    _demand(
        rule,
        exchange.n_push == 1,
        "exchange.n_push",
        exchange.n_push,
        "the compensation squares the gradient of one batch, and a sum over several has another square; leave n_push at 1",
    )
    why = (
        "the compensation is for the way from the weights that a gradient was computed on, and the server keeps one snapshot "
        "for each worker, that of its latest fetch; leave overlap and n_fetch out"
    )
    _demand(rule, not exchange.overlap, "exchange.overlap", "true", why)
    _demand(rule, exchange.n_fetch == 1, "exchange.n_fetch", exchange.n_fetch, why)


def _check_exchange(rule: ResolvedRule, exchange: ResolvedExchange) -> None:
    """Refuse to overlap, to round, to leave out or to fetch seldom what the rule needs."""
    entry, at, optimizer = RULEBOOK[rule.name], rule.momentum_at, optimizer_of(rule)
    why = "a worker would compute while it is to wait, or on weights that it is about to move"
    if exchange.n_push == "auto":
        why += "; n_push auto needs the overlap"
    _demand(rule, entry.may_overlap or not exchange.overlap, "exchange.overlap", "true", why)
    _demand(
        rule,
        exchange.wire == "float32" or entry.server not in _NEEDS_FLOAT32,
        "exchange.wire",
        exchange.wire,
        f"{_NEEDS_FLOAT32.get(entry.server)}, smaller than what rounding them loses; take float32",
    )
    _demand(
        rule,
        exchange.fetch_wire == "float32" or entry.server not in _NEEDS_FLOAT32,
        "exchange.fetch_wire",
        exchange.fetch_wire,
        f"{_NEEDS_FLOAT32.get(entry.server)}, smaller than what rounding them loses; take float32",
    )
    _demand(
        rule,
        exchange.wire not in COMPRESSED or optimizer == "sgd" or steps_at_workers(rule),
        "exchange.wire",
        exchange.wire,
        f"{optimizer} squares what arrives, and what is left out of one push arrives with later ones, in sum; take float32 or "
        "bfloat16",
    )
    _demand(
        rule,
        exchange.wire != "topk" or not (rule.momentum and at.startswith("server")),
        "rule.momentum_at",
        at,
        "topk sends a number every so many pushes only, and a velocity at the server goes on with it in all of the others; take "
        "dana or worker, which are applied to the gradient before anything is left out, or wire int8",
    )
    _demand(
        rule,
        entry.moves != "elastic" or exchange.n_fetch == exchange.n_push,
        "exchange.n_fetch",
        exchange.n_fetch,
        "the difference to the centre is of the weights that were just fetched; leave n_fetch out",
    )
    _demand(
        rule,
        entry.moves != "local" or exchange.n_fetch == exchange.n_push,
        "exchange.n_fetch",
        exchange.n_fetch,
        "a worker sets out from the weights that it has just fetched; leave n_fetch out",
    )
    _demand(
        rule,
        entry.moves == "local" or not rule.steps_by_speed,
        "rule.steps_by_speed",
        "true",
        "what its workers push is not the way of so many local steps, so their number is the same for all; take diloco, or leave it out",
    )


def _check_steps_of_workers(rule: ResolvedRule, num_stages: int) -> None:
    """Refuse what the steps of another optimizer than SGD, made by the workers, cannot go with."""
    optimizer = optimizer_of(rule)
    _demand(
        rule,
        not (optimizer in ADAM and rule.max_drift),
        "rule.max_drift",
        rule.max_drift,
        f"the steps of {optimizer} are as long whatever their gradients, so there is nothing to scale down; leave it out",
    )
    _demand(
        rule,
        not (optimizer != "sgd" and num_stages > 1),
        "rule.optimizer",
        optimizer,
        "every stage would keep a part of its state, which a checkpoint does not put together; take sgd, or leave --stages out",
    )


def _check_staleness(rule: ResolvedRule, num_workers: int) -> None:
    """Refuse weights of stale gradients other than the rule's own."""
    entry, optimizer = RULEBOOK[rule.name], optimizer_of(rule)
    _demand(
        rule,
        rule.staleness == entry.staleness or not entry.staleness,
        "rule.staleness",
        rule.staleness,
        f"the rule has its own weights ({entry.staleness})",
    )
    _demand(
        rule,
        pacing(rule, num_workers).mean_of == 1
        or optimizer not in ADAM
        or rule.staleness in (None, "constant"),
        "rule.staleness",
        rule.staleness,
        f"a step is the mean of gradients of several stalenesses, and the length of {optimizer}'s steps is not theirs: a weight of each "
        "would change the direction alone; take constant",
    )


def _check_shares(rule: ResolvedRule, num_workers: int) -> None:
    """Refuse to wait for fewer than one of the workers, or to share a step among more than all."""
    _demand(
        rule,
        rule.name != "sync_backup" or rule.backup < num_workers,
        "rule.backup",
        rule.backup,
        f"of {num_workers} workers, none would be waited for",
    )
    _demand(
        rule,
        rule.name != "softsync" or rule.splits <= num_workers,
        "rule.splits",
        rule.splits,
        f"there are {num_workers} workers, so a step cannot be the mean of less than a gradient",
    )


def defaults(rule: RuleConfig, recipe: Recipe) -> tuple[dict[str, object], float]:
    """For the fields of `rule` that are None, and the rate; `recipe`: the network's.

    A rule without momentum gets the rate lr / (1 - momentum), at which a gradient moves the weights as far in the end; Adam has
    a rate and a decay of its own, torch.optim's if the recipe is SGD's.
    """
    entry = RULEBOOK[rule.name]
    of_network = "sgd" if rule.own else recipe.optimizer
    optimizer = entry.optimizer or rule.optimizer or of_network
    rule = replace(rule, optimizer=optimizer)
    allowed = momenta(rule)
    at = allowed[0]
    if at == "none" and rule.momentum and len(allowed) > 1:
        at = allowed[1]
    without = (rule.momentum_at or at) == "none" or optimizer in ADAM
    lr, decay, staleness = recipe.lr, recipe.weight_decay, entry.staleness or "delay_adaptive"
    if optimizer in ADAM:
        if recipe.optimizer not in ADAM:
            lr, decay = ADAM_LR, ADAMW_DECAY
            if optimizer == "adam":
                decay = 0.0
        if entry.server == "mean":
            staleness = entry.staleness or "constant"
    elif without and rule.momentum is None and optimizer == "sgd" and not rule.own:
        lr = lr / (1 - recipe.momentum)
    return {
        "optimizer": optimizer,
        "momentum_at": at,
        "momentum": 0.0 if without else recipe.momentum,
        "weight_decay": decay,
        "no_decay": recipe.no_decay,
        "staleness": staleness,
        "dc_lambda": 2.0 if rule.name == "dc_asgd_a" else 0.04,
    }, lr


def expected_staleness(rule: RuleConfig, num_workers: int, in_flight: int) -> str:
    """Return what a user is to expect, in a line."""
    pacing_ = pacing(rule, num_workers)
    if not pacing_.mean_of:
        scale, rate = linear_scale(rule, num_workers), rate_scale(rule, num_workers)
        times, law = "", "linear scaling, Goyal et al. 2017"
        if is_adaptive(rule):
            law = "square root scaling, Malladi et al. 2022"
        if scale > 1:
            times = f", at {rate:.3g} times the rate of one ({law}), reached in the warm-up"
        return f"{num_workers} workers, {rule.name}: a step is the mean of {scale} gradients{times}"
    if in_flight == 1:
        return "1 worker: every gradient is computed on the newest weights"
    others = f"{in_flight - 1} {plural(in_flight - 1, 'other is', 'others are')}"
    text = (
        f"{num_workers} {plural(num_workers, 'worker')}: while a gradient is computed, about {others} applied (its "
        "staleness)"
    )
    if math.isfinite(pacing_.max_staleness):
        text += f", at most {pacing_.max_staleness - 1:g}"
    if pacing_.mean_of > 1:
        text += f", {pacing_.mean_of} gradients a step"
    return text

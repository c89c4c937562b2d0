"""What the numbers of a run suggest: a pure function from a `Summary` to pieces of advice with the numbers in them.

Every piece says what was measured, what follows, which option to turn and, where the numbers give it, what that gains at
most: a share s of the workers' time that they no longer wait is s / (1 - s) more images/s, one that is halved s / (2 - s). A rule that lacks its numbers is silent, and so is
one that another one explains better: who waits for a slow worker, or for the other servers, does not wait for a message.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from asgd_mpi.config.limits import MOST_SLOTS
from asgd_mpi.config.rulebook import WAITING
from asgd_mpi.record.events import PHASES
from asgd_mpi.record.summary import Summary
from asgd_mpi.record.unit import one_of
from asgd_mpi.report.cost import Cost, cost_until
from asgd_mpi.report.measure import measures
from asgd_mpi.report.units import count, number, percent, seconds, short, size

# parameters, from which several servers are proposed: an update of fewer is a matter of some ms
SHARED_OUT = 1_000_000
# share of the time that the server is busy, from which more workers hardly help
SATURATED = 0.8
QUEUES = 0.5  # ... from which pushes queue for it
SLOWER = 1.5  # times the median step, from which it is this worker that the others wait for
WAITS = 0.15  # share of the workers' time from which a phase is worth a word
# share of the gradients that were scaled down, from which that is worth a word
SCALED = 0.3
TORN = 0.05  # torn reads for each fetch
# accuracy that the last third of a run should at least gain; of a task's own metric, this share of it
PLATEAU = 0.001
MIN_VALIDATIONS = 6  # to speak of a plateau
WORTH_IT = 0.05  # gain in images/s, from which a change is worth a run
SHORT_OF_CORES = "Give each rank a core of its own, or start fewer"
IDLE_S = 5.0  # a worker's, from which a wait for a lease is worth a word: any run has a beginning and an end
# leases of the slowest worker, which holds as many: who waits for longer waits for something else
LEASES = 2.0
FEWEST_PUSHES = 50  # their mean is right to 14 %, even if the times spread as widely as it
FAR_OUT = 4  # times the measured workers, from which a number of workers is a guess


@dataclass(frozen=True)
class Advice:
    found: str  # what was measured, and what follows from it
    do: str = ""  # what to do about it, and what that gains, in sentences
    change: str = ""  # ... in a few words; "": nothing
    gain: float | None = (
        None  # images/s, as a share of what they are, at most; None: the numbers do not give it
    )
    is_alarm: bool = False  # the run's result is in doubt

    @property
    def text(self) -> str:
        return f"{self.found} {self.do}".rstrip()


def advise(summary: Summary, cost: Cost | None = None) -> list[str]:
    """Return the sentences, the weightiest first."""
    return [piece.text for piece in pieces(summary, cost)]


def foremost(found: list[Advice]) -> Advice | None:
    """Return the one thing to change: an alarm, else the largest gain, else the first that names a change."""
    able = [p for p in found if p.change and (p.gain is None or p.gain >= WORTH_IT)]
    alarms = [piece for piece in able if piece.is_alarm]
    if alarms:
        return alarms[0]
    return max(able, key=lambda piece: piece.gain or 0.0, default=None)


def without(share: float) -> float | None:
    """Return the gain in images/s if the workers no longer spend a share of their time, 0..1, waiting."""
    return share / (1 - share) if share < 1 else None


def without_waits(summary: Summary) -> float | None:
    """Return images/s of the workers if all of their time were `compute`; None if no interval says."""
    rates = [
        rank.counts["images"] / rank.phases["compute"]
        for rank in summary.ranks
        if rank.role == "worker" and rank.phases["compute"]
    ]
    return sum(rates) if rates and len(summary.crews) == 1 else None


def halved(share: float) -> float:
    """Return the gain in images/s if the workers spend half as much of their time, 0..1, so."""
    return share / (2 - share)


def _at_most(summary: Summary, gain: float | None) -> float | None:
    """Return a gain that is no more than what workers without any wait would bring: intervals last longer than the training."""
    free, rate = without_waits(summary), summary.images_per_s
    if gain is None or not free or not rate:
        return gain
    return min(gain, max(0.0, free / rate - 1))


def pieces(summary: Summary, cost: Cost | None = None) -> list[Advice]:
    """Return the advice, the weightiest first."""
    found = [piece for rule in RULES if (piece := rule(summary))]
    plateau = _plateau(summary, cost)
    if plateau:
        return [*found, plateau]
    return found


def worker_shares(summary: Summary) -> dict[str, float]:
    """Phase -> share of the time that all workers' intervals cover, 0..1; empty without intervals."""
    workers = [rank for rank in summary.ranks if rank.role == "worker"]
    total = sum(rank.seconds for rank in workers)
    if total:
        return {phase: sum(rank.phases[phase] for rank in workers) / total for phase in PHASES}
    return {}


def seconds_per_push(summary: Summary) -> dict[str, float]:
    """Phase -> a worker's seconds for one push, mean over all; empty without pushes."""
    workers = [rank for rank in summary.ranks if rank.role == "worker"]
    pushes = sum(rank.counts["pushes"] for rank in workers)
    if pushes:
        return {phase: sum(rank.phases[phase] for rank in workers) / pushes for phase in PHASES}
    return {}


def server_taken(summary: Summary) -> float | None:
    """Return the share of its time in which rank 0 can take no push: it updates, saves, or waits for the other servers; 0..1."""
    if summary.server_busy is None:
        return None
    return summary.server_busy + _share_for_servers(summary)


def _share_for_servers(summary: Summary) -> float:
    server = next((rank for rank in summary.ranks if rank.rank == 0 and rank.seconds), None)
    return server.phases["servers"] / server.seconds if server else 0.0


def _serve_s(summary: Summary) -> float | None:
    """Return the seconds for which one push occupies rank 0, mean: its own update, and the wait for those of the other servers."""
    server = next(
        (rank for rank in summary.ranks if rank.rank == 0 and rank.counts["pushes"]), None
    )
    if server and summary.apply_s:
        return summary.apply_s + server.phases["servers"] / server.counts["pushes"]
    return None


def _audit(summary: Summary) -> Advice | None:
    if not summary.audit.violations:
        return None
    more = len(summary.audit.violations) - 3
    named = "; ".join(summary.audit.violations[:3]) + (
        f"; and {more} more, see the audit" if more > 0 else ""
    )
    return Advice(
        f"The record contradicts itself ({named}).",
        "Do not trust the weights of this run before the cause is known.",
        "Look at the audit before these weights are used",
        is_alarm=True,
    )


def _saturated(summary: Summary) -> Advice | None:
    step = seconds_per_push(summary)
    if (
        (summary.server_busy or 0) < SATURATED
        or not summary.apply_s
        or not step
        or not summary.images_per_s
    ):
        return None
    pushes = sum(worker.pushes for worker in summary.workers)
    batch, asked = summary.images / pushes, summary.config.get("data.batch_size")
    own = step["data"] + step["compute"]
    doubled = min(
        2 * batch / summary.apply_s,
        summary.num_workers * 2 * batch / (2 * own + step["fetch"] + summary.apply_s),
    )
    gain = doubled / summary.images_per_s - 1
    found = (
        f"The server is busy {percent(summary.server_busy, 0)} of the time: one update takes {short(summary.apply_s)}, "
        f"so it applies at most {number(batch / summary.apply_s, 0)} {summary.unit}/s at {number(batch, 0)} {summary.unit} a push. "
        "More workers will not help."
    )
    change, do = "Take no more workers", ""
    if summary.num_parameters and summary.num_parameters >= SHARED_OUT:
        change = f"--servers {2 * summary.config.get('exchange.servers', 1)}"
        more = f"More servers share the update out, on cores of their own: {change}."
    else:
        more = ""
    if gain > 0.05:
        change = f"--data.batch_size {2 * asked if asked else round(2 * batch)}"
        do = (
            f"Twice the batch ({change}) halves the updates for each image: expected up "
            f"to +{percent(gain, 0)}, if a step then takes twice as long. Choose the learning rate anew. "
        )
    return Advice(found, (do + more).rstrip(), change, gain if gain > 0.05 else None)


def _servers(summary: Summary) -> Advice | None:
    """Rank 0 publishes when all servers have applied their slices."""
    share = _share_for_servers(summary)
    if share < WAITS:
        return None
    return Advice(
        f"Rank 0 waits {percent(share, 0)} of its time for the other servers to apply their slices: more of them would not help.",
        "Give each server a core of its own, or take fewer --servers.",
        "Give each server a core of its own, or take fewer --servers",
    )


def _waiting(summary: Summary) -> Advice | None:
    if summary.alone:  # its push is the update itself
        return None
    share, taken = worker_shares(summary).get("push", 0.0), server_taken(summary)
    if share < WAITS or taken is None or taken >= QUEUES or _share_for_servers(summary) >= WAITS:
        return None
    if summary.config.get("rule.name") in WAITING and summary.num_workers > 1:
        return _waiting_for_each_other(summary, share)
    text = (
        f"The workers spend {percent(share, 0)} of their time in push while the server is busy only "
        f"{percent(summary.server_busy, 0)}: "
    )
    if len({rank.host for rank in summary.present}) > 1:
        return Advice(
            text + "they wait for the message to travel, not for the update.",
            "Compare the bandwidth below with the link's, see that the server has a core of its own, and send less often: "
            "a larger --data.batch_size.",
            _larger_batch(summary),
            halved(share),
        )
    if not any(worker.device.startswith("cuda") for worker in summary.workers):
        host, threads = summary.present[0].host, sum(rank.num_threads for rank in summary.present)
        cores = summary.cores.get(host, 0)
        if cores >= threads:
            return Advice(
                text
                + f"on one host nothing travels, and its {cores} cores are enough for {count(threads, 'thread')}.",
                "See that no two ranks are bound to one core (mpirun --report-bindings), and what else runs there.",
                "See how the ranks are bound to cores (mpirun --report-bindings)",
                without(share),
            )
        return Advice(
            text
            + f"on one host nothing travels, so they wait for a core. All {len(summary.present)} ranks compute on its CPUs.",
            f"{SHORT_OF_CORES}.",
            SHORT_OF_CORES,
            without(share),
        )
    return Advice(
        text + "on one host nothing travels but from and to the GPUs.",
        "See that the server has a core of its own, and send less "
        "often: a larger --data.batch_size.",
        _larger_batch(summary),
        halved(share),
    )


def _larger_batch(summary: Summary) -> str:
    asked = summary.config.get("data.batch_size")
    if asked:
        return f"--data.batch_size {2 * asked}"
    return "A larger --data.batch_size"


def _waiting_for_each_other(summary: Summary, share: float) -> Advice:
    """Advise where a push is answered when others have pushed, too."""
    rule, step = summary.config["rule.name"], _step_of_each(summary)
    text = f"The workers spend {percent(share, 0)} of their time in push: under {rule} they wait there for each other. "
    slowest, median = max(step, key=step.get), statistics.median(step.values())
    if step[slowest] < SLOWER * median:
        return Advice(
            text + "No one of them is much slower than the others.",
            "A rule that does not wait gives that time back.",
            "A rule that does not wait, such as --rule asgd",
            without(share),
        )
    return Advice(
        text
        + f"Rank {slowest} takes {short(step[slowest])} for a step, the median is {short(median)}.",
        "Look at what else runs there, leave it out, or take a rule that does not wait.",
        f"Look at what slows rank {slowest} down, or take a rule that does not wait (--rule asgd)",
        without(share),
    )


def _step_of_each(summary: Summary) -> dict[int, float]:
    """Return the seconds of data and compute for a push of each worker, by rank."""
    return {
        rank.rank: (rank.phases["data"] + rank.phases["compute"]) / rank.counts["pushes"]
        for rank in summary.ranks
        if rank.role == "worker" and rank.counts["pushes"]
    }


def _bubble(summary: Summary) -> Advice | None:
    found = summary.pipelines
    if found is None or found.measured is None or found.measured < WAITS:
        return None
    if found.are_columns:
        return Advice(
            f"The columns of a replica wait for each other {percent(found.measured, 0)} of the time that a batch takes, for maps on their "
            "way or for the slower one.",
            "Give each a device of its own, and larger parts (a larger --data.batch_size, "
            "fewer --compute.micro_batches), which share out what a message costs.",
            _larger_batch(summary),
        )
    expected = ""
    if found.expected is not None:
        expected = f" (the plan expected {percent(found.expected, 0)})"
    more = 2 * found.num_parts
    then = (found.num_stages - 1) / (more + found.num_stages - 1)  # Huang et al. 2019, section 2.3
    gain = (1 - then) / (1 - found.measured) - 1 if found.measured < 1 else 0.0
    return Advice(
        f"The {found.num_stages} stages of a replica wait for each other {percent(found.measured, 0)} of the time that a batch takes"
        f"{expected}.",
        f"Cut a batch into more parts than {found.num_parts} (--compute.micro_batches), or take fewer stages.",
        f"--compute.micro_batches {more}",
        gain if gain > 0 else None,
    )


def _data(summary: Summary) -> Advice | None:
    share = worker_shares(summary).get("data", 0.0)
    if share < WAITS:
        return None
    if share < 1:
        return Advice(
            f"The workers wait {percent(share, 0)} of their time for {summary.unit}.",
            f"Raise --data.threads, or keep the shards on a faster disk. Without that wait up to +{percent(without(share), 0)} {summary.unit}/s.",
            "More --data.threads, or a faster disk",
            without(share),
        )
    return None


def _fetch(summary: Summary) -> Advice | None:
    share, step = worker_shares(summary).get("fetch", 0.0), seconds_per_push(summary)
    if share < WAITS or not step:
        return None
    return Advice(
        f"Fetching the weights takes {percent(share, 0)} of the workers' time, {short(step['fetch'])} for each push.",
        "A larger --data.batch_size fetches less often.",
        _larger_batch(summary),
        halved(share),
    )


def _lease(summary: Summary) -> Advice | None:
    share = worker_shares(summary).get("idle", 0.0)
    workers = [rank for rank in summary.ranks if rank.role == "worker"]
    if share < WAITS or statistics.mean(rank.phases["idle"] for rank in workers) < IDLE_S:
        return None
    lease_s = _lease_s(summary)
    longest = max(rank.phases["idle"] for rank in workers)
    text = f"The workers are idle {percent(share, 0)} of their time: they hold no lease"
    if lease_s is not None and longest > LEASES * lease_s * max(1, len(summary.restarts)):
        busiest = min(workers, key=lambda rank: rank.phases["idle"])
        return Advice(
            f"{text}, one of them for {seconds(longest)}, and a lease of the slowest takes {seconds(lease_s)}: it was not the "
            f"leases that they waited for. Something stood still; rank {busiest.rank} was idle least.",
            "See what held it, and the notes.",
            f"See what held rank {busiest.rank} while the others were idle",
        )
    return Advice(
        f"{text}, as at the end of a run.",
        "A smaller --data.lease_batches shares the rest out more evenly.",
        "A smaller --data.lease_batches",
        _at_most(summary, without(share)),
    )


def _lease_s(summary: Summary) -> float | None:
    """Return the seconds that the slowest worker takes for one lease; None if the record does not tell."""
    batch, batches = (
        summary.settings.get(f"data.{name}") for name in ("batch_size", "lease_batches")
    )
    if not batch or not batches:
        return None
    each = []
    for rank in summary.ranks:
        images, pushes = rank.counts["images"], rank.counts["pushes"]
        if rank.role == "worker" and images and pushes:
            own = sum(rank.phases[phase] for phase in ("data", "compute", "push", "fetch"))
            # a lease holds a push at least
            each.append(own / images * max(batch * batches, images / pushes))
    return max(each, default=None)


def _validate(summary: Summary) -> Advice | None:
    share = worker_shares(summary).get("validate", 0.0)
    if share < WAITS:
        return None
    every = summary.settings.get("run.validate_every")
    return Advice(
        f"Validation takes {percent(share, 0)} of the workers' time ({count(len(summary.validations), 'validation')}).",
        "A larger --run.validate_every gives it back to training.",
        f"--run.validate_every {2 * every:g}" if every else "A larger --run.validate_every",
        halved(share),
    )


def more_workers(summary: Summary) -> str:
    """Say whether more workers like these would find room, by the server and the cores; "" if the record does not tell."""
    limit, taken = _limit(summary), server_taken(summary)
    if taken is not None and taken >= SATURATED:
        return f"No: the server is busy {percent(taken, 0)} of the time."
    if limit is None:
        return ""
    if not _is_told(summary):
        pushes = count(_served(summary), "push", "pushes")
        return f"That cannot be told from {pushes}: train until there are {FEWEST_PUSHES} or more."
    if limit <= summary.num_workers:
        return f"No: the server can serve about {count(limit, 'worker')} like these."
    room = _bounded(summary, limit)
    waiting = _waiting(summary)
    if waiting and waiting.change == SHORT_OF_CORES:
        return f"Not on this host, whose cores are all taken; the server could serve {room}."
    return (
        f"The server could serve {room}, if the link and the cores allow. What that does to the "
        "accuracy: python -m asgd_mpi.poc."
    )


def _served(summary: Summary) -> int:
    """Return the pushes that rank 0 timed."""
    return sum(rank.counts["pushes"] for rank in summary.ranks if rank.rank == 0)


def _is_told(summary: Summary) -> bool:
    """Return whether there are pushes enough for the mean of their times to be taken further."""
    return _served(summary) >= FEWEST_PUSHES


def _bounded(summary: Summary, limit: int) -> str:
    """Say for how many workers there is room, no further than FAR_OUT times those that were measured."""
    most = FAR_OUT * summary.num_workers
    if limit <= most:
        return f"about {count(limit, 'worker')} like these"
    return f"{most:,} workers like these or more ({FAR_OUT} times those of this run, which tells no further)"


def _limit(summary: Summary) -> int | None:
    """Return how many workers like these keep the server busy all the time."""
    step, serve_s = seconds_per_push(summary), _serve_s(summary)
    if not serve_s or not step:
        return None
    return int(1 + (step["data"] + step["compute"] + step["fetch"]) / serve_s)


def _room(summary: Summary) -> Advice | None:
    step, serve_s, taken = seconds_per_push(summary), _serve_s(summary), server_taken(summary)
    limit = _limit(summary)
    if taken is None or taken >= SATURATED or limit is None or not _is_told(summary):
        return None
    cycle = step["data"] + step["compute"] + step["fetch"]
    server = next(rank for rank in summary.ranks if rank.rank == 0).phases
    with_what = ", mostly with checkpoints" if server["checkpoint"] > server["apply"] else ""
    if serve_s == summary.apply_s:
        what = "one update"
    else:
        what = "one update with the wait for the other servers"
    return Advice(
        f"More workers: the server is busy {percent(summary.server_busy, 0)} of the time{with_what}; {what} takes {short(serve_s)}, "
        f"a worker's step {short(cycle)}. It can serve {_bounded(summary, limit)} before it is the limit, if the "
        "link and the cores allow."
    )


def _stragglers(summary: Summary) -> Advice | None:
    slow = summary.stragglers
    if not slow:
        return None
    names = ", ".join(
        f"rank {worker.rank} ({worker.device} on {worker.host}): {number(worker.images_per_s)} {summary.unit}/s"
        for worker in slow[:5]
    )
    more = f", and {len(slow) - 5} more" if len(slow) > 5 else ""
    share = sum(worker.share or 0.0 for worker in slow)
    if summary.config.get("rule.name") in WAITING:
        waited = "The others wait for them"
    else:
        waited = "Nobody waits for them"
    return Advice(
        f"Below half of the median speed while they train: {names}{more}. {waited}; they did {percent(share)} of the work"
        f"{', with the stalest gradients' if _are_stalest(summary) else ''}.",
        "Look at what else runs there, or leave them out.",
        f"Look at what else runs beside {_ranks([worker.rank for worker in slow])}",
    )


def _ranks(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    return f"rank{'s' * (len(numbers) > 1)} {shown}{' and others' * (len(numbers) > 5)}"


def _are_stalest(summary: Summary) -> bool:
    """Return whether each straggler's gradients are staler, in the mean, than those of all others."""
    slow = [worker.mean_staleness or 0.0 for worker in summary.stragglers]
    others = [worker.mean_staleness or 0.0 for worker in summary.workers if not worker.is_straggler]
    return min(slow) > max(others, default=0.0)


def _statistics(summary: Summary) -> Advice | None:
    end = summary.validations[-1] if summary.validations else None
    if end is None or end.top1_error is None or end.stored_top1_error in (None, end.top1_error):
        return None
    return Advice(
        f"Batch norm: the accuracy is {percent(1 - end.top1_error, 2)} with the statistics measured anew on the final version, "
        f"{percent(1 - end.stored_top1_error, 2)} with those that the workers had gathered on versions before it. The "
        "checkpoint holds the former."
    )


def _torn(summary: Summary) -> Advice | None:
    if not summary.fetches or summary.torn_reads < TORN * summary.fetches:
        return None
    found = f"{summary.torn_reads:,} reads of {summary.fetches:,} fetches were torn and done again."
    # while one worker reads, each of the others may push, and the next snapshot is written beside
    asked = min(summary.num_workers + 2, MOST_SLOTS)
    if asked <= summary.config.get("exchange.ring", 3):
        return Advice(found)
    change = f"--exchange.ring {asked}"
    return Advice(
        found,
        f"{change} keeps a snapshot until every other worker has pushed. A slot takes the memory of one or two vectors, "
        f"{size(4 * summary.num_parameters)} each.",
        change,
    )


def _scaled(summary: Summary) -> Advice | None:
    """Silent where a smaller batch cannot help: the limit is the user's own norm, nobody else pushes, or a batch is one image."""
    pushes, batch = (
        sum(worker.pushes for worker in summary.workers),
        summary.config.get("data.batch_size") or 0,
    )
    if (
        not pushes
        or summary.scaled_pushes < SCALED * pushes
        or summary.num_workers < 2
        or batch < 2
        or summary.config.get("rule.clip_norm")
    ):
        return None
    return Advice(
        f"{percent(summary.scaled_pushes / pushes, 0)} of the gradients were scaled down, to {percent(summary.mean_scale, 0)} in "
        f"the mean, so that one push of all {summary.num_workers} workers does not move the weights too far (--rule.max_drift): "
        "a good part of the rate is not used.",
        f"Smaller steps, more often, use it: --data.batch_size {batch // 2}, at half of the "
        "rate, or fewer workers.",
        f"--data.batch_size {batch // 2} at half of the rate",
    )


def _skipped(summary: Summary) -> Advice | None:
    if not summary.skipped_images:
        return None
    return Advice(
        f"Left out: {count(summary.skipped_images, f'damaged {one_of(summary.unit)}')}.",
        "The notes name them; make their shards again.",
        f"Make the shards of the damaged {summary.unit} again",
    )


def _retries(summary: Summary) -> Advice | None:
    if not summary.read_retries:
        return None
    return Advice(
        f"Failed and repeated: {count(summary.read_retries, 'read')} of shards, each after half a second or more.",
        "Look at the file system; the notes name the shards.",
        "Look at the file system of the shards",
    )


def _plateau(summary: Summary, cost: Cost | None) -> Advice | None:
    scores = summary.validations
    if len(scores) < MIN_VALIDATIONS or summary.started is None or not summary.duration_s:
        return None
    last = -(-2 * len(scores) // 3)
    measure = measures(scores)[0]
    best = min(scores[:last], key=lambda score: measure.rank(measure.of(score)))
    value = measure.of(best)
    if value is None:
        return None
    least = PLATEAU if measure.is_accuracy else PLATEAU * abs(value)
    later = min(measure.rank(measure.of(score)) for score in scores[last:])
    if later < measure.rank(value) - least:
        return None
    whole = summary.seconds_at(summary.started + summary.duration_s)
    rest = max(0.0, 1 - summary.seconds_at(best.when) / whole)
    until = cost and cost_until(cost, summary, best.when)
    if until is None:
        price = ""
    else:
        price = f", {cost.total - until:,.4g} of the {cost.total:,.4g} that it cost"
    return Advice(
        f"No better since epoch {best.epoch:.1f} ({measure.name} {measure.cell(value)}): the last "
        f"{percent(rest, 0)} of the run ({seconds(rest * whole)}{price}) gained nothing.",
        "Stop earlier, or lower the learning rate sooner.",
        "Stop earlier, or lower the learning rate sooner",
    )


# the weightiest first; _plateau, which knows the cost, comes last
RULES = (
    _audit,
    _saturated,
    _servers,
    _waiting,
    _bubble,
    _data,
    _fetch,
    _lease,
    _validate,
    _room,
    _stragglers,
    _statistics,
    _torn,
    _scaled,
    _skipped,
    _retries,
)

"""What the numbers of a run suggest: a pure function from a `Summary` to sentences with the numbers in them.

Every sentence says what was measured, what follows, and which option to turn. A rule that lacks its numbers is silent, and so is
one that another one explains better: who waits for a slow worker, or for the other servers, does not wait for a message.
"""

from __future__ import annotations

import statistics

from asgd_mpi.config.rulebook import WAITING
from asgd_mpi.record.events import PHASES
from asgd_mpi.record.summary import Summary
from asgd_mpi.report.cost import Cost, cost_until
from asgd_mpi.report.units import count, number, percent, seconds, short

SHARED_OUT = 1_000_000   # parameters, from which several servers are proposed: an update of fewer is a matter of some ms
SATURATED = 0.8       # share of the time that the server is busy, from which more workers hardly help
QUEUES = 0.5          # ... from which pushes queue for it
SLOWER = 1.5          # times the median step, from which it is this worker that the others wait for
WAITS = 0.15          # share of the workers' time from which a phase is worth a word
SCALED = 0.3          # share of the gradients that were scaled down, from which that is worth a word
TORN = 0.05           # torn reads for each fetch
PLATEAU = 0.001       # top-1 error that the last third of a run should at least gain
MIN_VALIDATIONS = 6   # to speak of a plateau


def advise(summary: Summary, cost: Cost | None = None) -> list[str]:
    """The sentences, the weightiest first."""
    rules = (_audit, _saturated, _servers, _waiting, _bubble, _data, _fetch, _lease, _validate, _room, _stragglers, _statistics, _torn,
             _scaled, _skipped, _retries)
    found = [sentence for rule in rules if (sentence := rule(summary))]
    plateau = _plateau(summary, cost)
    return [*found, plateau] if plateau else found


def worker_shares(summary: Summary) -> dict[str, float]:
    """Phase -> share of the time that all workers' intervals cover, 0..1; empty without intervals."""
    workers = [rank for rank in summary.ranks if rank.role == "worker"]
    total = sum(rank.seconds for rank in workers)
    return {phase: sum(rank.phases[phase] for rank in workers) / total for phase in PHASES} if total else {}


def seconds_per_push(summary: Summary) -> dict[str, float]:
    """Phase -> a worker's seconds for one push, mean over all; empty without pushes."""
    workers = [rank for rank in summary.ranks if rank.role == "worker"]
    pushes = sum(rank.counts["pushes"] for rank in workers)
    return {phase: sum(rank.phases[phase] for rank in workers) / pushes for phase in PHASES} if pushes else {}


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
    server = next((rank for rank in summary.ranks if rank.rank == 0 and rank.counts["pushes"]), None)
    return summary.apply_s + server.phases["servers"] / server.counts["pushes"] if server and summary.apply_s else None


def _audit(summary: Summary) -> str | None:
    if not summary.audit.violations:
        return None
    more = len(summary.audit.violations) - 3
    named = "; ".join(summary.audit.violations[:3]) + (f"; and {more} more, see the audit" if more > 0 else "")
    return (f"The record contradicts itself ({named}): do not trust the weights of this run "
            "before the cause is known.")


def _saturated(summary: Summary) -> str | None:
    step = seconds_per_push(summary)
    if (summary.server_busy or 0) < SATURATED or not summary.apply_s or not step or not summary.images_per_s:
        return None
    pushes = sum(worker.pushes for worker in summary.workers)
    batch, asked = summary.images / pushes, summary.config.get("data.batch_size")
    own = step["data"] + step["compute"]
    doubled = min(2 * batch / summary.apply_s,
                  summary.num_workers * 2 * batch / (2 * own + step["fetch"] + summary.apply_s))
    gain = doubled / summary.images_per_s - 1
    text = (f"The server is busy {percent(summary.server_busy, 0)} of the time: one update takes {short(summary.apply_s)}, "
            f"so it applies at most {number(batch / summary.apply_s, 0)} images/s at {number(batch, 0)} images a push. "
            "More workers will not help.")
    if gain > 0.05:
        text += (f" Twice the batch (--data.batch_size {2 * asked if asked else round(2 * batch)}) halves the updates for each image: expected up "
                 f"to +{percent(gain, 0)}, if a step then takes twice as long. Choose the learning rate anew.")
    if summary.num_parameters and summary.num_parameters >= SHARED_OUT:
        text += (f" More servers share the update out, on cores of their own: --servers "
                 f"{2 * summary.config.get('exchange.servers', 1)}.")
    return text


def _servers(summary: Summary) -> str | None:
    """Rank 0 publishes when all servers have applied their slices."""
    share = _share_for_servers(summary)
    if share < WAITS:
        return None
    return (f"Rank 0 waits {percent(share, 0)} of its time for the other servers to apply their slices: more of them would not help. "
            "Give each server a core of its own, or take fewer --servers.")


def _waiting(summary: Summary) -> str | None:
    share, taken = worker_shares(summary).get("push", 0.0), server_taken(summary)
    if share < WAITS or taken is None or taken >= QUEUES or _share_for_servers(summary) >= WAITS:
        return None
    if summary.config.get("rule.name") in WAITING and summary.num_workers > 1:
        return _waiting_for_each_other(summary, share)
    text = (f"The workers spend {percent(share, 0)} of their time in push while the server is busy only "
            f"{percent(summary.server_busy, 0)}: ")
    if len({rank.host for rank in summary.present}) > 1:
        return text + ("they wait for the message to travel, not for the update. Compare the bandwidth below with the link's, see that "
                       "the server has a core of its own, and send less often: a larger --data.batch_size.")
    if not any(worker.device.startswith("cuda") for worker in summary.workers):
        return text + (f"on one host nothing travels, so they wait for a core. All {len(summary.present)} ranks compute on its CPUs: "
                       "give each rank a core of its own, or start fewer.")
    return text + ("on one host nothing travels but from and to the GPUs. See that the server has a core of its own, and send less "
                   "often: a larger --data.batch_size.")


def _waiting_for_each_other(summary: Summary, share: float) -> str:
    """Of a rule under which a push is answered when others have pushed, too."""
    rule, step = summary.config["rule.name"], _step_of_each(summary)
    text = f"The workers spend {percent(share, 0)} of their time in push: under {rule} they wait there for each other. "
    slowest, median = max(step, key=step.get), statistics.median(step.values())
    if step[slowest] < SLOWER * median:
        return text + "No one of them is much slower than the others; a rule that does not wait gives that time back."
    return text + (f"Rank {slowest} takes {short(step[slowest])} for a step, the median is {short(median)}: look at what else runs "
                   "there, leave it out, or take a rule that does not wait.")


def _step_of_each(summary: Summary) -> dict[int, float]:
    """Return the seconds of data and compute for a push of each worker, by rank."""
    return {rank.rank: (rank.phases["data"] + rank.phases["compute"]) / rank.counts["pushes"]
            for rank in summary.ranks if rank.role == "worker" and rank.counts["pushes"]}


def _bubble(summary: Summary) -> str | None:
    found = summary.pipelines
    if found is None or found.measured is None or found.measured < WAITS:
        return None
    if found.are_columns:
        return (f"The columns of a replica wait for each other {percent(found.measured, 0)} of the time that a batch takes, for maps on their "
                "way or for the slower one: give each a device of its own, and larger parts (a larger --data.batch_size, "
                "fewer --compute.micro_batches), which share out what a message costs.")
    expected = f" (the plan expected {percent(found.expected, 0)})" if found.expected is not None else ""
    return (f"The {found.num_stages} stages of a replica wait for each other {percent(found.measured, 0)} of the time that a batch takes"
            f"{expected}: cut a batch into more parts than {found.num_parts} (--compute.micro_batches), or take fewer stages.")


def _data(summary: Summary) -> str | None:
    share = worker_shares(summary).get("data", 0.0)
    if share < WAITS:
        return None
    return (f"The workers wait {percent(share, 0)} of their time for images: raise --data.threads, or keep the shards on a "
            f"faster disk. Without that wait up to +{percent(share / (1 - share), 0)} images/s." if share < 1 else None)


def _fetch(summary: Summary) -> str | None:
    share, step = worker_shares(summary).get("fetch", 0.0), seconds_per_push(summary)
    if share < WAITS or not step:
        return None
    return (f"Fetching the weights takes {percent(share, 0)} of the workers' time, {short(step['fetch'])} for each push: a "
            "larger --data.batch_size fetches less often.")


def _lease(summary: Summary) -> str | None:
    share = worker_shares(summary).get("idle", 0.0)
    if share < WAITS:
        return None
    return (f"The workers are idle {percent(share, 0)} of their time: they hold no lease, as at the end of a run. A "
            "smaller --data.lease_batches shares the rest out more evenly.")


def _validate(summary: Summary) -> str | None:
    share = worker_shares(summary).get("validate", 0.0)
    if share < WAITS:
        return None
    return (f"Validation takes {percent(share, 0)} of the workers' time ({count(len(summary.validations), 'validation')}): a larger "
            "--run.validate_every gives it back to training.")


def _room(summary: Summary) -> str | None:
    """How many workers like these keep the server busy all the time."""
    step, serve_s, taken = seconds_per_push(summary), _serve_s(summary), server_taken(summary)
    if taken is None or taken >= SATURATED or not serve_s or not step:
        return None
    cycle = step["data"] + step["compute"] + step["fetch"]
    limit = int(1 + cycle / serve_s)
    what = "one update" if serve_s == summary.apply_s else "one update with the wait for the other servers"
    return (f"The server is busy {percent(summary.server_busy, 0)} of the time; {what} takes {short(serve_s)}, "
            f"a worker's step {short(cycle)}. It can serve about {count(limit, 'worker')} like these before it is the limit, if the "
            "link and the cores allow.")


def _stragglers(summary: Summary) -> str | None:
    slow = summary.stragglers
    if not slow:
        return None
    names = ", ".join(f"rank {worker.rank} ({worker.device} on {worker.host}): {number(worker.images_per_s)} images/s"
                      for worker in slow[:5])
    more = f", and {len(slow) - 5} more" if len(slow) > 5 else ""
    share = sum(worker.share or 0.0 for worker in slow)
    waited = "The others wait for them" if summary.config.get("rule.name") in WAITING else "Nobody waits for them"
    return (f"Below half of the median speed while they train: {names}{more}. {waited}; they did {percent(share)} of the work"
            f"{', with the stalest gradients' if _are_stalest(summary) else ''}. Look at what else runs there, or leave them out.")


def _are_stalest(summary: Summary) -> bool:
    """Return whether each straggler's gradients are staler, in the mean, than those of all others."""
    slow = [worker.mean_staleness or 0.0 for worker in summary.stragglers]
    others = [worker.mean_staleness or 0.0 for worker in summary.workers if not worker.is_straggler]
    return min(slow) > max(others, default=0.0)


def _statistics(summary: Summary) -> str | None:
    end = summary.validations[-1] if summary.validations else None
    if end is None or end.stored_top1_error in (None, end.top1_error):
        return None
    return (f"Batch norm: {percent(1 - end.top1_error, 2)} are right with the statistics measured anew on the final version, "
            f"{percent(1 - end.stored_top1_error, 2)} with those that the workers had gathered on versions before it. The "
            "checkpoint holds the former.")


def _torn(summary: Summary) -> str | None:
    if not summary.fetches or summary.torn_reads < TORN * summary.fetches:
        return None
    return (f"{summary.torn_reads:,} reads of {summary.fetches:,} fetches were torn and done again: raise --exchange.ring, so "
            "that a snapshot stays longer before it is overwritten.")


def _scaled(summary: Summary) -> str | None:
    """Silent where a smaller batch cannot help: the limit is the user's own norm, nobody else pushes, or a batch is one image."""
    pushes, batch = sum(worker.pushes for worker in summary.workers), summary.config.get("data.batch_size") or 0
    if not pushes or summary.scaled_pushes < SCALED * pushes or summary.num_workers < 2 or batch < 2 or summary.config.get(
            "rule.clip_norm"):
        return None
    return (f"{percent(summary.scaled_pushes / pushes, 0)} of the gradients were scaled down, to {percent(summary.mean_scale, 0)} in "
            f"the mean, so that one push of all {summary.num_workers} workers does not move the weights too far (--rule.max_drift): "
            f"a good part of the rate is not used. Smaller steps, more often, use it: --data.batch_size {batch // 2}, at half of the "
            "rate, or fewer workers.")


def _skipped(summary: Summary) -> str | None:
    if not summary.skipped_images:
        return None
    return f"Left out: {count(summary.skipped_images, 'damaged image')}. The notes name them; make their shards again."


def _retries(summary: Summary) -> str | None:
    if not summary.read_retries:
        return None
    return (f"Failed and repeated: {count(summary.read_retries, 'read')} of shards, each after half a second or more. Look at the "
            "file system; the notes name the shards.")


def _plateau(summary: Summary, cost: Cost | None) -> str | None:
    scores = summary.validations
    if len(scores) < MIN_VALIDATIONS or summary.started is None or not summary.duration_s:
        return None
    last = -(-2 * len(scores) // 3)
    best = min(scores[:last], key=lambda score: score.top1_error)
    if min(score.top1_error for score in scores[last:]) < best.top1_error - PLATEAU:
        return None
    whole = summary.seconds_at(summary.started + summary.duration_s)
    rest = max(0.0, 1 - summary.seconds_at(best.when) / whole)
    until = cost and cost_until(cost, summary, best.when)
    price = "" if until is None else f", {cost.total - until:,.4g} of the {cost.total:,.4g} that it cost"
    return (f"No better since epoch {best.epoch:.1f} ({percent(1 - best.top1_error, 2)} top-1 accuracy): the last "
            f"{percent(rest, 0)} of the run ({seconds(rest * whole)}{price}) gained nothing. Stop earlier, or "
            "lower the learning rate sooner.")

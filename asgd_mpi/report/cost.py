"""What a run cost: GPU hours, energy, and money at a price for each. The server takes no GPU and is not counted.

Every rank that computes (a stage of a worker) is priced as one GPU unless the user gives their number: the name `cuda:0` of
two ranks on one host may be one GPU that they share, or two if the launcher shows each rank only its own. Of a run that was
resumed each start counts, with its own number of ranks; the time between two starts does not.
"""

from __future__ import annotations

import math

import msgspec

from asgd_mpi.record.ratio import ratio
from asgd_mpi.record.summary import Summary


class Cost(msgspec.Struct):
    price_per_gpu_hour: float
    num_gpus: int  # the most at a time
    # no rank had a GPU: each that computes is priced as one
    is_cpu: bool
    # from each Start to the last thing written before the next one
    gpu_hours: float
    total: float
    per_million_images: float | None
    per_epoch: float | None
    energy_kwh: float | None = None  # of the GPUs, where the driver counts it
    price_per_kwh: float | None = None  # part of `total`, if given
    given_gpus: int | None = None  # that the user gave
    without_energy: list[
        int
    ] = []  # ranks on a GPU whose energy is not, or not all, in `energy_kwh`


def price(
    summary: Summary,
    price_per_gpu_hour: float,
    num_gpus: int | None = None,
    price_per_kwh: float | None = None,
) -> Cost:
    """Return the cost of a run; `num_gpus`: of all its starts (default: one for each rank that computes in a start)."""
    hours = _gpu_seconds(summary, num_gpus) / 3600
    total = hours * price_per_gpu_hour + (price_per_kwh or 0.0) * (summary.energy_kwh or 0.0)
    is_cpu = not any(
        rank.device.startswith("cuda") for rank in summary.ranks if rank.role != "server"
    )
    most = num_gpus or max(
        (start.num_computing for start in summary.restarts), default=summary.num_workers
    )
    return Cost(
        price_per_gpu_hour,
        most,
        is_cpu,
        hours,
        total,
        ratio(1e6 * total, summary.images),
        ratio(total, summary.epochs_done),
        summary.energy_kwh,
        price_per_kwh,
        num_gpus,
        summary.without_energy,
    )


def cost_until(cost: Cost, summary: Summary, t: float) -> float | None:
    """Return what a run had cost at `t`, Unix seconds, its energy in proportion to its GPU hours."""
    if cost.gpu_hours:
        return cost.total * _gpu_seconds(summary, cost.given_gpus, t) / (3600 * cost.gpu_hours)
    return None


def _gpu_seconds(summary: Summary, num_gpus: int | None, until: float = math.inf) -> float:
    if summary.started is None:
        return 0.0
    end = summary.started + (summary.duration_s or 0.0)
    if not summary.restarts:
        return (num_gpus or summary.num_workers) * max(0.0, min(end, until) - summary.started)
    begins = [summary.started, *(start.started for start in summary.restarts[1:])]
    ends = [*(start.ended for start in summary.restarts[:-1]), end]
    return sum(
        (num_gpus or start.num_computing) * max(0.0, min(stop, until) - begin)
        for start, begin, stop in zip(summary.restarts, begins, ends)
    )

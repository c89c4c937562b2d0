"""What a run cost: GPU hours, energy, and money at a price for each. The server takes no GPU and is not counted.

Every worker is priced as one GPU unless the user gives their number: the name `cuda:0` of two workers on one host may be
one GPU that they share, or two if the launcher shows each worker only its own.
"""

from __future__ import annotations

import msgspec

from asgd_mpi.record.summary import Summary


class Cost(msgspec.Struct):
    price_per_gpu_hour: float
    num_gpus: int
    is_cpu: bool                               # the workers had no GPU: each is priced as one
    gpu_hours: float                           # from the first Start to the last thing written
    total: float
    per_million_images: float | None
    per_epoch: float | None
    energy_kwh: float | None = None            # of the GPUs, where the driver counts it
    price_per_kwh: float | None = None         # part of `total`, if given


def price(summary: Summary, price_per_gpu_hour: float, num_gpus: int | None = None,
          price_per_kwh: float | None = None) -> Cost:
    """The cost of `num_gpus` (default: one for each worker) from the first Start to the last thing written."""
    num_gpus = num_gpus or summary.num_workers
    hours = num_gpus * (summary.duration_s or 0.0) / 3600
    total = hours * price_per_gpu_hour + (price_per_kwh or 0.0) * (summary.energy_kwh or 0.0)
    is_cpu = not any(worker.device.startswith("cuda") for worker in summary.workers)
    return Cost(price_per_gpu_hour, num_gpus, is_cpu, hours, total,
                1e6 * total / summary.images if summary.images else None,
                total / summary.epochs_done if summary.epochs_done else None, summary.energy_kwh, price_per_kwh)

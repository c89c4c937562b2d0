"""What a run cost: GPU hours, and money at a price per GPU hour. The server takes no GPU and is not counted."""

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


def price(summary: Summary, price_per_gpu_hour: float) -> Cost:
    """Workers that share a GPU are priced as one GPU; one without a GPU, or of unknown device, as one."""
    places = [(worker.host, worker.device) if worker.device.startswith("cuda") else worker.rank
              for worker in summary.workers]
    num_gpus = len(set(places))
    hours = num_gpus * (summary.duration_s or 0.0) / 3600
    total = hours * price_per_gpu_hour
    return Cost(price_per_gpu_hour, num_gpus, not any(isinstance(place, tuple) for place in places), hours, total,
                1e6 * total / summary.images if summary.images else None,
                total / summary.epochs_done if summary.epochs_done else None)

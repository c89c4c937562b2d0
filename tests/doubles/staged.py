"""The gradient of a network that is cut into stages, all of them in this process: what the tests compare with the uncut one."""

from __future__ import annotations

from collections.abc import Sequence

from asgd_mpi.config.options import ComputeConfig
from asgd_mpi.data.loader import Batch
from asgd_mpi.optim.divided import Divided
from asgd_mpi.optim.step import Parts
from asgd_mpi.pipeline import pipeline
from asgd_mpi.pipeline.cut import Stage
from asgd_mpi.pipeline.schedule import Schedule, one_f_one_b
from asgd_mpi.vector.flat import FlatModel


def staged_gradient_(
    flat: FlatModel,
    divided: Divided,
    batch: Batch,
    seed: int,
    compute: ComputeConfig,
    stages: Sequence[Stage],
    schedule: Schedule = one_f_one_b,
) -> float:
    """Set `flat.gradient` as `compute_gradient_` does, to the bit, by the stages that the network is cut into."""
    flat.gradient.zero_()
    inputs = divided.objective.prepare(batch, flat.device)
    parts = Parts(batch.epoch, batch.start, batch.size, seed, 1.0)
    work = parts.work(inputs, divided, flat.device, compute)
    return sum(pipeline.run_(stages, work, parts.count(compute), schedule)).item()

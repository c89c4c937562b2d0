"""The GPUs of this process: which it may use, and the one that it takes.

`visible` asks CUDA and opens nothing on a device. Which GPU a rank takes is decided in `topology`, which is pure.
"""

from __future__ import annotations

import os

import torch

from asgd_mpi.config.topology import Gpu, Topology, identities

VARIABLE = "CUDA_VISIBLE_DEVICES"


def visible() -> list[Gpu]:
    """Return the GPUs that this process may use, in its own numbering."""
    listed = os.environ.get(VARIABLE)
    # CUDA must not start before `take` has named the slice
    if (listed or "").startswith("MIG-"):
        return identities(listed, [], [])
    properties = [
        torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())
    ]
    # torch has them since 2.5
    uuids = [f"GPU-{getattr(one, 'uuid', index)}" for index, one in enumerate(properties)]
    return identities(listed, uuids, [one.name for one in properties])


def take(places: Topology, rank: int) -> torch.device:
    """Drive the GPU that `places` gives to this rank; the CPU if it gives none."""
    gpu, index = places.gpu(rank), places.gpu_index(rank)
    if gpu is None:
        return torch.device("cpu")
    if gpu.id.startswith("MIG-"):
        os.environ[VARIABLE], index = gpu.id, 0
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device

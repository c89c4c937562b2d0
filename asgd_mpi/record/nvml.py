"""What the driver says of a GPU: utilisation, memory, energy. Needs nvidia-ml-py (`asgd_mpi[nvml]`); without it, nothing.

NVML counts for the whole GPU, whoever uses it. Energy is a counter since the driver was loaded: only differences mean
something (nvmlDeviceGetTotalEnergyConsumption; Volta and later).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from asgd_mpi.record.events import Gpu


class Gauge:
    """Reads one GPU, which `open_gauge` has found."""

    def __init__(self, nvml: Any, device: Any, gpu_id: str):
        self._nvml, self._device, self._id = nvml, device, gpu_id

    def read(self) -> Gpu | None:
        """Return what can be read now; None if nothing can."""
        nvml = self._nvml
        utilisation = self._try(lambda: nvml.nvmlDeviceGetUtilizationRates(self._device).gpu / 100)
        memory = self._try(lambda: nvml.nvmlDeviceGetMemoryInfo(self._device))
        # it counts mJ
        energy_j = self._try(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(self._device) / 1e3)
        if utilisation is memory is energy_j is None:
            return None
        return Gpu(
            time.time(),
            self._id,
            utilisation,
            memory and memory.used,
            memory and memory.total,
            energy_j,
        )

    def _try(self, read: Callable[[], Any]) -> Any:
        """A GPU, or a slice of one, may know some of it only."""
        try:
            return read()
        except self._nvml.NVMLError:
            return None


def open_gauge(gpu_id: str) -> Gauge | None:
    """Return the gauge of the GPU with this UUID, `GPU-...` or `MIG-...`; None without the package, the driver or the GPU."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return Gauge(pynvml, pynvml.nvmlDeviceGetHandleByUUID(gpu_id), gpu_id)
    except pynvml.NVMLError:
        return None

"""The learning rate as a function of the samples that the server has applied: one clock for all workers. Pure.

Counters of the workers' own would give them different rates at the same moment, and stretch the schedule with their
number (MXNet #625, gluon-cv #540).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from asgd_mpi.config import ScheduleConfig


@dataclass(frozen=True)
class Schedule:
    """lr(samples); `total` and the epochs of `config` are measured in samples by `samples_per_epoch`."""

    config: ScheduleConfig
    samples_per_epoch: int
    total_samples: int
    num_workers: int

    def __call__(self, samples: int) -> float:
        """The rate of the gradient that is applied after `samples` samples."""
        return self.config.lr * self._warmup(samples) * self._decay(samples)

    def _warmup(self, samples: int) -> float:
        ramp = self.config.warmup_epochs * self.samples_per_epoch
        if samples >= ramp:
            return 1.0
        first = 1 / self.num_workers  # n workers at lr / n move the weights as fast as one worker at lr
        return first + (1 - first) * samples / ramp

    def _decay(self, samples: int) -> float:
        if self.config.name == "step":
            return self.config.gamma ** (samples // round(self.config.step_epochs * self.samples_per_epoch))
        if self.config.name == "cosine":
            return 0.5 * (1 + math.cos(math.pi * samples / self.total_samples))
        return 1.0

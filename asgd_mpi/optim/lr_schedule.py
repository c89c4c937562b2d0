"""The learning rate of a gradient: of the samples that the server has applied, and of its staleness. Pure.

One clock serves all workers. Counters of the workers' own would give them different rates at the same moment, and stretch the schedule with their
number (MXNet #625, gluon-cv #540).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from asgd_mpi.config.resolved import ResolvedSchedule

WEIGHTS = {
    "constant": lambda staleness, in_flight: 1.0,
    # Zhang et al. 2016 (arXiv:1511.05950), staleness-aware SGD; staleness 1 is not reduced
    "inverse": lambda staleness, in_flight: 1.0 / max(1, staleness),
    # Mishchenko et al. 2022 (arXiv:2206.07638): only what is staler than usual loses weight
    "delay_adaptive": lambda staleness, in_flight: min(1.0, in_flight / (staleness + 1)),
}


@dataclass(frozen=True)
class Schedule:
    """schedule(samples, staleness) is a rate; epochs in `config` count `samples_per_epoch` each."""

    config: ResolvedSchedule
    samples_per_epoch: int
    total_samples: int
    num_workers: int
    staleness: str = "constant"  # a name of WEIGHTS
    # steps that are under way at any time: in the unit that staleness counts
    in_flight: float = 1
    # of a step whose rate grows with its gradients (rulebook.rate_scale)
    scale: float = 1

    def __call__(self, samples: int, staleness: int = 0) -> float:
        """Return the rate of a gradient of that staleness, applied after `samples` samples."""
        return (
            self.config.lr
            * self.scale
            * self._warmup(samples)
            * self._decay(samples)
            * WEIGHTS[self.staleness](staleness, self.in_flight)
        )

    def _warmup(self, samples: int) -> float:
        ramp = self.config.warmup_epochs * self.samples_per_epoch
        if samples >= ramp:
            return 1.0
        # n workers at lr / n move the weights as fast as one worker at lr, which is also where a scaled rate begins
        divisor = self.scale if self.scale > 1 else self.num_workers
        first = 1 / divisor
        return first + (1 - first) * samples / ramp

    def _decay(self, samples: int) -> float:
        if self.config.name == "step":
            return self.config.gamma ** (
                samples // round(self.config.step_epochs * self.samples_per_epoch)
            )
        if self.config.name == "cosine":
            return 0.5 * (1 + math.cos(math.pi * samples / self.total_samples))
        if self.config.name == "poly":
            return (1 - samples / self.total_samples) ** self.config.power
        return 1.0

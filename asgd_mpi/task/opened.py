"""A task as a configuration opens it: the data, the network with its first weights, the plan of the run.

The server, the workers and the replay open the same task from the same configuration, and get the same one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from asgd_mpi.config import limits
from asgd_mpi.config.resolved import Resolved
from asgd_mpi.config.rulebook import RULEBOOK, in_flight, rate_scale, pacing, vectors
from asgd_mpi.data.dataset import DatasetLoader
from asgd_mpi.data.loader import Loader
from asgd_mpi.errors import ConfigError, few
from asgd_mpi.optim.divided import Divided
from asgd_mpi.optim.formats import kept_at
from asgd_mpi.optim.lr_schedule import Schedule
from asgd_mpi.optim.objective import Objective
from asgd_mpi.pipeline import columns
from asgd_mpi.pipeline.graph import Graph, trace
from asgd_mpi.pipeline.plan import Batch, Row, Seconds, StagePlan
from asgd_mpi.pipeline.schedule import SCHEDULES
from asgd_mpi.protocol.ledger import Plan
from asgd_mpi.vector.flat import FlatModel
from asgd_mpi.vector.groups import ParameterGroup
from asgd_mpi.vector.no_decay import parameter_groups

# with n_push auto: while one is under way the next is summed up, and either may be longer than the last one
LEASE_PUSHES = 4

Forward = Callable[[nn.Module], object]  # a pass of a network in training


@dataclass(frozen=True)
class OpenedTask(ABC):
    """See the module. `config` is complete; `train` and `val` are the data, `val` without samples if nothing is validated."""

    config: Resolved
    train: Any
    val: Any
    metrics: tuple[str, ...] = ()  # that validations measure; none for image classification

    is_own = False  # a task of the user's
    maximize = False  # the first of them is to be high
    unit = "images"  # what a sample is called
    computes = True  # the gradients; else a loop of the user's does
    is_seeded = True  # the first weights are a function of the seed

    def begin(self, rank: Any, flat: FlatModel) -> None:  # noqa: B027 - most have nothing to note
        """Take note that a worker begins, with its network (see runtime.ranks)."""

    @property
    @abstractmethod
    def objective(self) -> Objective:
        """Return what is minimised and measured."""

    @property
    @abstractmethod
    def divided(self) -> Divided:
        """Return the same for a network that is cut into stages."""

    @abstractmethod
    def build_module(self) -> nn.Module:
        """Return the network with its first weights, a function of the seed. Raises ConfigError."""

    @abstractmethod
    def first_module(self, note: Callable[[str], None] = lambda text: None) -> nn.Module:
        """Return the network with the weights that training begins with. Raises ConfigError.

        `note` is told what was done to what a file holds.
        """

    @abstractmethod
    def outline(self) -> nn.Module:
        """Return the network to be cut into stages. Raises ConfigError."""

    @abstractmethod
    def sample(self) -> torch.Tensor:
        """Return what the network takes of a micro-batch: its shape and its type count. Raises ConfigError."""

    @abstractmethod
    def one(self) -> Any:
        """Return a batch of one sample, as the loss takes it, on the CPU. Raises ConfigError."""

    @abstractmethod
    def carried(self, module: nn.Module, forward: Forward | None = None) -> list[str]:
        """Return the names of what the network's forward pass moves in training (see model.buffers). Raises ConfigError.

        `module` is trained for it, twice: nobody may need it afterwards. `forward`: such a pass, in place of one of noise.
        """

    @abstractmethod
    def train_loader(
        self, on_skip: Callable[[str], None] = print, touch_on_device: bool = False
    ) -> Loader | DatasetLoader:
        """Return what makes batches of the training split."""

    @abstractmethod
    def val_loader(self, on_skip: Callable[[str], None] = print) -> Loader | DatasetLoader:
        """Return what makes batches of the validation split."""

    def stage_plan(self, module: nn.Module, seconds: list[Seconds] | None = None) -> StagePlan:
        """Return what the parts of the network cost. Raises ConfigError if it cannot be cut."""
        sample, micro = self.sample(), self.config.compute.micro_batches
        batch = Batch(len(sample), micro, SCHEDULES[self.config.stages.schedule])
        return StagePlan(Graph(trace(module), sample), batch, seconds, self._vectors)

    def rows_of_columns(self, module: nn.Module) -> list[Row]:
        """Return what each column of the network costs. Raises ConfigError if it has none."""
        return columns.rows(module, self.sample(), self._vectors)

    def cuts(self, plan: StagePlan, balance: str) -> list[int]:
        """Return where the network is cut: at the user's names, or by what is to be balanced. Raises ConfigError."""
        stages = self.config.stages
        if stages.names:
            return plan.cuts_at(stages.names)
        return plan.cuts_by(balance, stages.number)

    def demand_unmoved(self, moved: list[str]) -> None:
        """Raise ConfigError if the network is cut and its forward pass moves what each worker keeps."""
        if moved and self.config.stages.number > 1:
            raise ConfigError(
                f"--stages.number {self.config.stages.number}: the network's forward pass moves {few(moved)}, which "
                "every worker keeps, and a network that is cut cannot. Leave --stages out."
            )

    @property
    def _vectors(self) -> int:
        """Copies of its parameters that a stage keeps."""
        return 2 + vectors(self.config.rule, 1, self.config.exchange.wire)[1]

    @property
    def facts(self) -> dict[str, Any]:
        """Return what a checkpoint says of the data and of how it is prepared (see record.checkpoint.Manifest)."""
        data = self.train
        return {
            "num_classes": data.num_classes,
            "channels": 0,
            "image_size": 0,
            "data": data.fingerprint,
            "mean": [],
            "std": [],
            "class_names": list(data.class_names),
            "is_own": self.is_own,
        }

    @property
    def smallest(self) -> int:
        """Samples that a batch, or a part of one, has at least; 1 in runs that were recorded without."""
        return self.config.data.min_batch or 1

    def groups(self, module: nn.Module) -> list[ParameterGroup]:
        """Return the parameters of the network, by their place in its vector, with the rate and the weight decay of each."""
        return parameter_groups(module, limits.names(self.config.rule.no_decay))

    def plan(self, num_workers: int) -> Plan:
        data, run, samples = self.config.data, self.config.run, self.train.num_samples
        n_push, by_speed = self.config.exchange.n_push, self.config.rule.steps_by_speed
        # while a push is under way
        sums_on = n_push == "auto"
        # two are held: enough for a push
        lease_batches = max(data.lease_batches, 1 if sums_on or by_speed else n_push)
        return Plan(
            num_workers,
            samples,
            self.val.num_samples,
            round(run.epochs * samples),
            data.batch_size,
            lease_batches,
            run.validate_every,
            self.config.failure.max_nonfinite,
            round(self.config.rule.warm_start_epochs * samples),
            pacing(self.config.rule, num_workers),
            LEASE_PUSHES if sums_on else 0,
            RULEBOOK[self.config.rule.name].moves == "elastic",
            self.smallest,
            self.metrics,
            self.maximize,
            signed_loss=self.is_own,
            keeps_reads=RULEBOOK[self.config.rule.name].keeps_reads,
            by_speed=0 if sums_on or not by_speed else n_push,
        )

    def kept_at(self, samples: int) -> int:
        """Return how many numbers of a chunk a push on a snapshot of this sample clock sends; 0 if it is not sparse."""
        return kept_at(self.config.exchange, samples, self.train.num_samples)

    def schedule(self, num_workers: int) -> Schedule:
        samples, config = self.train.num_samples, self.config
        return Schedule(
            config.schedule,
            samples,
            round(config.run.epochs * samples),
            num_workers,
            config.rule.staleness,
            in_flight(config.rule, num_workers, config.exchange.overlap),
            rate_scale(config.rule, num_workers),
        )

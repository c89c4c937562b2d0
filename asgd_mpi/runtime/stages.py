"""A replica whose network is cut into stages, a chain of parts or two columns, each on a rank of its own.

The leader, stage 0, is the worker that the server knows: it holds the lease, the samples and the client. Every stage keeps its
own part of weights, gradient and momentum: it reads that from the server's snapshot, computes on it, and writes what is pushed
to where the leader's client takes it from; no rank needs the whole vectors. The leader says when, which snapshot, and what
takes all stages to know, the gradient's norm. So all compute a batch with the same version, and what is pushed, replayed and
saved is what an uncut network would give, to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asgd_mpi.comm import wait
from asgd_mpi.comm.stage_group import (
    ACTIVATIONS,
    COMMANDS,
    GRADIENTS,
    REPLIES,
    SCORES,
    StageChannel,
    StageGroup,
)
from asgd_mpi.comm.worker_window import Snapshot, WorkerWindow
from asgd_mpi.config import limits
from asgd_mpi.config.options import ComputeConfig
from asgd_mpi.config.resolved import Resolved
from asgd_mpi.optim.objective import Batch, Objective
from asgd_mpi.errors import ServerLost, StageLost
from asgd_mpi.model import batchnorm
from asgd_mpi.model.memory import materialise_
from asgd_mpi.optim.local_state import SpreadVectors, Vectors
from asgd_mpi.optim.divided import Divided
from asgd_mpi.optim.step import Parts, looking
from asgd_mpi.pipeline.pipeline import Link, Role
from asgd_mpi.pipeline.schedule import Step
from asgd_mpi.record import checkpoint
from asgd_mpi.record.meter import Meter
from asgd_mpi.vector.flat import (
    FlatModel,
    num_floats,
    num_statistics,
    places_of,
    statistics_of,
    trained,
    views,
)
from asgd_mpi.vector.groups import ParameterGroup, spread
from asgd_mpi.vector.no_decay import parameter_groups

CPU = torch.device("cpu")
IDLE_S = 0.5  # between two looks at the server and the clock, without a command


class _Interrupted(Exception):
    """The leader wants something else in place of what this stage waits for."""


# of a stage's parameters, in the whole vectors and in its own
Places = list[tuple[slice, slice]]


class _StageVectors(Vectors):
    """Those of a stage, which leaves what is pushed in its places of `gradient`, (P,) float32, shared."""

    def __init__(
        self,
        flat: FlatModel,
        config: Resolved,
        num_workers: int,
        places: Places,
        gradient: torch.Tensor,
        groups: Sequence[ParameterGroup] = (),
    ):
        super().__init__(flat, config, num_workers, spread(groups, places))
        self._places, self._shared = places, gradient

    def deliver_(self, kept: int) -> None:
        """If numbers travel rounded, they are rounded by who packs them, since units may belong to two stages (see codec)."""
        put_(self._shared, self.flat.gradient, self._places)

    def restore_(self, path: str) -> None:
        state = checkpoint.read_tensors(Path(path), is_mapped=True)
        self.load_(
            {
                name: torch.cat([vector[:0], *(vector[whole] for whole, _ in self._places)])
                for name, vector in state.items()
            }
        )


def put_(whole: torch.Tensor, part: torch.Tensor, places: Places) -> None:
    """Copy a stage's part of a vector to where it belongs, unless it is there."""
    for there, here in places:
        if whole[there].data_ptr() != part[here].data_ptr():
            whole[there].copy_(part[here])


class _Stage:
    """What every stage does. `module`: the network that was cut, for where this stage's parameters lie in its vectors."""

    at_every_batch: Callable[[torch.Tensor], None] = staticmethod(lambda gradient: None)

    def __init__(
        self,
        meter: Meter,
        team: StageGroup,
        window: WorkerWindow,
        module: nn.Module,
        role: Role,
        device: torch.device,
        config: Resolved,
        divided: Divided,
    ):
        self.meter, self.team, self.window, self.role, self.device = (
            meter,
            team,
            window,
            role,
            device,
        )
        self.compute, self.divided = config.compute, divided
        self._places, self._measured = places_of(module, role.module), batchnorm.measured(module)
        # as its own train() has it, which its parts do not know
        with batchnorm.as_training(module):
            self._modes = {part: part.training for part in role.module.modules()}
        materialise_(role.module)
        self.flat = FlatModel(role.module, device, self._own_gradient())
        on_host = device.type == "cpu"
        if on_host:
            self._fetched = self.flat.weights
        else:
            self._fetched = torch.empty(self.flat.num_floats, pin_memory=True)
        self.vectors = _StageVectors(
            self.flat,
            config,
            window.whole.num_workers,
            self._places,
            team.gradient,
            parameter_groups(module, limits.names(config.rule.no_decay)),
        )
        self._measuring = ExitStack()
        self._before = self._link(team.stage - 1) if team.stage else None
        if team.stage < team.num_stages - 1:
            self._after = self._link(team.stage + 1)
        else:
            self._after = None

    def _own_gradient(self) -> torch.Tensor | None:
        """Computed where it is wanted, if it lies in one piece there."""
        if self.device.type != "cpu" or len(self._places) != 1:
            return None
        return self.team.gradient[self._places[0][0]]

    def count(self, seconds: float) -> None:
        """A pass has taken so long."""
        self.meter.add(passes=seconds)

    def watch(self) -> None:
        """Called while another stage is waited for; may raise."""
        raise NotImplementedError

    def _link(self, neighbour: int) -> Link:
        return Link(
            *(
                StageChannel(self.team, neighbour, tag, self.device, self.watch)
                for tag in (ACTIVATIONS, GRADIENTS)
            )
        )

    def compute_part(self, parts: Parts, accumulate: bool, inputs: Any) -> float:
        """This stage's part of the gradient of a batch; returns the loss, of the last stage."""
        if not accumulate:
            self.flat.gradient.zero_()
        count = parts.count(self.compute)
        at_work = self.role.at_work(
            self._before, self._after, parts.work(inputs, self.divided, self.device, self.compute)
        )
        for step in self._steps(count):
            self._await(lambda: at_work.can(step), f"what its step {step} needs")
            started = time.perf_counter()
            at_work.do(step)
            self.count(time.perf_counter() - started)
        self.at_every_batch(self.flat.gradient)
        if self._after is None:
            return sum(at_work.losses[part] for part in range(count)).item()
        return 0.0

    @torch.no_grad()
    def forward_part(self, taken: torch.Tensor | None) -> torch.Tensor | None:
        """This stage's part of a forward pass without gradients; returns what comes out, of the last stage."""
        at_work = self.role.at_work(self._before, self._after, looking(taken, self.device))
        for step in self._steps(1):
            if step.is_forward:
                self._await(lambda: at_work.can(step), f"what its step {step} needs")
                at_work.do(step)
        return at_work.losses.get(0)

    def _steps(self, num_parts: int) -> list[Step]:
        return self.role.schedule(self.team.stage, self.team.num_stages, num_parts)

    def set_mode(self, mode: str) -> None:
        """train, eval, or recalibrate: batch norm measures its statistics anew, until the next mode is set."""
        self._measuring.close()
        if mode == "recalibrate":
            self._measuring.enter_context(
                batchnorm.measuring(
                    self.role.module, [layer for layer in self._measured if layer in self._modes]
                )
            )
        else:
            batchnorm.set_modes_(
                {part: mode == "train" and in_training for part, in_training in self._modes.items()}
            )

    def read(self, slot: int, whole: bool) -> int:
        """This stage's part of the snapshot in a slot of the server's ring; returns the bytes."""
        num_bytes = self.window.read_places(self._places, slot, self._fetched, whole)
        if self._fetched is not self.flat.weights:
            self.flat.weights.copy_(self._fetched)
        return num_bytes

    def act(self, of: str, verb: str, arguments: list) -> object:
        """Return what a verb of the `vectors` or the `flat` of this stage returns."""
        return getattr(getattr(self, of), verb)(*arguments)

    def show(self, what: str) -> None:
        """Put this stage's part of the weights, the velocity or the statistics to those of the others."""
        if what == "statistics":
            for place, buffer in statistics_of(self._measured, self.role.module):
                self.team.statistics[place].copy_(buffer.reshape(-1))
        else:
            part = self.flat.weights if what == "weights" else self.vectors.state[what]
            put_(getattr(self.team, what), part, self._places)

    def flush(self) -> None:
        """Return when the neighbours have taken all that was sent."""
        for pipe in (*(self._before or ()), *(self._after or ())):
            pipe.flush()

    def _await(self, poll: Callable[[], bool], what: str) -> None:
        wait.until(
            lambda: poll() or self.watch(), self.team.timeout_s, f"{self.team.who} waits for {what}"
        )


class LeadStage(_Stage):
    """Stage 0. To the worker's loop it is the network: what `validate` needs of a FlatModel, and the client.

    spread: the vectors of all stages. gradient: what is pushed, (P,) float32. `module`: the uncut network, which may be without
    memory for its parameters.
    """

    def __init__(
        self,
        meter: Meter,
        team: StageGroup,
        window: WorkerWindow,
        module: nn.Module,
        *about: object,
    ):
        super().__init__(meter, team, window, module, *about)
        self._whole, self.gradient = module, team.gradient
        self.module = self.divided.whole(self)
        self.measured, self._counts = self._measured, batchnorm.counts(module, self._measured)
        self.num_floats, self.num_statistics = num_floats(module), num_statistics(module)
        self.spread = SpreadVectors(
            self._each, lambda: {name: self.gathered(name) for name in self.vectors.state}
        )
        others = range(1, team.num_stages)
        self._commands = [StageChannel(team, stage, COMMANDS, CPU, self.watch) for stage in others]
        self._replies = {
            stage: StageChannel(team, stage, REPLIES, CPU, self.watch) for stage in others
        }
        self._scores = StageChannel(team, others[-1], SCORES, self.device, self.watch)
        self._heard: dict[int, dict] = {}
        for place, buffer in statistics_of(self.measured, module):
            team.statistics[place].copy_(buffer.reshape(-1))

    def fetch(self, at_least: int, whole: bool) -> tuple[Snapshot, int]:
        """Let every stage read its part of the latest snapshot, the same one; returns it, and the bytes of all parts."""
        num_bytes = 0

        def read(slot: int) -> None:
            nonlocal num_bytes
            self._tell(do="read", slot=slot, whole=whole)
            num_bytes = self.read(slot, whole) + sum(reply["result"] for reply in self._await_all())

        return self.window.fetch_by(read, at_least), num_bytes

    def gathered(self, what: str) -> torch.Tensor:
        """Return the weights or the velocity of all stages, (P,) float32, or their statistics: until they are gathered again."""
        self._tell(do="show", what=what)
        self.show(what)
        self._await_all()
        return getattr(self.team, what)

    def _each(self, of: str, verb: str, *arguments: object) -> list:
        self._tell(do="act", of=of, verb=verb, arguments=arguments)
        own = self.act(of, verb, arguments)
        return [own, *(reply["result"] for reply in self._await_all())]

    def compute_gradient_(
        self,
        flat: FlatModel,
        objective: Objective,
        batch: Batch,
        seed: int,
        accumulate: bool = False,
        compute: ComputeConfig = ComputeConfig(),
        scale: float = 1.0,
        smallest: int = 1,
    ) -> float:
        """Do what `step.compute_gradient_` does, for the whole network."""
        inputs = objective.prepare(batch, self.device)
        parts = Parts(batch.epoch, batch.start, batch.size, seed, scale, smallest)
        words, tensors = self.divided.share(batch)
        started = time.perf_counter()
        self._tell(tensors, do="compute", accumulate=accumulate, parts=asdict(parts), share=words)
        self.compute_part(parts, accumulate, inputs)
        loss = self._await_all()[-1]["result"]
        self.meter.add(pipelined=time.perf_counter() - started)
        return loss / scale

    def __call__(self, taken: torch.Tensor) -> torch.Tensor:
        """Return what the network makes of what it takes, in the mode that was set last."""
        self._tell(do="forward")
        self.forward_part(taken)
        [scores] = self._scores.take(0)
        self._await_all()
        return scores

    def eval(self) -> None:
        self._set("eval")

    def train(self) -> None:
        """Back to training; what `eval` and `recalibrate_` made of the statistics is put together."""
        self._set("train")
        self.gathered("statistics")

    def save_statistics(self, into: torch.Tensor) -> None:
        """Write the statistics of the last `train`, as FlatModel does."""
        into[: self.num_statistics].copy_(self.team.statistics)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return that of the uncut network, with the statistics of the last `train`; the parameters until they are gathered again."""
        module, weights = self._whole, self.gathered("weights")
        found = {id(p): view for p, view in zip(trained(module), views(module, weights))}
        found |= {
            id(b): self.team.statistics[place].view(b.shape)
            for place, b in statistics_of(self.measured, module)
        }
        own = dict(
            (
                *module.named_parameters(remove_duplicate=False),
                *module.named_buffers(remove_duplicate=False),
            )
        )
        return {
            **{
                name: found[id(own[name])] if id(own[name]) in found else tensor.clone()
                for name, tensor in module.state_dict().items()
            },
            **self._counts,
        }

    def recalibrate_(self, passes: Iterable[Callable[[Any], object]]) -> None:
        """Do what `batchnorm.recalibrate_` does, for the whole network."""
        self._set("recalibrate")
        for one in passes:
            one(self.module)
        self.train()

    def interrupt(self) -> None:
        """After a failure: the other stages leave what they do."""
        self._tell(do="rest")

    def close(self) -> None:
        """Let the other stages go."""
        self._tell(do="end")
        for pipe in self._commands:
            pipe.flush()
        self.team.close()

    def watch(self) -> None:
        """Raises StageLost if a stage says so."""
        for stage, pipe in self._replies.items():
            if stage not in self._heard and pipe.has():
                self._heard[stage], _ = pipe.hear()
                if error := self._heard[stage].get("error"):
                    raise StageLost(
                        f"stage {stage} of worker {self.team.worker} has failed: {error}"
                    )

    def _set(self, mode: str) -> None:
        self._tell(do="set", mode=mode)
        self.set_mode(mode)
        self._await_all()

    def _tell(self, for_last: tuple[torch.Tensor, ...] = (), **command: object) -> None:
        """Say a command to all other stages; tensors go with it to the last one."""
        self._heard = {}
        self.team.sync()
        for pipe in self._commands:
            pipe.say(command, for_last if pipe is self._commands[-1] else ())

    def _await_all(self) -> list[dict]:
        """Return the replies of the other stages, in order."""
        self._await(lambda: len(self._heard) == len(self._replies), "the other stages")
        self.team.sync()
        return [self._heard[stage] for stage in self._replies]


class FollowerStage(_Stage):
    """Every other stage: does what its leader says.

    fails: what to do with the error if it cannot; returns it in short. at_every_batch: what to do to its part of a gradient.
    """

    def __init__(
        self,
        meter: Meter,
        fails: Callable[[Exception], str],
        at_every_batch: Callable[[torch.Tensor], None],
        team: StageGroup,
        *about: object,
    ):
        super().__init__(meter, team, *about)
        self._fails, self.at_every_batch = fails, at_every_batch
        self._commands, self._replies, self._scores = (
            StageChannel(team, 0, tag, CPU, self.watch) for tag in (COMMANDS, REPLIES, SCORES)
        )
        self._tensors: tuple[torch.Tensor, ...] = ()  # that came with the last command
        self._acts = {
            "compute": self._compute,
            "forward": self._forward,
            "set": self.set_mode,
            "read": self.read,
            "act": self.act,
            "show": self.show,
        }

    def run(self) -> None:
        """Serve until the leader lets it go. Raises StageLost if the leader's process ends."""
        while (command := self._next_command())["do"] != "end":
            act = self._acts.get(command.pop("do"))
            if act is None:  # rest
                continue
            try:
                answer = {"result": act(**command)}
            except _Interrupted:
                continue
            except ServerLost:
                raise
            except Exception as error:
                answer = {"error": self._fails(error)}
            self.team.sync()
            self._replies.say(answer)
            self.meter.tick()
        self.team.close()

    def count(self, seconds: float) -> None:
        # the leader's loop times more as `compute`
        self.meter.add(passes=seconds, compute=seconds)

    def watch(self) -> None:
        """A command that comes before the last one is done takes its place."""
        self.team.world.demand_server()
        if self._commands.has():
            raise _Interrupted

    def _next_command(self) -> dict:
        """Wait for the next command, and return it. The leader may take its time: it works for all stages with the server."""
        while not wait.for_a_while(self._commands.has, IDLE_S):
            self.team.world.demand_server()
            self.meter.add()  # no stall
            self.meter.tick()
        command, self._tensors = self._commands.hear()
        return command

    def _compute(self, accumulate: bool, parts: dict, share: Any) -> float:
        about, inputs = Parts(**parts), None
        if self._after is None:
            inputs = self.divided.prepare(
                (share, self._tensors), about.size, about.epoch, about.start, self.device
            )
            self._tensors = ()
        return self.compute_part(about, accumulate, inputs)

    def _forward(self) -> None:
        with self.meter.phase("validate"):
            scores = self.forward_part(None)
            if scores is not None:
                self._scores.put(0, (scores,))

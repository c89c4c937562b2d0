"""A replica whose network is cut into stages, each on a rank of its own.

The leader, stage 0, is the worker that the server knows: it holds the lease, the images, the courier, the momentum, and the
replica's weights and gradient in memory that its stages share. For each batch it tells the stages what to do; they take
their weights from there, compute their part, and write their part of the gradient there. So all stages compute a batch with
the weights that the leader fetched, and what is pushed, replayed and saved is what an uncut network would give, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict

import torch
from torch import nn

from asgd_mpi.config import ComputeConfig
from asgd_mpi.data.loader import Batch
from asgd_mpi.errors import ServerLost, StageLost
from asgd_mpi.exchange import wait
from asgd_mpi.exchange.team import ACTIVATIONS, COMMANDS, GRADIENTS, REPLIES, SCORES, Pipe, Team
from asgd_mpi.model import batchnorm
from asgd_mpi.model.flat import FlatModel, places_of, statistics_of
from asgd_mpi.record.meter import Meter
from asgd_mpi.stages.cut import Stage
from asgd_mpi.stages.pipeline import Link, StageAtWork
from asgd_mpi.stages.schedule import Schedule
from asgd_mpi.worker.step import Normalise, Parts, prepared

CPU = torch.device("cpu")
IDLE_S = 0.5     # between two looks at the server and the clock, without a command


class _Interrupted(Exception):
    """The leader wants something else in place of what this stage waits for."""


class _Member:
    """What every stage does. `module`: the network that was cut, for where this stage's parameters lie in its vectors."""

    at_every_batch: Callable[[torch.Tensor], None] = staticmethod(lambda gradient: None)

    def __init__(self, team: Team, module: nn.Module, stage: Stage, device: torch.device, compute: ComputeConfig,
                 schedule: Schedule):
        self.team, self.stage, self.device, self.compute, self.schedule = team, stage, device, compute, schedule
        self.flat = FlatModel(stage.module, device)
        self._places, self._statistics = places_of(module, stage.module), statistics_of(module, stage.module)
        self._measuring = ExitStack()
        self._before = self._link(team.stage - 1) if team.stage else None
        self._after = self._link(team.stage + 1) if team.stage < team.num_stages - 1 else None

    def watch(self) -> None:
        """Called while another stage is waited for; may raise."""
        raise NotImplementedError

    def _link(self, neighbour: int) -> Link:
        return Link(*(Pipe(self.team, neighbour, tag, self.device, self.watch) for tag in (ACTIVATIONS, GRADIENTS)))

    def compute_part(self, parts: Parts, accumulate: bool, images: torch.Tensor | None, meter: Meter | None = None) -> float:
        """This stage's part of the gradient of a batch, into the shared one; returns the loss, of the last stage."""
        self._take_weights()
        if not accumulate:
            self.flat.gradient.zero_()
        count = parts.count(self.compute)
        at_work = StageAtWork(self.stage, self._before, self._after, parts.work(images, self.device, self.compute))
        for step in self.schedule(self.team.stage, self.team.num_stages, count):
            self._await(lambda: at_work.can(step), f"what its step {step} needs")
            with meter.phase("compute") if meter else ExitStack():
                at_work.do(step)
        self.at_every_batch(self.flat.gradient)
        for whole, own in self._places:
            self.team.gradient[whole].copy_(self.flat.gradient[own])
        return sum(at_work.losses[part] for part in range(count)).item() if self._after is None else 0.0

    @torch.no_grad()
    def forward_part(self, images: torch.Tensor | None) -> torch.Tensor | None:
        """This stage's part of a forward pass without gradients; returns the scores, of the last stage."""
        given = self.stage(*((images,) if self._before is None else self._before.activations.take(0)))
        if self._after is None:
            return given[0]
        self._after.activations.put(0, given)
        return None

    def set_mode(self, mode: str) -> None:
        """train, eval, or recalibrate: batch norm measures its statistics anew, until the next mode is set."""
        self._take_weights()
        self._measuring.close()
        if mode == "recalibrate":
            self._measuring.enter_context(batchnorm.measuring(self.stage.module))
        else:
            self.stage.module.train(mode == "train")

    def show_statistics(self) -> None:
        for place, buffer in self._statistics:
            self.team.statistics[place].copy_(buffer.reshape(-1))

    def flush(self) -> None:
        """Return when the neighbours have taken all that was sent."""
        for pipe in (*(self._before or ()), *(self._after or ())):
            pipe.flush()

    def _take_weights(self) -> None:
        self.team.sync()
        for whole, own in self._places:
            self.flat.weights[own].copy_(self.team.weights[whole])

    def _await(self, poll: Callable[[], bool], what: str) -> None:
        wait.until(lambda: poll() or self.watch(), self.team.timeout_s, f"{self.team.who} waits for {what}")


class Leader(_Member):
    """Stage 0. To the worker's loop it is the network: `compute_gradient_`, and what `validate` needs of a FlatModel.

    whole: the uncut network, over the team's vectors.
    """

    def __init__(self, whole: FlatModel, team: Team, *about: object):
        super().__init__(team, *about)
        self.whole, self.module = whole, self
        others = range(1, team.num_stages)
        self._commands = [Pipe(team, stage, COMMANDS, CPU, self.watch) for stage in others]
        self._replies = {stage: Pipe(team, stage, REPLIES, CPU, self.watch) for stage in others}
        self._scores = Pipe(team, others[-1], SCORES, self.device, self.watch)
        self._heard: dict[int, dict] = {}

    def compute_gradient_(self, flat: FlatModel, normalise: Normalise, batch: Batch, seed: int, accumulate: bool = False,
                          compute: ComputeConfig = ComputeConfig(), scale: float = 1.0) -> float:
        """As `step.compute_gradient_`, for the whole network."""
        images = prepared(batch, normalise, self.device, compute)
        parts = Parts(batch.epoch, batch.start, batch.labels.tolist(), seed, scale)
        self._tell(do="compute", accumulate=accumulate, parts=asdict(parts))
        self.compute_part(parts, accumulate, images)
        return self._await_all()[-1]["loss"] / scale

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """The scores (B, classes) of images (B, C, S, S), in the mode that was set last."""
        self._tell(do="forward")
        self.forward_part(images)
        [scores] = self._scores.take(0)
        self._await_all()
        return scores

    def eval(self) -> None:
        self._set("eval")

    def train(self) -> None:
        """Back to training; the whole network gets the statistics of all stages."""
        self._set("train")
        self._tell(do="show")
        self.show_statistics()
        self._await_all()
        self.whole.load_statistics_(self.team.statistics)

    def recalibrate_(self, batches: Iterable[torch.Tensor]) -> None:
        """As `batchnorm.recalibrate_`."""
        self._set("recalibrate")
        for images in batches:
            self(images)
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
                self._heard[stage] = pipe.hear()
                if error := self._heard[stage].get("error"):
                    raise StageLost(f"stage {stage} of worker {self.team.worker} has failed: {error}")

    def _set(self, mode: str) -> None:
        self._tell(do="set", mode=mode)
        self.set_mode(mode)
        self._await_all()

    def _tell(self, **command: object) -> None:
        self._heard = {}
        self.team.sync()
        for pipe in self._commands:
            pipe.say(command)

    def _await_all(self) -> list[dict]:
        """The replies of the other stages, in order."""
        self._await(lambda: len(self._heard) == len(self._replies), "the other stages")
        self.team.sync()
        return [self._heard[stage] for stage in self._replies]


class Assistant(_Member):
    """Every other stage: does what its leader says.

    fails: what to do with the error if it cannot; returns it in short. at_every_batch: what to do to its part of a gradient.
    """

    def __init__(self, meter: Meter, fails: Callable[[Exception], str], at_every_batch: Callable[[torch.Tensor], None],
                 team: Team, *about: object):
        super().__init__(team, *about)
        self._meter, self._fails, self.at_every_batch = meter, fails, at_every_batch
        self._commands, self._replies, self._scores = (
            Pipe(team, 0, tag, CPU, self.watch) for tag in (COMMANDS, REPLIES, SCORES))
        self._acts = {"compute": self._compute, "forward": self._forward, "set": self.set_mode, "show": self.show_statistics}

    def run(self) -> None:
        """Serve until the leader lets it go. Raises StageLost if the leader's process ends."""
        while (command := self._next_command())["do"] != "end":
            act = self._acts.get(command.pop("do"))
            if act is None:                        # rest
                continue
            try:
                answer = act(**command) or {}
            except _Interrupted:
                continue
            except ServerLost:
                raise
            except Exception as error:
                answer = {"error": self._fails(error)}
            self.team.sync()
            self._replies.say(answer)
            self._meter.tick()
        self.team.close()

    def watch(self) -> None:
        """A command that comes before the last one is done takes its place."""
        self.team.world.demand_server()
        if self._commands.has():
            raise _Interrupted

    def _next_command(self) -> dict:
        """The leader may take its time: it works for all stages with the server, or rests."""
        while not wait.for_a_while(self._commands.has, IDLE_S):
            self.team.world.demand_server()
            self._meter.add()                      # no stall
            self._meter.tick()
        return self._commands.hear()

    def _compute(self, accumulate: bool, parts: dict) -> dict:
        return {"loss": self.compute_part(Parts(**parts), accumulate, None, self._meter)}

    def _forward(self) -> None:
        with self._meter.phase("validate"):
            scores = self.forward_part(None)
            if scores is not None:
                self._scores.put(0, (scores,))

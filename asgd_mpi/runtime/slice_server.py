"""The server of a further slice: it does on its slice what rank 0 decides, in the same order, and decides nothing itself.

    slices of gradients come -> rank 0 is told -> rank 0 tells all what to apply -> applied, published -> rank 0 is told

Rank 0 publishes a version when all other servers have: then the slot of that version holds its slice everywhere, and stays as it
is until `ring` - 1 newer ones have been published.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from asgd_mpi.comm.arrival import WEIGHTS, Command
from asgd_mpi.comm.server_group import CoordinatorLink
from asgd_mpi.comm.server_window import ServerWindow
from asgd_mpi.optim.rules import Rule, advance_
from asgd_mpi.record.meter import Meter
from asgd_mpi.vector.finite import Lookout
from asgd_mpi.vector.partition import pieces

LOOK_S = 0.1  # between two ticks of the meter


@dataclass
class SliceServer:
    """Everything a further server holds; `run` is its loop. `first`: its slice of the weights to begin with, float32."""

    window: ServerWindow
    coordinator: CoordinatorLink
    rule: Rule
    meter: Meter
    first: torch.Tensor
    at_every_pass: Callable[[], None] = lambda: None  # failures that are rehearsed

    def __post_init__(self):
        self._lookout = Lookout(len(self.first))

    def run(self) -> None:
        """Obey until the end. Raises ServerLost, DeadlineExceeded."""
        while (command := self.coordinator.take(LOOK_S)) is None or command.kind != "leave":
            if command:
                self._obey(command)
                self.coordinator.done()
            self.meter.tick()
        self.coordinator.close()

    def _obey(self, command: Command) -> None:
        match command.kind:
            case "publish":
                self._publish_first(command)
            case "apply":
                self._apply(command)
            case "read":  # rank 0 has it in its ring, and this server has made as many passes
                self.rule.read_(command.worker, self.window.snapshot(command.version))
            case "give":
                vectors = {WEIGHTS: self.window.latest, **self.rule.state}
                with self.meter.phase("checkpoint"):
                    self.coordinator.give([vectors[name] for name in command.names])
            case "end":
                self.coordinator.let_go()

    def _publish_first(self, command: Command) -> None:
        with self.window.next_snapshot(command.version, command.samples) as fresh:
            for piece in pieces(len(fresh)):
                fresh[piece].copy_(self.first[piece])
                self.window.show(piece)

    def _apply(self, command: Command) -> None:
        judged = [
            (self.coordinator.gradient(applied.verdict.worker, applied.packet), applied.verdict)
            for applied in command.applied
        ]
        if judged:
            self.at_every_pass()
            with (
                self.meter.phase("apply"),
                self.window.next_snapshot(command.version, command.samples) as weights,
            ):
                advance_(
                    weights,
                    self.window.latest,
                    self.rule,
                    judged,
                    self.window.show,
                    self.coordinator.poll,
                    self._lookout.look,
                )
        for worker in [*command.refused, *(verdict.worker for _, verdict in judged)]:
            self.coordinator.release(worker)

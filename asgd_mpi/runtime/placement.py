"""The ranks of each replica, when a network is cut into stages: who computes what. Decided before training, by all together."""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import nn

from asgd_mpi.comm.server_window import ServerWindow
from asgd_mpi.comm.stage_group import StageGroup
from asgd_mpi.comm.worker_window import WorkerWindow
from asgd_mpi.comm.world import World
from asgd_mpi.config.topology import Topology
from asgd_mpi.pipeline.columns import ColumnAtWork, columns_of
from asgd_mpi.pipeline.cut import adopt_, cut
from asgd_mpi.pipeline.pipeline import Role, StageAtWork
from asgd_mpi.pipeline.plan import Seconds, StagePlan, measure, predicted_bubble, render
from asgd_mpi.pipeline.schedule import bubble, by_segments
from asgd_mpi.record.events import Cut
from asgd_mpi.task import OpenedTask
from asgd_mpi.vector.flat import num_floats, num_statistics


class StagePlacement:
    """The stages of this rank's replica: the plan, and who computes what. All ranks make it together."""

    def __init__(
        self,
        world: World,
        task: OpenedTask,
        module: nn.Module,
        device: torch.device,
        places: Topology,
        window: ServerWindow | WorkerWindow,
    ):
        config = task.config
        cut_up = _columns if config.stages.cut == "columns" else _chain
        self.cut, roles = cut_up(world, task, module, device)
        is_server = world.rank in places.servers
        if is_server:
            worker, stage = None, 0
        else:
            worker, stage = places.worker(world.rank), places.stage(world.rank)
        if not is_server and config.exchange.wire == "float32":
            payload = window.payload_of(worker)
        else:
            payload = None
        self.team = StageGroup(
            world,
            worker,
            stage,
            places.num_stages,
            num_floats(module),
            num_statistics(module),
            payload,
        )
        if not is_server:
            adopt_([role.module for role in roles], module)
            self._member = (self.team, window, module, roles[stage], device, config, task.divided)

    def take(self) -> tuple:
        """Return what a Leader or an Assistant is made of; once, so that nobody else holds on to the uncut network."""
        member, self._member = self._member, ()
        return member


def _chain(
    world: World, task: OpenedTask, module: nn.Module, device: torch.device
) -> tuple[Cut | None, list[Role]]:
    """Return what the server tells of the cut, and the roles of a replica's ranks.

    What each node takes is measured by the first worker, on its device; the server decides where the network is cut.
    """
    asked, plan, measured, told = task.config.stages, task.stage_plan(module), None, None
    if asked.balance == "time" and world.rank == 1:
        sample = plan.graph.sample
        if sample.is_meta:
            sample = torch.rand(sample.shape)
        measured = [vars(each) for each in measure(plan.graph, sample.to(device))]
    found, decided = world.gather(measured)[1], None
    if world.is_server:
        seconds = [Seconds(**each) for each in found] if found else None
        plan = StagePlan(plan.graph, plan.batch, seconds, plan.vectors)
        decided = {
            "cuts": task.cuts(plan, asked.balance),
            "differentiable": plan.graph.differentiable,
        }
        rows, parts = plan.rows(decided["cuts"]), plan.batch.parts
        if found:
            idle = predicted_bubble(rows, plan.batch)
        else:
            idle = bubble(len(rows), parts)
        print(
            f"{render(rows)}\n{parts} parts of a batch (--compute.micro_batches): the stages wait for each other "
            f"{idle:.0%} of the time",
            flush=True,
        )
        told = Cut(
            time.time(), len(rows), parts, asked.schedule, idle, [row.begins for row in rows]
        )
    decided = world.share(decided)
    stages = cut(plan.graph, **decided)
    return told, [
        Role(stage.module, partial(StageAtWork, stage), plan.batch.schedule) for stage in stages
    ]


def _columns(
    world: World, task: OpenedTask, module: nn.Module, device: torch.device
) -> tuple[Cut | None, list[Role]]:
    """Return what `_chain` does, for a network of two columns."""
    told = None
    if world.is_server:
        rows = task.rows_of_columns(module)
        print(
            f"{render(rows)}\nboth columns work on the same images, and exchange maps at the cross-overs",
            flush=True,
        )
        told = Cut(
            time.time(),
            len(rows),
            task.config.compute.micro_batches,
            "columns",
            0.0,
            [row.begins for row in rows],
        )
    return told, [
        Role(column.module, partial(ColumnAtWork, column), by_segments(column.num_pairs))
        for column in columns_of(module)
    ]

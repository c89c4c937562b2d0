"""What each kind of rank does in a run, from the first packet to the last: server, server of a slice, worker, stage of a worker."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch import nn

from asgd_mpi.comm.packets import Inbox, Outbox
from asgd_mpi.comm.server_group import CoordinatorLink, ServerGroup, ShardedInbox
from asgd_mpi.config import topology
from asgd_mpi.config.rulebook import RULEBOOK
from asgd_mpi.errors import DeadlineExceeded, DiskRefuses, ServerLost, StageLost, UserError
from asgd_mpi.process import signals
from asgd_mpi.protocol.ledger import Plan
from asgd_mpi.protocol.messages import Orders
from asgd_mpi.record.events import EventLog
from asgd_mpi.record.watchdog import Watch
from asgd_mpi.runtime.checkpointer import Checkpointer
from asgd_mpi.runtime.client import Formats, ServerClient
from asgd_mpi.runtime.last_words import let_server_speak, tell_error, tell_server
from asgd_mpi.runtime.placement import StagePlacement
from asgd_mpi.runtime.rank import Rank, finish, make_own_rule, open_server, open_worker, restore
from asgd_mpi.runtime.server import Server
from asgd_mpi.runtime.slice_server import SliceServer
from asgd_mpi.runtime.stages import FollowerStage, LeadStage
from asgd_mpi.vector.flat import FlatModel


def run_server(rank: Rank, plan: Plan, module: nn.Module) -> int:
    """Rank 0, with the network's first weights; returns the status of the job."""
    group: ServerGroup | None = None
    if rank.task.config.exchange.servers > 1:
        group = ServerGroup(rank.world, rank.window, rank.places.hosts)
        inbox: Inbox = ShardedInbox(rank.world, rank.window, group)
    else:
        inbox = Inbox(rank.world, rank.window)
    serving = open_server(rank, plan, module, inbox, group)
    server = serving.server
    server.publish_first(serving.first)
    try:
        server.run()
    except ServerLost:  # a slice of what was to be saved is lost
        serving.pushes.close()
        raise
    except UserError as error:
        raise _saved(rank, error, server, serving.checkpointer, serving.pushes) from error
    if group:
        group.end()
    serving.close()
    return finish(rank, server)


def run_slice_server(rank: Rank) -> int:
    """A further server; returns its own status."""
    rank.world.hold_on_to(rank.places.servers)
    flat = FlatModel(rank.task.first_module(), torch.device("cpu"))
    rule, own = make_own_rule(rank, flat)
    restore(rank, flat, rule, own)
    slice_server = SliceServer(
        rank.window,
        CoordinatorLink(rank.world, rank.window, signals.asked_to_leave),
        rule,
        rank.books.meter,
        flat.weights[own].clone(),
        rank.injector.step,
    )
    del flat
    rank.version = lambda: rank.window.version
    slice_server.run()
    rank.world.let_go_of(rank.places.servers)
    rank.close("finished", "")
    return 0


def run_stage(rank: Rank, placement: StagePlacement) -> int:
    """A rank of a further stage; returns its own status."""
    failures: list[str] = []

    def fails(error: Exception) -> str:
        failures.append(tell_error(rank.world, rank.files.run, error))
        return failures[-1]

    rank.world.hold_on_to([topology.SERVER])  # what else is needed the leader knows
    try:
        FollowerStage(rank.books.meter, fails, rank.injector.step, *placement.take()).run()
    except StageLost as error:  # the leader: the worker is retired without a word of its own
        fails(error)
    rank.world.let_go_of(rank.places.servers)
    rank.close("failed" if failures else "finished", "; ".join(failures))
    return 0


def run_worker(
    rank: Rank,
    module: nn.Module | None,
    device: torch.device,
    watch: Watch,
    placement: StagePlacement | None,
) -> Generator[Any, float, int]:
    """Return the rank of a worker, or of the first stage of one; returns its own status.

    Yields the inputs of each batch whose gradient a loop of the user's computes, who sends the loss; nothing if the task has a
    loss of its own.
    """
    config, world = rank.task.config, rank.world
    exchange = config.exchange
    world.hold_on_to(rank.places.servers)
    loaders = (
        rank.task.train_loader(rank.books.note, touch_on_device=device.type != "cpu"),
        rank.task.val_loader(rank.books.note),
    )
    outbox = Outbox(world, rank.window)
    # where it is read
    in_place = (
        device.type == "cpu"
        and not exchange.overlap
        and exchange.wire == "float32"
        # nothing else passes there
        and config.model.batchnorm != "server_ema"
    )
    elastic = RULEBOOK[config.rule.name].moves == "elastic"
    gradient = outbox.payload.view(torch.float32) if in_place else None
    lead = LeadStage(rank.books.meter, *placement.take()) if placement else None
    flat = (
        lead.flat
        if lead
        else FlatModel(module, device, gradient, exchange.overlap, elastic, rank.carried)
    )
    client = ServerClient(
        rank.window,
        outbox,
        flat,
        rank.books.meter,
        exchange.overlap,
        elastic,
        Formats(rank.window.whole.fetched, rank.window.whole.pushed),
        lead,
    )
    worker = open_worker(rank, flat, client, loaders, lead)
    failure = ""
    try:
        if rank.task.computes:
            worker.run()
        else:
            yield from worker.driven()
    except (ServerLost, DeadlineExceeded):
        raise
    except Exception as error:
        let_server_speak(world, error)
        tell = tell_error if rank.task.computes else tell_server
        failure = tell(world, rank.files.run, error)
        watch.close()  # it rests from now on, and that is no stall
        if lead:
            lead.interrupt()
        worker.rest()
    if lead:
        lead.close()
    for loader in loaders:
        loader.close()
    world.let_go_of(rank.places.servers)
    rank.close(
        "failed" if failure else "left" if client.mail.orders == Orders.LEAVE else "finished",
        failure,
    )
    return 0


def _saved(
    rank: Rank, error: UserError, server: Server, checkpointer: Checkpointer, pushes: EventLog
) -> UserError:
    """Save what can be saved when an error ends the run; returns it, with what there is to say of that."""
    text, refused = str(error), isinstance(error, DiskRefuses)
    for act in (server.save, checkpointer.close, pushes.close):
        try:
            act()
        except DiskRefuses as second:
            text += "" if refused else f"\n{second}"
            refused = True
    if refused:
        text += f" Then go on with --resume {rank.files.run.path}, from {checkpointer.newest}."
    return type(error)(text)

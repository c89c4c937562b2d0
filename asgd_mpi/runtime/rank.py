"""What the ranks of a run are made of: server and worker, with the books that they keep. No MPI: that comes with the window."""

from __future__ import annotations

import platform
import sys
import time
import traceback
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import msgspec
import numpy
import torch
from torch import nn

import asgd_mpi
from asgd_mpi.config import failures
from asgd_mpi.config.rulebook import (
    RULEBOOK,
    begins_anew,
    momentum_of,
    momentum_option,
    workers_keep_state,
)
from asgd_mpi.config.topology import SERVER, Topology
from asgd_mpi.data.dataset import DatasetLoader
from asgd_mpi.data.loader import Loader
from asgd_mpi.errors import UserError
from asgd_mpi.optim.replica import Replica
from asgd_mpi.optim.rules import EMA, Rule, make_rule
from asgd_mpi.optim.stability import LossWatch
from asgd_mpi.process import signals
from asgd_mpi.process.ending import DEGRADED, RESUME_ME
from asgd_mpi.protocol.ledger import Ledger, Plan
from asgd_mpi.record import checkpoint, origin, tee
from asgd_mpi.record.disk import write_whole
from asgd_mpi.record.events import End, EventLog, Resume
from asgd_mpi.record.meter import Meter
from asgd_mpi.record.progress import Progress
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.unit import counted
from asgd_mpi.runtime.checkpointer import Checkpointer
from asgd_mpi.runtime.fault_injection import Injector
from asgd_mpi.runtime.server import Incidents, Links, Server, ServerBooks, ServerHabits
from asgd_mpi.runtime.worker import Books, Disturbances, Subject, Worker
from asgd_mpi.runtime.worker_checkpointer import WorkerCheckpointer
from asgd_mpi.task import OpenedTask
from asgd_mpi.vector.flat import FlatModel
from asgd_mpi.vector.groups import within

if TYPE_CHECKING:
    from asgd_mpi.comm.packets import Inbox
    from asgd_mpi.comm.server_group import ServerGroup
    from asgd_mpi.comm.server_window import ServerWindow
    from asgd_mpi.comm.worker_window import WorkerWindow
    from asgd_mpi.comm.world import World
    from asgd_mpi.runtime.client import ServerClient
    from asgd_mpi.runtime.stages import LeadStage


# yields the inputs of each batch whose gradient a loop of the user's computes, is sent the loss, returns a status
Turns = Generator[Any, float, int]


@dataclass
class Files:
    """The run of a start, and `directory`, the checkpoint that it goes on from; `room`: bytes that one takes."""

    run: RunDir
    restart: int
    directory: Path | None
    room: int

    def __post_init__(self):
        self.manifest = checkpoint.read_manifest(self.directory) if self.directory else None


@dataclass(frozen=True)
class RankBooks:
    """The records that a rank keeps. `write_report` makes the report of a finished run, and returns where it is."""

    meter: Meter
    log: EventLog
    note: Callable[[str], None]
    write_report: Callable[[RunDir], Path]


@dataclass
class Rank:
    """What every kind of rank has. `carried`: the tensors of the network that are no weights and travel with them."""

    world: World
    places: Topology
    task: OpenedTask
    window: ServerWindow | WorkerWindow
    files: Files
    books: RankBooks
    carried: list[str]
    version: Callable[[], int] = lambda: 0  # for the watchdog

    def __post_init__(self):
        self.injector = Injector(failures.parse(self.task.config.run.inject), self.world.rank)

    def close(self, status: str, reason: str) -> None:
        """Close the books."""
        self.window.close()
        self.books.meter.flush()
        self.books.log.write(End(time.time(), status, reason))
        self.books.log.close()


@dataclass
class Serving:
    """A server at work, and the books that are closed with it."""

    server: Server
    first: torch.Tensor  # the weights that it begins with, (P,) float32 of its slice
    pushes: EventLog
    progress: Progress
    checkpointer: Checkpointer

    def close(self) -> None:
        self.server.inbox.close()
        self.pushes.close()
        self.progress.close()
        self.checkpointer.close()


def first_module(task: OpenedTask, run: RunDir) -> nn.Module:
    """Return the network with the weights that a run begins with, on rank 0.

    If they are no function of the seed they are written down: a replay begins with them, and so does a start after one that was
    killed before its first checkpoint.
    """
    module = task.first_module()
    if not task.is_seeded:
        if run.first.exists():
            module.load_state_dict(checkpoint.read_tensors(run.first))
        else:
            checkpoint.write_tensors(run.first, module.state_dict())
    return module


def open_server(
    rank: Rank, plan: Plan, module: nn.Module, inbox: Inbox, group: ServerGroup | None = None
) -> Serving:
    """Make rank 0's server, with the network's first weights or those of the checkpoint that the run goes on from."""
    task, config = rank.task, rank.task.config
    flat = FlatModel(module, torch.device("cpu"), carried=rank.carried)
    rule, own = make_own_rule(rank, flat)
    ledger = Ledger(plan, task.schedule(plan.num_workers), restore(rank, flat, rule, own))
    statistics = None
    if flat.num_statistics:
        statistics = torch.zeros(flat.num_statistics)
        flat.save_statistics(statistics)
    first = flat.weights[own].clone()
    pushes = _begin_log(rank, ledger)
    progress = Progress(
        config.run.progress, plan.total_samples, plan.num_samples, ledger.samples, task.unit
    )
    checkpointer = Checkpointer(
        rank.files.run,
        rank.files.restart,
        _about(rank),
        flat,
        rule,
        config.checkpoint.keep,
        pushes.sync,
        rank.files.room,
    )
    server = Server(
        Links(rank.window, inbox, group),
        ledger,
        rule,
        ServerBooks(rank.books.meter, rank.books.log, pushes, progress, checkpointer),
        ServerHabits(
            rank.world.timeout_s,
            config.failure,
            config.checkpoint,
            config.record.hash_snapshots,
            averages_statistics=config.model.batchnorm == "server_ema" and statistics is not None,
            workers_keep_momentum=workers_keep_state(config)
            or bool(rank.carried)
            and not begins_anew(config.rule),
            workers_move=bool(RULEBOOK[config.rule.name].moves),
        ),
        statistics,
        LossWatch(*momentum_of(config.rule), momentum_option(config.rule)),
        Incidents(
            signals.asked_to_leave,
            rank.injector.step,
            lambda failed: tee.read_error(rank.files.run.error_of(failed)),
        ),
    )
    rank.version = lambda: ledger.version
    return Serving(server, first, pushes, progress, checkpointer)


def open_worker(
    rank: Rank,
    flat: FlatModel,
    client: ServerClient,
    loaders: tuple[Loader | DatasetLoader, Loader | DatasetLoader],
    lead: LeadStage | None = None,
) -> Worker:
    """Make a worker, with the momentum of the checkpoint that the run goes on from."""
    config, number = rank.task.config, rank.world.worker
    num_workers = rank.window.whole.num_workers
    # each stage knows those of its own part
    groups = [] if lead else rank.task.groups(flat.module)
    schedule = rank.task.schedule(num_workers)
    replica = Replica(
        flat,
        config,
        num_workers,
        schedule,
        stages=lead,
        groups=groups,
        kept_at=rank.task.kept_at,
    )
    worker = Worker(
        number,
        client,
        replica,
        Subject(rank.task.objective, *loaders, rank.task.metrics),
        config,
        Books(
            rank.books.meter,
            WorkerCheckpointer(rank.files.run, rank.files.restart, number, rank.books.note),
            rank.books.log if config.record.hash_snapshots else None,
        ),
        lead,
        Disturbances(
            signals.asked_to_leave, rank.injector.step if rank.injector.failures else None
        ),
    )
    _restore_momentum(rank, worker)
    rank.version = lambda: client.version
    rank.task.begin(rank, flat)
    return worker


def make_own_rule(rank: Rank, flat: FlatModel) -> tuple[Rule, slice]:
    """Return the rule of this server, and the slice of the weights that it moves."""
    whole = rank.window.whole
    own = whole.slices[rank.places.servers.index(rank.world.rank)]
    groups = within(rank.task.groups(flat.module), own)
    return make_rule(own.stop - own.start, rank.task.config.rule, whole.num_workers, groups), own


def finish(rank: Rank, server: Server) -> int:
    """Close the books; the report, and the marker of success."""
    rank.close("left" if server.left_because else "finished", server.left_because)
    try:
        with rank.world.keeping_others():
            print(f"report: {rank.books.write_report(rank.files.run)}", flush=True)
    except UserError as error:  # the training is not lost with its report
        print(f"the report could not be made: {error}", file=sys.stderr, flush=True)
    except Exception:
        print(
            f"the report could not be made; `python -m asgd_mpi.report {rank.files.run.path}` tries again:\n"
            f"{traceback.format_exc()}",
            file=sys.stderr,
            flush=True,
        )
    ledger, where = (
        server.ledger,
        rank.files.run.checkpoint(server.ledger.version, rank.files.restart),
    )
    if server.left_because:
        print(
            f"left at version {ledger.version}, {ledger.samples} of {ledger.plan.total_samples} "
            f"{rank.task.unit}; checkpoint: {where}\ngo on with --resume {rank.files.run.path}",
            flush=True,
        )
        status = RESUME_ME
    else:
        print(f"{_result(rank, server)}\ncheckpoint: {where}", flush=True)
        status = DEGRADED if server.is_degraded else 0
        end = {
            "status": status,
            "version": ledger.version,
            **(server.final_score.named if server.final_score else {}),
            "restart": rank.files.restart,
            "retired": [loss.rank for loss in server.losses if loss.for_good],
        }
        write_whole(rank.files.run.finished, msgspec.json.format(msgspec.json.encode(end)))
    if absent := set(ledger.present) - server.inbox.dead:
        rank.world.end_without({worker + 1 for worker in absent}, status or DEGRADED)
    return status


def _result(rank: Rank, server: Server) -> str:
    """Say in a line what the final version scores."""
    score = server.final_score
    if score is None:
        return f"version {server.ledger.version}, not validated"
    if score.top1_error is None or score.top5_error is None:
        metrics = ", ".join(f"{name} {value:.6g}" for name, value in score.metrics.items())
        return f"version {score.version}: {metrics} on {counted(score.num_images, f'validation {rank.task.unit}')}"
    stored, differs = score.stored_top1_error, ""
    if stored not in (None, score.top1_error):
        differs = f"; {100 * (1 - stored):.2f} % with the workers' own batch-norm statistics, not measured anew"
    return (
        f"version {score.version}: accuracy {100 * (1 - score.top1_error):.2f} % on {counted(score.num_images, 'validation images')}, "
        f"top-5 accuracy {100 * (1 - score.top5_error):.2f} %{differs}"
    )


def restore(rank: Rank, flat: FlatModel, rule: Rule, own: slice) -> dict | None:
    """Load the checkpoint into the network, and a slice of it into the rule; returns the ledger's state."""
    if rank.files.directory is None:
        return None
    state, _ = checkpoint.load(rank.files.directory)
    flat.module.load_state_dict(state)
    has_state = rule.state and checkpoint.SERVER in rank.files.manifest.files
    saved = checkpoint.read_tensors(rank.files.directory / checkpoint.SERVER) if has_state else {}
    ledger = checkpoint.read_ledger(rank.files.directory)
    if rank.world.rank == SERVER:
        _tell_absent(rank.files.directory, "the rule", rule.state.keys() - saved.keys() - {EMA})
    # under another rule than before, the optimizer's first step is still to come; a mean that begins later begins here
    return ledger if rule.load_({EMA: flat.weights} | saved, own) else ledger | {"steps": 0}


def _restore_momentum(rank: Rank, worker: Worker) -> None:
    if str(rank.world.worker) in (rank.files.manifest.momenta if rank.files.manifest else {}):
        path = rank.files.directory / checkpoint.worker_file(rank.world.worker)
        worker.replica.restore_(path)
        if rank.task.config.stages.number == 1:  # else its state lies on several ranks
            names = (
                worker.replica.state.keys() - checkpoint.read_tensors(path, is_mapped=True).keys()
            )
            _tell_absent(path, f"rank {rank.world.rank}", names)


def _tell_absent(path: Path, whose: str, names: Collection[str]) -> None:
    """Say what a checkpoint of other settings does not hold."""
    if names:
        told = f"warning: {path} holds no {', '.join(sorted(names))} of {whose}: zero in its place"
        print(told, file=sys.stderr, flush=True)


def _begin_log(rank: Rank, ledger: Ledger) -> EventLog:
    pushes = EventLog(rank.files.run.pushes_of(rank.files.restart), rank.books.log.also)
    if rank.files.restart:
        momenta = rank.files.manifest.momenta if rank.files.manifest else {}
        pushes.write(
            Resume(
                time.time(),
                rank.files.restart,
                rank.files.manifest.restart if rank.files.manifest else rank.files.restart - 1,
                ledger.version,
                ledger.samples,
                ledger.plan.num_workers,
                [momenta.get(str(worker), -1) for worker in range(ledger.plan.num_workers)],
            )
        )
        pushes.sync()
    return pushes


def _about(rank: Rank) -> checkpoint.Manifest:
    task = rank.task
    return checkpoint.Manifest(
        0, 0, task.config.model.name, **task.facts, software=checkpoint.software()
    )


def write_versions(run: RunDir, restart: int, everyone: list[dict], mpi: str) -> None:
    """Write down what a run is made with, and who takes part."""
    found = {
        "asgd_mpi": asgd_mpi.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": metadata.version("torchvision"),
        "numpy": numpy.__version__,
        "h5py": h5py.__version__,
        "mpi": mpi,
        "machine": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "hosts": origin.hosts(everyone),
        **origin.of_run(),
        "ranks": everyone,
    }
    write_whole(run.versions_of(restart), msgspec.json.format(msgspec.json.encode(found)))

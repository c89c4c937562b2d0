"""Train a network by asynchronous SGD: `mpirun -np 8 python -m asgd_mpi.train` (1 server, 7 workers).

Rank 0 reads the command line, checks everything that can be checked (`prepare`), makes the run directory and tells the
others; then it serves and they work, or serve slices of the weights (`--servers`). A worker that fails is retired, and the
others go on; a server that fails ends the job, with its own error as the first thing to see.

Status: 0 finished; 3 finished, but with fewer workers than at the beginning; 75 asked to end by a signal, to be resumed
(`--resume`); 2 something that the user can put right; 1 anything else. `finished.json` in the run directory is written
last, and only when the training is finished: launchers are known to return 0 without that.
"""

from __future__ import annotations

from asgd_mpi.process import signals

if __name__ == "__main__":
    signals.install()              # before anything heavy is imported

import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from importlib import metadata
from pathlib import Path

import h5py
import msgspec
import numpy
import torch
from torch import nn

import asgd_mpi
from asgd_mpi import launch, report, segments
from asgd_mpi.comm import clock, mpi, wait
from asgd_mpi.comm.layout import Layout
from asgd_mpi.comm.packets import Inbox, Outbox
from asgd_mpi.comm.server_group import CoordinatorLink, ServerGroup, ShardedInbox
from asgd_mpi.comm.server_window import ServerWindow
from asgd_mpi.comm.worker_window import WorkerWindow
from asgd_mpi.comm.world import FORWARDING_S, World, library, tasks_of_scheduler
from asgd_mpi.config import options as configuration
from asgd_mpi.config import topology
from asgd_mpi.config.options import Config
from asgd_mpi.config.rulebook import RULEBOOK, workers_keep_state
from asgd_mpi.config.topology import Topology
from asgd_mpi.errors import DeadlineExceeded, DiskRefuses, RunDirError, ServerLost, StageLost, UserError, tell
from asgd_mpi.model import buffers
from asgd_mpi.optim.replica import Replica
from asgd_mpi.optim.rules import Rule, make_rule
from asgd_mpi.optim.stability import LossWatch
from asgd_mpi.process import ending
from asgd_mpi.process.ending import DEGRADED, FAULT, RESUME_ME, WRONG
from asgd_mpi.protocol.ledger import Ledger, Plan
from asgd_mpi.protocol.messages import Orders
from asgd_mpi.record import checkpoint, tee
from asgd_mpi.record.disk import is_of_all, write_whole
from asgd_mpi.record.events import End, EventLog, Note, Resume, Start
from asgd_mpi.record.meter import Meter
from asgd_mpi.record.metrics import Metrics
from asgd_mpi.record.nvml import open_gauge
from asgd_mpi.record.progress import Progress
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.tensorboard import TensorBoard
from asgd_mpi.record.watchdog import Watch
from asgd_mpi.runtime import devices, fault_injection
from asgd_mpi.runtime.checkpointer import Checkpointer
from asgd_mpi.runtime.client import ServerClient
from asgd_mpi.runtime.fault_injection import Injector
from asgd_mpi.runtime.placement import StagePlacement
from asgd_mpi.runtime.prepare import prepare
from asgd_mpi.runtime.server import Server
from asgd_mpi.runtime.slice_server import SliceServer
from asgd_mpi.runtime.stages import FollowerStage, LeadStage
from asgd_mpi.runtime.worker import Worker
from asgd_mpi.runtime.worker_checkpointer import WorkerCheckpointer
from asgd_mpi.task import Task, open_task
from asgd_mpi.vector import partition
from asgd_mpi.vector.flat import FlatModel, num_floats, num_statistics

DISK_PATIENCE_S = 4.0


@ending.of_command
def main(arguments: list[str] | None = None) -> int:
    signals.install()
    arguments = sys.argv[1:] if arguments is None else arguments
    world = World(mpi.start_limit_s(arguments))
    with ExitStack() as hold:          # the lock of the run directory, on rank 0
        try:
            setup = _agree(world, arguments, hold)
            if "status" in setup:
                return setup["status"] if world.is_server else 0
            world.renumber(setup["order"])
        except UserError as error:     # some rank did not come
            _fail(world, None, error)
        return _take_part(world, setup)


def _take_part(world: World, setup: dict) -> int:
    """Train, as what `setup` makes of this rank; returns its own status."""
    run = RunDir.open(setup["run"])
    config = configuration.from_yaml(setup["config"])
    world.timeout_s = config.run.timeout_s
    try:
        places = Topology.of(setup["ranks"], config.stages.number, config.exchange.servers)
        unkept = tee.keep(run.log_of(world.rank), topology.describe(places, world.rank))
        if world.is_server:
            if unkept:                 # one line for all ranks, which meet the same disk
                print(f"what the ranks print is not kept beside the run: cannot write {unkept}", file=sys.stderr, flush=True)
            tell(setup["greeting"])
        if places.hosts.index(world.host) == world.rank and (removed := segments.remove_dead()):
            print(f"{world.host}: {segments.describe(removed)}", flush=True)
        status = _train(world, config, run, places, setup["restart"], setup["checkpoint"], setup["carried"], setup["room"])
        signals.ignore()
        world.leave(status, config.failure.grace_s, status or DEGRADED)
        return status
    except BaseException as error:  # noqa: B036 - whatever ends one rank here must end all of them
        _fail(world, run, error)
    return 1


def _agree(world: World, arguments: list[str], hold: ExitStack) -> dict:
    """Rank 0 reads and checks; every rank learns what to do, or the status to leave with."""
    ranks = world.gather({"host": world.host, "gpus": [] if world.is_server else devices.visible()})
    setup = None
    if world.is_server:
        try:
            setup = prepare(arguments, ranks, tasks_of_scheduler(), hold)
        except UserError as error:
            if launch.is_first_process():    # not from each of many worlds of one rank
                print(f"error: {error}", file=sys.stderr, flush=True)
            setup = {"status": WRONG}
        except SystemExit as leave:  # --help
            setup = {"status": leave.code or 0}
        except BaseException as error:  # noqa: B036
            _fail(world, None, error)
    world.timeout_s = max(world.timeout_s, mpi.START_S)       # rank 0 may have much to read
    return world.share(setup)


def _train(world: World, config: Config, run: RunDir, places: Topology, restart: int, directory: str | None,
           carried: list[str], room: int) -> int:
    is_shown = world.is_server and config.record.tensorboard

    def tell(text: str) -> None:
        print(f"rank {world.rank}: {text}", file=sys.stderr, flush=True)

    def tell_of_disk(error: OSError, text: str) -> None:
        if world.is_server or not is_of_all(error):
            tell(text)

    log = Metrics(run.metrics_of(world.rank, restart), TensorBoard(run.tensorboard, tell).add if is_shown else None, tell_of_disk)
    meter = Meter(log, config.record.interval_s, config.record.spans)
    is_server, exchange = world.rank in places.servers, config.exchange
    threads = config.compute.threads or topology.threads_for(
        os.cpu_count(), len(os.sched_getaffinity(0)), places.num_on_host_of(world.rank))
    torch.set_num_threads(threads)

    def note(text: str, **counts: int) -> None:
        meter.add(**counts)
        log.write(Note(time.time(), text))
        tell(text)

    task = open_task(config, lambda text: note(text, read_retries=1))
    device = devices.take(places, world.rank)
    if gpu := places.gpu(world.rank):
        meter.gauge = open_gauge(gpu.id)
    is_cut = config.stages.number > 1
    module = task.first_module() if world.is_server else task.outline() if is_cut and not is_server else task.build_module()
    for tensor in buffers.constants_(module):          # so they need not come of the same file, or the same arithmetic
        world.share_tensor_(tensor)
    if is_server and partition.is_fine(num_floats(module), exchange.servers):
        threads = 1
    everyone = world.gather({"rank": world.rank, "host": world.host, "device": str(device), "threads": threads})
    if is_server:                  # the bits depend on it: on all servers as many
        threads = everyone[topology.SERVER]["threads"]
        torch.set_num_threads(threads)
    plan, offset = task.plan(places.num_workers), clock.measure(world)
    role = "server" if is_server else "stage" if places.stage(world.rank) else "worker"
    log.write(Start(time.time(), world.rank, role, world.host, str(device),
                    plan.num_workers, num_floats(module), plan.num_samples, plan.total_samples,
                    not exchange.overlap and exchange.n_fetch in (1, exchange.n_push), threads,
                    clock_offset_s=offset.seconds, clock_error_s=offset.error))
    log.flush()                    # the replay of a killed run needs it
    log.keep_free = room + room // 4
    layout = Layout(num_floats(module), exchange.ring, plan.num_workers, num_statistics(module, carried), exchange.wire,
                    exchange.servers)
    window = ServerWindow(world, layout, places.servers.index(world.rank)) if is_server else WorkerWindow(world, layout)
    window.open()
    if not is_server and window.reads and places.position_on_host(world.rank) == 0:
        print(window.reads, flush=True)
    placement = None
    if is_cut:
        placement = StagePlacement(world, task, module, device, places, window)
        module = module if world.is_server else None                                # members keep their own parts
    part = _Part(world, places, task, run, restart, Path(directory) if directory else None, window, meter, log, note, carried, room)
    watch = Watch(run, world.rank, world.host, meter, config.failure.stall_s,
                  lambda: (wait.now.what, wait.now.since) if wait.now else None, lambda: part.version())
    try:
        if world.is_server:
            write_whole(run.versions_of(restart), msgspec.json.format(msgspec.json.encode(_versions(everyone))))
            if placement:
                log.write(placement.cut)
            return part.serve(plan, module)
        if is_server:
            return part.serve_slice()
        if role == "stage":
            return part.assist(placement)
        return part.work(module, device, watch, placement)
    except BaseException as error:
        with suppress(ValueError):         # the books are closed already
            meter.flush()
            log.write(End(time.time(), "failed", _in_short(error)))
            log.close(tells=not isinstance(error, DiskRefuses))
        raise
    finally:
        watch.close()


class _Part:
    """What one rank does in a run: `serve` or `work`. `directory`: the checkpoint to go on from; `room`: bytes that one takes."""

    def __init__(self, world: World, places: Topology, task: Task, run: RunDir, restart: int, directory: Path | None,
                 window: ServerWindow | WorkerWindow, meter: Meter, log: EventLog, note: Callable[[str], None], carried: list[str],
                 room: int):
        self.room = room
        self.world, self.places = world, places
        self.task, self.run, self.restart, self.directory = task, run, restart, directory
        self.window, self.meter, self.log, self.note, self.carried = window, meter, log, note, carried
        self.manifest = checkpoint.read_manifest(directory) if directory else None
        self.injector = Injector(fault_injection.parse(task.config.run.inject), world.rank)
        self.version = lambda: 0       # for the watchdog

    def serve(self, plan: Plan, module: nn.Module) -> int:
        """Rank 0, with the network's first weights; returns the status of the job."""
        task, config = self.task, self.task.config
        flat = FlatModel(module, torch.device("cpu"), carried=self.carried)
        rule, own = self._make_rule()
        ledger = Ledger(plan, task.schedule(plan.num_workers), self._restore(flat, rule, own))
        statistics = torch.zeros(flat.num_statistics) if flat.num_statistics else None
        if statistics is not None:
            flat.save_statistics(statistics)
        first = flat.weights[own].clone()
        pushes = self._begin_log(ledger)
        progress = Progress(config.run.progress, plan.total_samples, plan.num_samples, ledger.samples)
        checkpointer = Checkpointer(self.run, self.restart, self._about(), flat, rule, config.checkpoint.keep, pushes.sync, self.room)
        group = ServerGroup(self.world, self.window, self.places.hosts) if config.exchange.servers > 1 else None
        inbox = ShardedInbox(self.world, self.window, group) if group else Inbox(self.world, self.window)
        moves = bool(RULEBOOK[config.rule.name].moves)
        server = Server(
            self.window, inbox, ledger, rule, self.meter, self.log, pushes, progress,
            self.world.timeout_s, config.failure, config.checkpoint, checkpointer, config.record.hash_snapshots,
            config.exchange.wire, statistics, config.model.batchnorm == "server_ema" and statistics is not None,
            workers_keep_state(config.rule) or bool(self.carried) and not moves, moves,
            LossWatch(config.rule.momentum, config.rule.momentum_at), signals.asked_to_leave, self.injector.step, group,
            lambda rank: tee.read_error(self.run.error_of(rank)))
        self.version = lambda: ledger.version
        server.publish_first(first)
        try:
            server.run()
        except ServerLost:                 # a slice of what was to be saved is lost
            pushes.close()
            raise
        except UserError as error:
            raise self._saved(error, server, checkpointer, pushes) from error
        if group:
            group.end()
        server.inbox.close()
        pushes.close()
        progress.close()
        checkpointer.close()
        return self._finish(server)

    def _saved(self, error: UserError, server: Server, checkpointer: Checkpointer, pushes: EventLog) -> UserError:
        """Save what can be saved when an error ends the run; returns it, with what there is to say of that."""
        text, refused = str(error), isinstance(error, DiskRefuses)
        for act in (server.save, checkpointer.close, pushes.close):
            try:
                act()
            except DiskRefuses as second:
                text += "" if refused else f"\n{second}"
                refused = True
        if refused:
            text += f" Then go on with --resume {self.run.path}, from {checkpointer.newest}."
        return type(error)(text)

    def serve_slice(self) -> int:
        """A further server; returns its own status."""
        self.world.hold_on_to(self.places.servers)
        flat = FlatModel(self.task.first_module(), torch.device("cpu"))
        rule, own = self._make_rule()
        self._restore(flat, rule, own)
        slice_server = SliceServer(self.window, CoordinatorLink(self.world, self.window, signals.asked_to_leave), rule, self.meter,
                        flat.weights[own].clone(), self.injector.step)
        del flat
        self.version = lambda: self.window.version
        slice_server.run()
        self.world.let_go_of(self.places.servers)
        self._close("finished", "")
        return 0

    def _make_rule(self) -> tuple[Rule, slice]:
        """The rule of this server, and the slice of the weights that it moves."""
        whole = self.window.whole
        own = whole.slices[self.places.servers.index(self.world.rank)]
        return make_rule(own.stop - own.start, self.task.config.rule, whole.num_workers), own

    def assist(self, placement: StagePlacement) -> int:
        """A rank of a further stage; returns its own status."""
        failures: list[str] = []

        def fails(error: Exception) -> str:
            failures.append(_tell(self.world, self.run, error))
            return failures[-1]

        self.world.hold_on_to([topology.SERVER])       # what else is needed the leader knows
        try:
            FollowerStage(self.meter, fails, self.injector.step, *placement.take()).run()
        except StageLost as error:             # the leader: the worker is retired without a word of its own
            fails(error)
        self.world.let_go_of(self.places.servers)
        self._close("failed" if failures else "finished", "; ".join(failures))
        return 0

    def work(self, module: nn.Module | None, device: torch.device, watch: Watch, placement: StagePlacement | None) -> int:
        """The rank of a worker, or of the first stage of one; returns its own status."""
        config, world = self.task.config, self.world
        exchange = config.exchange
        world.hold_on_to(self.places.servers)
        loaders = (self.task.train_loader(self.note, touch_on_device=device.type != "cpu"),
                   self.task.val_loader(self.note))
        outbox = Outbox(world, self.window)
        in_place = (device.type == "cpu" and not exchange.overlap and exchange.wire == "float32"    # where it is read
                    and config.model.batchnorm != "server_ema")                                     # nothing else passes there
        elastic = RULEBOOK[config.rule.name].moves == "elastic"
        gradient = outbox.payload.view(torch.float32) if in_place else None
        lead = LeadStage(self.meter, *placement.take()) if placement else None
        flat = lead.flat if lead else FlatModel(module, device, gradient, exchange.overlap, elastic, self.carried)
        client = ServerClient(self.window, outbox, flat, self.meter, exchange.overlap, elastic, exchange.wire, lead)
        num_workers = self.window.whole.num_workers
        replica = Replica(flat, config, num_workers, self.task.schedule(num_workers), stages=lead)
        worker = Worker(
            world.worker, client, replica, self.task.normalise, loaders, config, self.meter,
            WorkerCheckpointer(self.run, self.restart, world.worker, self.note), self.log if config.record.hash_snapshots else None,
            signals.asked_to_leave, self.injector.step, lead)
        self._restore_momentum(worker)
        self.version = lambda: client.version
        failure = ""
        try:
            worker.run()
        except (ServerLost, DeadlineExceeded):
            raise
        except Exception as error:
            _let_server_speak(world, error)
            failure = _tell(world, self.run, error)
            watch.close()                  # it rests from now on, and that is no stall
            if lead:
                lead.interrupt()
            worker.rest()
        if lead:
            lead.close()
        for loader in loaders:
            loader.close()
        world.let_go_of(self.places.servers)
        self._close("failed" if failure else "left" if client.mail.orders == Orders.LEAVE else "finished", failure)
        return 0

    def _finish(self, server: Server) -> int:
        """Close the books; the report, and the marker of success."""
        self._close("left" if server.left_because else "finished", server.left_because)
        try:
            with self.world.keeping_others():
                summary = report.summarize(self.run)
                report.write(self.run, summary, report.render(summary))
            print(f"report: {self.run.report / 'report.html'}", flush=True)
        except UserError as error:         # the training is not lost with its report
            print(f"the report could not be made: {error}", file=sys.stderr, flush=True)
        except Exception:
            print(f"the report could not be made; `python -m asgd_mpi.report {self.run.path}` tries again:\n"
                  f"{traceback.format_exc()}", file=sys.stderr, flush=True)
        where = self.run.checkpoint(server.ledger.version, self.restart)
        if server.left_because:
            print(f"left at version {server.ledger.version}, {server.ledger.samples} of {server.ledger.plan.total_samples} "
                  f"images; checkpoint: {where}\ngo on with --resume {self.run.path}", flush=True)
            status = RESUME_ME
        else:
            score = server.final_score
            stored = score.stored_top1_error
            differs = "" if stored in (None, score.top1_error) else (
                f"; {100 * (1 - stored):.2f} % with the workers' own batch-norm statistics, not measured anew")
            print(f"version {score.version}: {100 * (1 - score.top1_error):.2f} % of {score.num_images} validation images "
                  f"right (top-5 {100 * (1 - score.top5_error):.2f} %){differs}\ncheckpoint: {where}", flush=True)
            status = DEGRADED if server.is_degraded else 0
            write_whole(self.run.finished, msgspec.json.format(msgspec.json.encode({
                "status": status, "version": score.version, "top1_error": score.top1_error, "top5_error": score.top5_error,
                "restart": self.restart, "retired": [loss.rank for loss in server.losses if loss.for_good]})))
        if absent := set(server.ledger.present) - server.inbox.dead:
            self.world.end_without({worker + 1 for worker in absent}, status or DEGRADED)
        return status

    def _close(self, status: str, reason: str) -> None:
        self.window.close()
        self.meter.flush()
        self.log.write(End(time.time(), status, reason))
        self.log.close()

    def _restore(self, flat: FlatModel, rule: Rule, own: slice) -> dict | None:
        """Load the checkpoint into the network, and a slice of it into the rule; returns the ledger's state."""
        if self.directory is None:
            return None
        state, _ = checkpoint.load(self.directory)
        flat.module.load_state_dict(state)
        if rule.state and checkpoint.SERVER in self.manifest.files:
            saved = checkpoint.read_tensors(self.directory / checkpoint.SERVER)
            for name, vector in rule.state.items():
                if name in saved:
                    vector.copy_(saved[name][own])
        return checkpoint.read_ledger(self.directory)

    def _restore_momentum(self, worker: Worker) -> None:
        if str(self.world.worker) in (self.manifest.momenta if self.manifest else {}):
            worker.replica.restore_(self.directory / checkpoint.worker_file(self.world.worker))

    def _begin_log(self, ledger: Ledger) -> EventLog:
        pushes = EventLog(self.run.pushes_of(self.restart), self.log.also)
        if self.restart:
            momenta = self.manifest.momenta if self.manifest else {}
            pushes.write(Resume(
                time.time(), self.restart, self.manifest.restart if self.manifest else self.restart - 1, ledger.version,
                ledger.samples, ledger.plan.num_workers,
                [momenta.get(str(worker), -1) for worker in range(ledger.plan.num_workers)]))
            pushes.sync()
        return pushes

    def _about(self) -> checkpoint.Manifest:
        data, config = self.task.train, self.task.config
        return checkpoint.Manifest(
            0, 0, config.model.name, data.num_classes, self.task.channels, config.data.image_size, data.fingerprint,
            list(self.task.mean), list(self.task.std), software=checkpoint.software(), class_names=list(data.class_names),
            resize=config.data.resize or 0)


def _versions(everyone: list[dict]) -> dict:
    return {
        "asgd_mpi": asgd_mpi.__version__, "python": platform.python_version(), "torch": str(torch.__version__),
        "torchvision": metadata.version("torchvision"), "numpy": numpy.__version__, "h5py": h5py.__version__,
        "mpi": library(), "machine": platform.platform(), "processor": torch.backends.cpu.get_cpu_capability(),
        "ranks": everyone,
    }


def _tell(world: World, run: RunDir | None, error: BaseException) -> str:
    """Say what ended this rank, on stderr and in the run directory; returns it."""
    who = f"rank {world.rank} on {world.host}"
    text = f"error: {who}: {error}" if isinstance(error, UserError) else f"{who} failed:\n{traceback.format_exc()}"
    print(text, file=sys.stderr, flush=True)
    if run is not None:
        try:
            tee.write_error(run.error_of(world.rank), _in_short(error), text)
        except (OSError, RunDirError) as second:
            if not isinstance(error, DiskRefuses):     # else it is said already
                print(f"{who}: the error could not be written to the run directory: {second}", file=sys.stderr, flush=True)
    return _in_short(error)


def _let_server_speak(world: World, error: BaseException) -> None:
    """Wait, if the disk refuses a rank's files: rank 0 writes more often, and ends the job with one message for all."""
    if isinstance(error, DiskRefuses) and not world.is_server:
        time.sleep(DISK_PATIENCE_S)


def _in_short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _fail(world: World, run: RunDir | None, error: BaseException) -> None:
    """Say what ended this rank, and end the job."""
    _let_server_speak(world, error)
    _tell(world, run, error)
    time.sleep(FORWARDING_S)
    world.abort(WRONG if isinstance(error, UserError) else FAULT)


if __name__ == "__main__":
    sys.exit(main())

"""How the ranks of a job come together: rank 0 checks all that can be checked and tells the others, then each takes its part.

`take_part` is a generator, and so is what it calls: on a worker whose gradients a loop of the user's computes it yields the
inputs of each batch and is sent the loss; on every other rank it yields nothing. It returns the status of the rank.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import torch

from asgd_mpi.comm import clock, mpi, wait
from asgd_mpi.comm.layout import Layout
from asgd_mpi.comm.server_window import ServerWindow
from asgd_mpi.comm.worker_window import WorkerWindow
from asgd_mpi.comm.world import World, library, tasks_of_scheduler
from asgd_mpi.config import written
from asgd_mpi.config import exchange_choice, topology
from asgd_mpi.config.resolved import Resolved
from asgd_mpi.config.topology import Topology
from asgd_mpi.errors import DataError, DiskRefuses, UserError, tell
from asgd_mpi.model import buffers
from asgd_mpi.optim.formats import fetch_format, push_format
from asgd_mpi.process import launchers, segments, signals
from asgd_mpi.process.ending import DEGRADED, WRONG
from asgd_mpi.record import origin, tee
from asgd_mpi.record.disk import is_of_all, write_whole
from asgd_mpi.record.events import End, Note, Start
from asgd_mpi.record.meter import Meter
from asgd_mpi.record.metrics import Metrics, to_all
from asgd_mpi.record.nvml import open_gauge
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.tensorboard import TensorBoard
from asgd_mpi.record.watchdog import Watch
from asgd_mpi.runtime import choosing, devices
from asgd_mpi.runtime.last_words import fail, in_short
from asgd_mpi.runtime.placement import StagePlacement
from asgd_mpi.runtime.prepare import prepare
from asgd_mpi.runtime.rank import Files, Rank, RankBooks, Turns, first_module, write_versions
from asgd_mpi.runtime.ranks import run_server, run_slice_server, run_stage, run_worker
from asgd_mpi.task import Task, open_task
from asgd_mpi.task.own import OwnTask
from asgd_mpi.vector import partition
from asgd_mpi.vector.flat import num_floats, num_statistics


def take_part(
    world: World,
    setup: dict,
    write_report: Callable[[RunDir], Path],
    own: Task | None = None,
) -> Turns:
    """Train, as what `setup` makes of this rank; see the module.

    write_report: makes the report of a finished run. own: the user's task, if it is not to be found by its name.
    """
    run = RunDir.open(setup["run"])
    config = written.from_yaml(setup["config"])
    world.timeout_s = config.run.timeout_s
    try:
        places = Topology.of(setup["ranks"], config.stages.number, config.exchange.servers)
        unkept = tee.keep(run.log_of(world.rank), topology.describe(places, world.rank))
        if world.is_server:
            if unkept:  # one line for all ranks, which meet the same disk
                print(
                    f"what the ranks print is not kept beside the run: cannot write {unkept}",
                    file=sys.stderr,
                    flush=True,
                )
            tell(setup["greeting"])
        if places.hosts.index(world.host) == world.rank and (removed := segments.remove_dead()):
            print(f"{world.host}: {segments.describe(removed)}", flush=True)
        status = yield from _train(world, config, run, places, setup, write_report, own)
        signals.ignore()
        world.leave(status, config.failure.grace_s, status or DEGRADED)
        return status
    except BaseException as error:  # noqa: B036 - whatever ends one rank here must end all of them
        fail(world, run, error)
    return 1


def agree(world: World, arguments: list[str], hold: ExitStack, own: Task | None = None) -> dict:
    """Rank 0 reads and checks; every rank learns what to do, or the status to leave with."""
    gpus = [] if world.is_server else devices.visible()
    ranks = world.gather({"host": world.host, "gpus": gpus})
    setup = None
    if world.is_server:
        try:
            setup = prepare(arguments, ranks, tasks_of_scheduler(), hold, own)
        except UserError as error:
            if launchers.is_first_process():  # not from each of many worlds of one rank
                print(f"error: {error}", file=sys.stderr, flush=True)
            setup = {"status": WRONG}
        except SystemExit as leave:  # --help
            setup = {"status": leave.code or 0}
        except BaseException as error:  # noqa: B036
            fail(world, None, error)
    world.timeout_s = max(world.timeout_s, mpi.START_S)  # rank 0 may have much to read
    return world.share(setup)


def _train(
    world: World,
    config: Resolved,
    run: RunDir,
    places: Topology,
    setup: dict,
    write_report: Callable[[RunDir], Path],
    own: Task | None,
) -> Turns:
    restart, carried, room = setup["restart"], setup["carried"], setup["room"]
    listeners = [*own.listeners] if own else []

    def tell(text: str) -> None:
        print(f"rank {world.rank}: {text}", file=sys.stderr, flush=True)

    def tell_of_disk(error: OSError, text: str) -> None:
        if world.is_server or not is_of_all(error):
            tell(text)

    if world.is_server and config.record.tensorboard:
        listeners.append(TensorBoard(run.tensorboard, tell).add)
    log = Metrics(run.metrics_of(world.rank, restart), to_all(listeners), tell_of_disk)
    meter = Meter(log, config.record.interval_s, config.record.spans)
    is_server, exchange = world.rank in places.servers, config.exchange
    threads = config.compute.threads or topology.threads_for(
        os.cpu_count(), len(os.sched_getaffinity(0)), places.num_on_host_of(world.rank)
    )
    torch.set_num_threads(threads)

    def note(text: str, **counts: int) -> None:
        meter.add(**counts)
        log.write(Note(time.time(), text))
        tell(text)

    task = open_task(config, lambda text: note(text, read_retries=1), own, setup["metrics"])
    if isinstance(task, OwnTask):
        task = replace(task, unread=tuple(setup["unread"]))
        _demand_same_data(world, task.train.fingerprint, "training")
        _demand_same_data(world, task.val.fingerprint or "0-", "validation")
    device = devices.take(places, world.rank)
    if gpu := places.gpu(world.rank):
        meter.gauge = open_gauge(gpu.id)
    is_cut = config.stages.number > 1
    if world.is_server:
        module = first_module(task, run)
    elif is_cut and not is_server:
        module = task.outline()
    else:
        module = task.build_module()
    # so they need not come of the same file, or the same arithmetic
    shared = buffers.constants_(module)
    if not task.is_seeded:
        shared += [parameter.data for parameter in module.parameters() if parameter.requires_grad]
    for tensor in shared:
        world.share_tensor_(tensor)
    if is_server and partition.is_fine(num_floats(module), exchange.servers):
        threads = 1
    choice = ""
    if exchange_choice.is_open(config):
        task, choice = choosing.choose(world, places, task, module, device)
        config, exchange = task.config, task.config.exchange
        if world.is_server:
            text = written.record(config, places.num_workers)
            write_whole(run.config_of(restart), text.encode())
            print(choice, flush=True)
    everyone = world.gather(
        {"rank": world.rank, "host": world.host, "device": str(device), "threads": threads}
        | origin.of_host()
    )
    if is_server:  # the bits depend on it: on all servers as many
        threads = everyone[topology.SERVER]["threads"]
        torch.set_num_threads(threads)
    plan, offset = task.plan(places.num_workers), clock.measure(world)
    role = "worker"
    if is_server:
        role = "server"
    elif places.stage(world.rank):
        role = "stage"
    log.write(
        Start(
            time.time(),
            world.rank,
            role,
            world.host,
            str(device),
            plan.num_workers,
            num_floats(module),
            plan.num_samples,
            plan.total_samples,
            not exchange.overlap and exchange.n_fetch in (1, exchange.n_push),
            threads,
            unit=task.unit,
            clock_offset_s=offset.seconds,
            clock_error_s=offset.error,
        )
    )
    meter.begin()
    if choice and world.is_server:
        log.write(Note(time.time(), choice))
    log.flush()  # the replay of a killed run needs it
    log.keep_free = room + room // 4
    layout = Layout(
        num_floats(module),
        exchange.ring,
        plan.num_workers,
        num_statistics(module, carried),
        fetch_format(exchange.fetch_wire, module),
        exchange.servers,
        push_format(exchange, module),
    )
    if is_server:
        window = ServerWindow(world, layout, places.servers.index(world.rank))
    else:
        window = WorkerWindow(world, layout)
    window.open()
    if not is_server and window.reads and places.position_on_host(world.rank) == 0:
        print(window.reads, flush=True)
    placement = None
    if is_cut:
        placement = StagePlacement(world, task, module, device, places, window)
        # members keep their own parts
        module = module if world.is_server else None
    rank = Rank(
        world=world,
        places=places,
        task=task,
        window=window,
        files=Files(run, restart, Path(setup["checkpoint"]) if setup["checkpoint"] else None, room),
        books=RankBooks(meter, log, note, write_report),
        carried=carried,
    )
    watch = Watch(
        run,
        world.rank,
        world.host,
        meter,
        config.failure.stall_s,
        lambda: (wait.now.what, wait.now.since) if wait.now else None,
        lambda: rank.version(),
    )
    try:
        if world.is_server:
            write_versions(run, restart, everyone, library())
            if placement:
                log.write(placement.cut)
            return run_server(rank, plan, module)
        if is_server:
            return run_slice_server(rank)
        if role == "stage":
            return run_stage(rank, placement)
        return (yield from run_worker(rank, module, device, watch, placement))
    except BaseException as error:
        with suppress(ValueError):  # the books are closed already
            meter.flush()
            log.write(End(time.time(), "failed", in_short(error)))
            log.close(tells=not isinstance(error, DiskRefuses))
        raise
    finally:
        watch.close()


def _demand_same_data(world: World, fingerprint: str, split: str) -> None:
    """Raise DataError unless all ranks have as many samples of a split, and the same first one."""
    found = world.gather(fingerprint)
    for number, other in enumerate(found):
        if other != found[topology.SERVER]:
            ours, theirs = (one.partition("-")[0] for one in (found[topology.SERVER], other))
            what = f"{theirs} samples, rank 0 has {ours}"
            if ours == theirs:
                what = f"{ours} samples, as rank 0, but another first one"
            if not world.is_server:  # one says it for all, and ends the job
                world.barrier("rank 0 to say whose data differ")
            raise DataError(
                f"the {split} set of rank {number} has {what}: a sample is lent to a worker by its position, so every rank must "
                "have the same ones in the same order. Give it on every rank, sort what you list, and seed what you shuffle."
            )

"""Before a run: everything that can go wrong before training starts goes wrong here, on rank 0, with nothing begun."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from asgd_mpi.comm.layout import Layout
from asgd_mpi.config import options as configuration
from asgd_mpi.config import rulebook, topology
from asgd_mpi.config.options import Config, ConfigError
from asgd_mpi.config.topology import Topology
from asgd_mpi.errors import DiskRefuses, tell
from asgd_mpi.model import buffers
from asgd_mpi.record import checkpoint, disk, tensorboard
from asgd_mpi.record.disk import write_whole
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.runtime import checkpointer, fault_injection, preflight, resume, trust
from asgd_mpi.task import Task, complete, open_task, told
from asgd_mpi.vector import partition
from asgd_mpi.vector.flat import num_floats


def prepare(arguments: list[str], ranks: list[dict], num_tasks: int | None, hold: ExitStack) -> dict:
    """Check, and make or reopen the run directory; returns what every rank must know, or the status to leave with.

    `ranks`: the host and the visible GPUs of each; `num_tasks`: how many of them a scheduler says it started, if there is one.
    `hold` gets the lock of the run directory, before the first byte is written there and before what is there is read: another
    job that trains in it could still change that.
    Raises UserError.
    """
    config = configuration.parse(arguments)
    run, point = _find_run(config, hold)
    changes, named = [], trust.named(config.model.name, arguments)
    trust.demand_named(config.model.name, arguments)
    if point:
        old = configuration.read(run.latest(run.config_of), configuration.asked)
        config = complete(configuration.parse(arguments, base=old))
        changes = resume.demand_same(old, config)
        trust.demand(config.model.name, named, run.path)
    if config.compute.device == "cpu":
        ranks = [rank | {"gpus": []} for rank in ranks]
    num_stages, num_servers, order = config.stages.number, config.exchange.servers, list(range(len(ranks)))
    if len(ranks) > 1 or not config.run.dry_run:
        topology.check(Topology.of(ranks), num_tasks)
        order = topology.arrange([rank["host"] for rank in ranks], num_stages, num_servers)
    places = Topology.of([ranks[rank] for rank in order], num_stages, num_servers)
    if places.size > 1 or not config.run.dry_run:
        topology.demand_gpus(places, config.compute.device, config.compute.workers_per_gpu)
    if point:
        run.demand_own(point.restart, places.size)
    config = complete(config)
    for failure in fault_injection.parse(config.run.inject):
        if places.size > 1 and failure.rank >= places.size:
            raise ConfigError(f"--run.inject {failure.kind}@rank{failure.rank}: the ranks of this run are 0 to {places.size - 1}, so "
                              "it would never happen.")
    if config.record.tensorboard:
        tensorboard.find_writer()
    task = open_task(config)
    for line in told(task):
        tell(line)
    module = task.first_module(tell)
    if num_stages > 1:
        if config.stages.cut == "columns":
            task.rows_of_columns(module)
        else:
            task.cuts(task.stage_plan(module), "memory")
        if rulebook.RULEBOOK[config.rule.name].moves == "elastic":
            raise ConfigError(f"--stages {num_stages} with {config.rule.name}: its workers validate other weights than they "
                              "train, and the stages of a replica share one vector of weights. Take another rule.")
    task.train_loader().close()
    task, notes = preflight.try_out_(task, module)
    config = task.config
    for note in notes:
        tell(note)
    num_workers = max(1, places.num_workers)
    rulebook.check(config, num_workers)
    Layout(num_parameters=1, ring=config.exchange.ring, num_workers=num_workers)
    partition.cut(num_floats(module), num_servers, config.exchange.wire)
    carried = task.carried(module)
    if carried:
        print(buffers.told(carried), flush=True)
    total = task.plan(num_workers).total_samples
    if point:
        if point.manifest:
            resume.demand_same_data(point.manifest, task.train.fingerprint, task.train.num_classes, config.data.path)
            resume.demand_samples_left(point, total, task.plan(num_workers).num_samples)
            resume.demand_same_trained(point, module, carried)
        for line in [*resume.describe(run, point, places.num_workers or None, total), *changes]:
            tell(line)
        if run.finished.exists() and point.manifest and point.manifest.samples >= total:
            print(f"{run.path} is finished: nothing is left to do. To train on, give more --epochs with --override run.epochs.")
            return {"status": 0}
    if point and not config.run.dry_run:
        checkpoint.clean(run)
    room = checkpointer.room_for(module, carried, config, num_workers)
    _demand_room(run.path if run else Path(config.run.dir or "runs"), room, config.checkpoint.keep)
    if config.run.dry_run:
        print(f"{_outlook(places, task)}\ndry run: what can be checked before a training is right here, and nothing was written")
        return {"status": 0}
    if point:
        run.finished.unlink(missing_ok=True)
    else:
        run = RunDir.create(config.run.dir, config.model.name.replace(":", "-"))
        hold.enter_context(run.locked())
        run.demand_new()           # another job may have been faster, and be done by now
        run.demand_own(0, places.size)
    restart, directory = (point.restart, point.directory) if point else (0, None)
    text = configuration.record(config, num_workers)
    write_whole(run.config_of(restart), text.encode())
    if unknown := trust.record(config.model.name, run.path):
        print(unknown, flush=True)
    return {"config": text, "run": str(run.path), "ranks": [ranks[rank] for rank in order], "order": order,
            "restart": restart, "checkpoint": str(directory) if directory else None, "carried": carried, "room": room, "greeting": _greeting(places, task, run)}


def _greeting(places: Topology, task: Task, run: RunDir) -> str:
    """What the user sees first."""
    return f"{_outlook(places, task)}\nthe run directory is {run.path}"


def _outlook(places: Topology, task: Task) -> str:
    """Return who does what, on how much data, and what to expect; of a dry run without other ranks, what one worker would do."""
    num_hosts, config = len(set(places.hosts)), task.config
    stages, servers = places.num_stages, places.num_servers
    table = f"{topology.render(topology.table(places))}\n" if any(places.gpus) or max(num_hosts, stages, servers) > 1 else ""
    doubt = rulebook.doubt_of_linear_scaling(config.rule, places.num_workers, config.data.batch_size, task.train.num_samples)
    notes = "".join(f"{note}\n" for note in [*task.train.notes, *task.val.notes, *filter(None, [doubt])])
    ranks = "" if places.size == 1 else (
        f"{places.num_workers} workers {f'of {stages} stages ' if stages > 1 else ''}and {servers} server{'s' * (servers > 1)} on {num_hosts} host(s); ")
    return table + notes + ranks + (
        f"{config.model.name} on {task.train.num_samples} training and {task.val.num_samples} validation images of {task.train.num_classes} classes from {config.data.path}\n"
        f"{_expectation(config, max(1, places.num_workers), num_floats(task.build_module()))}")


def _expectation(config: Config, num_workers: int, num_parameters: int) -> str:
    """What the rule is, what it keeps in memory, and how stale its gradients will be."""
    rule, n_push = config.rule, config.exchange.n_push
    momentum = f"momentum {rule.momentum:g} ({rule.momentum_at})" if rule.momentum else "no momentum"
    server, worker = (4e-6 * num_parameters * count for count in rulebook.vectors(rule, num_workers))
    drift = rulebook.max_drift(rule, num_workers)
    limits = (f", gradients clipped to a norm of {rule.clip_norm:g}" if rule.clip_norm else "") + (
        f", one push of every worker moves the weights by {drift:.0%} of their norm at most" if drift else "")
    wire = f"; {config.exchange.wire} on the wire" if config.exchange.wire != "float32" else ""
    warm = f"; one worker alone for the first {rule.warm_start_epochs:g} epochs" if rule.warm_start_epochs else ""
    return (f"{rule.name}: {rulebook.RULEBOOK[rule.name].what}, {momentum}{limits}; it keeps {server:.0f} MB on the server and "
            f"{worker:.0f} MB on each worker beside the weights\n"
            f"{rulebook.expected_staleness(rule, num_workers, num_workers * (1 + config.exchange.overlap))}, n_sync {n_push}{wire}{warm}")


def _demand_room(path: Path, room: int, keep: int) -> None:
    """Raise DiskRefuses unless a checkpoint of `room` bytes fits on the disk of a run; say if not all that are kept do."""
    free = disk.free_bytes(path)
    if free is None:
        return
    if free < room:
        raise DiskRefuses(f"{free / 1e6:.1f} MB are left on the disk of {path}, and a checkpoint takes up to {room / 1e6:.1f} MB: the run "
                          "could not be saved. Free some space, or give a directory on another disk with --run.dir DIR.")
    due = (keep + 2 - len(RunDir(path).checkpoints_by_name)) * room       # those, the best one, and one that is written
    if free < due:
        print(f"note: {free / 1e6:.1f} MB are left on the disk of {path}, and the checkpoints that are kept take up to {due / 1e6:.1f} MB "
              f"more (--checkpoint.keep {keep}): the run ends early, saved, when there is room for one no longer", flush=True)


def _find_run(config: Config, hold: ExitStack) -> tuple[RunDir | None, resume.Point | None]:
    """The run to go on with, locked unless this is a dry run, and where; None for a new one. Raises UserError."""
    if not config.run.resume:
        return None, None
    path = config.run.resume
    if path == "auto":
        if not config.run.dir:
            raise ConfigError("--resume auto goes on with the run in --run.dir, or begins one there: give --run.dir DIR.")
        path = config.run.dir
        if not RunDir(Path(path)).config.exists():
            return None, None
    run = RunDir.open(path)
    if not config.run.dry_run:
        hold.enter_context(run.locked())
    return run, resume.find(run, demand_record=not config.run.accept_gaps)

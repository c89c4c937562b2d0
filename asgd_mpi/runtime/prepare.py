"""Before a run: everything that can go wrong before training starts goes wrong here, on rank 0, with nothing begun."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from torch import nn

from asgd_mpi.comm.layout import Layout
from asgd_mpi.config import parse, written
from asgd_mpi.config import exchange_choice, failures, rulebook, topology
from asgd_mpi.config.options import Config
from asgd_mpi.config.resolved import Resolved, ResolvedExchange
from asgd_mpi.config.rulebook import is_adaptive, is_kept_by_workers
from asgd_mpi.config.topology import Topology
from asgd_mpi.errors import ConfigError, DiskRefuses, plural, tell
from asgd_mpi.model import buffers
from asgd_mpi.optim.formats import fetch_format, kept_of, push_format
from asgd_mpi.optim.rules import make_rule
from asgd_mpi.record import checkpoint, disk, tensorboard
from asgd_mpi.record.disk import write_whole
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.unit import counted
from asgd_mpi.runtime import checkpointer, divisible, preflight, resume, trust
from asgd_mpi.task import OpenedTask, Task, complete, for_workers, open_task, told
from asgd_mpi.task.own import OWN, RECIPE, OwnTask, find, with_options
from asgd_mpi.vector.flat import num_floats
from asgd_mpi.vector.groups import told as told_groups


def prepare(
    arguments: list[str],
    ranks: list[dict],
    num_tasks: int | None,
    hold: ExitStack,
    own: Task | None = None,
) -> dict:
    """Check, and make or reopen the run directory; returns what every rank must know, or the status to leave with.

    `ranks`: the host and the visible GPUs of each; `num_tasks`: how many of them a scheduler says it started, if there is one.
    `hold` gets the lock of the run directory, before the first byte is written there and before what is there is read: another
    job that trains in it could still change that. `own`: the user's task, if it is not to be found by its name.
    Raises UserError.
    """
    config = configured(arguments, own)
    run, point = _find_run(config, hold)
    changes, named = [], trust.named(config.model.name, arguments)
    named_rule = trust.named(config.rule.own, arguments, "--rule")
    groups = told_groups(own.settings) if own else ""
    if not point and config.rule.groups not in (None, groups):
        raise ConfigError(
            f"--rule.groups {config.rule.groups!r}: parameter groups are those of the optimizer of a loop of your own, which has "
            f"{groups or 'none'!r}. Give them there, and leave the option out."
        )
    if point:
        old = written.read(run.latest(run.config_of), written.asked)
        if old.rule.groups is None:  # a record from before they were kept
            old = replace(old, rule=replace(old.rule, groups=groups))
        base = exchange_choice.before_choice(old, config)
        base = written.of_this_start(base, config)
        config = complete(parse.parse(arguments, base=base))
        config = exchange_choice.as_chosen_before(config, old)
    config = replace(config, rule=replace(config.rule, groups=groups))
    if point:
        changes = resume.demand_same(old, config)
        trust.demand(config.model.name, named, run.path)
        trust.demand(config.rule.own, named_rule, run.path, "--rule")
        changes += resume.kept_from_before(_said_in_vain(own, config) if own else {}, config)
    if config.compute.device == "cpu":
        ranks = [rank | {"gpus": []} for rank in ranks]
    num_stages, num_servers, order = (
        config.stages.number,
        config.exchange.servers,
        list(range(len(ranks))),
    )
    if num_stages > 1 and own and not own.computes:
        raise ConfigError(
            f"--stages.number {num_stages}: your loop computes on a whole network, of which no rank has all. Give a task of your own "
            "(asgd_mpi.Task), whose loss is computed by the stages, or leave --stages out."
        )
    if len(ranks) > 1 or not config.run.dry_run:
        topology.check(Topology.of(ranks), num_tasks)
        order = topology.arrange([rank["host"] for rank in ranks], num_stages, num_servers)
    places = Topology.of([ranks[rank] for rank in order], num_stages, num_servers)
    if places.size > 1 or not config.run.dry_run:
        topology.demand_gpus(places, config.compute.device, config.compute.workers_per_gpu)
    if point:
        run.demand_own(point.restart, places.size)
    asked, config = config, complete(config)
    for failure in failures.parse(config.run.inject):
        if places.size > 1 and failure.rank >= places.size:
            raise ConfigError(
                f"--run.inject {failure.kind}@rank{failure.rank}: the ranks of this run are 0 to {places.size - 1}, so "
                "it would never happen; name one of them."
            )
    if config.record.tensorboard:
        tensorboard.find_writer()
    num_workers = max(1, places.num_workers)
    task = open_task(config, own=own)
    if not point:
        asked = as_given(arguments, asked, task)
    task, suited = for_workers(task, asked, num_workers)
    for line in [*told(task), *suited]:
        tell(line)
    module = task.first_module(tell)
    task.train_loader().close()
    task, notes, carried = preflight.try_out_(task, module)
    config = task.config
    for note in notes:
        tell(note)
    if num_stages > 1:
        if isinstance(task, OwnTask):
            task = replace(task, unread=tuple(divisible.demand(task, module)))
        if config.stages.cut == "columns":
            task.rows_of_columns(module)
        else:
            task.cuts(task.stage_plan(module), "memory")
        if rulebook.RULEBOOK[config.rule.name].moves == "elastic":
            raise ConfigError(
                f"--stages {num_stages} with {config.rule.name}: its workers validate other weights than they "
                "train, and the stages of a replica share one vector of weights. Take another rule."
            )
        if is_adaptive(config.rule) and is_kept_by_workers(config.rule):
            raise ConfigError(
                f"--stages {num_stages} with --rule.momentum_at {config.rule.momentum_at} and Adam: its means are kept by workers "
                "whose network is whole. Leave --rule.momentum_at out (null, where a task's options name it), and the server keeps them."
            )
    _demand_measurable(task)
    plain = exchange_choice.as_plain(config)
    rulebook.check(plain, num_workers)
    Layout(
        num_floats(module),
        config.exchange.ring,
        num_workers,
        fetch=fetch_format(plain.exchange.fetch_wire, module),
        num_servers=num_servers,
        push=push_format(plain.exchange, module),
    )
    if carried:
        print(buffers.told(carried), flush=True)
    plan = task.plan(num_workers)
    total = plan.total_samples
    if point:
        if point.manifest:
            resume.demand_same_data(
                point.manifest, task.train.fingerprint, task.train.num_classes, config.data.path
            )
            resume.demand_samples_left(point, plan)
            resume.demand_same_trained(point, module, carried)
        for line in [*resume.describe(run, point, places.num_workers or None, total), *changes]:
            tell(line)
        if run.finished.exists() and point.manifest and point.manifest.samples >= total:
            print(
                f"{run.path} is finished: nothing is left to do. To train on, give more --epochs with --override run.epochs."
            )
            return {"status": 0}
    if point and not config.run.dry_run:
        checkpoint.clean(run)
    room = checkpointer.room_for(module, carried, config, num_workers)
    _demand_room(run.path if run else Path(config.run.dir or "runs"), room, config.checkpoint.keep)
    if config.run.dry_run:
        print(
            f"{_outlook(places, task)}\ndry run: what can be checked before a training is right here, and nothing was written"
        )
        return {"status": 0}
    if point:
        run.finished.unlink(missing_ok=True)
    else:
        run = RunDir.create(config.run.dir, config.model.name.replace(":", "-"))
        hold.enter_context(run.locked())
        run.demand_new()  # another job may have been faster, and be done by now
        run.demand_own(0, places.size)
        run.tell_of_writers()
    restart, directory = (point.restart, point.directory) if point else (0, None)
    text = written.record(config, num_workers)
    write_whole(run.config_of(restart), text.encode())
    if unknown := trust.record(config.model.name, run.path):
        print(unknown, flush=True)
    return {
        "config": text,
        "run": str(run.path),
        "ranks": [ranks[rank] for rank in order],
        "order": order,
        "restart": restart,
        "checkpoint": str(directory) if directory else None,
        "carried": carried,
        "room": room,
        "metrics": list(task.metrics),
        "unread": list(task.unread) if isinstance(task, OwnTask) else [],
        "greeting": _greeting(places, task, run),
    }


def _demand_measurable(task: OpenedTask) -> None:
    """Raise ConfigError if what is to be chosen by the time of a step cannot be: a loop of the user's computes it."""
    if exchange_choice.is_open(task.config) and not task.computes:
        exchange = task.config.exchange
        option, value = ("wire", "auto") if exchange.wire == "auto" else ("n_push", exchange.n_push)
        raise ConfigError(
            f"--exchange.{option} {value}: it is chosen by how long a step takes, and the steps of your own loop begin after that. "
            "Give what `python -m asgd_mpi.doctor` names for your link."
        )


def configured(arguments: list[str], own: Task | None = None) -> Config:
    """Read a command line, with the options that a user's task brings as its defaults. Raises ConfigError.

    `own`: the task, if it is not to be found by its name. The code of one is imported only if the user names it (see `trust`).
    """
    if own is None:
        config = parse.parse(arguments)
        trust.demand_named(config.model.name, arguments)
        trust.demand_named(config.rule.own, arguments, "--rule")
        if config.data.source not in OWN:
            return config
        own = find(config.model.name)
    return parse.parse(arguments, base=with_options(Config(), own))


def as_given(arguments: list[str], config: Config, task: OpenedTask) -> Config:
    """Return what `configured` made of a command line, without the batch and the rate if only the task's class names them.

    They are meant for one worker, as those of a recipe are (`task.for_workers`).
    """
    if not isinstance(task, OwnTask):
        return config
    names = {"data.batch_size", "schedule.lr"} & task.own.options.keys() - set(task.own.given)
    base = with_options(Config(), task.own)
    for name in names:
        section, _, key = name.partition(".")
        base = replace(base, **{section: replace(getattr(base, section), **{key: None})})
    again = parse.parse(arguments, base=base)
    data = replace(config.data, batch_size=again.data.batch_size)
    return replace(config, data=data, schedule=replace(config.schedule, lr=again.schedule.lr))


def _said_in_vain(own: Task, config: Config) -> Mapping[str, object]:
    """Return a task's options without the batch and the rate of one worker where a run that goes on has those of many."""
    of_one = {"data.batch_size", "schedule.lr"}
    batch = own.options.get("data.batch_size", RECIPE.batch_size)
    is_of_many = config.data.batch_size < batch or rulebook.steps_at_workers(config.rule)
    if of_one & set(own.given) or not is_of_many or not own.computes:
        return own.options
    return {name: value for name, value in own.options.items() if name not in of_one}


def _greeting(places: Topology, task: OpenedTask, run: RunDir) -> str:
    """Return what the user sees first."""
    return (
        f"{_outlook(places, task)}\nthe run directory is {run.path}\n"
        f"to stop it, saved: python -m asgd_mpi.stop {run.path} (Ctrl-C may lose what came after the last checkpoint)"
    )


def _outlook(places: Topology, task: OpenedTask) -> str:
    """Return who does what, on how much data, and what to expect; of a dry run without other ranks, what one worker would do."""
    num_hosts, config = len(set(places.hosts)), task.config
    stages, servers = places.num_stages, places.num_servers
    table = ""
    if any(places.gpus) or max(num_hosts, stages, servers) > 1:
        table = f"{topology.render(topology.table(places))}\n"
    doubts = rulebook.doubts(config, places.num_workers, task.train.num_samples)
    notes = "".join(f"{note}\n" for note in [*task.train.notes, *task.val.notes, *doubts])
    source = ranks = ""
    if not task.is_own:
        source = f" of {task.train.num_classes} classes from {config.data.path}"
    if places.size > 1:
        workers = f"{places.num_workers} {plural(places.num_workers, 'worker')}"
        if stages > 1:
            workers += f" of {stages} stages"
        ranks = f"{workers} and {servers} {plural(servers, 'server')} on {num_hosts} {plural(num_hosts, 'host')}; "
    return (
        table
        + notes
        + ranks
        + (
            f"{config.model.name} on {task.train.num_samples} training and {counted(task.val.num_samples, f'validation {task.unit}')}{source}\n"
            f"{_expectation(config, max(1, places.num_workers), task.build_module())}"
        )
    )


def _expectation(config: Resolved, num_workers: int, module: nn.Module) -> str:
    """Return what the rule is, what it keeps in memory, and how stale its gradients will be."""
    rule, n_push, num_parameters = config.rule, config.exchange.n_push, num_floats(module)
    on_server, on_worker = rulebook.vectors(rule, num_workers, config.exchange.wire)
    if rule.own:  # only the class knows
        on_server = len(make_rule(1, rule, num_workers).state)
    server, worker = (4e-6 * num_parameters * count for count in (on_server, on_worker))
    drift = rulebook.max_drift(rule, num_workers)
    limits = push = warm = ""
    if rule.clip_norm:
        limits += f", gradients clipped to a norm of {rule.clip_norm:g}"
    if drift:
        limits += f", long gradients shortened (--rule.max_drift {drift:g})"
    if n_push == "auto" and rulebook.steps_at_workers(rule):
        push = "; the batches of a push are chosen by the links, which are measured first"
    elif n_push == "auto":
        push = "; pushes as the server has time"
    elif n_push != 1:
        push = f"; a push for every {n_push} batches"
    if rule.steps_by_speed:
        push += ", for fewer of a slower worker"
    wire = _wire(config.exchange, module)
    if rule.warm_start_epochs:
        warm = f"; one worker alone for the first {rule.warm_start_epochs:g} epochs"
    return (
        f"{rule.name}: {rulebook.RULEBOOK[rule.name].what}, {rulebook.optimizer_told(rule)}{limits}\n"
        f"memory beside the weights: {server:.0f} MB on the server, {worker:.0f} MB on each worker\n"
        f"{rulebook.expected_staleness(rule, num_workers, num_workers * (1 + config.exchange.overlap))}{push}{wire}{warm}"
    )


def _wire(exchange: ResolvedExchange, module: nn.Module) -> str:
    """Return what is said of the formats that travel, and how much of this network's bytes they leave; nothing of float32."""
    if exchange.wire == "auto":
        return "; the format on the wire is chosen by the links, which are measured first"
    if exchange.wire == exchange.fetch_wire == "float32":
        return ""
    if exchange.wire == exchange.fetch_wire and exchange.wire not in rulebook.COMPRESSED:
        return f"; {exchange.wire} on the wire"
    kept = kept_of(exchange.density) if exchange.wire == "topk" else 0
    pushed = push_format(exchange, module).num_bytes(kept)
    fetched = fetch_format(exchange.fetch_wire, module).num_bytes()
    share = 0.25 / num_floats(module)  # of the bytes in float32
    return (
        f"; pushes in {exchange.wire}, {pushed * share:.1%} of the bytes of float32, weights in {exchange.fetch_wire}, "
        f"{fetched * share:.1%}"
    )


def _demand_room(path: Path, room: int, keep: int) -> None:
    """Raise DiskRefuses unless a checkpoint of `room` bytes fits on the disk of a run; say if not all that are kept do."""
    free = disk.free_bytes(path)
    if free is None:
        return
    if free < room:
        raise DiskRefuses(
            f"{free / 1e6:.1f} MB are left on the disk of {path}, and a checkpoint takes up to {room / 1e6:.1f} MB: the run "
            "could not be saved. Free some space, or give a directory on another disk with --run.dir DIR."
        )
    # those, the best one, and one that is written
    due = (keep + 2 - len(RunDir(path).checkpoints_by_name)) * room
    if free < due:
        print(
            f"note: {free / 1e6:.1f} MB are left on the disk of {path}, and the checkpoints that are kept take up to {due / 1e6:.1f} MB "
            f"more (--checkpoint.keep {keep}): the run ends early, saved, when there is room for one no longer",
            flush=True,
        )


def _find_run(config: Config, hold: ExitStack) -> tuple[RunDir | None, resume.Point | None]:
    """Return the run to go on with, locked unless this is a dry run, and where; None for a new one. Raises UserError."""
    if not config.run.resume:
        return None, None
    path = config.run.resume
    if path == "auto":
        if not config.run.dir:
            raise ConfigError(
                "--resume auto goes on with the run in --run.dir, or begins one there: give --run.dir DIR."
            )
        path = config.run.dir
        if not RunDir(Path(path)).config.exists():
            return None, None
    run = RunDir.open(path)
    if not config.run.dry_run:
        hold.enter_context(run.locked())
    run.tell_of_writers()
    return run, resume.find(run, demand_record=not config.run.accept_gaps)

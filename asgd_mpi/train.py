"""Train a network by asynchronous SGD: `mpirun -np 8 python -m asgd_mpi.train` (1 server, 7 workers).

Rank 0 reads the command line, checks everything that can be checked, makes the run directory and tells the others;
then it serves and they work. A rank that fails ends the job at once, with its own error as the first thing to see.
"""

from __future__ import annotations

import os
import platform
import sys
import time
import traceback

import h5py
import msgspec
import numpy
import torch
import torchvision
from torch import nn

import asgd_mpi
from asgd_mpi import config as configuration
from asgd_mpi import report, topology
from asgd_mpi.config import Config
from asgd_mpi.errors import UserError
from asgd_mpi.exchange import clock
from asgd_mpi.exchange.link import Inbox, Outbox
from asgd_mpi.exchange.window import Layout, ServerWindow, WorkerWindow
from asgd_mpi.exchange.world import World, library, tasks_of_scheduler
from asgd_mpi.model.flat import FlatModel, num_floats, num_statistics
from asgd_mpi.record import checkpoint
from asgd_mpi.record.events import Checkpoint, End, EventLog, Note, Start
from asgd_mpi.record.meter import Meter
from asgd_mpi.record.progress import Progress
from asgd_mpi.record.rundir import RunDir, write_whole
from asgd_mpi.server.ledger import Ledger, Plan
from asgd_mpi.server.rules import RULES
from asgd_mpi.server.serve import Server
from asgd_mpi.task import Task, complete, open_task
from asgd_mpi.topology import Topology
from asgd_mpi.worker.courier import Courier
from asgd_mpi.worker.loop import Worker

FORWARDING_S = 0.5  # the launcher forwards output at leisure, and drops what it still holds when the job is aborted


def main(arguments: list[str] | None = None) -> int:
    world = World()
    setup = _agree(world, sys.argv[1:] if arguments is None else arguments)
    if "status" in setup:
        return setup["status"]
    run = RunDir.open(setup["run"])
    config = configuration.from_yaml(setup["config"])
    world.timeout_s = config.run.timeout_s
    try:
        places = Topology(tuple(setup["hosts"]))
        _train(world, config, run, places)
    except BaseException as error:  # noqa: B036 - whatever ends one rank must end all of them
        _fail(world, run, error)
    return 0


def _agree(world: World, arguments: list[str]) -> dict:
    """Rank 0 reads and checks; every rank learns what to do, or the status to leave with."""
    hosts = world.gather(world.host)
    setup = None
    if world.is_server:
        try:
            setup = _prepare(arguments, hosts)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            setup = {"status": 2}
        except SystemExit as leave:  # --help
            setup = {"status": leave.code or 0}
        except BaseException as error:  # noqa: B036
            _fail(world, None, error)
    return world.share(setup)


def _prepare(arguments: list[str], hosts: list[str]) -> dict:
    """Everything that can go wrong before training starts goes wrong here, on one rank. Raises UserError."""
    config = configuration.parse(arguments)
    places = topology.plan(hosts, tasks_of_scheduler())
    config = complete(config)
    task = open_task(config)
    task.build_module()
    task.train_loader().close()
    Layout(num_parameters=1, ring=config.exchange.ring, num_workers=places.num_workers, capacity=1)
    run = RunDir.create(config.run.dir, config.model.name.replace(":", "-"))
    write_whole(run.config, configuration.to_yaml(config).encode())
    num_train, num_val = task.train.num_samples, task.val.num_samples
    print(f"{places.num_workers} workers and 1 server on {len(set(hosts))} host(s); {config.model.name} on {num_train} "
          f"training and {num_val} validation images of {task.train.num_classes} classes from {config.data.path}\n"
          f"expect a staleness of about {places.num_workers * (1 + config.exchange.overlap) - 1}; the run directory is "
          f"{run.path}", flush=True)
    return {"config": configuration.to_yaml(config), "run": str(run.path), "hosts": hosts}


def _train(world: World, config: Config, run: RunDir, places: Topology) -> None:
    log = EventLog(run.metrics_of(world.rank))
    meter = Meter(log, config.record.interval_s, config.record.spans)
    threads = config.compute.threads or topology.threads_for(
        os.cpu_count(), len(os.sched_getaffinity(0)), places.num_on_host_of(world.rank))
    torch.set_num_threads(threads)

    def on_retry(text: str) -> None:
        meter.add(read_retries=1)
        log.write(Note(time.time(), text))
        print(f"rank {world.rank}: {text}", file=sys.stderr, flush=True)

    task = open_task(config, on_retry)
    device = torch.device("cpu") if world.is_server else _device(config, places, world.rank)
    module = task.build_module()
    everyone = world.gather({"rank": world.rank, "host": world.host, "device": str(device), "threads": threads})
    plan, exchange, offset = task.plan(places.num_workers), config.exchange, clock.measure(world)
    log.write(Start(time.time(), world.rank, "server" if world.is_server else "worker", world.host, str(device),
                    plan.num_workers, num_floats(module), plan.num_samples, plan.total_samples,
                    not exchange.overlap and exchange.n_fetch in (1, exchange.n_push), threads,
                    clock_offset_s=offset.seconds, clock_error_s=offset.error))
    capacity = max(num_floats(module), num_statistics(module))
    layout = Layout(num_floats(module), exchange.ring, plan.num_workers, capacity)
    window = (ServerWindow if world.is_server else WorkerWindow)(world, layout)
    window.open()
    if world.is_server:
        write_whole(run.versions, msgspec.json.format(msgspec.json.encode(_versions(everyone))))
        _serve(world, task, run, plan, FlatModel(module, device), window, meter, log)
    else:
        _work(world, task, module, device, window, meter, log)
    window.close()
    meter.flush()
    log.write(End(time.time(), "finished"))
    log.close()
    world.barrier("all ranks to close their metrics files")
    if world.is_server:
        summary = report.summarize(run)
        report.write(run, summary, report.render(summary))
        print(f"report: {run.report / 'report.html'}", flush=True)


def _serve(world: World, task: Task, run: RunDir, plan: Plan, flat: FlatModel, window: ServerWindow, meter: Meter,
           log: EventLog) -> None:
    config = task.config
    pushes = EventLog(run.pushes)
    server = Server(
        window, Inbox(world, window), Ledger(plan, task.schedule(plan.num_workers)),
        RULES[config.rule.name](flat.num_floats, config.rule), meter, log, pushes,
        Progress(config.run.progress, plan.total_samples, plan.num_samples), world.timeout_s,
        config.record.hash_snapshots, torch.zeros(flat.num_statistics) if flat.statistics else None)
    server.publish_first(flat.weights)
    server.run()
    server.inbox.close()
    pushes.close()
    server.progress.close()
    with meter.phase("checkpoint"):
        _save(server, task, run, flat)
    score = server.final_score
    print(f"version {score.version}: {100 * (1 - score.top1_error):.2f} % of {score.num_images} validation images right "
          f"(top-5 {100 * (1 - score.top5_error):.2f} %)\ncheckpoint: {run.checkpoint(score.version)}", flush=True)


def _save(server: Server, task: Task, run: RunDir, flat: FlatModel) -> None:
    """Write the final version, with the statistics it was validated with."""
    started, score, data = time.time(), server.final_score, task.train
    flat.weights.copy_(server.window.latest)
    if server.statistics is not None:
        flat.load_statistics_(server.statistics)
    directory = run.checkpoint(score.version)
    num_bytes = checkpoint.save(directory, flat.module.state_dict(), checkpoint.Manifest(
        score.version, server.ledger.samples, task.config.model.name, data.num_classes, task.channels,
        task.config.data.image_size, data.fingerprint, list(data.mean), list(data.std), score.top1_error, score.top5_error))
    server.log.write(Checkpoint(time.time(), score.version, str(directory.relative_to(run.path)), time.time() - started,
                                num_bytes))


def _work(world: World, task: Task, module: nn.Module, device: torch.device, window: WorkerWindow, meter: Meter,
          log: EventLog) -> None:
    config = task.config
    exchange = config.exchange

    def on_skip(text: str) -> None:
        log.write(Note(time.time(), text))
        print(f"rank {world.rank}: {text}", file=sys.stderr, flush=True)

    loaders = task.train_loader(on_skip, touch_on_device=device.type != "cpu"), task.val_loader(on_skip)
    outbox = Outbox(world, window)
    in_place = device.type == "cpu" and not exchange.overlap      # compute the gradient where the server reads it
    flat = FlatModel(module, device, outbox.payload if in_place else None, spare=exchange.overlap)
    Worker(world.worker, Courier(window, outbox, flat, meter, exchange.overlap), flat, task.normalise, loaders, config,
           meter, log if config.record.hash_snapshots else None).run()
    for loader in loaders:
        loader.close()


def _device(config: Config, places: Topology, rank: int) -> torch.device:
    """The GPU at this worker's position among the workers of its host, or the CPU. Raises ConfigError."""
    num_gpus = torch.cuda.device_count() if config.compute.device != "cpu" else 0
    if config.compute.device == "cuda" and not num_gpus:
        raise configuration.ConfigError(
            f"--compute.device cuda: {places.hosts[rank]} shows no GPU to rank {rank}. Look at nvidia-smi and "
            "CUDA_VISIBLE_DEVICES there, or train on the CPU with --compute.device cpu.")
    if not num_gpus:
        return torch.device("cpu")
    device = torch.device("cuda", topology.device_index(places.position_on_host(rank), num_gpus))
    torch.cuda.set_device(device)
    return device


def _versions(everyone: list[dict]) -> dict:
    return {
        "asgd_mpi": asgd_mpi.__version__, "python": platform.python_version(), "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__), "numpy": numpy.__version__, "h5py": h5py.__version__,
        "mpi": library(), "machine": platform.platform(), "processor": torch.backends.cpu.get_cpu_capability(),
        "ranks": everyone,
    }


def _fail(world: World, run: RunDir | None, error: BaseException) -> None:
    """Say what ended this rank, and end the job."""
    who = f"rank {world.rank} on {world.host}"
    text = f"error: {who}: {error}" if isinstance(error, UserError) else f"{who} failed:\n{traceback.format_exc()}"
    print(text, file=sys.stderr, flush=True)
    if run is not None:
        try:
            run.error_of(world.rank).write_text(text + "\n")
        except OSError as second:
            print(f"{who}: the error could not be written to the run directory: {second}", file=sys.stderr, flush=True)
    time.sleep(FORWARDING_S)
    world.abort(2 if isinstance(error, UserError) else 1)


if __name__ == "__main__":
    sys.exit(main())

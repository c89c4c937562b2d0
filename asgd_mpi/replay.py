"""`python -m asgd_mpi.replay RUN_DIR`: compute a recorded run again, in one process and without MPI.

`pushes.log` says which worker pushed what in which order, and on which version it had computed. Nothing else is
needed: a gradient is a pure function of (weights, epoch, positions, seed). On the CPU, in float32, with the thread
count of the run, the weights come out the same to the bit. Every entry goes through a ledger of its own invariants
(versions in order, staleness not negative, the rate that the schedule gives).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence

import jsonargparse
import torch
from tqdm import tqdm

from asgd_mpi import config as configuration
from asgd_mpi.data.loader import Batch, Loader
from asgd_mpi.errors import RunDirError, UserError
from asgd_mpi.model.flat import FlatModel
from asgd_mpi.record import checkpoint
from asgd_mpi.record.events import Push, Start, read_events, read_pushes
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.server.rules import RULES, pieces
from asgd_mpi.task import Task, open_task
from asgd_mpi.worker.momentum import Momentum
from asgd_mpi.worker.step import compute_gradient_


def replay(task: Task, pushes: Iterable[Push], num_workers: int) -> FlatModel:
    """Apply `pushes` from the first weights on; returns the network after the last one. Raises RunDirError.

    Memory: one (P,) vector for each version that a worker may still have computed on, and one for each worker's momentum.
    """
    config = task.config
    flat = FlatModel(task.build_module(), torch.device("cpu"))
    rule = RULES[config.rule.name](flat.num_floats, config.rule)
    schedule, loader, samples = task.schedule(num_workers), task.train_loader(), 0
    held: dict[int, int] = dict.fromkeys(range(num_workers), 0)   # worker -> the version it read last
    momenta = [Momentum(config.rule, flat.weights) for _ in range(num_workers)]
    snapshots = {0: flat.weights.clone()}
    version = 0
    for push in pushes:
        _check(push, version, schedule(samples, push.staleness), snapshots)
        flat.weights.copy_(snapshots[push.read_version])
        losses = [compute_gradient_(flat, task.normalise, batch, config.run.seed, accumulate=number > 0)
                  for number, batch in enumerate(_batches(push, loader, config.data.batch_size))]
        loss = sum(losses) / len(losses)
        if loss != push.loss:
            raise RunDirError(f"the push that made version {version + 1} recorded a loss of {push.loss!r}, the replay "
                              f"computes {loss!r}: the log, the data or the arithmetic (threads, library) differ.")
        momenta[push.worker].push_(flat.gradient)
        fresh = snapshots[version].clone()
        for piece in pieces(len(fresh)):
            rule.apply_(fresh, flat.gradient, push.lr, piece)
        version += 1
        samples += push.positions
        snapshots[version] = fresh
        held[push.worker] = push.read_version                    # a worker never reads an older version again
        for old in [old for old in snapshots if old < min(held.values())]:
            del snapshots[old]
    flat.weights.copy_(snapshots[version])
    loader.close()
    return flat


def _batches(push: Push, loader: Loader, batch_size: int) -> Iterator[Batch]:
    """The batches that a push was computed on, cut as the worker cut them."""
    for epoch, start, stop in push.segments:
        for first in range(start, stop, batch_size):
            yield loader.batch(epoch, first, min(first + batch_size, stop))


def _check(push: Push, version: int, lr: float, snapshots: dict[int, torch.Tensor]) -> None:
    if push.version != version or push.read_version not in snapshots or push.lr != lr:
        raise RunDirError(f"pushes.log does not follow from itself: version {version} at rate {lr!r} was due, with a read "
                          f"of one of the versions {min(snapshots)} to {version}; it has {push}. It was cut or changed.")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = jsonargparse.ArgumentParser(
        prog="python -m asgd_mpi.replay", description="Compute a recorded run again and compare the weights.")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="A directory that asgd_mpi.train made.")
    options = parser.parse_args(arguments)
    try:
        return _replay_and_compare(RunDir.open(options.run_dir))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _replay_and_compare(run: RunDir) -> int:
    start = next((event for event in read_events(run.metrics_of(1)) if isinstance(event, Start)), None)
    pushes = [push for push in read_pushes(run.pushes)]
    if start is None or None in pushes or not pushes:
        raise RunDirError(f"{run.path}: the log of pushes or the metrics of rank 1 are missing or damaged: a replay needs "
                          "every push.")
    torch.set_num_threads(start.threads)
    task = open_task(configuration.from_yaml(run.config.read_text()))
    flat = replay(task, tqdm(pushes, unit=" pushes"), start.num_workers)
    saved, manifest = checkpoint.load(run.checkpoint(len(pushes)))
    replayed = dict(flat.module.named_parameters())
    different = [name for name, parameter in replayed.items() if not torch.equal(parameter, saved[name])]
    if different:
        print(f"version {manifest.version} differs from its replay in {', '.join(different)}")
        return 1
    print(f"version {manifest.version}: {len(pushes)} pushes replayed, the weights are the same to the bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())

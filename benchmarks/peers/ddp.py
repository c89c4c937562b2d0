"""Synchronous training of the digits by DistributedDataParallel over gloo; N = 1 is a plain loop, without it.

It reads the same shards in the same order with the same augmentation as asgd_mpi, N batches a step. It stops after
`--max-steps`, or when `--accuracy` is reached; its clock stands still while it validates.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from asgd_mpi.config.options import Config, ScheduleConfig
from asgd_mpi.data.loader import Range
from asgd_mpi.model.networks import DIGITS
from asgd_mpi.optim.lr_schedule import Schedule
from asgd_mpi.task import Task, complete, open_task
from benchmarks.networks import sleeping_digits

WARM = 0.2  # share of the steps left out of the rate


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--steps-ms", required=True, help="how long each worker sleeps in a step: 20,20,20,100"
    )
    parser.add_argument(
        "--rate", type=float, default=DIGITS.lr, help="learning rate of a step of all workers"
    )
    parser.add_argument(
        "--epochs", type=float, default=DIGITS.epochs, help="length of the schedule"
    )
    parser.add_argument("--max-steps", type=int, help="stop earlier")
    parser.add_argument(
        "--accuracy", type=float, help="validate after every epoch, and stop when it is reached"
    )
    options = parser.parse_args()
    steps_s = [float(step) / 1e3 for step in options.steps_ms.split(",")]
    # the data set is made here, once, if it is not there
    config = complete(Config())
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as place:
        multiprocessing.spawn(
            work, (steps_s, options, config, f"{place}/store"), nprocs=len(steps_s)
        )


def work(
    rank: int, steps_s: list[float], options: argparse.Namespace, config: Config, store: str
) -> None:
    # a task has open files: each process opens its own
    workers, task = len(steps_s), open_task(config)
    torch.set_num_threads(1)
    torch.manual_seed(task.config.run.seed)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=workers)
    module = sleeping_digits(task.train.num_classes, task.channels, steps_s[rank])
    torch.manual_seed(rank)  # dropout
    result = train(
        rank, workers, DistributedDataParallel(module) if workers > 1 else module, options, task
    )
    if rank == 0:
        print(json.dumps(result), flush=True)
    dist.destroy_process_group()


def train(
    rank: int, workers: int, module: nn.Module, options: argparse.Namespace, task: Task
) -> dict:
    """Images per second of all workers, and seconds to the accuracy, as every rank sees them."""
    optimizer = torch.optim.SGD(
        module.parameters(), options.rate, DIGITS.momentum, weight_decay=DIGITS.weight_decay
    )
    together = workers * DIGITS.batch_size
    per_epoch = task.train.num_samples // together
    steps = round(options.epochs * per_epoch)
    rate_at = Schedule(
        ScheduleConfig(DIGITS.schedule, options.rate, DIGITS.warmup_epochs),
        per_epoch * together,
        steps * together,
        workers,
    )
    timed, loader = min(steps, options.max_steps or steps), task.train_loader()
    clock, warm, reached = 0.0, 0.0, None
    dist.barrier()
    started = time.perf_counter()
    for step, batch in enumerate(loader.batches(shares(rank, workers, per_epoch, timed)), start=1):
        optimizer.param_groups[0]["lr"] = rate_at((step - 1) * together)
        optimizer.zero_grad()
        functional.cross_entropy(module(task.normalise(batch.images)), batch.labels).backward()
        optimizer.step()
        if step == int(WARM * timed):
            warm = time.perf_counter() - started
        if options.accuracy and step % per_epoch == 0:
            clock += time.perf_counter() - started
            # the same on every rank: so are the weights
            if accuracy(module, task) >= options.accuracy:
                reached = clock
                break
            dist.barrier()
            started = time.perf_counter()
    elapsed = time.perf_counter() - started
    loader.close()
    rate = None if options.accuracy else (timed - int(WARM * timed)) * together / (elapsed - warm)
    return {"images_per_s": rate, "seconds_to_accuracy": reached}


def shares(rank: int, workers: int, per_epoch: int, steps: int) -> Iterator[Range]:
    """Return where this rank's batches lie."""
    for step in range(steps):
        epoch, position = divmod(step, per_epoch)
        start = (position * workers + rank) * DIGITS.batch_size
        yield epoch, start, start + DIGITS.batch_size


@torch.no_grad()
def accuracy(module: nn.Module, task: Task) -> float:
    """The share of the validation images whose first guess is right."""
    loader = task.val_loader()
    module.eval()
    batch = loader.batch(0, 0, task.val.num_samples)
    right = (module(task.normalise(batch.images)).argmax(1) == batch.labels).float().mean().item()
    module.train()
    loader.close()
    return right


if __name__ == "__main__":
    main()

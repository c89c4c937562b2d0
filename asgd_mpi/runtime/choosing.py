"""Measure links and a step before the first weights travel, and choose what a configuration leaves open.

`--exchange.wire auto`, and `--exchange.n_push auto` with `--rule diloco`. All ranks take part, and get the same configuration; what is
chosen by what is decided in `config.exchange_choice`.
"""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import replace

import torch
from torch import nn

from asgd_mpi.comm import probe
from asgd_mpi.comm.world import World
from asgd_mpi.config import exchange_choice
from asgd_mpi.config.exchange_choice import Measured
from asgd_mpi.config.resolved import Resolved
from asgd_mpi.config.topology import Topology
from asgd_mpi.optim.step import ScaledLoss
from asgd_mpi.task import OpenedTask
from asgd_mpi.vector.flat import FlatModel, ranges_below
from asgd_mpi.vector.largest import CHUNK

STEPS = 3  # the first of which is not counted


def choose(
    world: World, places: Topology, task: OpenedTask, module: nn.Module, device: torch.device
) -> tuple[OpenedTask, str]:
    """Return the task with nothing left open, and what is to be said of it; all ranks call it, with their own device.

    module: the network, which is not touched.
    """
    is_worker = world.rank in places.workers
    step_s = _step_s(task, module, device) if is_worker else 0.0
    times = [seconds for seconds in world.gather(step_s) if seconds]
    send, read = probe.speeds(world, places.workers)
    measured = Measured(
        sum(p.numel() for p in module.parameters() if p.requires_grad),
        statistics.median(times),
        send,
        read,
        sum(stop - start for start, stop in ranges_below(module, CHUNK)),
    )
    config = exchange_choice.chosen(task.config, measured, places.num_workers)
    # the same everywhere, whatever the last bits of what was gathered
    settled = world.share(_settled(config) if world.is_server else None)
    config = exchange_choice.with_exchange(config, **settled)
    return replace(task, config=config), exchange_choice.told(config, measured)


def _settled(config: Resolved) -> dict:
    exchange = config.exchange
    return {name: getattr(exchange, name) for name in ("wire", "fetch_wire", "n_push", "n_fetch")}


def _step_s(task: OpenedTask, module: nn.Module, device: torch.device) -> float:
    """Return the seconds of a step on the first batch of the training split, on a copy of the network."""
    config, loader = task.config, task.train_loader()
    try:
        size = min(config.data.batch_size or 1, task.train.num_samples)
        batch = loader.batch(0, 0, size)
    finally:
        loader.close()
    flat = FlatModel(copy.deepcopy(module), device)
    flat.module.train()
    loss = ScaledLoss(config.compute, None, task.smallest)
    times = []
    for _ in range(STEPS):
        started = time.perf_counter()
        loss.compute_gradient_(flat, task.objective, batch, config.run.seed, False)
        times.append(time.perf_counter() - started)
    return min(times[1:])

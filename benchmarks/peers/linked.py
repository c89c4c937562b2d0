"""Synchronous training over gloo, for slow links: DDP, DDP with the PowerSGD hook, post-local SGD. All are torch's own classes.

One rank of it; `benchmarks.links_peers` starts all. A layer sleeps its share of a step, a third in its forward pass and two
thirds in its backward pass, so that DDP sends a bucket while the layers before are still computed. Its weight is square, so that
PowerSGD compresses it: `--layers` of SIDE x SIDE.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook, powerSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn.parallel import DistributedDataParallel

SIDE = 540  # 40 layers are 11.7 million parameters
NAMES = ("ddp", "powersgd", "post-local")
# steps before those that are timed: PowerSGD's hook begins with the third, and post-local SGD with the second
WARM = 3
ENVIRONMENT = {"RANK": "OMPI_COMM_WORLD_RANK", "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE"}


class _Sleep(torch.autograd.Function):
    """Take as long as a layer of a GPU would, whose gradient is at hand."""

    @staticmethod
    def forward(ctx, values: torch.Tensor, weight: torch.Tensor, step_s: float) -> torch.Tensor:
        time.sleep(step_s / 3)
        ctx.weight, ctx.step_s = weight, step_s
        return values.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        time.sleep(2 * ctx.step_s / 3)
        return gradient, torch.ones_like(ctx.weight), None


class Layer(nn.Module):
    def __init__(self, step_s: float):
        super().__init__()
        self.weight, self._step_s = nn.Parameter(torch.zeros(SIDE, SIDE)), step_s

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return _Sleep.apply(values, self.weight, self._step_s)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", choices=NAMES, required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--step-ms", type=float, required=True)
    parser.add_argument("--slower", type=float, default=1.0, help="times, of the last rank")
    parser.add_argument("--steps", type=int, required=True, help="that are timed")
    parser.add_argument("--bucket-mb", type=float, default=25.0, help="of DDP")
    parser.add_argument("--matrix-rank", type=int, default=1, help="of PowerSGD")
    parser.add_argument("--period", type=int, default=50, help="of post-local SGD, in steps")
    options = parser.parse_args()
    os.environ.update({ours: os.environ[mpi] for ours, mpi in ENVIRONMENT.items()})
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        seconds, sent = _train(options, dist.get_rank() == dist.get_world_size() - 1)
        total = torch.tensor(float(sent), dtype=torch.float64)
        dist.reduce(total, 0)
        if dist.get_rank() == 0:
            print(json.dumps({"seconds": seconds, "bytes_sent": total.item()}), flush=True)
    finally:
        dist.destroy_process_group()


def _train(options: argparse.Namespace, is_last: bool) -> tuple[float, int]:
    """Return the seconds of the timed steps, from when all ranks begin with them to when all have ended, and the bytes sent."""
    step_s = options.step_ms / 1e3 * (options.slower if is_last else 1.0) / options.layers
    module = DistributedDataParallel(
        nn.Sequential(*(Layer(step_s) for _ in range(options.layers))),
        bucket_cap_mb=options.bucket_mb,
        gradient_as_bucket_view=True,
    )
    optimizer = torch.optim.SGD(module.parameters(), 0.01)
    averager = _hooked(module, options)
    values, began, sent = torch.ones(1, requires_grad=True), 0.0, 0
    for step in range(WARM + options.steps):
        if step == WARM:
            dist.barrier()
            began, sent = time.perf_counter(), _num_bytes_sent()
        module(values).sum().backward()
        optimizer.step()
        if averager:  # while the weights have gradients: it leaves out those without
            averager.average_parameters(module.parameters())
        optimizer.zero_grad()
    dist.barrier()
    return time.perf_counter() - began, _num_bytes_sent() - sent


def _num_bytes_sent() -> int:
    """Return what this host's network devices have sent, but to itself."""
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    devices = dict(line.split(":") for line in lines)
    return sum(int(words.split()[8]) for name, words in devices.items() if name.strip() != "lo")


def _hooked(
    module: DistributedDataParallel, options: argparse.Namespace
) -> PeriodicModelAverager | None:
    """Let DDP exchange as the name says; returns what averages the weights now and then, if something does."""
    if options.name == "powersgd":
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=options.matrix_rank, start_powerSGD_iter=2
        )
        module.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    if options.name != "post-local":
        return None
    alone = post_localSGD_hook.PostLocalSGDState(
        None, None, start_localSGD_iter=1, post_local_gradient_allreduce=False
    )
    module.register_comm_hook(alone, post_localSGD_hook.post_localSGD_hook)
    # so that `steps`, a multiple of the period, hold as many averages as they should
    return PeriodicModelAverager(options.period, warmup_steps=WARM)


if __name__ == "__main__":
    main()

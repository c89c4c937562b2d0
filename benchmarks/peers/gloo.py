"""Synchronous SGD over torch.distributed's gloo, which starts its own N processes; every one makes the same step."""

import os
import tempfile

import torch
import torch.distributed as dist
from torch import multiprocessing

from benchmarks.peers import protocol


def work(rank: int, options, store: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=options.workers
    )
    torch.set_num_threads(options.threads)
    gradient = protocol.make_gradient(options.parameters)
    weights, velocity = torch.zeros_like(gradient), torch.zeros_like(gradient)

    def round_() -> None:
        dist.all_reduce(gradient)
        # leaves the mean in the gradient: as before
        protocol.step_(weights, gradient, velocity, options.workers)

    def agree(number: int) -> int:
        box = torch.tensor([number])
        dist.broadcast(box, src=0)
        return int(box)

    rounds, rate = protocol.in_step(round_, agree, options.warmup, options.seconds)
    right = torch.tensor([int(protocol.are_right(weights, rounds))])
    dist.all_reduce(right, op=dist.ReduceOp.MIN)
    if rank == 0:
        protocol.report([rate] * options.workers, rounds * options.workers, bool(right))
    dist.destroy_process_group()


def main() -> None:
    options = protocol.options()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as place:
        multiprocessing.spawn(work, (options, f"{place}/store"), nprocs=options.workers)


if __name__ == "__main__":
    main()

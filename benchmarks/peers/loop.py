"""What a user writes without us: one process, one device, torch.optim.SGD, the same images as asgd_mpi. The last line is JSON.

python -m benchmarks.peers.loop --steps 200 [any options of asgd_mpi.train that say what is trained on what]
"""

import argparse
import json
import sys
import time

import torch
from torch import nn
from torch.nn import functional

from asgd_mpi.config import parse as configuration
from asgd_mpi.data.loader import ranges
from asgd_mpi.task import Task, complete, open_task

WARM = 0.2  # share of the steps left out of the rate


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    own, options = parser.parse_known_args()
    task = open_task(complete(configuration.parse(options)))
    compute = task.config.compute
    torch.set_num_threads(compute.threads or torch.get_num_threads())
    device = torch.device(
        "cuda"
        if compute.device == "cuda" or compute.device == "auto" and torch.cuda.is_available()
        else "cpu"
    )
    print(json.dumps({"images_per_s": train(task, device, own.steps)}), flush=True)
    return 0


def train(task: Task, device: torch.device, steps: int) -> float:
    """Images a second, of the last 80 % of the steps."""
    config, module = task.config, task.build_module().to(device)
    layout = {"memory_format": torch.channels_last} if config.compute.channels_last else {}
    module.to(**layout)
    optimizer = torch.optim.SGD(
        module.parameters(),
        config.schedule.lr,
        config.rule.momentum,
        weight_decay=config.rule.weight_decay,
    )
    warm, started, loader = int(WARM * steps), 0.0, task.train_loader(touch_on_device=True)
    size = config.data.batch_size
    for step, batch in enumerate(loader.batches(ranges(0, 0, steps * size, size))):
        if step == warm:
            _settle(device)
            started = time.perf_counter()
        _step(
            module,
            optimizer,
            task.normalise(batch.on(device)).to(**layout),
            batch.labels.to(device, non_blocking=True),
        )
    _settle(device)
    elapsed = time.perf_counter() - started
    loader.close()
    return (steps - warm) * size / elapsed


def _step(
    module: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor
) -> None:
    optimizer.zero_grad()
    functional.cross_entropy(module(images), labels).backward()
    optimizer.step()


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())

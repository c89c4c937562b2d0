"""Where the momentum should live: accuracy on the digits by number of workers, rate, and keeper of the velocity.

    python -m benchmarks.momentum --workers 1,8,16,32 --epochs 12 --seeds 2

Simulated in one process: workers take turns, so that the staleness is workers - 1; gradients, rule, momentum, schedule
and data are the package's own. Prints a Markdown table and writes benchmarks/results/momentum.json.
"""

from __future__ import annotations

import statistics
from dataclasses import replace

import torch
from jsonargparse import auto_cli
from tqdm import tqdm

from asgd_mpi import config as configuration
from asgd_mpi.model.flat import FlatModel
from asgd_mpi.server.ledger import Verdict
from asgd_mpi.server.rules import make_rule, pieces
from asgd_mpi.task import Task, complete, open_task
from asgd_mpi.worker.replica import Replica
from asgd_mpi.worker.step import validate
from benchmarks import machine

KEEPERS = ("server", "worker", "dana", "none")
FACTORS = (0.3, 1.0, 3.0)   # of the stock rate


def train(task: Task, num_workers: int) -> float:
    """Accuracy (0..1) on the validation split after the configured epochs; workers push in turn."""
    config, samples, k = task.config, 0, 0
    flat = FlatModel(task.build_module(), torch.device("cpu"))
    schedule, plan, loader = task.schedule(num_workers), task.plan(num_workers), task.train_loader()
    rule, weights = make_rule(flat.num_floats, config.rule, num_workers), flat.weights.clone()
    replicas, read = [Replica(flat, config, num_workers, schedule, shares=True) for _ in range(num_workers)], [0] * num_workers
    for replica in replicas:
        replica.fetched_(0, 0, weights.clone())
    while samples < plan.total_samples:
        epoch, start = divmod(samples, plan.num_samples)
        stop = min(plan.num_samples, start + plan.batch_size)
        replica = replicas[k % num_workers]
        replica.add(loader.batch(epoch, start, stop), task.normalise)
        replica.finish()
        for piece in pieces(flat.num_floats):
            rule.apply_(weights, flat.gradient, Verdict(schedule(samples, k - read[k % num_workers])), piece)
        samples = samples + stop - start
        replica.fetched_(k + 1, samples, weights.clone())
        read[k % num_workers], k = k + 1, k + 1
    flat.weights.copy_(weights)
    val = task.val_loader()
    errors = validate(flat, task.normalise, [val.batch(0, 0, task.val.num_samples)])
    return errors.top1 / errors.num_images


def configured(keeper: str, factor: float, seed: int, epochs: float) -> Task:
    config = complete(configuration.parse(["--epochs", str(epochs), "--seed", str(seed)]))
    rule = replace(config.rule, momentum=0.0) if keeper == "none" else replace(config.rule, momentum_at=keeper)
    lr = config.schedule.lr * factor * (10 if keeper == "none" else 1)   # without momentum a step is 1 / (1 - m) shorter
    return open_task(replace(config, rule=rule, schedule=replace(config.schedule, lr=lr)))


def main(workers: str = "1,8,16,32", epochs: float = 12, seeds: int = 2) -> None:
    """Measure the accuracy for each number of workers, keeper of the velocity and factor of the stock rate.

    Args:
        workers: numbers of workers, separated by commas
        epochs: passes over the 1437 training images
        seeds: runs of each setting
    """
    torch.set_num_threads(1)
    settings = [(n, keeper, factor) for n in machine.integers(workers) for keeper in KEEPERS for factor in FACTORS]
    accuracy = {setting: [train(configured(setting[1], setting[2], seed, epochs), setting[0]) for seed in range(seeds)]
                for setting in tqdm(settings)}
    rows = [{"workers": n, "momentum": keeper, "rate": factor, "accuracy": runs}
            for (n, keeper, factor), runs in accuracy.items()]
    machine.write(machine.RESULTS / "momentum.json", machine.describe("benchmarks.momentum") | {"rows": rows})

    def cell(runs: list[float]) -> str:
        return f"{100 * statistics.mean(runs):.1f} ({100 * min(runs):.1f} to {100 * max(runs):.1f})"

    print(machine.table(
        ["workers", "momentum", *(f"{factor:g}x rate" for factor in FACTORS)],
        [[n, keeper, *(cell(accuracy[n, keeper, factor]) for factor in FACTORS)]
         for n in dict.fromkeys(n for n, _, _ in settings) for keeper in KEEPERS]))



if __name__ == "__main__":
    auto_cli(main, as_positional=False)

"""What is left in the workers' residuals when a compressed training ends, and what it would be worth there.

    python -m benchmarks.residual --seeds 3

Trains the digits with 8 simulated workers for 8 epochs and validates twice: the last weights, and these after all residuals have been
pushed densely as one gradient of no samples: at the rate of the last push, and at the largest of the run. diloco's residual is a way of
the weights, which takes no rate but the outer one. The sum is the same whoever pushes first: the server's step is linear in it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch

from asgd_mpi.offline.simulation import Simulation, Times, simulate
from asgd_mpi.process import ending
from asgd_mpi.record.events import Push
from asgd_mpi.runtime.prepare import configured
from asgd_mpi.task import complete, open_task
from benchmarks import machine

RESULT = machine.RESULTS / "residual.json"
WORKERS, EPOCHS = 8, 8
TIMES = Times(step_s=0.100, push_s=0.001, apply_s=0.0001, fetch_s=0.001, spread=0.1)
DILOCO = "--rule diloco --n-sync 5 --lr 0.1 --rule.outer_momentum"
CASES = (
    "--exchange.wire topk",
    "--exchange.wire topk --schedule.name constant",
    "--exchange.wire topk --n-sync 5",
    "--exchange.wire topk --n-sync 5 --schedule.name constant",
    f"{DILOCO} 0.5 --exchange.wire topk",
    f"{DILOCO} 0 --rule.outer_rate 0.7 --exchange.wire topk",
    "--exchange.wire int4",
    "--exchange.wire int8",
    f"{DILOCO} 0.5 --exchange.wire int4",
)


def train(options: str, seed: int) -> dict:
    """Return what the last weights score, without their residuals and with them, in percent."""
    torch.set_num_threads(1)
    asked = ["--epochs", str(EPOCHS), "--seed", str(seed), "--run.progress", "none"]
    task = open_task(complete(configured([*asked, *options.split()])))
    game = simulate(task, WORKERS, TIMES)
    left = torch.stack([replica.state["residual"] for replica in game.computation.replicas]).sum(0)
    weights, rule = game.latest.weights, task.config.rule
    if rule.name == "diloco":
        rates = {"outer": rule.outer_rate / (rule.outer_pushes or WORKERS)}
    else:
        of_pushes = [push.lr for push in game.pushes if isinstance(push, Push)]
        rates = {"last": of_pushes[-1], "largest": max(of_pushes)}
    return {
        "options": options,
        "seed": seed,
        "without": score(game, weights),
        "with": {name: score(game, weights - rate * left) for name, rate in rates.items()},
        "rates": rates,
        "length": float(left.norm()),
        "length_of_weights": float(weights.norm()),
    }


def score(game: Simulation, weights: torch.Tensor) -> float:
    samples = game.plan.num_validation
    tally = game.computation.validate_(game.latest._replace(weights=weights), 0, samples)
    return 100 * tally.sums["top1"] / samples


def table(rows: list[dict]) -> str:
    """Means of the seeds and their range, as Markdown."""

    def cell(found: list[float]) -> str:
        return f"{statistics.mean(found):.1f} ({min(found):.1f} to {max(found):.1f})"

    lines = []
    for options in dict.fromkeys(row["options"] for row in rows):
        chosen = [row for row in rows if row["options"] == options]
        names = list(chosen[0]["with"])
        lines.append(
            [
                f"`{options}`",
                cell([row["without"] for row in chosen]),
                cell([row["with"][names[0]] for row in chosen]),
                cell([row["with"][names[1]] for row in chosen]) if len(names) > 1 else "",
            ]
        )
    return machine.table(
        ["options", "without", "flushed at the last (diloco: outer) rate", "at the largest"], lines
    )


@ending.of_command
def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.residual", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    described, rows = machine.describe("benchmarks.residual"), []
    for case in CASES:
        for seed in range(options.seeds):
            rows.append(train(case, seed))
            print(f"{case}, seed {seed}: {rows[-1]['without']:.1f}, {rows[-1]['with']}", flush=True)
    machine.write(options.out, described | {"rows": rows})
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

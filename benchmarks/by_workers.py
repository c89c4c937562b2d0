"""What a training by default comes to with many workers, which takes a batch and a rate by their number; and rules on characters.

    python -m data_prep.fashion_mnist --out data/fashion-mnist
    python -m benchmarks.by_workers --parts digits,fashion,characters --seeds 1

Simulated (`asgd_mpi.simulate`): steps of 10 ms with a spread of 30 %, exchanges of 2 ms on a virtual clock. Every training adds a row to
benchmarks/results/by_workers.json; those that are there are not computed again. At the end the tables are printed.

digits      20 epochs, the recipe of the digits; by default, and with the batch and the rate that the recipe has for one worker
fashion     Fashion-MNIST, 4 epochs, the same recipe with a warm-up of half an epoch or so, a small convolutional network; likewise, with
            the recipe of small images, which a network of one's own has, and the synchronous line by rate
characters  a small transformer (benchmarks.characters), 1000 batches; AdamW at the server and at the workers by rate, and the synchronous line
vit, convnext   Fashion-MNIST, 4 epochs, small networks (benchmarks.small_networks) with AdamW: by default, one worker and the synchronous
            line by rate
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from asgd_mpi.errors import TrainingDiverged
from asgd_mpi.offline.simulation import Times, simulate
from asgd_mpi.runtime import preflight
from asgd_mpi.runtime.prepare import as_given, configured
from asgd_mpi.task import complete, for_workers, open_task
from asgd_mpi.process import ending
from benchmarks import machine

RESULT = machine.RESULTS / "by_workers.json"
TIMES = Times(step_s=0.010, push_s=0.001, apply_s=0.0001, fetch_s=0.001, spread=0.3)
WORKERS = (1, 8, 16, 32)
RECIPE = "--batch-size 16 --lr 0.02"
BASE = {
    "digits": "--epochs 20 --run.validate_every 20",
    "fashion": "--data data/fashion-mnist --model benchmarks.networks:fashion_cnn --model.recipe digits "
    "--schedule.warmup_epochs 0.4 --epochs 4 --run.validate_every 4",
    "characters": "--task benchmarks.characters:Topics --epochs 0.25 --run.validate_every 0.25",
}
BASE |= {
    name: f"--data data/fashion-mnist --model benchmarks.small_networks:{name} --model.recipe small_transformer "
    "--schedule.warmup_epochs 0.4 --epochs 4 --run.validate_every 4"
    for name in ("vit", "convnext")
}
SMALL = "--model.recipe small_images"
ADAMW_RATES = ("--lr 0.001", "--lr 0.002")
SYNC_ADAMW = "--rule sync --rule.optimizer adamw"
VARIANTS = {
    "digits": ("", RECIPE, "--rule adamw", "--rule adamw --batch-size 16 --lr 0.001"),
    "fashion": (
        "",
        RECIPE,
        SMALL,
        *(f"--rule sync --lr {rate:g}" for rate in (0.005, 0.01, 0.02)),
        *(f"{SMALL} --rule sync --lr {rate:g}" for rate in (0.00625, 0.0125, 0.025)),
    ),
    "characters": ("",)
    + tuple(
        f"{rule} --lr {rate:g}"
        for rule in (
            "--rule adamw",
            "--rule adamw --rule.momentum_at dana",
            "--rule adamw --rule.momentum_at worker",
            SYNC_ADAMW,
        )
        for rate in (1e-3, 3e-3, 6e-3)
    ),
    **{
        name: ("", *(f"{SYNC_ADAMW} {rate}" for rate in ADAMW_RATES))
        for name in ("vit", "convnext")
    },
}
# of one worker alone: rates that may be better than the recipe's, and the former one of small transformers
LINES = {"fashion": ("--lr 0.01",)} | {
    name: (*ADAMW_RATES, "--lr 0.00025") for name in ("vit", "convnext")
}


def settings(part: str, seeds: int) -> Iterator[dict]:
    for seed in range(seeds):
        for workers in WORKERS:
            for options in VARIANTS[part] + (LINES.get(part, ()) if workers == 1 else ()):
                is_default = options == RECIPE and workers <= 8
                is_sync_alone = "sync" in options and workers == 1
                if not is_default and not is_sync_alone:
                    yield {"part": part, "workers": workers, "seed": seed, "options": options}


def train(part: str, workers: int, seed: int, options: str) -> dict:
    """Return what the last version scores, in percent, or in nats of the characters; and what was in force."""
    torch.set_num_threads(1)
    arguments = [*BASE[part].split(), *options.split(), "--seed", str(seed), "--run.progress=none"]
    asked = configured(arguments)
    task = open_task(complete(asked))
    task, _ = for_workers(task, as_given(arguments, asked, task), workers)
    task, _, _ = preflight.try_out_(task, task.first_module())
    try:
        named = simulate(task, workers, TIMES).scores[-1].named
    except TrainingDiverged:
        named = {}
    score = named.get("nats")
    if "top1_error" in named:
        score = 100 * (1 - named["top1_error"])
    return {
        "score": score,
        "batch": task.config.data.batch_size,
        "lr": task.config.schedule.lr,
    }


def table(rows: list[dict], part: str) -> str:
    """Means of the seeds, their range and their number, as Markdown."""
    digits = 3 if part == "characters" else 1

    def cell(workers: int, options: str) -> str:
        chosen = [
            row
            for row in rows
            if (row["part"], row["workers"], row["options"]) == (part, workers, options)
        ]
        found = [row["score"] for row in chosen if row["score"] is not None]
        if len(found) < len(chosen):
            return f"diverged ({len(chosen) - len(found)}/{len(chosen)})"
        if len(found) < 2:
            return f"{found[0]:.{digits}f}" if found else ""
        spread = f"{min(found):.{digits}f} to {max(found):.{digits}f}; {len(found)}"
        return f"{statistics.mean(found):.{digits}f} ({spread})"

    asked = list(dict.fromkeys(row["options"] for row in rows if row["part"] == part))
    return machine.table(
        ["options", *map(str, WORKERS)],
        [
            [f"`{options}`" if options else "by default", *(cell(n, options) for n in WORKERS)]
            for options in asked
        ],
    )


@ending.of_command
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", default=",".join(BASE))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    done = [{name: row[name] for name in ("part", "workers", "seed", "options")} for row in rows]
    wanted = [
        setting for part in options.parts.split(",") for setting in settings(part, options.seeds)
    ]
    for setting in tqdm([setting for setting in wanted if setting not in done]):
        rows.append(setting | train(**setting))
        machine.write(options.out, machine.describe("benchmarks.by_workers") | {"rows": rows})
    for part in BASE:
        if any(row["part"] == part for row in rows):
            print(f"{part}\n\n{table(rows, part)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

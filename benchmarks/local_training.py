"""Measure the accuracy of workers that train on their own (`--rule diloco`), by inner rate, outer step and batches between exchanges.

    python -m data_prep.fashion_mnist --out data/fashion-mnist
    python -m benchmarks.local_training --parts digits,fashion,characters,vit,convnext

8 workers, simulated as in benchmarks.by_workers, with pushes in int8 and fetches in bfloat16, or in int4 and int8. Every training adds a row to
benchmarks/results/local_training.json; those that are there are not computed again. At the end the tables are printed.

digits      8 epochs, 5 batches between exchanges: 18 rounds of 8 pushes
fashion     Fashion-MNIST, 4 epochs, 10 to 50 batches: 37 rounds with 50; and 16, 32 and 64 epochs
characters  a small transformer, AdamW at the workers, 1000 batches, 5 between exchanges: 25 rounds; and 4000 to 96,000 batches
vit, convnext  small networks on Fashion-MNIST, 4 epochs, AdamW at the workers, 19 batches
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from asgd_mpi.process import ending
from benchmarks import by_workers, machine

RESULT = machine.RESULTS / "local_training.json"
WORKERS = 8
LOCAL = "--rule diloco --exchange.wire int8"
NARROW = "--rule diloco --exchange.wire int4 --exchange.fetch_wire int8"
OVERLAP = "--exchange.overlap true"
# as it was: no worker goes ahead by more than its own part of the server's step
OWN_PART = f"{OVERLAP} --rule.outer_ahead 0"
FORMER, PLAIN = (0.7, 0.9), (1, 0)  # outer rate and momentum


def local(
    n_sync: int, lr: float, outer: tuple[float, float], more: str = "", rule: str = LOCAL
) -> str:
    rate, momentum = outer
    words = f"{rule} --n-sync {n_sync} --lr {lr:g} --rule.outer_rate {rate:g} --rule.outer_momentum {momentum:g}"
    return f"{words} {more}".strip()


def narrow(n_sync: int, lr: float, more: str = "") -> str:
    return local(n_sync, lr, PLAIN, f"{OVERLAP} {more}", NARROW)


# the recipe's rate, 0.02, times the root of 8 workers; the default is twice the recipe's, 0.04
ROOT = 0.056569
LOWER = 0.0282843  # times the root of 2
ALL = (0, 1)  # seeds
ADAMW = "--rule.optimizer adamw"
# batches of 8
OF_4000, OF_32000, OF_96000 = (
    f"--epochs {epochs} --run.validate_every {epochs}" for epochs in (1, 8, 24)
)
SLOW = "--run.inject slow:4x@rank8"
LONG, LONGER, LONGEST = (
    f"--epochs {epochs} --run.validate_every {epochs}" for epochs in (16, 32, 64)
)
# by part: (options, workers, seeds)
CASES = {
    "digits": [
        ("--epochs 8 --run.validate_every 8 " + options, WORKERS, ALL)
        for options in (
            "--lr 0.02",
            *(
                local(5, lr, outer)
                for outer in (FORMER, (0.7, 0.5), PLAIN)
                for lr in (0.02, 0.04, ROOT, 0.08, 0.12, 0.16)
            ),
            local(5, 0.02, FORMER, OWN_PART),
            *(local(5, ROOT, outer, OWN_PART) for outer in (FORMER, (0.5, 0), (0.7, 0), PLAIN)),
            local(5, 0.04, PLAIN, OVERLAP),
            local(5, 0.04, (0.5, 0), OWN_PART),
        )
    ],
    "fashion": [
        ("--lr 0.02", WORKERS, (1,)),  # seed 0 is in benchmarks.convergence
        *((local(50, lr, PLAIN), WORKERS, (0,)) for lr in (0.02, 0.08)),
        *((local(50, lr, PLAIN), WORKERS, ALL) for lr in (0.04, ROOT)),
        (local(50, 0.02, FORMER), WORKERS, ALL),
        (local(50, 0.04, (0.7, 0.5)), WORKERS, (0,)),
        (local(50, 0.1, (0.7, 0.5)), WORKERS, (0,)),
        (local(25, ROOT, PLAIN), WORKERS, (0,)),
        (local(10, 0.02, FORMER), WORKERS, (0,)),
        (local(10, 0.04, PLAIN), WORKERS, (0,)),
        (local(10, ROOT, PLAIN), WORKERS, ALL),
        (local(50, 0.02, FORMER, OWN_PART), WORKERS, (0,)),
        (local(50, ROOT, (0.5, 0), OWN_PART), WORKERS, (0,)),
        (local(50, 0.04, (0.5, 0), OWN_PART), WORKERS, ALL),
        (local(50, 0.04, PLAIN, OVERLAP), WORKERS, ALL),
        (local(10, 0.04, (0.5, 0), OWN_PART), WORKERS, (0,)),
        (local(10, 0.04, PLAIN, OVERLAP), WORKERS, (0,)),
        *((local(50, lr, PLAIN), 32, (0,)) for lr in (0.04, 0.113137)),
        # whether it becomes less in a longer run, and with smaller batches and as many samples between exchanges
        (f"{LONG} --lr 0.02", WORKERS, (0,)),
        *((f"{LONG} {local(n_sync, 0.04, PLAIN)}", WORKERS, (0,)) for n_sync in (10, 25)),
        (f"{LONG} {local(50, 0.04, PLAIN)}", WORKERS, ALL),
        (f"{LONGER} --lr 0.02", WORKERS, ALL),
        (f"{LONGER} {local(50, 0.04, PLAIN)}", WORKERS, (0,)),
        *((f"{LONGER} {local(n, 0.04, (0.5, 0), OWN_PART)}", WORKERS, (0,)) for n in (10, 50)),
        *((f"{LONGER} {local(n, 0.04, PLAIN, OVERLAP)}", WORKERS, (0,)) for n in (38, 50)),
        (f"{LONGER} {local(10, 0.04, PLAIN, OVERLAP)}", WORKERS, ALL),
        # narrower, and so more often: 1/101 of the bytes of n_sync 1 in float32, and 1/422 with one worker that is slow
        *((narrow(n, 0.04), WORKERS, ALL) for n in (10, 19)),
        (f"{LONGER} {narrow(19, 0.04)}", WORKERS, ALL),
        (f"{LONGER} {narrow(19, LOWER)}", WORKERS, (0,)),
        (f"{LONGER} {narrow(80, LOWER, SLOW)}", WORKERS, ALL),
        (f"{LONGEST} {narrow(80, 0.04, SLOW)}", WORKERS, (0,)),
        (f"{LONGEST} --lr 0.02", WORKERS, (0,)),
        (f"{LONGEST} {local(50, 0.04, PLAIN, OVERLAP)}", WORKERS, (0,)),
        *((local(200, lr, PLAIN, "--batch-size 4"), WORKERS, (0,)) for lr in (0.01, 0.02, 0.04)),
    ],
    "characters": [
        (local(5, lr, outer, ADAMW), WORKERS, (0,))
        for lr in (0.001, 0.003, 0.0085)
        for outer in (FORMER, PLAIN)
    ]
    + [
        (local(5, 0.0085, PLAIN, f"{ADAMW} {OVERLAP}"), WORKERS, (0,)),
        (local(5, 0.0085, (0.5, 0), f"{ADAMW} {OWN_PART}"), WORKERS, (0,)),
        # four times as long
        (f"{OF_4000} --rule adamw", WORKERS, (0,)),
        *(
            (f"{OF_4000} {narrow(19, lr, f'--batch-size {batch} {ADAMW}')}", WORKERS, (0,))
            for batch, lr in ((2, 0.012), (4, 0.017), (8, 0.0085), (8, 0.017), (8, 0.034))
        ),
        *(
            (f"{OF_4000} {narrow(19, lr, f'--batch-size 8 {ADAMW}')}", 32, (0,))
            for lr in (0.006, 0.012)
        ),
        (f"{OF_32000} --rule adamw", WORKERS, (0,)),
        (f"{OF_32000} {narrow(19, 0.012, f'--batch-size 2 {ADAMW}')}", WORKERS, (0,)),
        (f"{OF_32000} {narrow(76, 0.012, f'--batch-size 2 {ADAMW}')}", WORKERS, (0,)),
        (f"{OF_32000} {narrow(19, 0.017, f'--batch-size 8 {ADAMW}')}", WORKERS, (0,)),
        (f"{OF_96000} --rule adamw", WORKERS, (0,)),
        (f"{OF_96000} {narrow(19, 0.017, f'--batch-size 8 {ADAMW}')}", WORKERS, (0,)),
    ],
    **{
        name: [(narrow(19, lr, ADAMW), WORKERS, (0,)) for lr in (0.002, 0.004)]
        for name in ("vit", "convnext")
    },
}


def settings(part: str) -> Iterator[dict]:
    for options, workers, seeds in CASES[part]:
        for seed in seeds:
            yield {"part": part, "workers": workers, "seed": seed, "options": options}


def table(rows: list[dict], part: str) -> str:
    """Return the scores of the seeds, as Markdown."""
    digits = 3 if part == "characters" else 1
    found: dict[tuple[int, str], list[str]] = {}
    for row in rows:
        if row["part"] == part:
            score = "diverged" if row["score"] is None else f"{row['score']:.{digits}f}"
            found.setdefault((row["workers"], row["options"]), []).append(score)
    lines = [
        [f"`{options}`", str(workers), ", ".join(scores)]
        for (workers, options), scores in found.items()
    ]
    return machine.table(["options", "workers", "seeds 0 and 1"], lines)


@ending.of_command
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", default=",".join(CASES))
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    done = [{name: row[name] for name in ("part", "workers", "seed", "options")} for row in rows]
    wanted = [setting for part in options.parts.split(",") for setting in settings(part)]
    for setting in tqdm([setting for setting in wanted if setting not in done]):
        rows.append(setting | by_workers.train(**setting))
        machine.write(options.out, machine.describe("benchmarks.local_training") | {"rows": rows})
    for part in CASES:
        print(f"{part}\n\n{table(rows, part)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Hashes of the final weights of small trainings: what a change that only moves code must leave as it is.

    python -m benchmarks.golden > before      # in a checkout of the commit before; then in the one after:
    python -m benchmarks.golden | diff before -

One line a training: its name, the hash of its last version's weights, and, of a simulated one, that of its log of pushes. Simulated:
every rule with 3 workers, a momentum at each place, each wire format. Under mpirun, with one worker, whose order is its own:
several servers, and a network in stages, which give one hash. Hashes depend on torch and on the processor, so they are
compared, never kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

from asgd_mpi import simulate
from benchmarks import launch
from data_prep import run

RULES = (
    "asgd",
    "sasgd",
    "downpour",
    "adagrad",
    "softsync",
    "ringmaster",
    "ssp",
    "dc_asgd_c",
    "dc_asgd_a",
    "easgd",
    "eamsgd",
    "sync",
    "sync_backup",
    "adamw",
    "adam",
    "nadamw",
)
MORE = {
    "heavy ball": "--rule.momentum_at server",
    "Nesterov": "--rule.momentum_at server_nag",
    "at workers": "--rule.momentum_at worker",
    "float16": "--exchange.wire float16",
    "bfloat16": "--exchange.wire bfloat16",
    "sums of 2": "--exchange.n_push 2",
    "overlap": "--exchange.overlap true",
    "micro-batches": "--compute.micro_batches 2",
    "clipped": "--rule.clip_norm 0.5",
    "sync adamw": "--rule sync --rule.optimizer adamw",
    "softsync adamw": "--rule softsync --rule.splits 2 --rule.optimizer adamw",
}
REAL = {
    "2 servers": (3, "--servers 2"),
    "2 stages": (3, "--stages 2"),
    "1F1B, 4 parts": (3, "--stages 2 --compute.micro_batches 4"),
    "2 stages, bfloat16": (3, "--stages 2 --exchange.wire bfloat16"),
    "2 servers, adamw": (3, "--servers 2 --rule adamw --rule.no_decay bias"),
    "2 stages, adamw": (3, "--stages 2 --rule adamw --rule.no_decay bias"),
    "2 servers, no decay": (3, "--servers 2 --rule.no_decay bias --rule.weight_decay 0.01"),
    "2 stages, no decay": (3, "--stages 2 --rule.no_decay bias --rule.weight_decay 0.01"),
}
COMMON = ["--epochs", "2", "--seed", "3", "--run.progress", "none"]
DEADLINE_S = 120.0


def trainings() -> Iterator[tuple[str, int, list[str]]]:
    """Yield (name, ranks under mpirun or 0 for a simulation, options)."""
    yield from ((rule, 0, ["--rule", rule]) for rule in RULES)
    yield from ((name, 0, options.split()) for name, options in MORE.items())
    yield from ((name, ranks, options.split()) for name, (ranks, options) in REAL.items())


def hashes_of(ranks: int, options: list[str], directory: Path) -> list[str]:
    """Train, and return the hash of the last weights; of a simulation that of the pushes, too. Raises launch.Failed."""
    if ranks:
        launch.run(
            [
                *launch.mpirun(ranks),
                *launch.python("asgd_mpi.train", *COMMON, *options, "--run.dir", directory),
            ],
            DEADLINE_S,
        )
    else:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            simulate.main([*COMMON, *options, "--workers", "3", "--out", str(directory)])
    last = max(directory.glob("checkpoints/v*/model.pt"))
    files = [last] if ranks else [last, directory / "pushes.log"]
    return [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files]


def main(only: str = "") -> None:
    """Print a line for each training.

    Args:
        only: trainings whose name holds this text; all without it
    """
    for name, ranks, options in trainings():
        if only in name:
            with tempfile.TemporaryDirectory() as scratch:
                print(f"{name:20}", *hashes_of(ranks, options, Path(scratch) / "run"), flush=True)


if __name__ == "__main__":
    run(main)

"""Compare a loop of one's own with `asgd_mpi.train` on the embedded digits: `python -m benchmarks.own_loop`, with mpirun on the PATH.

With one worker the weights that both end with, which are to be the same to the bit; with 3 workers the images a second in the middle of a
run, the two in turn. No augmentation, which a loop's dataset does not draw as `train` does. Figures are medians.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

from asgd_mpi.process import ending
from asgd_mpi.record import checkpoint
from asgd_mpi.record.rundir import RunDir
from benchmarks import machine, training

DEADLINE_S = 300.0
KINDS = {
    "train": ("asgd_mpi.train", ["--data.augment", "none"]),
    "own loop": ("benchmarks.digits_loop", []),
}


def hash_of(run: RunDir) -> str:
    """Return a hash of the last version's tensors, by their names."""
    newest, _ = next(checkpoint.resumable(run))
    found = hashlib.sha256()
    for name, tensor in sorted(checkpoint.load(newest)[0].items()):
        found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def compare(workers: int, epochs: float, rounds: int) -> dict:
    """Return the hashes with one worker, and the speeds with several, by kind."""
    hashes = {}
    for kind, (module, more) in KINDS.items():
        with training.run(1, ["--epochs", "2", *more], {}, DEADLINE_S, module) as run:
            hashes[kind] = hash_of(run)
    print(f"one worker: {hashes}", flush=True)
    speeds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(rounds):
        for kind in list(KINDS) if number % 2 else list(KINDS)[::-1]:  # no kind always comes first
            module, more = KINDS[kind]
            options = ["--epochs", str(epochs), *more]
            with training.run(workers, options, {}, DEADLINE_S, module) as run:
                speeds[kind].append(training.images_per_s(run))
        print({kind: round(values[-1]) for kind, values in speeds.items()}, flush=True)
    shares = [own / plain for own, plain in zip(speeds["own loop"], speeds["train"], strict=True)]
    return {
        "hashes": hashes,
        "same": len(set(hashes.values())) == 1,
        "images a second": {kind: machine.summary(values) for kind, values in speeds.items()},
        "own loop over train": machine.summary(shares),
    }


@ending.of_command
def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.own_loop", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "own_loop.json")
    options = parser.parse_args()
    described = machine.describe("benchmarks.own_loop")
    found = compare(options.workers, options.epochs, options.rounds)
    machine.write(options.out, described | {"workers": options.workers, "result": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How far the plan is from real runs: `python benchmarks/plan.py --out DIR`, with mpirun on the PATH.

Trains networks that stand for a GPU (`sleeping`: a step sleeps) with 1, 2, 4 and 7 workers, calibrates the model with the
run of 1 worker, and again with those of 1 and 7, and prints predicted against measured images/s.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from asgd_mpi.forecast import calibrate, simulate
from asgd_mpi.plan import observe
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.summary import summarize

HERE = Path(__file__).parent
WORKERS = (1, 2, 4, 7)


def train(out: Path, network: str, num_workers: int, epochs: float, step_s: float) -> RunDir:
    """One run, without validations; done before, it is taken as it is."""
    path = out / f"{network}-{num_workers}"
    if not (path / "report" / "report.json").exists():
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), "EMULATED_STEP_S": str(step_s)}
        subprocess.run(
            ["mpirun", "-np", str(num_workers + 1), sys.executable, "-m", "asgd_mpi.train", "--model", f"benchmarks.sleeping:{network}",
             "--run.dir", str(path), "--epochs", str(epochs), "--data.batch_size", "8", "--schedule.lr", "0.001",
             "--run.validate_every", "1000", "--run.progress", "none", "--compute.threads", "1", "--data.threads", "1",
             "--data.augment", "none", "--rule.momentum", "0.9", "--rule.weight_decay", "0.0001", "--schedule.name", "constant",
             "--schedule.warmup_epochs", "0", "--compute.device", "cpu"],
            check=True, env=env, cwd=out, stdout=subprocess.DEVNULL)
    return RunDir.open(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=3.0, help="for each worker")
    parser.add_argument("--step-s", type=float, default=0.02)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out.resolve()
    for network in ("small", "large"):
        runs = {count: train(out, network, count, options.epochs * count, options.step_s) for count in WORKERS}
        seen, measured = ({count: read(run) for count, run in runs.items()} for read in (observe, summarize))
        for basis in ((1,), (1, 7)):
            costs = calibrate([seen[count] for count in basis])
            print(f"{network}, calibrated with {' and '.join(map(str, basis))} worker(s): step {1e3 * costs.step_s:.1f} ms, travel "
                  f"{1e3 * costs.travel_s:.2f}, update {1e3 * costs.apply_s:.2f} + {1e3 * costs.overhead_s:.2f}, knee {costs.knee:.1f}")
            for count, one in seen.items():
                found = simulate(costs, count)
                print(f"  {count} workers: measured {one.images_per_s:8.1f} images/s, predicted {found.images_per_s:8.1f} "
                      f"({100 * (found.images_per_s / one.images_per_s - 1):+.1f} %); staleness "
                      f"{measured[count].staleness.mean:.2f} and {found.staleness:.2f}; server busy "
                      f"{measured[count].server_busy:.1%} and {found.server_busy:.1%}")


if __name__ == "__main__":
    main()

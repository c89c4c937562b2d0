"""How far the plan is from real runs, and how long it takes: `python -m benchmarks.plan --work DIR`.

Trains networks of two sizes that stand for a GPU (`sleeping`: a step sleeps) with 1, 2, 4 and 7 workers and several n_push,
calibrates the model with the run of 1 worker at n_push 1, and again with those of 1 and 7, and compares predicted with
measured images/s of all. Runs that are in DIR already are taken as they are. Then plans 4096 workers and 64 servers.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from asgd_mpi.offline.forecast import Costs, calibrate, simulate
from asgd_mpi.plan import MAX_SERVERS, MAX_WORKERS, observe
from asgd_mpi.process import ending
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.summary import summarize
from benchmarks import launch, machine

WORKERS = (1, 2, 4, 7)
BASES = ((1,), (1, 7))  # workers of the runs to calibrate with
DEADLINE_S = 600.0


@ending.of_command
def main() -> int:
    options = _parse()
    described = machine.describe("benchmarks.plan")
    rows = []
    for network in ("small", "large"):
        runs = {
            (n_push, count): _train(options, network, n_push, count)
            for n_push in options.n_push
            for count in WORKERS
        }
        for basis in BASES:
            costs = calibrate([observe(runs[1, count]) for count in basis])
            rows += [
                _compare(network, basis, n_push, count, costs, run)
                for (n_push, count), run in runs.items()
            ]
    seconds = _largest(costs)
    print(_table(rows, options.n_push))
    print(f"\n{MAX_WORKERS} workers and {MAX_SERVERS} servers are planned in {seconds:.2f} s")
    machine.write(options.out, described | {"rows": rows, "seconds_for_the_largest_plan": seconds})
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("--work", type=Path, required=True, help="where the runs are kept")
    parser.add_argument("--n-push", type=machine.integers, default=[1, 4], help="1 among them")
    parser.add_argument("--epochs", type=float, default=3.0, help="for each worker")
    parser.add_argument("--step-s", type=float, default=0.02)
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "plan.json")
    return parser.parse_args()


def _train(options: argparse.Namespace, network: str, n_push: int, num_workers: int) -> RunDir:
    """One run, without validations."""
    path = options.work.resolve() / f"{network}-push{n_push}-{num_workers}"
    if not (path / "finished.json").exists():
        launch.run(
            launch.mpirun(num_workers + 1)
            + launch.python(
                "asgd_mpi.train",
                "--model",
                f"benchmarks.sleeping:{network}",
                "--run.dir",
                path,
                "--epochs",
                options.epochs * num_workers,
                "--n-sync",
                n_push,
                "--data.batch_size",
                8,
                "--data.lease_batches",
                4 * n_push,
                "--schedule.lr",
                0.001,
                "--run.validate_every",
                1000,
                "--run.progress",
                "none",
                "--compute.threads",
                1,
                "--data.threads",
                1,
                "--data.augment",
                "none",
                "--rule.momentum",
                0.9,
                "--rule.weight_decay",
                0.0001,
                "--schedule.name",
                "constant",
                "--schedule.warmup_epochs",
                0,
                "--compute.device",
                "cpu",
            ),
            DEADLINE_S,
            {"EMULATED_STEP_S": str(options.step_s)},
        )
    return RunDir.open(path)


def _compare(
    network: str, basis: tuple[int, ...], n_push: int, num_workers: int, costs: Costs, run: RunDir
) -> dict:
    measured, found = (
        observe(run),
        simulate(replace(costs, n_push=n_push, n_fetch=None), num_workers),
    )
    summary = summarize(run)
    return {
        "network": network,
        "parameters": summary.num_parameters,
        "calibrated_with": basis,
        "n_push": n_push,
        "workers": num_workers,
        "measured_images_per_s": measured.images_per_s,
        "predicted_images_per_s": found.images_per_s,
        "error": found.images_per_s / measured.images_per_s - 1,
        "measured_staleness": summary.staleness.mean,
        "predicted_staleness": found.staleness,
        "measured_server_busy": summary.server_busy,
        "predicted_server_busy": found.server_busy,
        "knee": replace(costs, n_push=n_push).knee,
    }


def _largest(costs: Costs) -> float:
    started = time.perf_counter()
    simulate(
        replace(costs, num_servers=MAX_SERVERS, n_push=4, link_s=0.01, latency_s=1e-5), MAX_WORKERS
    )
    return time.perf_counter() - started


def _table(rows: list[dict], pushes: list[int]) -> str:
    lines = []
    for network in ("small", "large"):
        for basis in BASES:
            for n_push in pushes:
                part = [
                    row
                    for row in rows
                    if (row["network"], row["calibrated_with"], row["n_push"])
                    == (network, basis, n_push)
                ]
                lines.append(
                    [
                        f"{part[0]['parameters'] / 1e6:.2g} million",
                        " and ".join(map(str, basis)),
                        n_push,
                        *(f"{100 * row['error']:+.1f} %" for row in part),
                    ]
                )
    return machine.table(
        ["parameters", "calibrated with workers", "n_push", *map(str, WORKERS)], lines
    )


if __name__ == "__main__":
    sys.exit(main())

"""`python -m asgd_mpi.plan RUN_DIR [RUN_DIR ...]`: how many workers are worth it, from short runs on the same hardware.

Calibrates the model of the exchange (`forecast`) with what the runs measured, and prints images/s, staleness and server
load for other numbers of workers, where it ends, and what would move that. Writes `plan.html` and `plan.json`.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import jsonargparse
import msgspec

from asgd_mpi.errors import ConfigError, RunDirError, UserError
from asgd_mpi.forecast import Costs, Observation, Outcome, calibrate, simulate, what_moves
from asgd_mpi.record.events import Interval, read_events
from asgd_mpi.record.rundir import RunDir, write_whole
from asgd_mpi.record.summary import summarize
from asgd_mpi.report.units import number, percent, short

DEFAULT_WORKERS = "1,2,4,8,16,32,64,128"
MAX_WORKERS = 4096


def main(arguments: Sequence[str] | None = None) -> int:
    parser = jsonargparse.ArgumentParser(
        prog="python -m asgd_mpi.plan",
        description="Predict images/s, staleness and server load for other numbers of workers.")
    parser.add_argument("run_dir", metavar="RUN_DIR", type=str, nargs="+",
                        help="Runs to calibrate with; of two sizes (1 worker, and as many as a host holds) is best.")
    parser.add_argument("--workers", type=str, default=DEFAULT_WORKERS, metavar="N,N,...", help=f"Up to {MAX_WORKERS}.")
    parser.add_argument("--link-gbit", type=Optional[float], metavar="GBIT",
                        help="Gbit/s of the server's link, if the runs were on one host and the plan is for several.")
    parser.add_argument("--out", type=str, default="plan", metavar="DIR", help="Where plan.html and plan.json are written.")
    options = parser.parse_args(arguments)
    try:
        counts = _counts(options.workers)
        observations = [observe(RunDir.open(path)) for path in options.run_dir]
        costs = calibrate(observations)
        if options.link_gbit is not None:
            costs = _with_link(costs, options.link_gbit, options.run_dir[0])
        outcomes = [simulate(costs, count) for count in counts]
        moves = what_moves(costs, counts[-1])
        for line in describe(costs, outcomes, moves):
            print(line)
        _write(Path(options.out), costs, observations, outcomes, moves)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def observe(run: RunDir) -> Observation:
    """What a run measured, over all its workers. Raises RunDirError if it holds too little."""
    summary = summarize(run)
    workers = [rank for rank in summary.ranks if rank.rank and rank.counts["pushes"]]
    if not workers or not summary.apply_s:
        raise RunDirError(f"{run.path} holds no worker's intervals with pushes, or none of the server's: nothing to "
                          "calibrate with. Take a run that trained for a few seconds.")
    pushes = sum(rank.counts["pushes"] for rank in workers)
    batch = sum(rank.counts["images"] for rank in workers) / pushes
    total = {phase: sum(rank.phases[phase] for rank in workers) for phase in ("data", "compute", "fetch")}
    cycles = [sum(rank.phases[phase] for phase in ("data", "compute", "push", "fetch")) / rank.counts["pushes"]
              for rank in workers]
    fetches = sum(rank.counts["fetches"] for rank in workers) or pushes
    step_s = (total["data"] + total["compute"]) / pushes
    spread = _spread([event for rank in workers for event in read_events(run.metrics_of(rank.rank))
                      if isinstance(event, Interval)], step_s)
    costs = Costs(batch, step_s, summary.apply_s, total["fetch"] / fetches, spread=spread)
    return Observation(costs, len(workers), sum(batch / cycle for cycle in cycles))


def _spread(intervals: list[Interval], mean_s: float) -> float:
    """Standard deviation of a step over its mean, from means over intervals: that of n steps has 1 / n of the variance."""
    weighted = [(interval.data + interval.compute - interval.pushes * mean_s) ** 2 / interval.pushes
                for interval in intervals if interval.pushes]
    return min(1.0, math.sqrt(sum(weighted) / len(weighted)) / mean_s) if weighted and mean_s else 0.0


def describe(costs: Costs, outcomes: Sequence[Outcome], moves: Sequence[tuple[str, float, float]]) -> list[str]:
    """The plan, as lines of text."""
    lines = [f"one push of {number(costs.batch, 0)} images: step {short(costs.step_s)} (spread {percent(costs.spread, 0)}), "
             f"travel {short(costs.travel_s)}, update {short(costs.apply_s)}, {short(costs.overhead_s)} more one at a time, "
             f"fetch {short(costs.fetch_s)}" + (f", link {short(costs.link_s)} each way" if costs.link_s else ""),
             "workers    images/s  efficiency  staleness  server busy  queue busy"]
    one = costs.batch / costs.cycle_s
    lines += [f"{row.num_workers:7,} {row.images_per_s:11,.1f} {percent(row.images_per_s / one / row.num_workers, 0):>11} "
              f"{row.staleness:10,.1f} {percent(row.server_busy, 0):>12} "
              f"{percent(row.queue_busy, 0):>11}" for row in outcomes]
    whose = "link's" if costs.link_s > costs.serve_s else "queue's: the update and what else is done one at a time"
    lines.append(f"the knee is at {number(costs.knee)} workers: with more, {number(costs.limit, 0)} images/s is the limit "
                 f"(the {whose})")
    lines.append(f"what would move {outcomes[-1].num_workers:,} workers:")
    lines += [f"  {name}: {100 * gain:+.0f} % images/s, the knee at {number(knee)}" for name, gain, knee in moves]
    return lines


def _counts(text: str) -> list[int]:
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise ConfigError(f"--workers {text}: give whole numbers with commas between them, such as 1,2,4,8.") from None
    if counts[0] < 1 or counts[-1] > MAX_WORKERS:
        raise ConfigError(f"--workers {text}: from 1 to {MAX_WORKERS} workers can be planned.")
    return counts


def _with_link(costs: Costs, gbit: float, path: str) -> Costs:
    if not gbit > 0:
        raise ConfigError(f"--link-gbit {gbit}: give the Gbit/s of the server's link, above 0.")
    num_bytes = 4 * summarize(RunDir.open(path)).num_parameters
    return dataclasses.replace(costs, link_s=8 * num_bytes / (gbit * 1e9))


def _write(out: Path, costs: Costs, observations: Sequence[Observation], outcomes: Sequence[Outcome],
           moves: Sequence[tuple[str, float, float]]) -> None:
    from asgd_mpi.report.plan_page import page  # loads matplotlib

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirError(f"cannot make {out}: {error.strerror}. Give another directory with --out DIR.") from error
    facts = {"costs": costs, "knee_workers": _finite(costs.knee), "limit_images_per_s": _finite(costs.limit),
             "observed": observations, "predicted": outcomes,
             "moves": [{"change": name, "gain": gain, "knee_workers": _finite(knee)} for name, gain, knee in moves]}
    write_whole(out / "plan.json", msgspec.json.format(msgspec.json.encode(facts), indent=2) + b"\n")
    write_whole(out / "plan.html", page(costs, observations, outcomes, describe(costs, outcomes, moves)).encode())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    sys.exit(main())

"""`python -m asgd_mpi.plan RUN_DIR [RUN_DIR ...]`: how many workers are worth it, and how to set the exchange.

Calibrates the model of the exchange (`forecast`) with short runs on the same hardware, or with a probe of a minute
(`--probe`: two runs of a network that sleeps in place of a GPU), and prints images/s, staleness and server load for other
numbers of workers and servers, other n_push, links and step times, where it ends, and what would move that. Writes
`plan.html` and `plan.json`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Optional

import jsonargparse
import msgspec

from asgd_mpi.config import command_line, exchange_choice, limits, rulebook
from asgd_mpi.config import written
from asgd_mpi.config.exchange_choice import TOPK, WIRES, Measured, kept_fetch_wire
from asgd_mpi.config.rulebook import WAITING
from asgd_mpi.errors import ConfigError, RunDirError, tell
from asgd_mpi.offline.forecast import (
    Costs,
    Observation,
    Outcome,
    calibrate,
    simulate,
    what_moves,
)
from asgd_mpi.process import ending
from asgd_mpi.record.bubble import Pipelines
from asgd_mpi.record.disk import write_whole
from asgd_mpi.record.events import Interval, read_events
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.summary import summarize
from asgd_mpi.report.answers import Answer
from asgd_mpi.report.planned import Miss, answers, misses, whose
from asgd_mpi.report.units import number, percent, short, workers
from asgd_mpi.runtime import supervise

DEFAULT_WORKERS = "1,2,4,8,16,32,64,128"
MAX_WORKERS, MAX_SERVERS = 4096, 64
# of each of the two runs; short steps, to meet the server's limit
PROBE_S, PROBE_STEP_S = 20.0, 0.02


RANGES = {
    "parameters": (
        limits.at_least(1, 1e11),
        "give those of the network to plan for, such as 25.6e6",
    ),
    "batch-size": limits.RANGES["data.batch_size"],
    "step-ms": (limits.above(0), "give milliseconds above 0"),
    "spread": (limits.at_least(0, 10), "give a standard deviation over the mean, from 0 to 10"),
    "stages": (limits.at_least(1, 4096), "a worker has 1 stage or more; 4096 at most"),
    "micro-batches": (limits.at_least(1, 4096), "a batch has 1 part or more; 4096 at most"),
    "balance": (
        limits.above(0, 1),
        "no stage is faster than the slowest one, nor takes no time; give more than 0, and 1 or less",
    ),
    "servers": (limits.at_least(1, MAX_SERVERS), f"from 1 to {MAX_SERVERS} servers can be planned"),
    "n-fetch": limits.RANGES["exchange.n_fetch"],
    "link-gbit": (limits.above(0), "give Gbit/s above 0"),
    "link-latency-us": (limits.at_least(0), "give microseconds, 0 or more"),
}


@ending.of_command
def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().read(arguments)
    counts = command_line.counts("--workers", options.workers, MAX_WORKERS)
    observations, num_parameters, unit = _observe(options)
    calibrated = calibrate(observations)
    missed = misses(calibrated, observations)
    costs = _as_asked(calibrated, options, num_parameters)
    outcomes = [simulate(costs, count) for count in counts]
    moves = what_moves(costs, counts[-1])
    out = Path(options.out)
    _write(out, costs, observations, outcomes, moves, missed, unit)
    for line in [
        *verdict(answers(costs, outcomes, moves, missed, unit)),
        *describe(costs, outcomes, moves, unit),
        *_smaller_batches(options, counts[-1]),
        *advice(costs, num_parameters),
    ]:
        tell(line)
    tell(f"page:    {out / 'plan.html'}\nnumbers: {out / 'plan.json'}")
    return 0


def make_parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog="python -m asgd_mpi.plan",
        ranges=RANGES,
        description="Predict images/s, staleness and server load for other numbers of workers and other settings.",
    )
    parser.add_argument(
        "run_dir",
        metavar="RUN_DIR",
        type=str,
        nargs="*",
        help="Runs to calibrate with; of two sizes (1 worker, and as many as a host holds) is best.",
    )
    parser.add_argument(
        "--probe",
        action="store_true",
        help="Calibrate with two runs of 20 s in place of a RUN_DIR.",
    )
    parser.add_argument("--parameters", type=float, default=11.7e6, help="Of the probe's network.")
    parser.add_argument(
        "--batch-size",
        type=Optional[int],
        help="Images a batch (default: the run's; 32 with --probe).",
    )
    parser.add_argument(
        "--step-ms",
        type=Optional[float],
        help="A batch on a GPU (default: the run's; 100 with --probe).",
    )
    parser.add_argument(
        "--spread", type=Optional[float], help="Standard deviation of a batch's time over its mean."
    )
    parser.add_argument(
        "--workers",
        type=str,
        default=DEFAULT_WORKERS,
        metavar="N,N,...",
        help=f"Up to {MAX_WORKERS}.",
    )
    parser.add_argument(
        "--stages",
        type=Optional[int],
        help="GPUs that a worker's network is cut over (default: the run's).",
    )
    parser.add_argument(
        "--micro-batches",
        type=Optional[int],
        help="Parts of a batch that pass through the stages one after "
        "the other (default: the run's).",
    )
    parser.add_argument(
        "--balance",
        type=Optional[float],
        help="Mean time of a stage over that of the slowest one (default: "
        "the run's if it has as many stages, else 1).",
    )
    parser.add_argument(
        "--servers",
        type=int,
        default=1,
        help=f"Up to {MAX_SERVERS}, which share the weights, each with cores of its own.",
    )
    parser.add_argument(
        "--n-push",
        type=str,
        default="",
        metavar="N|auto",
        help="Batches a push (default: the run's).",
    )
    parser.add_argument(
        "--n-fetch", type=Optional[int], help="Batches between two fetches (default: n_push)."
    )
    parser.add_argument("--overlap", action="store_true", help="Compute while a push is under way.")
    parser.add_argument(
        "--wire",
        type=Optional[Literal[(*WIRES, TOPK)]],
        help="Numbers on a link (default: the run's --exchange.wire).",
    )
    parser.add_argument(
        "--link-gbit",
        type=Optional[float],
        metavar="GBIT",
        help="Gbit/s of each host's link, if the runs were on one host and the plan is for several.",
    )
    parser.add_argument(
        "--link-latency-us", type=float, default=0.0, metavar="US", help="Its latency, one way."
    )
    parser.add_argument(
        "--launcher",
        type=str,
        default="",
        help="What starts the ranks of a probe here (default: mpirun).",
    )
    parser.add_argument(
        "--out",
        type=str,
        default="plan",
        metavar="DIR",
        help="Where plan.html and plan.json are written.",
    )
    return parser


def _observe(options: jsonargparse.Namespace) -> tuple[list[Observation], int, str]:
    """Return what the runs measured, their parameters, and what their samples are called; a probe's are made first."""
    if options.probe == bool(options.run_dir):
        raise ConfigError(
            "give runs to calibrate with (RUN_DIR ...), or --probe, which makes two short ones; not both."
        )
    if not options.probe:
        runs = [RunDir.open_told(path) for path in options.run_dir]
        first = summarize(runs[0])
        return [observe(run) for run in runs], first.num_parameters, first.unit
    with tempfile.TemporaryDirectory(prefix="asgd_mpi_probe_") as place:
        runs = probe(Path(place), int(options.parameters), options.launcher)
        return [observe(run) for run in runs], int(options.parameters), "images"


def probe(place: Path, num_parameters: int, launcher: str = "") -> list[RunDir]:
    """Train an emulated network with 1 worker, and with as many as this host has cores (2 to 8). Raises RunDirError."""
    from asgd_mpi.model import emulated  # loads torch

    begin, runs = supervise.find_launcher(launcher), []
    for num_workers in (1, min(8, max(2, os.cpu_count() or 2))):
        run, output = RunDir(place / f"workers{num_workers}"), place / f"workers{num_workers}.txt"
        print(f"probe: {num_workers} worker(s), {PROBE_S:.0f} s", file=sys.stderr, flush=True)
        supervise.train(
            begin,
            num_workers,
            [
                "--run.dir",
                str(run.path),
                "--model",
                "asgd_mpi.model.emulated:network",
                "--data.source",
                "synthetic",
                "--data.image_size",
                "8",
                "--data.augment",
                "none",
                "--data.batch_size",
                "1",
                "--data.threads",
                "1",
                "--data.lease_batches",
                "64",
                "--epochs",
                "1",
                "--rule.momentum",
                "0",
                "--rule.weight_decay",
                "0",
                "--schedule.name",
                "constant",
                "--schedule.warmup_epochs",
                "0",
                "--run.validate_every",
                "1000",
                "--run.progress",
                "none",
                "--compute.device",
                "cpu",
                "--compute.threads",
                "1",
                "--checkpoint.every_s",
                "0",
            ],
            PROBE_S,
            output,
            env={emulated.PARAMETERS: str(num_parameters), emulated.STEP_S: str(PROBE_STEP_S)},
        )
        if supervise.trained_s(run) < PROBE_S / 2:
            raise RunDirError(
                f"the probe with {num_workers} worker(s) did not train:\n{supervise.last_words(output)}"
            )
        runs.append(run)
    return runs


def _as_asked(costs: Costs, options: jsonargparse.Namespace, num_parameters: int) -> Costs:
    """Return the calibrated costs, with what the options set. Raises ConfigError."""
    n_push = _n_push(options.n_push) if options.n_push else costs.n_push
    n_fetch = options.n_fetch if options.n_fetch or options.n_push else costs.n_fetch
    # on one GPU
    if options.probe:
        batch, step_ms = 32, 100.0
    else:
        batch, step_ms = costs.batch, 1e3 * costs.cut(1, 1).step_s
    batch, step_ms = (
        options.batch_size or batch,
        step_ms if options.step_ms is None else options.step_ms,
    )
    stages, parts = options.stages or costs.num_stages, options.micro_batches or costs.micro_batches
    balance = options.balance or (costs.balance if stages == costs.num_stages else 1.0)
    if not (math.isfinite(step_ms) and step_ms > 0):
        raise RunDirError(
            "the steps of these runs took no time, so there is nothing to calibrate with: give --step-ms."
        )
    if stages > 1 and (options.overlap or n_push == "auto"):
        raise ConfigError(
            f"--stages {stages} with {'--overlap' if options.overlap else '--n-push auto'}: a training with "
            "stages cannot overlap. Leave one of them out."
        )
    if n_fetch and (n_push == "auto" or n_fetch % n_push):
        raise ConfigError(
            f"--n-fetch {n_fetch}: give a multiple of the batches of a push, {n_push}."
        )
    if options.link_gbit is None:
        link_s = 0.0
    else:
        link_s = 8 * WIRES["float32"] * num_parameters / (options.link_gbit * 1e9)
    alone = dataclasses.replace(costs.cut(1, 1), step_s=step_ms / 1e3)
    return dataclasses.replace(
        alone.cut(stages, parts, balance),
        batch=batch,
        spread=costs.spread if options.spread is None else options.spread,
        n_push=n_push,
        n_fetch=n_fetch,
        overlap=options.overlap,
        wire=options.wire or costs.wire,
        fetch_wire=kept_fetch_wire(costs.fetch_wire) if options.wire else costs.fetch_wire,
        num_servers=options.servers,
        link_s=link_s,
        latency_s=options.link_latency_us / 1e6,
    )


def _n_push(text: str) -> int | str:
    if text == "auto":
        return text
    limits.demand(
        text.isdecimal() and 0 < int(text) <= limits.MOST,
        "--n-push",
        text,
        "give 1 batch or more, or auto",
    )
    return int(text)


def observe(run: RunDir) -> Observation:
    """Return what a run measured, over all its workers. Raises RunDirError if it holds too little."""
    summary = summarize(run)
    busy = [rank for rank in summary.ranks if rank.role == "worker" and rank.counts["pushes"]]
    if not busy or not summary.apply_s:
        raise RunDirError(
            f"{run.path} holds no worker's intervals with pushes, or none of the server's: nothing to "
            "calibrate with. Take a run that trained for a few seconds."
        )
    if len(summary.crews) > 1:
        raise RunDirError(
            f"{run.path} had {workers(summary.crews)}, one start after the other: what it measured is of none of them. "
            "Calibrate with a run that kept its workers."
        )
    n_push, rule = summary.config.get("exchange.n_push", 1), summary.config.get("rule.name", "asgd")
    if n_push == "auto" or summary.config.get("exchange.overlap") or rule in WAITING:
        raise RunDirError(
            f"{run.path} hides what a push costs behind the computation, or behind other workers (overlap, "
            f"n_push auto, rules {', '.join(WAITING)}): calibrate with a run that does not; the plan may then have --overlap."
        )
    if summary.settings.get("rule.steps_by_speed"):
        raise RunDirError(
            f"{run.path} had pushes of as many batches as each worker's speed allowed (--rule.steps_by_speed): calibrate with a run "
            "whose pushes are alike."
        )
    if summary.config.get("exchange.servers", 1) > 1:
        raise RunDirError(
            f"{run.path} had several servers, which wait for each other: calibrate with a run that had one; the plan "
            "may then have --servers."
        )
    if summary.pipelines and summary.pipelines.are_columns:
        raise RunDirError(
            f"{run.path} had a network in columns, whose exchange of maps the model does not know: calibrate "
            "with a run that was not cut, or cut into a chain."
        )
    pushes = sum(rank.counts["pushes"] for rank in busy)
    images = sum(rank.counts["images"] for rank in busy) / pushes
    total = {
        phase: sum(rank.phases[phase] for rank in busy) for phase in ("data", "compute", "fetch")
    }
    cycles = [
        sum(rank.phases[phase] for phase in ("data", "compute", "push", "fetch"))
        / rank.counts["pushes"]
        for rank in busy
    ]
    fetches = sum(rank.counts["fetches"] for rank in busy) or pushes
    step_s = (total["data"] + total["compute"]) / pushes / n_push
    spread = _spread(
        [
            (interval.data + interval.compute, interval.pushes * n_push)
            for rank in busy
            for interval in _intervals(run, rank.rank)
        ],
        step_s,
    )
    apply_spread = _spread(
        [(interval.apply, interval.pushes) for interval in _intervals(run, 0)], summary.apply_s
    )
    costs = Costs(
        images / n_push,
        step_s,
        summary.apply_s,
        total["fetch"] / fetches,
        spread=spread,
        apply_spread=apply_spread,
        n_push=n_push,
        n_fetch=summary.config.get("exchange.n_fetch"),
        wire=summary.config.get("exchange.wire", "float32"),
        density=summary.settings.get("exchange.density", 0.01),
        fetch_wire=summary.settings.get("exchange.fetch_wire"),
        num_stages=summary.pipelines.num_stages if summary.pipelines else 1,
        micro_batches=summary.config.get("compute.micro_batches", 1),
        balance=_balance(summary.pipelines),
    )
    return Observation(costs, len(busy), sum(images / cycle for cycle in cycles))


def _balance(found: Pipelines | None) -> float:
    """Mean time of a stage over that of the slowest one; 1 if nothing is cut."""
    if found is None:
        return 1.0
    busy = [
        sum(use.passes for use in found.stages if use.stage == stage)
        for stage in range(found.num_stages)
    ]
    return sum(busy) / len(busy) / max(busy) if max(busy) else 1.0


def _intervals(run: RunDir, number: int) -> list[Interval]:
    return [
        event
        for rank, _, path in run.metrics_files
        if rank == number
        for event in read_events(path)
        if isinstance(event, Interval)
    ]


def _spread(sums: list[tuple[float, int]], mean_s: float) -> float:
    """Standard deviation over mean of one time, from (sum, number) of many: a sum of n times has n times the variance."""
    weighted = [(seconds - times * mean_s) ** 2 / times for seconds, times in sums if times]
    if weighted and mean_s:
        return min(1.0, math.sqrt(sum(weighted) / len(weighted)) / mean_s)
    return 0.0


def verdict(found: Sequence[Answer]) -> list[str]:
    """Return the answers, as lines of text."""
    return [f"{answer.question} {answer.short}. {answer.text}" for answer in found]


def _smaller_batches(options: jsonargparse.Namespace, num_workers: int) -> list[str]:
    """Say that a run of so many workers may take smaller batches than the one that the plan was made from, if it may."""
    if options.probe or options.batch_size:
        return []
    run = RunDir.open(options.run_dir[0])
    if not run.config.exists():
        return []
    config, found = written.read(run.config), summarize(run)
    samples = found.num_samples
    if config.data.batch_size is None or config.run.epochs is None:  # an old record
        return []
    divisor = rulebook.batch_divisor(config, num_workers, samples)
    # a run of many may have divided its batch already, and the recipe's is not on record
    if divisor == 1 or rulebook.batch_divisor(config, found.num_workers, samples) > 1:
        return []
    images = config.data.batch_size // divisor
    return [
        f"with {num_workers} workers a training as short as this one, without --batch-size and --lr, takes batches of {images} "
        f"(docs/rules.md): plan with --batch-size {images}"
    ]


def describe(
    costs: Costs,
    outcomes: Sequence[Outcome],
    moves: Sequence[tuple[str, float, float]],
    unit: str = "images",
) -> list[str]:
    """Return the plan, as lines of text."""
    pushes = f"n_push {costs.n_push}, n_fetch {costs.n_fetch or costs.n_push}{', overlap' if costs.overlaps else ''}"
    lines = [
        f"a batch of {number(costs.batch, 0)} {unit}: step {short(costs.step_s)} (spread {percent(costs.spread, 0)}); "
        f"a push ({pushes}): travel {short(costs.travel_s)}, update {short(costs.apply_s)} (spread "
        f"{percent(costs.apply_spread, 0)}), {short(costs.overhead_s)} more and {short(costs.shared_s)} for each batch one at a "
        f"time, fetch {short(costs.fetch_s)}"
        + (
            f", link {short(costs.sent_s)} for a push, {short(costs.read_s)} for a fetch, and {short(costs.latency_s)} of latency"
            if costs.link_s
            else ""
        )
        + (f"; {costs.num_servers} servers share it" if costs.num_servers > 1 else "")
    ]
    if costs.num_stages > 1:
        lines.append(
            f"a worker is {costs.num_stages} stages, each on a GPU: a step takes {percent(costs.step_share, 0)} of that "
            f"of one GPU ({short(costs.cut(1, 1).step_s)}); with {costs.micro_batches} micro-batches the stages wait for "
            f"each other {percent(costs.bubble, 0)} of the time, and the slowest one sets the pace (balance "
            f"{percent(costs.balance, 0)})"
        )
    lines.append(
        f"workers   ranks {unit + '/s':>11}  efficiency  staleness  server busy  queue busy  batches a push"
    )
    lines += [
        f"{row.num_workers:7,} {costs.num_ranks(row.num_workers):7,} {row.images_per_s:11,.1f} "
        f"{percent(row.images_per_s / costs.alone / row.num_workers, 0):>11} {row.staleness:10,.1f} "
        f"{percent(row.server_busy, 0):>12} {percent(row.queue_busy, 0):>11} {row.batches:15,.1f}"
        for row in outcomes
    ]
    if math.isfinite(costs.limit):
        then = f"{number(costs.limit, 0)} {unit}/s is the limit (the {whose(costs)})"
    else:
        then = f"pushes wait (for the {whose(costs)}), and sum up more batches"
    lines.append(f"the knee is at about {workers([round(costs.knee)])}: with more, {then}")
    lines.append(f"what would move {workers([outcomes[-1].num_workers])}:")
    lines += [
        f"  {name}: {100 * gain:+.0f} % {unit}/s, the knee at {number(knee, 0)}"
        for name, gain, knee in moves
    ]
    return lines


def advice(costs: Costs, num_parameters: int) -> list[str]:
    """Return which exchange the link of the plan bears, in a line; nothing without one, or for stages, which refuse most of them."""
    if not costs.link_s or costs.num_stages > 1:
        return []
    speed = WIRES["float32"] * num_parameters / costs.link_s
    measured = Measured(num_parameters, costs.step_s, speed, speed)
    return [f"for {exchange_choice.advice_told(measured, costs.density)}"]


def _write(
    out: Path,
    costs: Costs,
    observations: Sequence[Observation],
    outcomes: Sequence[Outcome],
    moves: Sequence[tuple[str, float, float]],
    missed: Sequence[Miss],
    unit: str,
) -> None:
    from asgd_mpi.report.plan_page import page  # loads matplotlib

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirError(
            f"cannot make {out}: {error.strerror}. Give another directory with --out DIR."
        ) from error
    facts = {
        "costs": costs,
        "knee_workers": _finite(costs.knee),
        "limit_images_per_s": _finite(costs.limit),
        "observed": observations,
        "predicted": outcomes,
        "calibration": missed,
        "bubble": costs.bubble,
        "ranks": [costs.num_ranks(outcome.num_workers) for outcome in outcomes],
        "moves": [
            {"change": name, "gain": gain, "knee_workers": _finite(knee)}
            for name, gain, knee in moves
        ],
    }
    write_whole(
        out / "plan.json", msgspec.json.format(msgspec.json.encode(facts), indent=2) + b"\n"
    )
    write_whole(
        out / "plan.html",
        page(
            costs,
            observations,
            outcomes,
            answers(costs, outcomes, moves, missed, unit),
            describe(costs, outcomes, moves, unit),
            unit,
        ).encode(),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    sys.exit(main())

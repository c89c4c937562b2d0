"""`python -m asgd_mpi.simulate [train options] --workers 64`: train in one process, on a virtual clock, without MPI.

Prints accuracy against virtual time; `--out` leaves a run directory, for report, replay and evaluate.
"""

from __future__ import annotations

from asgd_mpi.process import interpreter

if __name__ == "__main__":  # before anything heavy is imported
    interpreter.begin()

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import torch

from asgd_mpi.errors import tell
from asgd_mpi import plan
from asgd_mpi.config import command_line, limits, rulebook
from asgd_mpi.config import written
from asgd_mpi.config.options import Config
from asgd_mpi.offline import forecast
from asgd_mpi.offline.simulation import Simulation, Times, simulate
from asgd_mpi.process import ending
from asgd_mpi.record.checkpoint import Manifest
from asgd_mpi.record.disk import write_whole
from asgd_mpi.record.events import End, EventLog, Note, Push, Start
from asgd_mpi.record.progress import Progress
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.report.units import count, number, percent, seconds
from asgd_mpi.runtime import preflight, trust
from asgd_mpi.runtime.prepare import as_given, configured
from asgd_mpi.runtime.checkpointer import Checkpointer
from asgd_mpi.task import OpenedTask, complete, for_workers, open_task, told

MAX_WORKERS = 4096
TIMES = {"step": 10.0, "push": 1.0, "apply": 0.1, "fetch": 1.0}  # milliseconds


def times_of(runs: Sequence[RunDir]) -> Times:
    """Return what the workers and the server of recorded runs took, as `asgd_mpi.plan` sees them. Raises RunDirError."""
    costs = forecast.calibrate([plan.observe(run) for run in runs])
    return Times(costs.step_s, costs.travel_s, costs.serve_s, costs.fetch_s, costs.spread)


# ---- what it leaves behind


def write_run(run: RunDir, task: OpenedTask, simulation: Simulation) -> None:
    """Write the log, the metrics, the last version and the marker of success, as a run does; time begins at 0."""
    config, plan_, exchange = task.config, simulation.plan, task.config.exchange
    computation, score = simulation.computation, simulation.scores[-1]
    write_whole(run.config, written.record(config, plan_.num_workers).encode())
    write_whole(
        run.versions,
        msgspec.json.encode({"torch": str(torch.__version__), "mpi": "none: simulated"}),
    )
    with _log(run.pushes) as pushes:
        for push in simulation.pushes:
            pushes.write(push)
        _save(run, task, simulation, pushes)
    for rank, book in enumerate(simulation.books):
        with _log(run.metrics_of(rank)) as log:
            log.write(
                Start(
                    0.0,
                    rank,
                    "worker" if rank else "server",
                    "simulated",
                    "cpu",
                    plan_.num_workers,
                    computation.flat.num_floats,
                    plan_.num_samples,
                    plan_.total_samples,
                    not exchange.overlap and exchange.n_fetch in (1, exchange.n_push),
                    torch.get_num_threads(),
                )
            )
            if not rank:
                log.write(Note(0.0, f"simulated, on a virtual clock: {simulation.times}"))
            for event in book.events:
                log.write(event)
            dead = rank and simulation.workers[rank - 1].is_dead
            log.write(
                End(
                    simulation.now,
                    "failed" if dead else "finished",
                    "killed on purpose" if dead else "",
                )
            )
    write_whole(
        run.finished,
        msgspec.json.format(
            msgspec.json.encode(
                {
                    "status": 0,
                    "version": score.version,
                    **score.named,
                }
            )
        ),
    )


@contextmanager
def _log(path: Path) -> Iterator[EventLog]:
    log = EventLog(path)
    yield log
    log.close()


def _save(run: RunDir, task: OpenedTask, simulation: Simulation, pushes: EventLog) -> None:
    """Write the last version as a checkpoint."""

    def freeze_(weights: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        weights.copy_(simulation.latest.weights)
        for name, vector in state.items():
            vector.copy_(computation.rule.state[name])

    computation = simulation.computation
    about = Manifest(0, 0, task.config.model.name, **task.facts)
    checkpointer = Checkpointer(
        run, 0, about, computation.flat, computation.rule, task.config.checkpoint.keep, pushes.sync
    )
    checkpointer.begin(1, freeze_, simulation.ledger, None, None, set())
    checkpointer.finish(simulation.latest.version, task.config.run.timeout_s)
    checkpointer.close()


def describe(simulation: Simulation) -> list[str]:
    """Return the course of the training and its sums, as lines of text."""
    pushes = [push for push in simulation.pushes if isinstance(push, Push)]
    lines = ["   time (s)   epoch   version       loss   result"]
    lines += [
        f"{score.when:11.3f} {score.epoch:7.2f} {score.version:9,} {number(score.loss, 4):>10}   {score.result}"
        for score in sorted(simulation.scores, key=lambda score: score.version)
    ]
    last, made = simulation.scores[-1], len(pushes)
    staleness = sum(push.staleness for push in pushes) / made
    dropped = simulation.num_dropped / (made + simulation.num_dropped)
    lines.append(
        f"{count(simulation.plan.num_workers, 'worker')}: {last.result} after "
        f"{seconds(pushes[-1].t)}, {number(simulation.ledger.samples / pushes[-1].t, 0)} {simulation.computation.task.unit} a virtual second, "
        f"mean staleness {staleness:.2f}, {percent(dropped, 1)} of {count(made + simulation.num_dropped, 'push', 'pushes')} "
        "dropped"
    )
    if simulation.of_mean:
        means = (
            f"{name} {number(simulation.of_mean.mean(name), 4)}" for name in simulation.of_mean.sums
        )
        lines.append(f"running mean of the weights: {', '.join(means)}")
    if simulation.is_degraded:
        lines.append(
            f"{len(simulation.ledger.members)} of {count(simulation.plan.num_workers, 'worker')} were left at the end"
        )
    return lines


# ---- the command line


MILLISECONDS = limits.at_least(0), "give milliseconds, 0 or more"
RANGES = {
    "workers": (limits.at_least(1, MAX_WORKERS), f"from 1 to {MAX_WORKERS} can be simulated"),
    "step-time": (
        limits.above(0),
        "steps that take no time would leave no order; give milliseconds above 0",
    ),
    "push-time": MILLISECONDS,
    "apply-time": MILLISECONDS,
    "fetch-time": MILLISECONDS,
    "spread": (limits.at_least(0, 10), "give a standard deviation over the mean, from 0 to 10"),
}


def make_parser() -> command_line.FirstParser:
    parser = command_line.FirstParser(
        prog="python -m asgd_mpi.simulate",
        ranges=RANGES,
        description="Train in one process on a virtual clock, with any number of workers.",
        epilog="Every other option is one of asgd_mpi.train: --config FILE, --rule sync, --epochs 12, "
        "--inject kill@t=3s:rank1 (virtual seconds), ...; `python -m asgd_mpi.train --help all` lists them.",
    )
    parser.add_argument(
        "--workers", type=int, default=8, metavar="N", help=f"Up to {MAX_WORKERS} (default: 8)."
    )
    for name, default in TIMES.items():
        parser.add_argument(
            f"--{name}-time", type=float, metavar="MS", help=f"Milliseconds (default: {default:g})."
        )
    parser.add_argument(
        "--spread",
        type=float,
        metavar="S",
        help="Standard deviation of a step over its mean, log-normal (default: 0.1).",
    )
    parser.add_argument(
        "--times-from",
        nargs="+",
        metavar="RUN_DIR",
        help="Take the times from recorded runs; of two sizes is best (see asgd_mpi.plan).",
    )
    parser.add_argument(
        "--slow",
        default="",
        metavar="FACTORx@RANK,...",
        help="Stragglers, such as 3x@2,5x@7; short for --inject slow:3x@rank2,slow:5x@rank7.",
    )
    parser.add_argument(
        "--out",
        default="",
        metavar="DIR",
        help="Write a run directory, for report, replay and evaluate.",
    )
    return parser


@ending.of_command
def main(arguments: Sequence[str] | None = None) -> int:
    options, rest = make_parser().read(arguments)
    config = _config(rest, options.slow)
    times = _times(options)
    task = open_task(complete(config))
    task, suited = for_workers(task, as_given(rest, config, task), options.workers)
    for line in [*told(task), *suited]:
        tell(line, file=sys.stderr)
    task, notes, _ = preflight.try_out_(task, task.first_module())
    for note in [*notes, *rulebook.doubts(task.config, options.workers, task.train.num_samples)]:
        tell(note, file=sys.stderr)
    rulebook.check(task.config, options.workers)
    run = RunDir.create(options.out, "") if options.out else None
    plan_ = task.plan(options.workers)
    progress = Progress(config.run.progress, plan_.total_samples, plan_.num_samples, unit=task.unit)
    # several gain nothing at small networks
    torch.set_num_threads(task.config.compute.threads or 1)
    simulation = simulate(task, options.workers, times, progress)
    lines = describe(simulation)
    if run:
        write_run(run, task, simulation)
        lines += [
            *filter(None, [trust.record(config.model.name, run.path)]),
            f"the run directory is {run.path}",
        ]
    tell("\n".join(lines))
    return 0


def _config(arguments: list[str], slow: str) -> Config:
    config = configured(arguments)
    limits.demand(
        not config.run.resume and not config.run.dry_run,
        "--resume" if config.run.resume else "--dry-run",
        config.run.resume or "true",
        "a simulation begins anew, and is over soon",
    )
    for option, asked in (
        ("--servers", config.exchange.servers),
        ("--stages", config.stages.number),
    ):
        limits.demand(
            asked == 1,
            option,
            asked,
            "the weights are the same to the bit with any number; a simulation has one, and "
            "asgd_mpi.plan predicts how fast several are",
        )
    limits.demand(
        config.model.batchnorm == "recalibrate",
        "--model.batchnorm",
        config.model.batchnorm,
        "a simulation measures the "
        "statistics anew before it validates, and has no others; leave it at recalibrate",
    )
    stragglers = [
        f"slow:{entry.strip().replace('@', '@rank')}" for entry in slow.split(",") if entry.strip()
    ]
    return replace(
        config,
        run=replace(config.run, inject=",".join([*filter(None, [config.run.inject]), *stragglers])),
    )


def _times(options: argparse.Namespace) -> Times:
    """Return the given times over the recorded ones, or over the defaults."""
    if options.times_from:
        base = times_of([RunDir.open_told(path) for path in options.times_from])
    else:
        base = Times(*(milliseconds / 1000 for milliseconds in TIMES.values()), spread=0.1)
    given = {
        f"{name}_s": value / 1000
        for name in TIMES
        if (value := getattr(options, f"{name}_time")) is not None
    }
    if options.spread is not None:
        given["spread"] = options.spread
    times = replace(base, **given)
    for name in TIMES:  # what runs have measured, too
        limits.check_number(
            f"--{name}-time", 1000 * getattr(times, f"{name}_s"), RANGES[f"{name}-time"]
        )
    limits.check_number("--spread", times.spread, RANGES["spread"])
    return times


if __name__ == "__main__":
    interpreter.loaded()
    interpreter.end(main())

"""`python -m asgd_mpi.report RUN_DIR [RUN_DIR ...]`: what runs did and where their time went, from their directories alone.

Several are compared (`compare`). `--audit`, `--trace` and `--follow` do that instead (`audit`, `trace`, `follow`). For one,
prints its short form (`brief`; all of it with --full) and writes `report/report.html`, `report/report.md` and
`report/report.json` (a `Summary`, and the advice). Works on a run that finished, failed, was killed or is still going, on any
machine: it imports neither MPI nor torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import jsonargparse
import msgspec

from asgd_mpi.config import command_line, limits
from asgd_mpi.errors import ConfigError, RunDirError, printable, tell
from asgd_mpi.process import ending
from asgd_mpi.record import history
from asgd_mpi.record.disk import make_directory, write_whole
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.summary import Summary, summarize
from asgd_mpi.report.advice import advise
from asgd_mpi.report.audit import account
from asgd_mpi.report.brief import brief
from asgd_mpi.report.compare import Comparison, compare, measure_of
from asgd_mpi.report.cost import Cost, price
from asgd_mpi.report.follow import follow
from asgd_mpi.report.markdown import render, render_comparison
from asgd_mpi.report.trace import write_trace
from asgd_mpi.report.units import size

PRICE = limits.at_least(0), "a price is 0 or more, in any currency"
ACCURACY = limits.above(0, 100), "give a top-1 accuracy in percent, above 0 and up to 100"
METRIC = limits.at_least(-limits.MOST), "give a value of the task's first metric"
RANGES = {
    "price-per-gpu-hour": PRICE,
    "price-per-kwh": PRICE,
    "target-accuracy": ACCURACY,
    "target": METRIC,
    "num-gpus": (limits.at_least(1), "give the GPUs that the workers shared, 1 or more"),
}


def make_parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog="python -m asgd_mpi.report",
        description="Report what a run did and where its time went, or compare several.",
        ranges=RANGES,
    )
    parser.add_argument(
        "run_dir",
        metavar="RUN_DIR",
        type=str,
        nargs="+",
        help="A directory that asgd_mpi.train made; several are compared, and that is written to --out.",
    )
    parser.add_argument(
        "--no-write", action="store_true", help="Only print; leave RUN_DIR/report as it is."
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="Print the whole report as Markdown, not its short form.",
    )
    parser.add_argument(
        "--follow",
        action="store_true",
        help="Show the state of one run until it ends, here and on a page (RUN_DIR/report/live.html) that a browser loads "
        "anew by itself.",
    )
    parser.add_argument(
        "--audit",
        action="store_true",
        help="Show which samples of each epoch were due, used, repeated and "
        "missing, and what was checked; write nothing. Exit status 1 if something is violated.",
    )
    parser.add_argument(
        "--trace",
        type=str,
        default="",
        metavar="FILE.json",
        help="Write a trace of one run for Perfetto or "
        "chrome://tracing, and nothing else; train with --record.spans 10000 to see single steps.",
    )
    parser.add_argument(
        "--price-per-gpu-hour",
        type=Optional[float],
        metavar="PRICE",
        help="What a GPU costs in an hour, in any currency: adds the cost.",
    )
    parser.add_argument(
        "--price-per-kwh",
        type=Optional[float],
        metavar="PRICE",
        help="Of one run: adds the energy of the GPUs, where it was measured, to the cost.",
    )
    parser.add_argument(
        "--num-gpus",
        type=Optional[int],
        metavar="GPUS",
        help="GPUs of the one run, if its workers shared them (default: one for each worker).",
    )
    parser.add_argument(
        "--target-accuracy",
        type=Optional[float],
        metavar="PERCENT",
        help="Of a comparison: top-1 accuracy "
        "whose time and cost are compared (default: the best that all runs reach).",
    )
    parser.add_argument(
        "--target",
        type=Optional[float],
        metavar="VALUE",
        help="The same of a task with metrics of its own: a value of the first of them.",
    )
    parser.add_argument(
        "--out",
        type=str,
        default="comparison",
        metavar="DIR",
        help="Where a comparison is written.",
    )
    return parser


@dataclass(frozen=True)
class Target:
    """What runs are compared at, of an accuracy (0..1) or of a task's first metric."""

    value: float
    is_accuracy: bool


@ending.of_command
def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().read(arguments)
    runs = [RunDir.open_told(path) for path in options.run_dir]
    if options.follow and len(runs) > 1:
        raise ConfigError(
            f"--follow shows one run at a time, and {len(runs)} are given: start it once for each."
        )
    if options.trace:
        return _trace(runs, Path(options.trace))
    if options.audit:
        return _audit(runs)
    if options.follow:
        follow(runs[0], writes_page=not options.no_write)
    elif len(runs) > 1:
        _compare(runs, options)
    else:
        _report(runs[0], options)
    return 0


def _trace(runs: list[RunDir], path: Path) -> int:
    if len(runs) > 1:
        raise ConfigError(
            f"--trace writes one run to a file, and {len(runs)} are given: start it once for each."
        )
    for problem in write_trace(runs[0], path):
        tell(problem, file=sys.stderr)
    print(
        f"trace: {path} ({size(path.stat().st_size)}); open it in ui.perfetto.dev or chrome://tracing"
    )
    return 0


def _audit(runs: list[RunDir]) -> int:
    """Print the account of each run; returns 1 if one of them is violated."""
    accounts = [account(summarize(run), history.gap(run)) for run in runs]
    print("\n".join(one.text for one in accounts), end="")
    return int(any(one.violations for one in accounts))


def _report(run: RunDir, options: jsonargparse.Namespace) -> None:
    summary = summarize(run)
    cost = None
    if options.price_per_kwh is not None and summary.energy_kwh is None:
        raise ConfigError(
            f"--price-per-kwh {options.price_per_kwh:g}: {run.path} holds no energy. It is measured on GPUs "
            "that count it, with nvidia-ml-py (pip install 'asgd_mpi[nvml]')."
        )
    if options.price_per_gpu_hour is not None or options.price_per_kwh is not None:
        cost = price(
            summary, options.price_per_gpu_hour or 0.0, options.num_gpus, options.price_per_kwh
        )
    markdown = render(summary, cost)
    text = markdown if options.full else brief(summary, cost)
    try:
        if not options.no_write:
            write(run, summary, markdown, cost)
            if not options.full:
                text += _where(run.report, "report")
    finally:  # files first, since whoever reads the text may leave; the text also where no file can be
        print(text, end="")


def _where(directory: Path, name: str) -> str:
    """Return the lines that say where the files lie."""
    found = (("page", "html"), ("text", "md"), ("numbers", "json"))
    return "".join(
        f"{what + ':':<9}{printable(str(directory / name))}.{kind}\n" for what, kind in found
    )


def _compare(runs: list[RunDir], options: jsonargparse.Namespace) -> None:
    out = None if options.no_write else Path(options.out)
    write_comparison(runs, out, target_of(options), options.price_per_gpu_hour)


def target_of(options: jsonargparse.Namespace) -> Target | None:
    """Return what --target-accuracy or --target asks for. Raises ConfigError for both."""
    if options.target is not None and options.target_accuracy is not None:
        raise ConfigError("--target-accuracy is of images, --target of other tasks: give one.")
    if options.target is not None:
        return Target(options.target, is_accuracy=False)
    if options.target_accuracy is not None:
        return Target(options.target_accuracy / 100, is_accuracy=True)
    return None


def write_comparison(
    runs: Sequence[RunDir],
    out: Path | None,
    target: Target | None = None,
    price_per_gpu_hour: float | None = None,
) -> Comparison:
    """Print the comparison, and write `comparison.html`, `.md` and `.json` into `out`, if given. Raises RunDirError."""
    summaries = [summarize(run) for run in runs]
    measure = measure_of(summaries)
    if target is not None and target.is_accuracy != measure.is_accuracy:
        raise ConfigError(
            f"these runs are judged by {measure.name}: give the value to compare them at by --{measure.option}."
        )
    comparison = compare(summaries, target and target.value, price_per_gpu_hour)
    markdown, where = render_comparison(comparison), ""
    try:
        if out is not None:
            from asgd_mpi.report.comparison import page

            write_whole(_directory(out.resolve()) / "comparison.md", markdown.encode())
            write_whole(out / "comparison.json", _json(msgspec.to_builtins(comparison)))
            write_whole(out / "comparison.html", page(comparison, summaries).encode())
            where = f"\n{_where(out, 'comparison')}"
    finally:
        print(markdown + where, end="")
    return comparison


def write(run: RunDir, summary: Summary, markdown: str, cost: Cost | None = None) -> None:
    """Write `report/report.html`, `report.md` and `report.json`. Raises RunDirError."""
    # loads matplotlib: a rank of a run that only trains does without
    from asgd_mpi.report.page import page

    facts = msgspec.to_builtins(summary) | {
        "advice": advise(summary, cost),
        "cost": msgspec.to_builtins(cost),
    }
    out = _directory(run.report)
    write_whole(out / "report.md", markdown.encode())
    write_whole(out / "report.json", _json(facts))
    write_whole(out / "report.html", page(summary, cost).encode())


def _directory(path: Path) -> Path:
    try:
        make_directory(path)
    except OSError as error:
        raise RunDirError(
            f"cannot make {path}: {error.strerror}. Give --no-write, which only prints the report."
        ) from error
    return path


def _json(facts: dict) -> bytes:
    return msgspec.json.format(msgspec.json.encode(facts), indent=2) + b"\n"

"""`python -m asgd_mpi.report RUN_DIR`: what a run did and where its time went, from its run directory alone.

Prints Markdown and writes `report/report.html`, `report/report.md` and `report/report.json` (a `Summary`, and the advice).
Works on a run that finished, failed, was killed or is still going, on any machine: it imports neither MPI nor torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Optional

import jsonargparse
import msgspec

from asgd_mpi.errors import RunDirError, UserError
from asgd_mpi.record.rundir import RunDir, write_whole
from asgd_mpi.record.summary import Summary, summarize
from asgd_mpi.report.advice import advise
from asgd_mpi.report.cost import Cost, price
from asgd_mpi.report.markdown import render


def make_parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog="python -m asgd_mpi.report", description="Report what a run did and where its time went.")
    parser.add_argument("run_dir", metavar="RUN_DIR", type=str, help="A directory that asgd_mpi.train made.")
    parser.add_argument("--no-write", action="store_true", help="Only print; leave RUN_DIR/report as it is.")
    parser.add_argument("--price-per-gpu-hour", type=Optional[float], metavar="PRICE",
                        help="What a GPU costs in an hour, in any currency: adds the cost.")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    try:
        run = RunDir.open(options.run_dir)
        summary = summarize(run)
        cost = None if options.price_per_gpu_hour is None else price(summary, options.price_per_gpu_hour)
        markdown = render(summary, cost)
        print(markdown, end="")
        if not options.no_write:
            write(run, summary, markdown, cost)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write(run: RunDir, summary: Summary, markdown: str, cost: Cost | None = None) -> None:
    """Write `report/report.html`, `report.md` and `report.json`. Raises RunDirError."""
    from asgd_mpi.report.page import page  # loads matplotlib: a rank of a run that only trains does without

    try:
        run.report.mkdir(exist_ok=True)
    except OSError as error:
        raise RunDirError(f"cannot make {run.report}: {error.strerror}. --no-write only prints the report.") from error
    facts = msgspec.to_builtins(summary) | {"advice": advise(summary, cost), "cost": msgspec.to_builtins(cost)}
    write_whole(run.report / "report.md", markdown.encode())
    write_whole(run.report / "report.json", msgspec.json.format(msgspec.json.encode(facts), indent=2) + b"\n")
    write_whole(run.report / "report.html", page(summary, cost).encode())

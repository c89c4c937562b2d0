"""`python -m asgd_mpi.report RUN_DIR`: what a run did and where its time went, from its run directory alone.

Prints Markdown and writes `report/report.md` and, with the same numbers, `report/report.json` (a `Summary`). Works on a
run that finished, failed, was killed or is still going, on any machine: it imports neither MPI nor torch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import jsonargparse
import msgspec

from asgd_mpi.errors import RunDirError, UserError
from asgd_mpi.record.events import PHASES
from asgd_mpi.record.rundir import RunDir, write_whole
from asgd_mpi.record.summary import Summary, summarize

MAX_ROWS = 20     # of a table that grows with the length of the run
BAR_WIDTH = 40    # characters
NONE = "n/a"
MARKUP = re.compile(r"[\\`*\[\]<>|&~$]|(?<![^\W_])_|_(?![^\W_])")  # an underscore within a word is harmless


def main(arguments: Sequence[str] | None = None) -> int:
    parser = jsonargparse.ArgumentParser(
        prog="python -m asgd_mpi.report", description="Report what a run did and where its time went.")
    parser.add_argument("run_dir", metavar="RUN_DIR", type=str, help="A directory that asgd_mpi.train made.")
    parser.add_argument("--no-write", action="store_true", help="Only print; leave RUN_DIR/report as it is.")
    options = parser.parse_args(arguments)
    try:
        run = RunDir.open(options.run_dir)
        summary = summarize(run)
        markdown = render(summary)
        print(markdown, end="")
        if not options.no_write:
            write(run, summary, markdown)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def render(summary: Summary) -> str:
    """Lay out the Markdown."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "record"), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, finalize=_plain)
    environment.filters.update(number=_number, rate=_rate, percent=_percent, seconds=_seconds, size=_size, thin=_thin,
                               left_out=lambda rows: max(0, len(rows) - MAX_ROWS), bar=_bar)
    return environment.get_template("report.md.j2").render(
        s=summary, phases=PHASES, epochs=list(zip(summary.epochs, summary.audit.epochs, strict=True)))


def write(run: RunDir, summary: Summary, markdown: str) -> None:
    """Write `report/report.md` and `report/report.json`. Raises RunDirError."""
    try:
        run.report.mkdir(exist_ok=True)
    except OSError as error:
        raise RunDirError(f"cannot make {run.report}: {error.strerror}. --no-write only prints the report.") from error
    write_whole(run.report / "report.md", markdown.encode())
    write_whole(run.report / "report.json", msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n")


def _plain(value: Any) -> Any:
    """Keep a name from being read as Markdown: jinja2 passes every value that it prints through here."""
    if value is None:
        return NONE
    return MARKUP.sub(r"\\\g<0>", " ".join(value.splitlines())) if isinstance(value, str) else value


def _number(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"


def _rate(value: float | None) -> str:
    return NONE if value is None else f"{value:.4g}"


def _percent(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else f"{100 * value:.{digits}f} %"


def _seconds(value: float | None) -> str:
    if value is None:
        return NONE
    if value < 120:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} h"


def _size(num_bytes: float | None) -> str:
    if num_bytes is None:
        return NONE
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"


def _thin(rows: Sequence[Any]) -> list[Any]:
    """Keep at most MAX_ROWS, evenly, with the first and the last."""
    if len(rows) <= MAX_ROWS:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (MAX_ROWS - 1))] for i in range(MAX_ROWS)]


def _bar(count: int, largest: int) -> str:
    return "#" * -(-BAR_WIDTH * count // largest)  # rounded up: one push is seen


if __name__ == "__main__":
    sys.exit(main())

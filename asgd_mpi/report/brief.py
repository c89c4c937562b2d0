"""A run, or several, in at most MOST lines of a terminal; where the whole report is, is said by who wrote it. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from asgd_mpi.errors import one_line
from asgd_mpi.record.summary import Summary
from asgd_mpi.record.unit import one_of
from asgd_mpi.report import units
from asgd_mpi.report.advice import advise, more_workers
from asgd_mpi.report.answers import answers
from asgd_mpi.report.cost import Cost

WIDTH = 98  # columns
HEAD = 16  # columns, of the questions
MOST = 22  # lines; three more say where the files are


def brief(summary: Summary, cost: Cost | None = None) -> str:
    """Lay out one run."""
    lines = [*_lines(summary, cost)]
    if len(lines) > MOST:
        lines = [*lines[: MOST - 1], "... and more in the report"]
    return "".join(f"{line}\n" for line in lines)


def _lines(summary: Summary, cost: Cost | None) -> Iterator[str]:
    config = summary.config
    data = f" on {config['data.path']}" if "data.path" in config else ""
    yield from _wrapped(
        "",
        f"{summary.name}: {summary.outcome}; {config.get('model.name', 'unknown network')}{data}, "
        f"{config.get('rule.name', 'asgd')}, {units.workers(summary.crews)}",
    )
    for answer in answers(summary, cost):
        yield from _wrapped(answer.question, f"{answer.short}. {answer.text}")
    if room := more_workers(summary):
        yield from _wrapped("More workers?", room)
    staleness = summary.staleness
    besides = (
        f"{units.number(summary.epochs_done, 2)} epochs, {units.count(summary.images, one_of(summary.unit))}; staleness "
        f"{units.number(staleness and staleness.mean, 2)} in the mean; server busy {units.percent(summary.server_busy, 0)}"
    )
    if cost:
        besides += f"; cost {cost.total:,.4g}, {cost.gpu_hours:,.3g} GPU hours"
    yield from _wrapped("Besides", besides)
    if summary.best_checkpoint:
        yield from _wrapped("Best version", summary.best_checkpoint.path)
    for problem in summary.problems[:5]:
        yield from _wrapped("Missing", problem)
    if len(summary.problems) > 5:
        yield from _wrapped("Missing", f"and {len(summary.problems) - 5} more")
    more = len(advise(summary, cost))
    if more > 1:
        yield from _wrapped("More", f"{units.count(more, 'piece')} of advice in the report")


def _wrapped(head: str, text: str) -> list[str]:
    first, following = "", "  "
    if head:
        first, following = f"{head:<{HEAD}}", " " * HEAD
    return textwrap.wrap(
        one_line(text),
        WIDTH,
        initial_indent=first,
        subsequent_indent=following,
        break_on_hyphens=False,
    )

"""The reports as Markdown: templates, filled from a `Summary` or a `Comparison`; every value is escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from asgd_mpi.errors import few, one_line
from asgd_mpi.record.events import PHASES
from asgd_mpi.record.summary import Summary
from asgd_mpi.report import units
from asgd_mpi.report.advice import advise
from asgd_mpi.report.compare import Comparison
from asgd_mpi.report.cost import Cost
from asgd_mpi.report.incidents import incidents
from asgd_mpi.report.measure import measures

MAX_ROWS = 20  # of a table that grows with the length of the run or the number of ranks
BAR_WIDTH = 40  # characters
# an underscore within a word is harmless
MARKUP = re.compile(
    r"[\\`*\[\]<>|&~$@]|(?<![^\W_])_|_(?![^\W_])"
    # what some readers make links of
    r"|:(?=//)|(?<=\bwww)\."
    # what begins a heading, a list, a line
    r"|^[#+-](?=[#\s]|$)|^=+$|(?<=^\d)[.)](?=\s)"
)


def render(summary: Summary, cost: Cost | None = None) -> str:
    """Lay out the Markdown of one run."""
    return _template("report.md.j2").render(
        s=summary,
        cost=cost,
        advice=advise(summary, cost),
        phases=PHASES,
        incidents=incidents(summary),
        measures=measures(summary.validations),
        epochs=list(zip(summary.epochs, summary.audit.epochs, strict=True)),
    )


def render_comparison(comparison: Comparison) -> str:
    """Lay out the Markdown of several runs."""
    return _template("comparison.md.j2").render(c=comparison)


def environment(**options: Any) -> jinja2.Environment:
    """Return what reads the templates of this directory, with the filters that Markdown and HTML share."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )
    made.filters.update(
        number=units.number,
        rate=units.rate,
        percent=units.percent,
        seconds=units.seconds,
        size=units.size,
        short=units.short,
        energy=energy,
        thin=thin,
        left_out=left_out,
    )
    return made


def _template(name: str) -> jinja2.Template:
    made = environment(keep_trailing_newline=True, finalize=_plain)
    made.filters.update(count=units.count, workers=units.workers, gpus=gpus, bar=_bar)
    return made.get_template(name)


def gpus(cost: Cost) -> str:
    """`4 GPUs`, `2 ranks without a GPU, each priced as one,`; of a run whose starts had more or fewer, the most."""
    if cost.is_cpu:
        return units.count(cost.num_gpus, "rank") + " without a GPU, each priced as one,"
    return units.count(cost.num_gpus, "GPU")


def energy(energy_kwh: float | None, without: Sequence[int]) -> str:
    """`0.12 kWh`, and whose is not in it."""
    if energy_kwh is None:
        return units.NONE
    told = f"{units.rate(energy_kwh)} kWh"
    if without:
        ranks = "rank" if len(without) == 1 else "ranks"
        told += f" (without that of {ranks} {few(without, MAX_ROWS)}, which was not, or not always, measured)"
    return told


def thin(rows: Sequence[Any]) -> list[Any]:
    """Keep at most MAX_ROWS, evenly, with the first and the last."""
    if len(rows) <= MAX_ROWS:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (MAX_ROWS - 1))] for i in range(MAX_ROWS)]


def left_out(rows: Sequence[Any]) -> int:
    return max(0, len(rows) - MAX_ROWS)


def _plain(value: Any) -> Any:
    """Keep a name from being read as Markdown: jinja2 passes every value that it prints through here."""
    if value is None:
        return units.NONE
    if isinstance(value, str):
        return MARKUP.sub(r"\\\g<0>", one_line(value))
    return value


def _bar(count: int, largest: int) -> str:
    return "#" * -(-BAR_WIDTH * count // largest)  # rounded up: one push is seen

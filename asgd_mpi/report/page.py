"""The report as one HTML page that opens offline: pictures, styles and numbers in one file, everything escaped."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from asgd_mpi.errors import one_line
from asgd_mpi.record.events import PHASES
from asgd_mpi.record.summary import Summary
from asgd_mpi.record.unit import one_of
from asgd_mpi.report import figures, units
from asgd_mpi.report.advice import advise
from asgd_mpi.report.answers import answers
from asgd_mpi.report.cost import Cost, cost_until
from asgd_mpi.report.incidents import incidents
from asgd_mpi.report.measure import measures
from asgd_mpi.report.markdown import environment, energy, gpus

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Live:
    """Of a page of a run that is going on."""

    written: float  # Unix seconds
    every_s: int  # a browser loads it anew so often; 0: the run is over


def page(summary: Summary, cost: Cost | None = None, live: Live | None = None) -> str:
    """Return the page of one run."""
    drawn, missing = figures.pictures(summary)
    shares = {
        rank.rank: {phase: rank.phases[phase] / rank.seconds for phase in PHASES}
        for rank in summary.ranks
        if rank.seconds and rank.role == "worker"
    }
    nothing = dict.fromkeys(PHASES)
    began = summary.started and time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(summary.started))
    return template("page.html.j2").render(
        s=summary,
        cost=cost,
        began=began,
        answers=answers(summary, cost),
        live=live,
        written=live and time.strftime("%H:%M:%S UTC", time.gmtime(live.written)),
        cards=_cards(summary, cost),
        advice=advise(summary, cost),
        pictures=drawn,
        missing=missing,
        phases=[phase for phase in PHASES if phase not in ("apply", "servers", "checkpoint")],
        workers=[(worker, shares.get(worker.rank, nothing)) for worker in summary.workers],
        training=_training(summary),
        traffic=_traffic(summary),
        money=_money(cost, summary.unit) if cost else [],
        cost_until=cost_until,
        machine=_machine(summary),
        incidents=incidents(summary),
        measures=measures(summary.validations),
    )


@cache
def template(name: str) -> jinja2.Template:
    """Return a template of this directory; every value printed by it is escaped for HTML."""
    made = environment(autoescape=True, finalize=_shown)
    made.filters["unbroken"] = _unbroken
    script = (HERE / "page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    made.globals.update(
        css=jinja2.utils.markupsafe.Markup((HERE / "page.css").read_text()),
        script=jinja2.utils.markupsafe.Markup(script),
        script_hash=f"sha256-{digest}",  # no other script of the page is run
    )
    return made.get_template(name)


def _unbroken(text: str) -> jinja2.utils.markupsafe.Markup:
    """Return a sentence whose options (--n-sync) no line end may cut."""
    safe = jinja2.utils.markupsafe.escape(one_line(text))
    marked = re.sub(r"--[\w.-]*\w", r'<span class="option">\g<0></span>', str(safe))
    return jinja2.utils.markupsafe.Markup(marked)


def _shown(value: Any) -> Any:
    """Write out control characters and cut what is too long; jinja2 passes every value that it prints through here."""
    return one_line(value) if type(value) is str else value  # Markup is ours


def _cards(summary: Summary, cost: Cost | None) -> list[tuple[str, str]]:
    """Return the numbers beside the three answers: (value, what it is)."""
    staleness, servers = summary.staleness, summary.config.get("exchange.servers", 1)
    whose = "the server is busy"
    if servers != 1:
        whose = f"rank 0 is busy, the first of {servers} servers"
    cards = [
        (units.seconds(summary.training_s), "training time"),
        (
            units.number(summary.epochs_done, 2),
            f"epochs, {units.count(summary.images, one_of(summary.unit))}",
        ),
        (
            units.percent(summary.server_busy, 0),
            f"of the time {whose}",
        ),
        (
            units.number(staleness and staleness.mean, 2),
            f"mean staleness, largest {units.number(staleness and staleness.max, 0)}",
        ),
    ]
    if cost:
        cards.append((units.rate(cost.total), f"cost of {cost.gpu_hours:,.3g} GPU hours"))
    return cards


def _training(summary: Summary) -> list[tuple[str, str]]:
    starts = len(summary.restarts)
    between = without = ""
    if starts > 1:
        between = f", {units.seconds(summary.paused_s)} of it between {starts} starts"
        without = ", without the time between starts"
    return [
        (
            "duration",
            f"{units.seconds(summary.duration_s)}, from the first Start to the last thing written{between}",
        ),
        ("training", f"{units.seconds(summary.training_s)}, to the last applied push{without}"),
        (
            summary.unit,
            f"{summary.images:,} applied, {summary.images_trained:,} trained by the workers, "
            f"{summary.skipped_images:,} damaged and skipped",
        ),
        ("shards", f"{units.count(summary.read_retries, 'read')} failed and repeated"),
        (
            "learning rate",
            f"{units.rate(summary.lr_first)} first, {units.rate(summary.lr_last)} last",
        ),
        ("parameters", f"{summary.num_parameters:,}" if summary.num_parameters else units.NONE),
    ]


def _traffic(summary: Summary) -> list[tuple[str, str]]:
    return [
        (
            "pushed",
            f"{units.size(summary.bytes_pushed)}, {units.size(summary.bytes_pushed_per_s)}/s",
        ),
        (
            "fetched",
            f"{units.size(summary.bytes_fetched)}, {units.size(summary.bytes_fetched_per_s)}/s",
        ),
        (
            "fetches",
            f"{summary.fetches:,}, {summary.followed:,} of them while the update was written, and "
            f"{units.count(summary.torn_reads, 'torn read')}, done again",
        ),
        (
            "overlap",
            f"{units.percent(summary.overlap)} of the time of push and fetch lay behind the computation",
        ),
        (
            "server busy",
            f"{units.percent(summary.server_busy)} of the time of rank 0, {units.short(summary.apply_s)} for one update",
        ),
    ]


def _money(cost: Cost, unit: str) -> list[tuple[str, str]]:
    return [
        ("price", f"{cost.price_per_gpu_hour:,.4g} for one GPU hour"),
        ("GPU hours", f"{cost.gpu_hours:,.4g}, of {gpus(cost).rstrip(',')}"),
        ("energy of the GPUs", _energy(cost)),
        ("total", f"{cost.total:,.4g}"),
        ("for one epoch", units.rate(cost.per_epoch)),
        (f"for a million {unit}", units.rate(cost.per_million_images)),
    ]


def _energy(cost: Cost) -> str:
    if cost.energy_kwh is None:
        return "not measured"
    told = energy(cost.energy_kwh, cost.without_energy)
    if cost.price_per_kwh is None:
        return f"{told}, not in the total"
    return f"{told} at {cost.price_per_kwh:,.4g}"


def _machine(summary: Summary) -> list[tuple[str, str]]:
    """Packages, then hosts with what the ranks compute on; the list of all ranks is in versions.json."""
    devices: dict[str, Counter[tuple[str, str]]] = {}
    for rank in summary.present:
        devices.setdefault(rank.host, Counter())[rank.role, rank.device.split(":")[0]] += 1
    hosts = [
        (
            f"host {host}",
            ", ".join(f"{units.count(n, role)} on {device}" for (role, device), n in found.items()),
        )
        for host, found in devices.items()
    ]
    rows = [(key, value) for key, value in summary.versions.items() if key != "ranks"]
    rows += hosts[:20]
    if len(hosts) > 20:
        rows.append(("more hosts", str(len(hosts) - 20)))
    return rows

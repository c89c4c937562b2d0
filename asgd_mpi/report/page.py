"""The report as one HTML page that opens offline: pictures, styles and numbers in one file, everything escaped."""

from __future__ import annotations

import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from asgd_mpi.errors import one_line
from asgd_mpi.record.events import PHASES
from asgd_mpi.record.summary import Summary
from asgd_mpi.report import figures, units
from asgd_mpi.report.advice import advise
from asgd_mpi.report.cost import Cost, cost_until
from asgd_mpi.report.incidents import incidents
from asgd_mpi.report.markdown import gpus, left_out, thin

HERE = Path(__file__).parent


def page(summary: Summary, cost: Cost | None = None) -> str:
    """The page of one run."""
    drawn, missing = figures.pictures(summary)
    shares = {rank.rank: {phase: rank.phases[phase] / rank.seconds for phase in PHASES}
              for rank in summary.ranks if rank.seconds and rank.role == "worker"}
    nothing = dict.fromkeys(PHASES)
    began = summary.started and time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(summary.started))
    return template("page.html.j2").render(
        s=summary, cost=cost, began=began, css=css(), cards=_cards(summary, cost), advice=advise(summary, cost),
        pictures=drawn, missing=missing, phases=[phase for phase in PHASES if phase not in ("apply", "servers", "checkpoint")],
        workers=[(worker, shares.get(worker.rank, nothing)) for worker in summary.workers],
        training=_training(summary), traffic=_traffic(summary), money=_money(cost) if cost else [], cost_until=cost_until,
        machine=_machine(summary), incidents=incidents(summary))


@cache
def template(name: str) -> jinja2.Template:
    """A template of this directory; every value printed by it is escaped for HTML."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), undefined=jinja2.StrictUndefined,
                                     autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_shown)
    environment.filters.update(number=units.number, rate=units.rate, percent=units.percent, seconds=units.seconds,
                               size=units.size, short=units.short, thin=thin, left_out=left_out)
    return environment.get_template(name)


def _shown(value: Any) -> Any:
    """Write out control characters and cut what is too long; jinja2 passes every value that it prints through here."""
    return one_line(value) if type(value) is str else value         # Markup is ours


@cache
def css() -> jinja2.utils.markupsafe.Markup:
    return jinja2.utils.markupsafe.Markup((HERE / "page.css").read_text())


def _cards(summary: Summary, cost: Cost | None) -> list[tuple[str, str]]:
    """The numbers to see first: (value, what it is)."""
    best = summary.best
    last = summary.validations[-1] if summary.validations else None
    staleness, servers = summary.staleness, summary.config.get("exchange.servers", 1)
    cards = [
        (units.number(summary.images_per_s, 0), f"images/s by {units.workers(summary.crews)}"),
        (units.percent(1 - last.top1_error, 2) if last else units.NONE,
         "top-1 accuracy" + (f"; the best was {units.percent(1 - best.top1_error, 2)}" if best else "")),
        (units.seconds(summary.training_s), "training time"),
        (units.number(summary.epochs_done, 2), f"epochs, {units.count(summary.images, 'image')}"),
        (units.percent(summary.server_busy, 0), "of the time the server is busy" if servers == 1 else
         f"of the time rank 0 is busy, the first of {servers} servers"),
        (units.number(staleness and staleness.mean, 2),
         f"mean staleness, largest {units.number(staleness and staleness.max, 0)}"),
    ]
    if cost:
        cards.append((units.rate(cost.total), f"cost of {cost.gpu_hours:,.3g} GPU hours"))
    return cards


def _training(summary: Summary) -> list[tuple[str, str]]:
    starts = len(summary.restarts)
    between = f", {units.seconds(summary.paused_s)} of it between {starts} starts" if starts > 1 else ""
    return [
        ("duration", f"{units.seconds(summary.duration_s)}, from the first Start to the last thing written{between}"),
        ("training", f"{units.seconds(summary.training_s)}, to the last applied push"
                     + (", without the time between starts" if starts > 1 else "")),
        ("images", f"{summary.images:,} applied, {summary.images_trained:,} trained by the workers, "
                   f"{summary.skipped_images:,} damaged and skipped"),
        ("shards", f"{units.count(summary.read_retries, 'read')} failed and repeated"),
        ("learning rate", f"{units.rate(summary.lr_first)} first, {units.rate(summary.lr_last)} last"),
        ("parameters", f"{summary.num_parameters:,}" if summary.num_parameters else units.NONE),
    ]


def _traffic(summary: Summary) -> list[tuple[str, str]]:
    return [
        ("pushed", f"{units.size(summary.bytes_pushed)}, {units.size(summary.bytes_pushed_per_s)}/s"),
        ("fetched", f"{units.size(summary.bytes_fetched)}, {units.size(summary.bytes_fetched_per_s)}/s"),
        ("fetches", f"{summary.fetches:,}, {summary.followed:,} of them while the update was written, and "
                    f"{units.count(summary.torn_reads, 'torn read')}, done again"),
        ("overlap", f"{units.percent(summary.overlap)} of the time of push and fetch lay behind the computation"),
        ("server busy", f"{units.percent(summary.server_busy)} of the time of rank 0, {units.short(summary.apply_s)} for one update"),
    ]


def _money(cost: Cost) -> list[tuple[str, str]]:
    return [
        ("price", f"{cost.price_per_gpu_hour:,.4g} for one GPU hour"),
        ("GPU hours", f"{cost.gpu_hours:,.4g}, of {gpus(cost).rstrip(',')}"),
        ("energy of the GPUs", "not measured" if cost.energy_kwh is None else f"{cost.energy_kwh:,.4g} kWh" + (
            f" at {cost.price_per_kwh:,.4g}" if cost.price_per_kwh is not None else ", not in the total")),
        ("total", f"{cost.total:,.4g}"),
        ("for one epoch", units.rate(cost.per_epoch)),
        ("for a million images", units.rate(cost.per_million_images)),
    ]


def _machine(summary: Summary) -> list[tuple[str, str]]:
    """Packages, then hosts with what the ranks compute on; the list of all ranks is in versions.json."""
    devices: dict[str, Counter[str]] = {}
    for rank in summary.present:
        devices.setdefault(rank.host, Counter())[f"{rank.role} on {rank.device.split(':')[0]}"] += 1
    hosts = [(f"host {host}", ", ".join(f"{count} {what}" for what, count in found.items()))
             for host, found in devices.items()]
    rows = [(key, value) for key, value in summary.versions.items() if key != "ranks"]
    more = [("more hosts", str(len(hosts) - 20))] if len(hosts) > 20 else []
    return rows + hosts[:20] + more

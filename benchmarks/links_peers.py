"""Measure torch's synchronous trainings behind the slow links of benchmarks.links: `python -m benchmarks.links_peers`.

DDP over gloo, DDP with its PowerSGD hook, and post-local SGD (benchmarks.peers.linked), each at the settings of a grid. Hosts,
links, sleeping steps, `--shrink` and the bytes per batch are as there, but that no server stands beside the workers. Needs root.

The network is made of square layers (40 of 540 x 540), of which `--shrink 10` leaves 4: both what DDP sends and what PowerSGD does
are a tenth then. Which accuracy each reaches is not compared: DDP's is that of synchronous training, the others lose some.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

from asgd_mpi.process import ending
from benchmarks import launch, machine
from benchmarks.hosts import Hosts
from benchmarks.links import add_options, measure_all
from benchmarks.peers.linked import NAMES, SIDE, WARM

GRID = {
    "ddp": [{"bucket-mb": size} for size in (1, 5, 25)],
    "powersgd": [{"matrix-rank": rank} for rank in (1, 2, 4)],
    "post-local": [{"period": period} for period in (50, 200)],
}
LAYERS = 40
START_S = 120.0  # for all ranks to load torch
MARGIN = 4.0  # times what a run should take: then it is told as failed


@ending.of_command
def main() -> int:
    options = _parse()
    cases = {
        f"{name}, {_told(setting)}": (name, setting)
        for name in options.peers
        for setting in GRID[name]
    }
    return measure_all("benchmarks.links_peers", options, 0, cases, _measure, _table)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.links_peers", description=__doc__.partition("\n\n")[0]
    )
    add_options(parser)
    parser.add_argument("--peers", type=lambda text: text.split(","), default=list(NAMES))
    parser.add_argument("--seconds", type=float, default=10.0, help="of a run, about")
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "links_peers.json")
    return parser.parse_args()


def _measure(
    network: Hosts,
    link: float,
    case: tuple[str, dict[str, float]],
    place: Path,
    options: argparse.Namespace,
) -> dict:
    """Raises launch.Failed."""
    name, setting = case
    layers, step_s = max(1, round(LAYERS / options.shrink)), options.step_ms / 1e3 * options.slower
    # what an all-reduce of everything takes
    whole_s = 2 * 4 * 8 * layers * SIDE**2 / (link / options.shrink)
    period = int(setting.get("period", 1))
    round_s = period * step_s + whole_s
    steps = period * max(1 if period > 1 else 4, round(options.seconds / round_s))
    arguments = [
        *("--name", name, "--layers", layers, "--step-ms", options.step_ms),
        *("--slower", options.slower, "--steps", steps),
        *itertools.chain.from_iterable((f"--{key}", value) for key, value in setting.items()),
    ]
    env = {
        "MASTER_ADDR": network.addresses[0],
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": "eth0",
        "PYTHONPATH": str(launch.ROOT),
    }
    exports = itertools.chain.from_iterable(("-x", key) for key in env)
    command = [
        *network.enter(),
        *launch.mpirun(options.workers),
        *network.mpirun_options(ranks_per_host=1),
        *exports,
        *launch.python("benchmarks.peers.linked", *arguments),
    ]
    warm_s = WARM * (step_s + whole_s)
    deadline_s = START_S + MARGIN * (warm_s + steps / period * round_s)
    found = launch.last_json(launch.run(command, deadline_s, env))
    ideal = 1e3 / options.step_ms * (options.workers - 1 + 1 / options.slower)
    return {
        "link_bits_per_s": link,
        "peer": name,
        "setting": setting,
        "slower": options.slower,
        "over_ideal": options.workers * steps / found["seconds"] / ideal,
        "bytes_per_batch": options.shrink * found["bytes_sent"] / (options.workers * steps),
        "steps": steps,
        "seconds": found["seconds"],
    }


def _told(setting: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in setting.items())


def _table(cells: list[dict]) -> str:
    """Markdown: the fastest setting of each peer at each link."""
    best: dict[tuple[float, str], dict] = {}
    for cell in cells:
        key = cell["link_bits_per_s"], cell["peer"]
        best[key] = max(best.get(key, cell), cell, key=lambda one: one["over_ideal"])
    return machine.table(
        ["link", "training", "images/s over the ideal", "MB a batch"],
        [
            [
                f"{link / 1e6:g} Mbit/s",
                f"{peer}, {_told(cell['setting'])}",
                f"{cell['over_ideal']:.1%}",
                f"{cell['bytes_per_batch'] / 1e6:.3g}",
            ]
            for (link, peer), cell in best.items()
        ],
    )


if __name__ == "__main__":
    sys.exit(main())

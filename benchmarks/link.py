"""How fast pushes and fetches cross a network, against a plain two-sided stream on the same link: `python -m benchmarks.link`.

Two hosts are made on this machine (see hosts.py: needs root), joined by a link that `tc` gives a rate. The
server is on one, a worker that only pushes and fetches on the other. Rounds are interleaved; medians.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

from asgd_mpi.process import ending
from benchmarks import launch, machine
from benchmarks.hosts import Hosts, hosts, why_not

STARTUP_S = 240.0
LINKS = ["tbf rate 1gbit burst 256kb latency 50ms", "tbf rate 10gbit burst 4mb latency 20ms"]
PEERS = ("stream", "far")
WAYS = {"push_s": "push", "fetch_s": "fetch"}


@ending.of_command
def main() -> int:
    options = _parse()
    if reason := why_not():
        print(f"two hosts cannot be made: {reason}", file=sys.stderr)
        return 2
    described = machine.describe("benchmarks.link")
    cells = list(itertools.product(options.links, options.parameters))
    times: dict[tuple, list[dict[str, dict[str, float]]]] = {cell: [] for cell in cells}
    with tempfile.TemporaryDirectory() as place, hosts(2, Path(place)) as pair:
        for round_, (link, num_parameters) in itertools.product(range(options.rounds), cells):
            if not pair.shape(link):
                print(
                    f"this kernel cannot give a link a rate: tc qdisc ... {link}", file=sys.stderr
                )
                return 2
            found = {peer: _measure(pair, peer, num_parameters, options) for peer in PEERS}
            times[link, num_parameters].append(found)
            print(
                f"round {round_ + 1}, {link}, P = {num_parameters}: "
                + ", ".join(
                    f"{way} {found['stream'][name] / found['far'][name]:.2f}"
                    for name, way in WAYS.items()
                ),
                flush=True,
            )
    result = [
        {"link": link, "parameters": num_parameters}
        | {
            way: {
                "of_stream": machine.summary(
                    [found["stream"][name] / found["far"][name] for found in runs]
                ),
                "stream_bytes_per_s": machine.summary(
                    [4 * num_parameters / found["stream"][name] for found in runs]
                ),
                "bytes_per_s": machine.summary(
                    [4 * num_parameters / found["far"][name] for found in runs]
                ),
            }
            for name, way in WAYS.items()
        }
        for (link, num_parameters), runs in times.items()
    ]
    print(
        "\n"
        + machine.table(
            ["link", "parameters", "push, of a stream", "fetch, of a stream"],
            [
                [
                    cell["link"],
                    cell["parameters"],
                    *(f"{cell[way]['of_stream']['median']:.0%}" for way in WAYS.values()),
                ]
                for cell in result
            ],
        )
    )
    machine.write(options.out, described | {"cells": result})
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.link", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument(
        "--parameters", type=machine.integers, default=[1_000_000, 11_700_000, 61_000_000]
    )
    parser.add_argument(
        "--links",
        type=lambda text: text.split(","),
        default=LINKS,
        help="rules of tc, with commas between them",
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="timed, of each in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "link.json")
    return parser.parse_args()


def _measure(
    pair: Hosts, peer: str, num_parameters: int, options: argparse.Namespace
) -> dict[str, float]:
    """Seconds of a push and of a fetch. Raises launch.Failed."""
    command = (
        launch.mpirun(2)
        + pair.mpirun_options(ranks_per_host=1)
        + ["-x", "PYTHONPATH"]
        + launch.python(
            f"benchmarks.peers.{peer}",
            "--parameters",
            num_parameters,
            "--workers",
            1,
            "--seconds",
            options.seconds,
        )
    )
    return launch.last_json(launch.run(pair.command(command), STARTUP_S + 20 * options.seconds))


if __name__ == "__main__":
    sys.exit(main())

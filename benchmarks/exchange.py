"""Exchanges per second of ours and of what people would use instead: `python -m benchmarks.exchange`.

An exchange is one push, its step of momentum SGD (`--optimizer adamw`: of AdamW, ours alone) and one fetch, of P float32 each way; workers do nothing else. Every round
runs every system once, one after the other, so that what else the machine does hits all of them; medians over the rounds.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

from asgd_mpi.process import ending
from benchmarks import launch, machine

# before a deadline begins to count: imports, first touches, on a busy machine
STARTUP_S = 240.0
# of an exchange, a parameter: apply reads g, w and what the optimizer keeps (v; m and v), and writes that and w'; fetch reads and writes
LIMIT_BYTES = {"sgd": 7 * 4, "adamw": 9 * 4}
MEMORY = ("triad_1", "triad_2", "copy_1", "copy_2")


@dataclass(frozen=True)
class Peer:
    module: str
    what: str
    ranks_more: int | None = None  # than workers, under mpirun; None: it starts its own processes
    needs: str = "torch"  # a package


PEERS = {
    "ours": Peer("ours", "asgd_mpi", 1),
    "rpc": Peer("rpc", "torch.distributed.rpc server"),
    "ray": Peer("ray_actor", "Ray actor server", needs="ray"),
    "blocking": Peer("blocking", "blocking mpi4py server", 1),
    "allreduce": Peer("allreduce", "MPI.Allreduce + step", 0),
    "gloo": Peer("gloo", "gloo all_reduce + step"),
}


@ending.of_command
def main() -> int:
    options = _parse()
    described = machine.describe("benchmarks.exchange")
    peers, skipped = _present(options.peers)
    sizes = list(itertools.product(options.parameters, options.workers))
    values: dict[tuple, list[float]] = {}
    failures = []
    for round_ in range(options.rounds):
        memory = _measure_memory(options)
        for name, bandwidth in memory.items():
            values.setdefault(("memory", name), []).append(bandwidth)
        for (num_parameters, num_workers), name in itertools.product(sizes, peers):
            try:
                rate = _measure(PEERS[name], num_parameters, num_workers, options)
            except launch.Failed as failure:
                failures.append(
                    f"round {round_ + 1}, {name}, P = {num_parameters}, {num_workers} workers: {failure}"
                )
                print(failures[-1], file=sys.stderr)
                continue
            values.setdefault((num_parameters, num_workers, name), []).append(rate)
            print(
                f"round {round_ + 1}: P = {num_parameters}, {num_workers} workers, {name}: {rate:.1f}/s",
                flush=True,
            )
        result = _result(sizes, peers, values, LIMIT_BYTES[options.optimizer])
        # a run is long
        machine.write(options.out, described | {"skipped": skipped, "failures": failures} | result)
    print("\n" + "\n\n".join(_tables(result, peers)))
    return int(bool(failures))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exchange", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument(
        "--parameters", type=machine.integers, default=[1_000_000, 11_700_000, 61_000_000]
    )
    parser.add_argument("--workers", type=machine.integers, default=[1, 2, 4, 7])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="timed, of each system in each round"
    )
    parser.add_argument("--warmup", type=float, default=1.0, help="seconds before that")
    parser.add_argument("--threads", type=int, default=1, help="of the process that applies")
    parser.add_argument(
        "--peers", type=lambda text: text.split(","), default=list(PEERS), help=",".join(PEERS)
    )
    parser.add_argument(
        "--mpirun", default="mpirun --bind-to none", help="the launcher, with its options"
    )
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "exchange.json")
    parser.add_argument("--optimizer", choices=tuple(LIMIT_BYTES), default="sgd")
    options = parser.parse_args()
    if options.optimizer != "sgd" and options.peers != ["ours"]:
        parser.error(
            f"--optimizer {options.optimizer}: the peers make steps of sgd; add --peers ours"
        )
    unknown = set(options.peers) - set(PEERS)
    if unknown:
        parser.error(
            f"there is no peer {', '.join(sorted(unknown))}; there are: {', '.join(PEERS)}"
        )
    return options


def _present(names: list[str]) -> tuple[list[str], dict[str, str]]:
    """The peers that can run here, and why the others cannot."""
    skipped = {
        name: f"{PEERS[name].needs} is not installed"
        for name in names
        if importlib.util.find_spec(PEERS[name].needs) is None
    }
    for name, reason in skipped.items():
        print(f"{name} is skipped: {reason}", file=sys.stderr)
    return [name for name in names if name not in skipped], skipped


def _measure(
    peer: Peer, num_parameters: int, num_workers: int, options: argparse.Namespace
) -> float:
    """Exchanges per second. Raises Failed, also if the weights are not those that so many steps make."""
    command = launch.python(
        f"benchmarks.peers.{peer.module}",
        "--parameters",
        num_parameters,
        "--workers",
        num_workers,
        "--seconds",
        options.seconds,
        "--warmup",
        options.warmup,
        "--threads",
        options.threads,
        "--optimizer",
        options.optimizer,
    )
    if peer.ranks_more is not None:
        command = launch.mpirun(num_workers + peer.ranks_more, options.mpirun) + command
    done = launch.last_json(launch.run(command, STARTUP_S + 4 * (options.warmup + options.seconds)))
    if not done["right"]:
        raise launch.Failed(
            f"the weights after {done['exchanges']} exchanges are not those of {options.optimizer}"
        )
    return done["exchanges_per_s"]


def _measure_memory(options: argparse.Namespace) -> dict[str, float]:
    """Bytes/s."""
    command = launch.python(
        "benchmarks.peers.memory", "--parameters", 0, "--workers", 0, "--seconds", options.seconds
    )
    return launch.last_json(launch.run(command, STARTUP_S + 4 * options.seconds))


def _result(sizes: list, peers: list[str], values: dict, limit_bytes: int) -> dict:
    """Medians and ranges; the limit is that of the triad of one thread."""
    memory = {name: machine.summary(values["memory", name]) for name in MEMORY}
    cells = []
    for num_parameters, num_workers in sizes:
        limits = {name: memory[name]["median"] / (limit_bytes * num_parameters) for name in MEMORY}
        rates = {
            name: machine.summary(values[num_parameters, num_workers, name])
            for name in peers
            if (num_parameters, num_workers, name) in values
        }
        cells.append(
            {
                "parameters": num_parameters,
                "workers": num_workers,
                "exchanges_per_s": rates,
                "limit_exchanges_per_s": limits,
            }
        )
    return {"memory_bytes_per_s": memory, "cells": cells}


def _tables(result: dict, peers: list[str]) -> list[str]:
    """Exchanges per second, and ours over each of the others."""
    columns = [
        "parameters",
        "workers",
        *(PEERS[name].what for name in peers),
        "memory limit (triad, 1 thread)",
    ]
    rates = [
        [
            cell["parameters"],
            cell["workers"],
            *(_rate(cell["exchanges_per_s"].get(name)) for name in peers),
            f"{cell['limit_exchanges_per_s']['triad_1']:.1f}",
        ]
        for cell in result["cells"]
    ]
    tables = ["Exchanges per second, median (range):\n\n" + machine.table(columns, rates)]
    if "ours" in peers:
        others = [name for name in peers if name != "ours"]
        columns = [
            "parameters",
            "workers",
            *(f"over {PEERS[name].what}" for name in others),
            "over the memory limit",
        ]
        ratios = [
            [
                cell["parameters"],
                cell["workers"],
                *(_ratio(cell, name) for name in others),
                _over(cell, cell["limit_exchanges_per_s"]["triad_1"]),
            ]
            for cell in result["cells"]
        ]
        tables.append("asgd_mpi, times the other's median:\n\n" + machine.table(columns, ratios))
    return tables


def _rate(found: dict | None) -> str:
    return f"{found['median']:.1f} ({found['min']:.1f}-{found['max']:.1f})" if found else "failed"


def _ratio(cell: dict, name: str) -> str:
    other = cell["exchanges_per_s"].get(name)
    return _over(cell, other["median"]) if other else "failed"


def _over(cell: dict, rate: float) -> str:
    ours = cell["exchanges_per_s"].get("ours")
    return f"{ours['median'] / rate:.2f}" if ours else "failed"


if __name__ == "__main__":
    sys.exit(main())

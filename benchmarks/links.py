"""What share of the computing power is used behind slow links, and what travels for it: `python -m benchmarks.links`.

Every worker is on a host of its own (see hosts.py: needs root), whose link `tc tbf` holds to a rate in both directions; the server's own
link is free. A worker computes by sleeping (asgd_mpi.model.emulated), the exchange is the training's own. Ideal is a batch of
every worker a step. `--shrink 10` divides parameters and rates by 10: what travels takes as long as it would, and the processors
here, which stand for those of 9 hosts, have a tenth of the vectors to move. What is told is of the whole size.

Images/s are those of whole rounds, from a worker's third push (the first ones are short, until leases have grown) to its last one.
Beside them stands the share of that time that workers spend in steps, which a busy machine, where a sleep of 100 ms takes longer,
does not lower. Bytes are those of pushes and fetches meanwhile; in the file stand beside them those that the hosts' network devices
counted in the whole run, with its start, the messages of MPI and the headers of TCP.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from asgd_mpi.comm.worker_window import SAMPLE, TRIES
from asgd_mpi.config import parse as configuration
from asgd_mpi.errors import RunDirError
from asgd_mpi.model import emulated
from asgd_mpi.config.exchange_choice import TOPK, WIRES
from asgd_mpi.process import ending
from asgd_mpi.record.events import Interval, Push, read_events, read_pushes
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.runtime import supervise
from benchmarks import launch, machine
from benchmarks.hosts import Hosts, hosts, why_not

Case = TypeVar("Case")
# bits/s of every worker's link
LINKS = [10e9, 1e9, 100e6, 20e6]
SETTINGS = {
    "n_sync 1": "",
    "n_push auto": "--exchange.n_push auto",
    "bfloat16, n_push auto": "--exchange.wire bfloat16 --exchange.n_push auto",
    "int8, n_push auto": "--exchange.wire int8 --exchange.n_push auto",
    "int4, n_push auto": "--exchange.wire int4 --exchange.n_push auto",
    "topk, n_push auto": "--exchange.wire topk --exchange.n_push auto",
    "diloco, n_sync 10, int8, overlap": "--rule diloco --n-sync 10 --exchange.wire int8 --exchange.overlap true",
    "diloco, n_sync 50, int8, overlap": "--rule diloco --n-sync 50 --exchange.wire int8 --exchange.overlap true",
    "diloco, n_sync 200, int8, overlap": "--rule diloco --n-sync 200 --exchange.wire int8 --exchange.overlap true",
    **{
        f"diloco, n_sync {n_sync}, int4, fetched int8, ring 10, overlap": f"--rule diloco --n-sync {n_sync} --exchange.wire int4 "
        "--exchange.fetch_wire int8 --exchange.ring 10 --exchange.overlap true"
        for n_sync in (19, 80)
    },
}
# images of a batch: it is the sleep that takes the time
PLAIN = """--model asgd_mpi.model.emulated:network --data.source synthetic --data.image_size 8 --data.augment none
--data.batch_size 1 --data.threads 1 --epochs 1 --rule.momentum 0 --rule.weight_decay 0 --schedule.name constant
--schedule.warmup_epochs 0 --run.validate_every 1000 --run.progress none --compute.device cpu --compute.threads 1
--checkpoint.every_s 0 --record.interval_s 0.5""".split()
# bytes by which a worker measures how it reads best, in two ways, one of which may load the link three times
MEASURED = TRIES * 4 * SAMPLE
SHORT = 2  # pushes of each worker that are not counted
ROUNDS = 5.5  # that a worker has time for, at least, after it has read the first weights
QUEUE_S, LEAST_QUEUE = 0.2, 200_000  # of a link, as routers have it


@ending.of_command
def main() -> int:
    options = _parse()
    cases = {setting: setting for setting in options.settings}
    return measure_all("benchmarks.links", options, 1, cases, _measure, _table)


def measure_all(
    module: str,
    options: argparse.Namespace,
    unshaped: int,
    cases: Mapping[str, Case],
    measure: Callable[[Hosts, float, Case, Path, argparse.Namespace], dict],
    table: Callable[[list[dict]], str],
) -> int:
    """Measure each case behind each link, write the cells into `options.out`, print their table; returns the status.

    unshaped: hosts beside those of the workers, the first ones, whose links are free. cases: by what they are told as.
    """
    # so that a run that is under way is ended, and the hosts removed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if reason := why_not():
        print(f"hosts cannot be made: {reason}", file=sys.stderr)
        return 2
    described, cells, failures = machine.describe(module), [], []
    num_hosts = unshaped + options.workers
    with tempfile.TemporaryDirectory() as place, hosts(num_hosts, Path(place)) as network:
        for link, (told, case) in itertools.product(options.links, cases.items()):
            if not _shape(network, range(unshaped, num_hosts), link / options.shrink):
                print("this kernel gives a link no rate: tc qdisc ... tbf", file=sys.stderr)
                return 2
            name = f"{link / 1e6:g} Mbit/s, {told}"
            try:
                cells.append(measure(network, link, case, Path(place), options))
            except (launch.Failed, RunDirError) as failure:
                failures.append(f"{name}: {failure}")
                print(failures[-1], file=sys.stderr, flush=True)
                continue
            cell = cells[-1]
            share = f"{_share(cell)} of the time in steps, " if "in_steps" in cell else ""
            print(
                f"{name}: {cell['over_ideal']:.1%} of the ideal, {share}{cell['bytes_per_batch']:.3g} bytes a batch",
                flush=True,
            )
            machine.write(options.out, described | {"failures": failures, "cells": cells})
    print("\n" + table(cells))
    return int(bool(failures))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.links", description=__doc__.partition("\n\n")[0]
    )
    add_options(parser)
    parser.add_argument("--parameters", type=int, default=11_700_000)
    parser.add_argument(
        "--settings",
        type=lambda text: [part.strip() for part in text.split(";")],
        default=list(SETTINGS),
        help=f"of {'; '.join(SETTINGS)}, with semicolons between them",
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="of a run, at least")
    parser.add_argument("--train", default="", help="more options for the training")
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "links.json")
    return parser.parse_args()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what workers and links are like."""
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--step-ms", type=float, default=100.0)
    parser.add_argument(
        "--links",
        type=lambda text: [float(part) for part in text.split(",")],
        default=LINKS,
        help="bits a second",
    )
    parser.add_argument("--shrink", type=float, default=10.0, help="parameters and rates")
    parser.add_argument("--slower", type=float, default=1.0, help="times, of the last worker")


def _shape(network: Hosts, numbers: Iterable[int], rate: float) -> bool:
    """Give the links of these hosts a rate, bits/s; whether the kernel can do that."""
    burst, queue = max(32_000, int(rate / 8 * 2e-3)), max(LEAST_QUEUE, int(rate / 8 * QUEUE_S))
    rule = f"tbf rate {rate:.0f}bit burst {burst} limit {queue}"
    return all([network.shape_both_ways(number, rule) for number in numbers])


def _measure(
    network: Hosts, link: float, setting: str, place: Path, options: argparse.Namespace
) -> dict:
    """Raises launch.Failed, RunDirError."""
    run = RunDir(Path(tempfile.mkdtemp(dir=place)) / "run")
    arguments = ["--run.dir", str(run.path), *PLAIN, *SETTINGS[setting].split()]
    if options.slower != 1:
        arguments += ["--run.inject", f"slow:{options.slower:g}x@rank{options.workers}"]
    arguments += options.train.split()
    env = {
        emulated.PARAMETERS: str(round(options.parameters / options.shrink)),
        emulated.STEP_S: str(options.step_ms / 1e3),
        "PYTHONPATH": str(launch.ROOT),
    }
    exports = list(itertools.chain.from_iterable(("-x", name) for name in env))
    first_s = 8 * (WIRES["float32"] * options.parameters + MEASURED * options.shrink) / link
    seconds = max(options.seconds, first_s + ROUNDS * _round_s(arguments, link, options))
    sent, output = network.num_bytes_sent(), run.path.parent / "output.txt"
    supervise.train(
        lambda num_ranks: [
            *network.enter(),
            *launch.mpirun(num_ranks),
            *network.mpirun_options(ranks_per_host=1),
            *exports,
        ],
        options.workers,
        arguments,
        seconds,
        output,
        env=env,
    )
    began = supervise.started_at(run, 0.0)
    if began is None:
        raise launch.Failed(supervise.last_words(output))
    pushes = [push for push in read_pushes(run.pushes) if isinstance(push, Push)]
    of_workers = [
        [push for push in pushes if push.worker == worker and push.t < began + seconds][SHORT:]
        for worker in range(options.workers)
    ]
    if min(map(len, of_workers)) < 2:
        raise launch.Failed(f"a worker pushed less than {SHORT + 2} times in {seconds:.0f} s")
    counted = [push for own in of_workers for push in own]
    ideal = 1e3 / options.step_ms * (options.workers - 1 + 1 / options.slower)
    sent = network.num_bytes_sent() - sent
    return {
        "link_bits_per_s": link,
        "setting": setting,
        "over_ideal": sum(map(_speed, of_workers)) / ideal,
        "in_steps": _in_steps(run, of_workers),
        "bytes_per_batch": options.shrink * _bytes_per_batch(run, of_workers),
        "bytes_per_batch_of_devices": options.shrink
        * sent
        / sum(push.positions for push in pushes),
        "batches_per_push": sum(push.positions for push in counted) / len(counted),
        "staleness": sum(push.version - push.read_version for push in counted) / len(counted),
        "num_pushes": len(counted),
        "seconds": seconds,
    }


def _round_s(arguments: list[str], link: float, options: argparse.Namespace) -> float:
    """Return the most seconds that a push and its fetch take, with the batches between."""
    exchange = configuration.parse(arguments).exchange
    n_push = 1 if exchange.n_push in (None, "auto") else exchange.n_push
    push = exchange.density if exchange.wire == TOPK else WIRES[exchange.wire]
    fetch = min(WIRES[exchange.wire] if exchange.wire != TOPK else 2, 4)
    travels = 8 * options.parameters * (push + max(2, fetch)) / link
    steps = options.slower * n_push * options.step_ms / 1e3
    overlaps = exchange.overlap or exchange.n_push == "auto"
    return max(steps, travels) if overlaps else steps + travels


def _speed(pushes: list[Push]) -> float:
    """Batches a second of one worker, from its first push to its last one."""
    return sum(push.positions for push in pushes[1:]) / (pushes[-1].t - pushes[0].t)


def _in_steps(run: RunDir, pushes: list[list[Push]]) -> float | None:
    """The share of their time that workers spend in steps, meanwhile; None if no interval lies in it."""
    intervals = _intervals(run, pushes)
    total = sum(one.t1 - one.t0 for one in intervals)
    # an interval ends with a step, so that there is none where a step takes as long as a round
    return sum(one.data + one.compute for one in intervals) / total if total else None


def _bytes_per_batch(run: RunDir, pushes: list[list[Push]]) -> float:
    """The bytes of pushes and fetches, meanwhile: so many of each as there are whole rounds, which are as long as all of the run."""
    intervals = _intervals(run, pushes, whole=True)
    per_push = sum(one.bytes_pushed for one in intervals) / sum(one.pushes for one in intervals)
    per_fetch = sum(one.bytes_fetched for one in intervals) / sum(one.fetches for one in intervals)
    rounds = [push for own in pushes for push in own[1:]]
    return len(rounds) * (per_push + per_fetch) / sum(push.positions for push in rounds)


def _intervals(run: RunDir, pushes: list[list[Push]], whole: bool = False) -> list[Interval]:
    """Return those between the first and the last of each worker's pushes; whole: those of all of the run."""
    return [
        event
        for worker, own in enumerate(pushes)
        for event in read_events(run.metrics_of(worker + 1))
        if isinstance(event, Interval) and (whole or event.t0 >= own[0].t and event.t1 <= own[-1].t)
    ]


def _share(cell: dict) -> str:
    return "-" if cell["in_steps"] is None else f"{cell['in_steps']:.1%}"


def _table(cells: list[dict]) -> str:
    return machine.table(
        [
            "link",
            "setting",
            "images/s over the ideal",
            "time in steps",
            "MB a batch",
            "batches a push",
            "staleness",
        ],
        [
            [
                f"{cell['link_bits_per_s'] / 1e6:g} Mbit/s",
                cell["setting"],
                f"{cell['over_ideal']:.1%}",
                _share(cell),
                f"{cell['bytes_per_batch'] / 1e6:.3g}",
                f"{cell['batches_per_push']:.0f}",
                f"{cell['staleness']:.1f}",
            ]
            for cell in cells
        ],
    )


if __name__ == "__main__":
    sys.exit(main())

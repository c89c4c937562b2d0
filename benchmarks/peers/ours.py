"""asgd_mpi itself: `mpirun -np N+1`. The package's own server, ledger, window and client; only computing is left out.

The gradient lies where a training on the CPU computes it: in the memory that the server reads in place.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from asgd_mpi.comm.layout import Layout
from asgd_mpi.comm.packets import Inbox, Outbox
from asgd_mpi.comm.server_window import ServerWindow
from asgd_mpi.comm.worker_window import WorkerWindow
from asgd_mpi.comm.world import World
from asgd_mpi.config.options import CheckpointConfig, FailureConfig, RuleConfig
from asgd_mpi.optim.rules import Rule
from asgd_mpi.protocol.ledger import Ledger, Plan
from asgd_mpi.protocol.messages import Header, Kind, Lease, Mail, Orders, Verdict
from asgd_mpi.record.events import EventLog
from asgd_mpi.record.meter import Meter
from asgd_mpi.record.progress import Progress
from asgd_mpi.runtime.client import ServerClient
from asgd_mpi.runtime.server import Links, Server, ServerBooks, ServerHabits
from asgd_mpi.vector.flat import FlatModel, num_floats
from benchmarks.peers import protocol

ENDLESS = 1 << 40  # samples


class TimedLedger(Ledger):
    """Lends until the time is over, which begins with the first push; what is lent by then is the whole run."""

    def __init__(self, num_workers: int, seconds: float):
        super().__init__(
            Plan(
                num_workers, ENDLESS, 0, ENDLESS, batch_size=1, lease_batches=1, validate_every=1.0
            ),
            lr_at=lambda samples, staleness: protocol.LR,
        )
        self._seconds, self._ends = seconds, None

    def judge(self, header: Header, now: float = 0.0) -> Verdict:
        self._ends = self._ends or time.monotonic() + self._seconds
        if time.monotonic() > self._ends and self.plan.total_samples == ENDLESS:
            self.plan = dataclasses.replace(self.plan, total_samples=self._lent)
        return super().judge(header, now)


class NoSaver:
    """Of a run that nobody will resume."""

    is_busy = False
    saved_version = -1

    def why_no_room(self) -> str:
        return ""

    def begin(self, *_: object) -> None:
        pass

    def poll(self, best: int) -> list:
        return []

    def finish(self, best: int, timeout_s: float, meanwhile: Callable[[], object]) -> list:
        return []


class Vector(nn.Module):
    """P parameters."""

    def __init__(self, num_parameters: int):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(num_parameters))


def serve(world: World, window: ServerWindow, log: EventLog, meter: Meter, options) -> int:
    """Serve for the time; the number of pushes."""
    if options.optimizer == "adamw":
        config = RuleConfig(name="adamw", optimizer="adamw", weight_decay=0.0)
    else:
        config = RuleConfig(momentum=protocol.MOMENTUM, momentum_at="server", weight_decay=0.0)
    rule = Rule(window.layout.num_parameters, config)
    with tempfile.TemporaryDirectory() as place:
        pushes = EventLog(Path(place) / "pushes.log")
        server = Server(
            Links(window, Inbox(world, window)),
            TimedLedger(options.workers, options.warmup + options.seconds),
            rule,
            ServerBooks(meter, log, pushes, Progress("none", ENDLESS, ENDLESS), NoSaver()),
            ServerHabits(world.timeout_s, FailureConfig(), CheckpointConfig(every_s=0)),
        )
        server.publish_first(torch.zeros(window.layout.num_parameters))
        server.run()
        server.inbox.close()
        pushes.close()
    return server.ledger.version


def push_and_fetch(client: ServerClient, header: Header) -> None:
    client.push_gradient(header, fetch=True)
    client.wait()


def work(
    world: World,
    client: ServerClient,
    clock: protocol.Clock,
    exchange: Callable[[ServerClient, Header], None],
) -> None:
    """Push and fetch, one sample of a lease each time, until the server says stop."""

    def granted() -> Lease | None:
        return next((lease for lease in client.mail.leases if lease.number == number), None)

    def is_news(mail: Mail) -> bool:
        return mail.orders == Orders.STOP or any(lease.number == number for lease in mail.leases)

    number = 1
    while True:
        # else it came with the last trip, as it does in a training
        if not granted():
            client.await_mail(is_news, "grant it a lease")
        lease = granted()
        if lease is None:
            client.say(Header(Kind.GOODBYE, world.worker, client.sent + 1, 0, 0, 0, 0))
            return
        exchange(
            client,
            Header(
                Kind.GRADIENT, world.worker, client.sent + 1, client.version, number, lease.start, 1
            ),
        )
        clock.tick()
        number += 1


def main(exchange: Callable[[ServerClient, Header], None] = push_and_fetch) -> World:
    """How a worker makes an exchange may be given; the world, when all is over."""
    options, world = protocol.options(), World(timeout_s=60)
    torch.set_num_threads(options.threads if world.is_server else 1)
    module = Vector(options.parameters)
    window = (ServerWindow if world.is_server else WorkerWindow)(
        world, Layout(num_floats(module), 3, options.workers)
    )
    window.open()
    with tempfile.TemporaryDirectory() as place:
        log = EventLog(Path(place) / "metrics.jsonl")
        meter = Meter(log, interval_s=1.0)
        if world.is_server:
            result = {"rate": 0.0, "pushes": serve(world, window, log, meter, options)}
            weights = window.latest.clone()
        else:
            outbox = Outbox(world, window)
            flat = FlatModel(module, torch.device("cpu"), outbox.payload.view(torch.float32))
            flat.gradient[: options.parameters].copy_(protocol.make_gradient(options.parameters))
            client = ServerClient(window, outbox, flat, meter, overlap=False)
            clock = protocol.Clock(options.warmup, options.seconds)
            work(world, client, clock, exchange)
            result = {"rate": clock.rate, "pushes": clock.exchanges}
            # now of this worker's last push: get those of everybody's
            weights = flat.weights
            # one alone on another host, whom nobody answers any more, has them
            if window.near[0]:
                window.fetch(weights.view(torch.uint8), at_least=client.mail.version)
        log.close()
    results = world.gather(result)
    pushes = results[0]["pushes"]
    everything = pushes == sum(worker["pushes"] for worker in results[1:])
    right = world.gather(
        protocol.are_right(weights[: options.parameters], pushes, options.optimizer)
    )
    if world.is_server:
        protocol.report([worker["rate"] for worker in results], pushes, everything and all(right))
    world.barrier("all ranks to be done")
    return world


if __name__ == "__main__":
    main()

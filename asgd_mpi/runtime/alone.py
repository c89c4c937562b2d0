"""A run in one process, without MPI: one worker and its server take turns.

The server is that of a job, and so is the worker; what lies between them is here: a window that is plain memory, an inbox that
holds what the worker has just sent. Every exchange is over before the worker goes on, as it is with one worker under MPI, so
the weights are the same to the bit. There is nobody to overlap with.
"""

from __future__ import annotations

import copy
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from asgd_mpi.comm.arrival import Arrival
from asgd_mpi.comm.layout import Layout
from asgd_mpi.config import options as configuration, written
from asgd_mpi.config import exchange_choice, topology
from asgd_mpi.config.rulebook import RULEBOOK
from asgd_mpi.config.topology import Topology
from asgd_mpi.errors import ConfigError, DeadlineExceeded, tell
from asgd_mpi.optim.formats import fetch_format, push_format
from asgd_mpi.process import signals
from asgd_mpi.protocol.messages import Header, Kind, Mail
from asgd_mpi.record import origin
from asgd_mpi.record.events import Note, Start
from asgd_mpi.record.meter import Meter
from asgd_mpi.record.nvml import open_gauge
from asgd_mpi.record.metrics import Metrics, to_all
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.runtime import devices
from asgd_mpi.runtime.prepare import configured, prepare
from asgd_mpi.runtime.rank import (
    Files,
    Rank,
    RankBooks,
    Serving,
    Turns,
    finish,
    first_module,
    open_server,
    open_worker,
    write_versions,
)
from asgd_mpi.runtime.server import Server
from asgd_mpi.task import Task, open_task
from asgd_mpi.vector.flat import FlatModel, num_floats, num_statistics
from asgd_mpi.vector.vector_format import VectorFormat

WORKER = 1  # its rank


class Alone:
    """This process, for a loop or a task of the user's; see asgd_mpi.api. Raises ConfigError."""

    is_alone = True

    def __init__(self, own: Task, arguments: list[str], write_report: Callable[[RunDir], Path]):
        self._own, self._arguments, self._write_report = own, arguments, write_report
        self.directory: Path | None = None
        self.rank, self.is_worker = WORKER, True
        config = configured(arguments, own)
        if (stages := config.stages.number) > 1 and own.computes:
            raise ConfigError(
                f"--stages.number {stages}: python alone trains in this process, and the stages of a worker are ranks of their own. Start "
                f"{stages + 1} of them: mpirun -np {stages + 1} python and your script, or leave --stages out."
            )
        on_cpu = config.compute.device == "cpu"
        here = socket.gethostname()
        self._ranks = [
            {"host": here, "gpus": []},
            {"host": here, "gpus": [] if on_cpu else devices.visible()},
        ]
        self.device = devices.take(Topology.of(self._ranks), WORKER)

    def begin(self, hold: ExitStack) -> Turns:
        """Train; see runtime.joining.take_part."""
        setup = prepare(self._arguments, self._ranks, None, hold, self._own)
        if "status" in setup:
            return setup["status"]
        run = RunDir.open(setup["run"])
        self.directory = run.path
        tell(setup["greeting"])
        # nothing has to travel
        config = exchange_choice.as_plain(written.from_yaml(setup["config"]))
        exchange = replace(config.exchange, overlap=False, servers=1)
        config = replace(config, exchange=exchange)
        status = yield from self._train(config, run, setup)
        signals.ignore()
        return status

    def give_up(self, status: int) -> int:
        return status

    def _train(self, config: configuration.Config, run: RunDir, setup: dict) -> Turns:
        places = Topology.of(self._ranks)
        task = open_task(config, own=self._own, metrics=setup["metrics"])
        threads = config.compute.threads or topology.threads_for(
            os.cpu_count() or 1, len(os.sched_getaffinity(0)), places.size
        )
        torch.set_num_threads(threads)
        module = first_module(task, run)
        plan, carried = task.plan(1), setup["carried"]
        layout = Layout(
            num_floats(module),
            config.exchange.ring,
            1,
            num_statistics(module, carried),
            fetch_format(config.exchange.fetch_wire, module),
            push=push_format(config.exchange, module),
        )
        window = LocalWindow(layout)
        files = Files(
            run,
            setup["restart"],
            Path(setup["checkpoint"]) if setup["checkpoint"] else None,
            setup["room"],
        )
        ranks = []
        for number, role in ((topology.SERVER, "server"), (WORKER, "worker")):
            listeners = self._own.listeners if number == topology.SERVER else []
            log = Metrics(run.metrics_of(number, setup["restart"]), to_all(listeners), _say_of_disk)
            device = self.device if number == WORKER else torch.device("cpu")
            log.write(
                Start(
                    time.time(),
                    number,
                    role,
                    places.hosts[number],
                    str(device),
                    plan.num_workers,
                    num_floats(module),
                    plan.num_samples,
                    plan.total_samples,
                    config.exchange.n_fetch in (1, config.exchange.n_push),
                    threads,
                    unit=task.unit,
                    alone=True,
                )
            )
            meter = Meter(log, config.record.interval_s, config.record.spans)
            if gpu := places.gpu(number):
                meter.gauge = open_gauge(gpu.id)
            meter.begin()
            log.flush()
            ranks.append(
                Rank(
                    world=Place(number, config.run.timeout_s),
                    places=places,
                    task=task,
                    window=window,
                    files=files,
                    books=RankBooks(meter, log, _noting(meter, log), self._write_report),
                    carried=carried,
                )
            )
        everyone = [
            {"rank": number, "host": host, "device": str(self.device), "threads": threads}
            | origin.of_host()
            for number, host in enumerate(places.hosts)
        ]
        write_versions(run, setup["restart"], everyone, "none: one process")
        serving = open_server(ranks[0], plan, copy.deepcopy(module), LocalInbox())
        serving.server.publish_first(serving.first)
        return (yield from self._take_turns(ranks, serving, module))

    def _take_turns(self, ranks: list[Rank], serving: Serving, module: torch.nn.Module) -> Turns:
        server_rank, rank = ranks
        config, server = rank.task.config, serving.server
        is_elastic = RULEBOOK[config.rule.name].moves == "elastic"
        flat = FlatModel(module, self.device, spare_weights=is_elastic, carried=rank.carried)
        client = LocalClient(server, flat, rank.books.meter, is_elastic)
        loaders = rank.task.train_loader(rank.books.note), rank.task.val_loader(rank.books.note)
        worker = open_worker(rank, flat, client, loaders)
        if rank.task.computes:
            worker.run()
        else:
            yield from worker.driven()
        for loader in loaders:
            loader.close()
        rank.close("left" if server.left_because else "finished", "")
        server.save_last()
        serving.close()
        return finish(server_rank, server)


def _say_of_disk(error: OSError, text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _noting(meter: Meter, log: Metrics) -> Callable[..., None]:
    def note(text: str, **counts: int) -> None:
        meter.add(**counts)
        log.write(Note(time.time(), text))
        print(text, file=sys.stderr, flush=True)

    return note


@dataclass
class Place:
    """What a rank asks its world, where there is none."""

    rank: int
    timeout_s: float

    @property
    def worker(self) -> int:
        return self.rank - 1

    @contextmanager
    def keeping_others(self) -> Iterator[None]:
        yield

    def end_without(self, ranks: set[int], status: int) -> None:
        """Nobody else is there."""


class LocalWindow:
    """The server's memory: as much of comm.server_window.ServerWindow as a server needs."""

    def __init__(self, layout: Layout):
        self.whole = layout
        self.version, self.samples = -1, 0
        self.latest = torch.zeros(layout.num_parameters)
        self._next = torch.zeros(layout.num_parameters)
        self.statistics = torch.zeros(layout.num_statistics)
        self.mail = Mail(judged=0, version=0)

    @contextmanager
    def next_snapshot(self, version: int, samples: int) -> Iterator[torch.Tensor]:
        yield self._next
        self.latest, self._next = self._next, self.latest
        self.version, self.samples = version, samples

    def promise(self, worker: int, packet: int) -> None:
        """Nobody follows."""

    def show(self, piece: slice) -> None:
        """Nobody follows."""

    def show_statistics(self, statistics: torch.Tensor) -> None:
        self.statistics.copy_(statistics)

    def post(self, worker: int, mail: Mail) -> None:
        self.mail = mail

    def close(self) -> None:
        """Plain memory."""


@dataclass
class LocalInbox:
    """What the worker has sent: as much of comm.packets.Inbox as a server needs."""

    waiting: list[Arrival] = field(default_factory=list)
    dead: set[int] = field(default_factory=set)

    def take(self, seconds: float) -> list[Arrival]:
        taken, self.waiting = self.waiting, []
        return taken

    def poll(self) -> bool:
        return bool(self.waiting)

    def release(self, arrival: Arrival) -> None:
        """Its memory is the worker's own."""

    def close(self) -> None:
        """Nothing is under way."""


class LocalClient:
    """A worker's exchange with the server of its own process: as runtime.client.ServerClient, without overlap."""

    def __init__(self, server: Server, flat: FlatModel, meter: Meter, fetches_aside: bool):
        self._server, self._flat, self._meter = server, flat, meter
        self._aside = fetches_aside
        self._is_new = self._is_sent_home = False
        self.version = self.samples = self.sent = 0
        self._statistics = torch.empty(flat.num_statistics)
        self.mail = self._window.mail

    @property
    def _window(self) -> LocalWindow:
        return self._server.window

    @property
    def format(self) -> VectorFormat:
        """That of what is fetched."""
        return self._window.whole.fetched

    @property
    def fetched(self) -> torch.Tensor:
        """The weights that the last fetch brought, (P,) float32."""
        return self._flat.spare_weights if self._aside else self._flat.weights

    def is_back(self) -> bool:
        return True

    def is_overtaken(self) -> bool:
        return self.version < self._window.mail.oldest

    def start(
        self,
        header: Header | None,
        fill: Callable[[torch.Tensor], int],
        fetch: bool = True,
        whole: bool = False,
    ) -> None:
        """Exchange: the server judges a packet, unless `header` is None; then the newest weights come, if asked for."""
        began = time.perf_counter()
        if header is not None:
            memory = torch.empty(4 * self._flat.num_statistics, dtype=torch.uint8)
            if header.kind in (Kind.VALIDATION, Kind.STATISTICS):
                fill(memory)
            self._send(header, memory.view(torch.float32))
        pushed = time.perf_counter()
        if fetch:
            window = self._window
            weights = window.latest if whole else self.format.rounded(window.latest)
            self.fetched.copy_(weights)
            self.version, self.samples, self._is_new = window.version, window.samples, True
            self._meter.add(fetches=1)
        self._meter.add(push=pushed - began, fetch=time.perf_counter() - pushed)

    def push_gradient(self, header: Header, fetch: bool, code: torch.Tensor | None = None) -> int:
        """Exchange the gradient of the network, which holds what `code` stands for; returns the bytes that travel: none."""
        self.start(header, lambda payload: 0, fetch)
        return 0

    def wait(self) -> bool:
        """Return whether the weights are new since the last call."""
        self.mail = self._window.mail
        is_new, self._is_new = self._is_new, False
        return is_new

    def say(self, header: Header) -> None:
        self.start(header, lambda payload: 0, fetch=False)
        self.wait()

    def await_mail(self, until: Callable[[Mail], bool], for_what: str) -> None:
        """Let the server work until `until` holds of the mail. Raises DeadlineExceeded."""
        deadline = time.monotonic() + self._server.timeout_s
        while not until(self._window.mail):
            self._turn()
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"the server of this process did not {for_what} for {self._server.timeout_s:g} s (--run.timeout_s); "
                    "raise the limit if its disk is that slow."
                )
            time.sleep(0.001)
        self.mail = self._window.mail

    def read_statistics(self) -> torch.Tensor:
        return self._window.statistics

    def close(self) -> None:
        """Nothing is under way."""

    def _send(self, header: Header, statistics: torch.Tensor) -> None:
        """Hand a packet to the server, and let it work until it is judged."""
        self.sent += 1
        gradient = self._flat.gradient.cpu()
        self._server.inbox.waiting.append(Arrival(header.worker, header, gradient, statistics))
        self.await_mail(lambda mail: mail.judged >= self.sent, "judge a packet")

    def _turn(self) -> None:
        server = self._server
        server.turn()
        if server.is_over and not self._is_sent_home:
            self._is_sent_home = True
            server.send_home()

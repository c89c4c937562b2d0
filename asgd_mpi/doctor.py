"""`mpirun -np 4 python -m asgd_mpi.doctor`: what a training would meet here, and for each problem the one thing to change.

Run it under the same launcher, on the same hosts, as the job. Every step has a deadline: one that passes it is reported
as a problem, with everything found until then, and ends the job; it never hangs. A watchdog thread ends steps that are
stuck inside MPI, where nothing can be polled. The exit status is 0 if all is well, 1 if a problem was found, 2 for a wrong
option. What follows from the findings is decided in `findings.py`, which is pure.
"""

from __future__ import annotations

from asgd_mpi.optim.formats import fetch_format
from asgd_mpi.process import interpreter

if __name__ == "__main__":  # before anything heavy is imported
    interpreter.begin()

import faulthandler
import io
import math
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Literal, Optional

import h5py
import jsonargparse

from asgd_mpi.config import command_line, limits, topology
from asgd_mpi.config.options import FETCHED, WIRES
from asgd_mpi.config.topology import SERVER, Gpu, Topology
from asgd_mpi.errors import ConfigError, UserError, tell
from asgd_mpi.model import networks
from asgd_mpi.process import ending, launchers, segments
from asgd_mpi.runtime import devices, findings
from asgd_mpi.runtime.findings import PROBLEM, Findings, Link, Locking, Need, Rank, Row
from asgd_mpi.runtime.prepare import configured
from asgd_mpi.task import complete, open_task
from asgd_mpi.vector.flat import num_floats, num_statistics
from asgd_mpi.vector.vector_format import VectorFormat

# rank 0 speaks first: the others leave so much later, unless it has ended the job by then; it may have to wait for a core
GRACE_S = 10.0
SILENT_TRIES = 3  # of a read that a busy machine has spoilt
FORWARDING_S = 0.5  # the launcher drops what it has not yet forwarded when the job is ended
DIGITS = (10, 1, 8)  # classes, channels, pixels of the embedded data,
IMAGENET = (1000, 3, 224)  # ... and what every other network is taken to see
# of the world, as Open MPI's and MPICH's launchers have it
SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
WIDTH = 120  # columns of the report


class StepFailed(Exception):
    """A step that went wrong on one rank at least; every rank raises it."""


@ending.of_command
def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    # MPI_Init holds the interpreter: no thread could act
    faulthandler.dump_traceback_later(3 * options.deadline_s, exit=True)
    from asgd_mpi.comm.world import World

    faulthandler.cancel_dump_traceback_later()
    world = World(timeout_s=options.deadline_s)
    examination = Examination(world, options)
    try:
        examination.run()
    except StepFailed:
        examination.end(status=1)
    status = 0
    if world.is_server and launchers.is_first_process():
        status = examination.report()
    faulthandler.dump_traceback_later(3 * options.deadline_s, exit=True)
    examination.probe.leave()
    faulthandler.cancel_dump_traceback_later()
    return status


RANGES = {
    "ring": limits.RANGES["exchange.ring"],
    "servers": limits.RANGES["exchange.servers"],
    "step-ms": (limits.above(0), "give milliseconds above 0"),
    "megabytes": (limits.at_least(1, 2**20), "give the size of the test window, 1 MiB or more"),
    "deadline-s": (
        limits.above(0, 86400),
        "every step needs a limit above 0 seconds; a day at most",
    ),
}


def make_parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog="python -m asgd_mpi.doctor",
        ranges=RANGES,
        description="Examine MPI, shared memory, GPUs and HDF5 under the job's own launcher; see what to change.",
    )
    parser.add_argument(
        "--model", default="digits_cnn", help=f"The network to be trained: {networks.FORMS}."
    )
    parser.add_argument(
        "--task",
        default="",
        metavar="NAME",
        help="The task to be trained, as package.module:Class, in place of --model: its data is opened as a training does, on rank "
        "0; see --deadline-s.",
    )
    parser.add_argument(
        "--ring", type=int, default=3, help="Snapshots in the window (--exchange.ring)."
    )
    parser.add_argument(
        "--wire", type=Literal[WIRES], default="float32", help="What travels (--exchange.wire)."
    )
    parser.add_argument(
        "--fetch-wire",
        type=Optional[Literal[FETCHED]],
        help="What is fetched, if it is not the same (--exchange.fetch_wire).",
    )
    parser.add_argument(
        "--servers", type=int, default=1, help="Ranks that serve (--exchange.servers)."
    )
    parser.add_argument(
        "--data", default=".", help="Directory in which HDF5 file locking is tried."
    )
    parser.add_argument(
        "--step-ms",
        type=float,
        default=100.0,
        help="A batch on a worker, to choose an exchange for.",
    )
    parser.add_argument("--megabytes", type=int, default=4, help="Size of the test window.")
    parser.add_argument(
        "--deadline-s",
        type=float,
        default=10.0,
        help="Limit of what each rank does in a step; the job ends after 3 of them at the latest.",
    )
    return parser


def _options(arguments: Sequence[str] | None) -> jsonargparse.Namespace:
    """Return the options; one process says what is wrong with them, or what they are. Raises ConfigError, SystemExit."""
    if launchers.is_first_process():
        return make_parser().read(arguments)
    try:
        with redirect_stdout(io.StringIO()):
            return make_parser().read(arguments)
    except ConfigError:
        launchers.let_first_speak()
        raise SystemExit(ending.WRONG) from None


class Examination:
    """Takes the steps, on all ranks together, and keeps what they find."""

    def __init__(self, world, options: jsonargparse.Namespace):
        from asgd_mpi.comm import probe

        self.world, self.options, self.probe = world, options, probe
        own = Rank(world.host, **probe.facts(), num_cores=len(os.sched_getaffinity(0)))
        self.found = Findings(
            [own],
            world.size,
            patience_s=(probe.SILENCE_S - probe.PATIENCE_S) / 2,
            step_s=options.step_ms / 1e3,
        )

    def run(self) -> None:
        """Raises StepFailed."""
        found, options = self.found, self.options
        found.launched, found.slurm_tasks = _launched(), _slurm_tasks()
        self.step("world: barrier", lambda: self.probe.talk(self.world))
        own = found.ranks[0]
        found.ranks = [
            Rank(**facts | {"gpus": tuple(Gpu(*gpu) for gpu in facts["gpus"])})
            for facts in self.step("host: facts", lambda: asdict(own) | _machine_facts())
        ]
        if options.servers > 1:  # number the ranks as a training does
            order = self.step(
                "world: roles",
                lambda: topology.arrange([rank.host for rank in found.ranks], 1, options.servers),
            )[0]
            self.world.renumber(order)
            found.ranks, found.num_servers = [found.ranks[rank] for rank in order], options.servers
        build = "parallel" if h5py.get_config().mpi else "serial"
        found.hdf5 = f"{h5py.version.hdf5_version}, h5py {h5py.__version__}, {build}"
        locking = self.step(
            "file: locking",
            lambda: asdict(_try_locking(Path(options.data))) if self.world.is_server else {},
        )
        found.locking = Locking(**locking[SERVER])
        found.need = Need(**self.step("model: memory", self._need)[SERVER])
        self._examine_window(found.places)
        if found.sends_gpu_memory:
            self.step(findings.GPU_MESSAGES, self._send_gpu_memory)

    def _examine_window(self, places: Topology) -> None:
        num_bytes = self.options.megabytes << 20
        self.step(findings.ROOM, lambda: self._demand_room(num_bytes))
        probe = self.probe.WindowProbe(self.world, num_bytes)
        carried = self.step("window: allocate", probe.allocate)[SERVER]
        settings = (
            ", ".join(f"{name}={value}" for name, value in carried["settings"].items())
            or "no setting"
        )
        self.found.window = (
            f"the component cannot be asked for its name ({settings}); {carried['memory_model']} memory "
            "model; what it does is tried below"
        )
        for name in ("lock", "put", "get", "atomic", "count"):
            self.step(f"window: {name}", getattr(probe, name))
        if places.num_workers:
            self.found.silent_s = self._read_silently(probe, places)
            links = self.step("link: measure", lambda: probe.links(places))[SERVER]
            self.found.links = [Link(**link) for link in links]
        self.step("window: free", probe.free)

    def _read_silently(self, probe, places: Topology) -> dict[int, float]:
        """Return the seconds of each prober's read while rank 0 sleeps; nan if none began in time.

        A rank that gets no core makes a read late, or slow: within rank 0's host, where it should be neither, the best of
        SILENT_TRIES counts.
        """
        probers, server = self.probe.probers(places), places.hosts[SERVER]
        took = dict.fromkeys(probers, math.nan)
        for _ in range(SILENT_TRIES):
            told = self.step("window: silent target", lambda: probe.silent_target(probers))
            for rank in probers:
                seconds, is_in_time = told[rank]
                if is_in_time:
                    took[rank] = min(seconds, took[rank]) if took[rank] >= 0 else seconds
            if all(
                seconds <= self.found.patience_s or seconds >= 0 and places.hosts[rank] != server
                for rank, seconds in took.items()
            ):
                break
        return took

    def step(self, name: str, act: Callable[[], object]) -> list:
        """Act, on all ranks; return every rank's result when all are done.

        Raises StepFailed; ends the process if this rank is stuck. Acting may take one deadline, which leaves the others
        waiting for as long: they wait half as long again.
        """
        deadline_s, started = self.options.deadline_s, time.perf_counter()
        limit_s = 3 * deadline_s
        if not self.world.is_server:
            limit_s += GRACE_S
        watchdog = threading.Timer(limit_s, self._stuck, [name])
        watchdog.daemon = True
        watchdog.start()
        value, error = None, ""
        try:
            value = act()
        except Exception as caught:  # whatever it is, the others learn of it
            error = f"{self._who()}: {_plain(caught)}"
        self.world.timeout_s = 1.5 * deadline_s
        try:
            values, errors = zip(*self.world.gather([value, error]))
        except Exception as caught:
            values, errors = (
                (),
                (error or f"{self._who()} did its part, but not all others did: {_plain(caught)}",),
            )
        self.world.timeout_s = deadline_s
        watchdog.cancel()
        if any(errors):
            self.found.failed = (name, "; ".join(filter(None, errors)))
            raise StepFailed(name)
        self.found.steps.append((name, time.perf_counter() - started))
        return list(values)

    def report(self) -> int:
        """Print the report; the exit status."""
        rows = findings.diagnose(self.found)
        tell(render(rows, self.found.places))
        return int(any(row.verdict == PROBLEM for row in rows))

    def end(self, status: int) -> None:
        """Report, and end all ranks; rank 0 first."""
        if self.world.is_server:
            self.report()
            time.sleep(FORWARDING_S)
        else:
            # rank 0 may just have begun to wait for the others
            time.sleep(self.options.deadline_s + GRACE_S)
        self.world.abort(status)

    def _demand_room(self, num_bytes: int) -> None:
        """Raises ConfigError: writing to shared memory that is not there would kill the process."""
        free = self.found.ranks[SERVER].shm_free
        if free is not None and free < num_bytes:
            raise ConfigError(
                f"/dev/shm has {free} bytes free, and the test window needs {num_bytes}: enlarge it"
            )

    def _send_gpu_memory(self) -> None:
        places, rank = self.found.places, self.world.rank
        ranks = [worker for worker in places.workers if places.gpu(worker)]
        if rank in ranks:
            self.probe.message_round(self.world, ranks, devices.take(places, rank))

    def _need(self) -> dict | None:
        """Return the fields of Need, from rank 0. Raises ConfigError."""
        from asgd_mpi.comm.layout import Layout

        places, options = self.found.places, self.options
        if not self.world.is_server:
            return None
        if options.task:
            module = open_task(complete(configured([f"--task={options.task}"]))).build_module()
        elif options.model == "digits_cnn":
            module = networks.build(options.model, *DIGITS)
        else:
            module = networks.build(options.model, *IMAGENET)
        layout = Layout(
            num_floats(module),
            options.ring,
            places.num_workers,
            num_statistics(module),
            fetch_format(options.fetch_wire or options.wire, module),
            options.servers,
            VectorFormat(num_floats(module), options.wire),
        )
        here = [rank for rank, host in enumerate(places.hosts) if host == places.hosts[SERVER]]
        window = sum(
            layout.of(places.servers.index(rank)).server_bytes
            for rank in here
            if rank in places.servers
        )
        local = sum(rank in places.workers for rank in here)
        return asdict(
            Need(
                options.task or options.model,
                layout.num_parameters,
                options.ring,
                window,
                local * layout.worker_bytes,
            )
        )

    def _stuck(self, name: str) -> None:
        """This rank is inside MPI, or behind a rank that is, and past the limit: say so and leave."""
        self.found.failed = (
            name,
            f"{self._who()} is still in it after {3 * self.options.deadline_s:g} s",
        )
        if self.world.is_server:
            self.report()
        else:
            tell(f"{PROBLEM}: {name}: {self.found.failed[1]}", file=sys.stderr)
        time.sleep(FORWARDING_S)
        # MPI cannot be asked to abort by a thread if it is stuck in another; the launcher ends the rest
        os._exit(1)

    def _who(self) -> str:
        return f"rank {self.world.rank} on {self.world.host}"


def render(rows: list[Row], places: Topology) -> str:
    """Return the report: a table of the checks, the GPU map, and the problems with their remedies."""
    indent = " " * 24
    lines = [f"{row.verdict:8s} {row.topic:15s}{_wrapped(row.fact, indent)}" for row in rows]
    lines += ["", topology.render(topology.table(places))]
    problems = [row for row in rows if row.verdict == PROBLEM]
    lines += ["", f"{len(problems)} problem(s)" if problems else "no problem found"]
    for number, row in enumerate(problems, start=1):
        lines += [
            f"{number}. {row.topic}: {_wrapped(row.fact, '   ')}",
            f"   -> {_wrapped(row.remedy, '      ')}",
        ]
    return "\n".join(lines)


def _wrapped(text: str, indent: str) -> str:
    lines, line = [], ""
    for word in text.split():
        if line and len(indent) + len(line) + 1 + len(word) > WIDTH:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return f"\n{indent}".join([*lines, line])


def _machine_facts() -> dict:
    """Fields of Rank that CUDA and the file system know."""
    shm = Path("/dev/shm")
    removed = segments.remove_dead()
    return {
        "shm_removed": len(removed),
        "shm_removed_bytes": sum(segment.num_bytes for segment in removed),
        "gpus": devices.visible(),
        "shm_free": shutil.disk_usage(shm).free if shm.is_dir() else None,
    }


def _launched() -> int | None:
    sizes = [int(os.environ[size]) for size in SIZES if size in os.environ]
    return max(sizes, default=None)


def _slurm_tasks() -> int | None:
    allocation = launchers.Allocation.of(os.environ)
    return allocation and allocation.num_tasks


def _try_locking(directory: Path) -> Locking:
    """Make, lock and remove a small HDF5 file in `directory`."""
    setting = os.environ.get("HDF5_USE_FILE_LOCKING")
    try:
        with tempfile.TemporaryDirectory(dir=directory, prefix=".asgd_mpi_doctor_") as place:
            with h5py.File(Path(place) / "probe.h5", "w", locking=True) as file:
                file["x"] = 1
    except OSError as error:
        return Locking(str(directory), str(error), setting)
    return Locking(str(directory), "", setting)


def _plain(error: Exception) -> str:
    """An error in one line; a deadline without the advice that is meant for a training."""
    if isinstance(error, UserError):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}"
    return text.partition(" (--run.timeout_s)")[0]


if __name__ == "__main__":
    interpreter.loaded()
    interpreter.end(main())

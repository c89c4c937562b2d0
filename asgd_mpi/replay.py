"""`python -m asgd_mpi.replay RUN_DIR`: compute a recorded run again, in one process and without MPI.

`pushes.log` says which worker pushed what in which order, and on which version it had computed. Nothing else is
needed: a gradient is a pure function of (weights, epoch, positions, seed). On the CPU, in float32, with the thread
counts of the ranks, the weights come out the same to the bit, over failures and restarts of the run. Every entry goes
through a ledger of its own invariants (versions in order, staleness not negative, the rate that the schedule gives).
"""

from __future__ import annotations

from asgd_mpi.process import interpreter

if __name__ == "__main__":  # before anything heavy is imported
    interpreter.begin()

import math
import os
import runpy
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Optional

import msgspec
import torch

from asgd_mpi import api
from asgd_mpi.config import command_line, limits
from asgd_mpi.config import written
from asgd_mpi.config.options import Config
from asgd_mpi.config.topology import SERVER
from asgd_mpi.errors import ConfigError, DataError, RunDirError, tell
from asgd_mpi.offline.trainer import Computed, SingleProcessTrainer, Snapshot, finished
from asgd_mpi.optim.replica import Replica
from asgd_mpi.optim.rules import EMA, Rule
from asgd_mpi.process import ending
from asgd_mpi.protocol.ledger import Plan
from asgd_mpi.protocol.messages import Verdict
from asgd_mpi.record import checkpoint, history, progress
from asgd_mpi.record.events import Member, Push, Resume, Start, Turn, read_events, read_log
from asgd_mpi.record.history import Session, lineage
from asgd_mpi.record.rundir import RunDir, version_and_restart
from asgd_mpi.record.tensors import read_tensors
from asgd_mpi.runtime import trust
from asgd_mpi.runtime.rank import Turns
from asgd_mpi.runtime.resume import demand_same_data
from asgd_mpi.task import OpenedTask, Task, open_task
from asgd_mpi.task.loop import Loop
from asgd_mpi.untrusted import bounded
from asgd_mpi.untrusted.plausible import MAX_WORKERS, out_of_range
from asgd_mpi.vector.flat import FlatModel
from asgd_mpi.vector.groups import told as told_groups

State = dict[str, torch.Tensor]
MAX_THREADS = 4096  # of a rank


@dataclass
class Point:
    """Where a start of a run begins: what its checkpoint held."""

    version: int
    samples: int
    weights: torch.Tensor  # (P,) float32
    rule: State = field(default_factory=dict)
    steps: int = 0  # that this state knows of
    # by worker; empty: from nothing
    momenta: list[State] = field(default_factory=list)


def replay(
    task: OpenedTask,
    pushes: Iterable[Push | Turn],
    num_workers: int,
    begin: Point | None = None,
    successor: Resume | None = None,
    threads: Mapping[int, int] = MappingProxyType({}),
    until: float = math.inf,
) -> tuple[FlatModel, Point | None]:
    """Apply the entries of one start's log, as `replaying` does, for a task that has a loss of its own."""
    return finished(replaying(task, pushes, num_workers, begin, successor, threads, until))


def replaying(
    task: OpenedTask,
    pushes: Iterable[Push | Turn],
    num_workers: int,
    begin: Point | None = None,
    successor: Resume | None = None,
    threads: Mapping[int, int] = MappingProxyType({}),
    until: float = math.inf,
    look_at: Mapping[int, Callable[[FlatModel], None]] = MappingProxyType({}),
) -> Generator[Any, float, tuple[FlatModel, Point | None]]:
    """Apply the entries of one start's log; returns the network after the last push, and where `successor` begins.

    `until`: the version to stop at. `begin`: None for the first weights. `threads`: of each rank; the bits depend on how a
    vector is shared out among them. What was applied after the successor's checkpoint is computed, too: momenta may
    hold a little of it. `look_at`: what to call with the network when it holds a version. Memory: one (P,) vector for each version that a worker may still have computed on, and one for
    each worker's momentum. Raises RunDirError.
    """
    first = begin and Snapshot(begin.version, begin.samples, begin.weights)
    computation = SingleProcessTrainer(task, num_workers, first)
    rule, replicas, schedule = computation.rule, computation.replicas, computation.schedule
    pacing = task.plan(num_workers).pacing
    latest = computation.first
    is_whole = begin and rule.load_({EMA: begin.weights} | begin.rule)
    steps = begin.steps if is_whole else 0
    for replica, state in zip(replicas, begin.momenta if begin else []):
        replica.load_(state)
    # worker -> the version it read last
    held: dict[int, int] = dict.fromkeys(range(num_workers), latest.version)
    snapshots = {latest.version: latest}
    # worker -> the version that its replica has, and the one that its last push made
    fetched: dict[int, int] = {}
    made: dict[int, int] = {}
    handover = _Handover(successor, rule, steps, latest, replicas)
    for entry in pushes:
        if isinstance(entry, Member):
            held[entry.worker] = entry.version
            computation.begin_anew_(entry.worker)
            fetched.pop(entry.worker, None)
            made.pop(entry.worker, None)
        if not isinstance(entry, Push):
            continue
        if latest.version >= until:
            break
        push, replica = entry, replicas[entry.worker]
        staleness = pacing.staleness(latest.version, push.read_version)
        _check(push, latest.version, schedule(latest.samples, staleness), snapshots)
        elastic = replica.moves == "elastic"
        begun = push.base if elastic and replica.base == -1 else push.read_version
        if begun not in snapshots:
            raise RunDirError(
                f"pushes.log does not follow from itself: {push} began with version {begun}, which no worker held "
                "then. It was cut or changed: take a copy that was not."
            )
        goes_on = fetched.get(push.worker) == begun or elastic and replica.base != -1
        _use(threads.get(push.worker + 1))
        computed = yield from computation.computing_(
            push.worker,
            push.segments,
            None if goes_on else snapshots[begun],
            snapshots[push.read_version] if elastic else None,
            push.read_version < made.get(push.worker, 0),
        )
        if computed.loss != push.loss:
            raise RunDirError(
                f"the push that made version {latest.version + 1} recorded a loss of {push.loss!r}, the "
                f"replay computes {computed.loss!r}: the log, the data or the arithmetic (threads, library) differ. "
                "Replay with the data and the versions that versions.json of the run names."
            )
        if wrong := _other(push, computed):
            raise RunDirError(
                f"the push that made version {latest.version + 1} recorded {wrong}: the log was changed, or the data are "
                "others. Take a copy that was not changed."
            )
        fetched[push.worker], made[push.worker] = push.read_version, push.version + 1
        steps += push.mean_of > 0
        verdict = Verdict(
            push.lr,
            push.version,
            push.staleness,
            push.worker,
            rate=schedule(latest.samples),
            mean_of=push.mean_of,
            scale=computed.scale,
            step=steps,
            samples=latest.samples,
            count=push.positions,
        )
        _use(threads.get(SERVER))
        latest = snapshots[push.version + 1] = computation.applied(latest, verdict, push.positions)
        if latest.version in look_at:
            computation.flat.weights.copy_(latest.weights)
            look_at[latest.version](computation.flat)
        handover.see_version(latest, rule, steps)
        handover.see_momentum(push.worker, latest.version, replica)
        # a worker never reads an older version again
        held[push.worker] = push.read_version
        for old in [old for old in snapshots if old < min(held.values())]:
            del snapshots[old]
    computation.flat.weights.copy_(latest.weights)
    computation.close()
    return computation.flat, handover.point()


def _use(threads: int | None) -> None:
    if threads and threads != torch.get_num_threads():
        torch.set_num_threads(threads)


class _Handover:
    """Collects, on the way, what the successor's checkpoint held."""

    def __init__(
        self,
        successor: Resume | None,
        rule: Rule,
        steps: int,
        first: Snapshot,
        replicas: list[Replica],
    ):
        self._successor = successor
        self._point: Point | None = None
        self._momenta: list[State] = [{} for _ in successor.momenta] if successor else []
        self.see_version(first, rule, steps)
        for worker, replica in enumerate(replicas):
            self.see_momentum(worker, first.version, replica)

    def see_version(self, latest: Snapshot, rule: Rule, steps: int) -> None:
        if self._successor and self._successor.version == latest.version:
            self._point = Point(*latest, _clone(rule.state), steps, self._momenta)

    def see_momentum(self, worker: int, made: int, replica: Replica) -> None:
        if worker < len(self._momenta) and self._successor.momenta[worker] == made:
            self._momenta[worker] = _clone(replica.state)

    def point(self) -> Point | None:
        if self._successor and self._point is None:
            raise RunDirError(
                f"a later start goes on from version {self._successor.version}, which the log does not reach: "
                "it was cut. Replay a whole copy of the run."
            )
        return self._point


def _clone(state: State) -> State:
    return {name: vector.clone() for name, vector in state.items()}


def _check(push: Push, version: int, lr: float, snapshots: dict[int, Snapshot]) -> None:
    if push.version != version or push.read_version not in snapshots or push.lr != lr:
        raise RunDirError(
            f"pushes.log does not follow from itself: version {version} at rate {lr!r} was due, with a read "
            f"of one of the versions {min(snapshots)} to {version}; it has {push}. It was cut or changed: take a copy that was not."
        )


def _other(push: Push, computed: Computed) -> str:
    """Return what a line says of its push that the replay finds to be otherwise; a log of before it was written says 0, or 1."""
    if push.skipped and push.skipped != computed.skipped:
        return f"{push.skipped} samples left out, the replay leaves out {computed.skipped}"
    if push.scale != 1 and not math.isclose(push.scale, computed.scale, rel_tol=1e-5):
        return (
            f"that it was scaled by {push.scale:.6g}, the replay scales it by {computed.scale:.6g}"
        )
    return ""


RANGES = {"until": (limits.at_least(0, 2**62), "a version is a whole number from 0")}


def make_parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog="python -m asgd_mpi.replay",
        description="Compute a recorded run again and compare the weights.",
        ranges=RANGES,
        short={"--data": "--data.path", "--task": "--model"},
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="A directory that asgd_mpi.train made.")
    parser.add_argument(
        "--until",
        type=Optional[int],
        metavar="VERSION",
        help="Stop at this version of the weights.",
    )
    parser.add_argument(
        "--debug",
        action="store_true",
        help="Start the debugger there; `flat` is the network, `push` the next entry of the log.",
    )
    parser.add_argument(
        "--data.path",
        default="",
        metavar="DIR",
        help="Where the data set of the run lies, if not where its "
        "configuration says: of a run that was copied from another machine. --data is short for it.",
    )
    parser.add_argument(
        "--model",
        default="",
        metavar="NAME",
        help="The network, by its name or as package.module:function, or the task as package.module:Class (--task is the same), in "
        "place of the one that the run names: code of your own is run only if you name it, or have trained "
        "this run here with it.",
    )
    parser.add_argument(
        "--rule",
        default="",
        metavar="NAME",
        help="The rule of the run, as package.module:Class, if it is of your own: its code is run only if you name it.",
    )
    parser.add_argument(
        "--script",
        default="",
        metavar="FILE",
        help="The script whose loop over run.batches made the run: it is run again, and gets the batches of the log.",
    )
    return parser


@ending.of_command
def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().read(arguments)
    run, given = (
        RunDir.open_told(options.run_dir),
        Given(options.data.path, options.model, options.rule),
    )
    if options.script:
        trust.demand_outside(options.script, run.path)
        return of_script(options.script, run, given)
    if options.until is None:
        return finished(replay_and_compare(run, given))
    return finished(_replay_until(run, options.until, options.debug, given))


@dataclass(frozen=True)
class Given:
    """Return what the user says in place of a run's configuration; empty: as it is there."""

    data: str = ""
    model: str = ""
    rule: str = ""
    own: Task | None = None  # what a script brings

    def task_of(self, run: RunDir, restart: int) -> OpenedTask:
        """Open the task of a start. Raises ConfigError if its network is code that the user has not named, DataError, and
        ConfigError if the data set is not the one of its checkpoints."""
        config = _read_config(run.config_of(restart))
        model = self.model or config.model.name
        trust.demand(model, self.model, run.path)
        trust.demand(config.rule.own, self.rule, run.path, "--rule")
        data = replace(config.data, path=self.data or config.data.path)
        try:
            config = replace(config, data=data, model=replace(config.model, name=model))
            if config.data.source == "script" and self.own is None:
                raise ConfigError(
                    f"{run.path} was made by a loop in {config.model.name}: give that script with --script FILE, and it is run again."
                )
            task = open_task(config, own=self.own)
        except DataError as error:
            if self.data or os.path.exists(data.path):
                raise
            raise DataError(
                f"{data.path}, the data set of {run.path}, is not here: if the run was copied from another directory "
                "or machine, say where it lies with --data DIR."
            ) from error
        own_groups = told_groups(self.own.settings) if self.own else ""
        if config.rule.groups not in (None, own_groups):
            raise ConfigError(
                f"{run.path} was made with the parameter groups {config.rule.groups or 'none'!r}, and the script's optimizer has "
                f"{own_groups or 'none'!r}: the weights would be others. Give the script that made the run."
            )
        manifest = next((manifest for _, manifest in checkpoint.resumable(run) if manifest), None)
        if manifest:
            demand_same_data(manifest, task.train.fingerprint, task.train.num_classes, data.path)
        return task


def _read_config(path: Path) -> Config:
    """Read the configuration that a start wrote down. Raises ConfigError for values that no start has."""
    config = written.as_before(written.read(path))
    in_force = written.in_force(config, num_workers=1)
    try:
        limits.check(config)
        if left := [name for name, value, _ in limits.values(in_force) if value is None]:
            raise ConfigError(
                f"it leaves {', '.join(left)} open, which every run writes down. Restore it."
            )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config


def replay_and_compare(run: RunDir, given: Given) -> Turns:
    """Replay a run and compare its checkpoints; returns the status. See runtime.rank.Turns."""
    flat, point, done = None, None, 0
    compared = Compared(run)
    sessions = lineage(run)
    _tell_versions(run, sessions)
    for session, successor in zip(sessions, [*sessions[1:], None]):
        flat, point, last = yield from _replay_session(
            run,
            given,
            session,
            successor and successor.begin,
            point,
            look_at=compared.of(session, successor),
        )
        done += last
    found, version = _newest(run, sessions[-1].restart)
    different = _different(flat, found)
    if different:
        tell(f"version {version} differs from its replay in {', '.join(different)}")
    if different or compared.wrong:
        return 1
    print(f"version {version}: {done} pushes replayed, the weights are the same to the bit")
    return 0


class Compared:
    """Compares every checkpoint of a run on the way, the best one among them, and tells of those that hold other weights."""

    def __init__(self, run: RunDir):
        self._run = run
        self.wrong: list[Path] = []

    def of(
        self, session: Session, successor: Session | None
    ) -> dict[int, Callable[[FlatModel], None]]:
        """Return what to do at the versions of one start; what its successor did not go on from is not looked at."""
        found = {}
        for directory in self._run.checkpoints_by_name:
            version, restart = version_and_restart(directory.name)
            is_left = successor is not None and version > successor.begin.version
            if restart == session.restart and not is_left:
                found[version] = partial(self._compare, directory)
        return found

    def _compare(self, directory: Path, flat: FlatModel) -> None:
        try:
            found = checkpoint.load(directory)[0]
        except (RunDirError, OSError) as error:
            tell(f"note: {error}", file=sys.stderr)
            return
        if different := _different(flat, found):
            self.wrong.append(directory)
            tell(f"{directory} differs from its replay in {', '.join(different)}")


class Script:
    """What drives the loop of a script that is run again: the batches of a run's log; see asgd_mpi.api."""

    is_alone = is_worker = True
    rank, device = SERVER + 1, torch.device("cpu")

    def __init__(self, run: RunDir, given: Given):
        self.directory, self.status = run.path, 1
        self._run, self._given = run, given
        self._loop: Loop | None = None

    def take(self, loop: Loop) -> None:
        """Take the script's loop, whose network begins with the weights of then."""
        loop.model.load_state_dict(read_tensors(self._run.first))
        self._loop = loop

    def begin(self, hold: ExitStack) -> Turns:
        named = self._given.rule or str(self._loop.options.get("rule.own", ""))
        given = replace(self._given, own=self._loop, rule=named)
        self.status = yield from replay_and_compare(self._run, given)
        return self.status

    def give_up(self, status: int) -> int:
        return status


def of_script(path: str, run: RunDir, given: Given) -> int:
    """Run a script again on the batches of a run's log; returns the status. Raises ConfigError."""
    engine = Script(run, given)
    if not os.path.isfile(path):
        raise ConfigError(
            f"--script {path}: there is no such file; give the one that made the run."
        )
    before, sys.argv = sys.argv, [path]
    api.replays, api._run = engine, None
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    try:
        runpy.run_path(path, run_name="__main__")
    finally:
        sys.argv, api.replays, api._run = before, None, None
    return engine.status


def _tell_versions(run: RunDir, sessions: list[Session]) -> None:
    """Say on stderr which starts ran under other versions: their arithmetic may differ in the last bits."""
    here = checkpoint.software()
    for session in sessions:
        path = run.versions_of(session.restart)
        try:
            there = bounded.decode_json(bounded.read(path), msgspec.json.Decoder(dict))
        except (
            OSError,
            ValueError,
        ):  # a start of before these were kept, or a damaged file: nothing is known
            continue
        differ = [
            f"{name} {there[name]}, this is {version}"
            for name, version in here.items()
            if there.get(name) not in (None, version)
        ]
        if differ:
            tell(
                f"note: start {session.restart} ran under {'; '.join(differ)}: a difference in bits may be due to that",
                file=sys.stderr,
            )


def _replay_until(run: RunDir, version: int, debug: bool, given: Given) -> Turns:
    """Replay up to a version, compare it with its checkpoint if there is one, and look at it."""
    last = max((push.version + 1 for push in history.pushes(run) if push), default=0)
    if not 0 <= version <= last:
        raise RunDirError(
            f"--until {version}: the run has the versions 0 to {last}; give one of them."
        )
    flat, point = None, None
    sessions = lineage(run)
    for session, successor in zip(sessions, [*sessions[1:], None]):
        ends_here = successor is None or successor.begin.version >= version
        begin = None if ends_here else successor.begin
        flat, point, _ = yield from _replay_session(run, given, session, begin, point, version)
        if ends_here:
            break
    push = next((push for push in history.pushes(run) if push and push.version == version), None)
    tell(
        f"version {version} of the weights: norm {flat.weights.norm().item():.9g}; the next push is {push}"
    )
    directory = next(
        (
            path
            for path, manifest in checkpoint.resumable(run)
            if manifest and manifest.version == version
        ),
        None,
    )
    status = 0
    if directory:
        found = checkpoint.load(directory)[0]
        same = not _different(flat, found)
        if same:
            tell(f"the weights are the same to the bit as in {directory}")
        else:
            tell(f"the weights are not those in {directory}")
            status = 1
    if debug:
        breakpoint()
    return status


def _replay_session(
    run: RunDir,
    given: Given,
    session: Session,
    successor: Resume | None,
    begin: Point | None,
    until: float = math.inf,
    look_at: Mapping[int, Callable[[FlatModel], None]] = MappingProxyType({}),
) -> Generator[Any, float, tuple[FlatModel, Point | None, int]]:
    """Replay one start of the run; also returns the number of its pushes."""
    starts = _starts(run, session.restart)
    entries = _read(session.log)
    # what came after its checkpoint is needed for the momenta only
    if successor is not None:
        entries = _until(entries, max([successor.version, *successor.momenta]))
    if not starts or None in entries.values() or not entries and successor is None:
        raise RunDirError(
            f"{run.path}: the log of pushes or the metrics of the ranks are missing or damaged (start "
            f"{session.restart}): a replay needs every push."
        )
    counts = {start.num_workers for start in starts.values()}
    if len(counts) > 1:
        raise RunDirError(
            f"{run.path}: its metrics say of start {session.restart} that it had {' and '.join(map(str, sorted(counts)))} "
            "workers. They were changed, or are of several runs: take a copy that was not changed."
        )
    [num_workers] = counts
    task = given.task_of(run, session.restart)
    _demand_possible(session, entries, task.plan(num_workers))
    pushes = sum(isinstance(entry, Push) for entry in entries.values())
    flat, point = yield from replaying(
        task,
        progress.Counter(len(entries), "pushes", "replay").over(entries.values()),
        num_workers,
        begin,
        successor,
        {rank: start.threads for rank, start in starts.items()},
        until,
        look_at,
    )
    return flat, point, pushes


def _until(entries: Mapping[int, Push | Turn | None], version: int) -> dict[int, Push | Turn]:
    """Return the lines of a log without the pushes that come after `version` was made, whatever they say."""
    found, made = {}, 0
    for number, entry in entries.items():
        if isinstance(entry, Push):
            if max(made, entry.version) >= version:
                continue
            made = entry.version + 1
        if entry:
            found[number] = entry
    return found


def _starts(run: RunDir, restart: int) -> dict[int, Start]:
    """Return what the ranks of a start said when they were ready, as far as it can be read. Raises RunDirError."""
    found = {}
    for rank, number, path in run.metrics_files:
        if number != restart:
            continue
        try:
            start = next((event for event in read_events(path) if isinstance(event, Start)), None)
        except OSError as error:
            raise RunDirError(f"{path} cannot be read: {error.strerror}.") from error
        if start is None:
            continue
        if wrong := out_of_range(
            [
                ("number of workers", start.num_workers, 1, MAX_WORKERS),
                ("number of threads", start.threads, 1, MAX_THREADS),
            ]
        ):
            raise RunDirError(
                f"{path}: {wrong}. It is damaged, or no rank of a run wrote it: restore it."
            )
        found[rank] = start
    return found


def _read(log: Path) -> dict[int, Push | Turn | None]:
    """Return the lines of a log by their numbers, from 1. Raises RunDirError if it cannot be read."""
    if not os.path.lexists(log):
        return {}
    try:
        return dict(enumerate(read_log(log), start=1))
    except OSError as error:
        raise RunDirError(
            f"{log} cannot be read: {error.strerror}. A replay needs it: restore it."
        ) from error


def _demand_possible(session: Session, entries: Mapping[int, Push | Turn], plan: Plan) -> None:
    """Raise RunDirError, with the number of the line and the value, for what no run of `plan` writes."""
    for number, entry in entries.items():
        if wrong := out_of_range(_ranges(entry, plan, session.restart)):
            raise RunDirError(
                f"{session.log}, line {number}: {wrong}. No run of these settings writes that: the log was changed, or is of "
                "another run. Take a copy that was not changed."
            )


def _ranges(
    entry: Push | Turn, plan: Plan, restart: int
) -> Iterator[tuple[str, float, float, float]]:
    """Yield (name, value, least, most) of a line's numbers."""
    last = plan.num_workers - 1
    yield "version", entry.version, 0, plan.total_samples
    if isinstance(entry, Resume):
        yield "number of workers", entry.num_workers, plan.num_workers, plan.num_workers
        yield "number of momenta", len(entry.momenta), plan.num_workers, plan.num_workers
        for made in entry.momenta:
            yield "momentum", made, -1, plan.total_samples
        yield "start", entry.restart, restart, restart
        yield "parent", entry.parent, 0, restart - 1
        return
    yield "worker", entry.worker, 0, last
    if isinstance(entry, Push):
        yield "read_version", entry.read_version, 0, entry.version
        yield "base", entry.base, -1, entry.read_version
        least, most = 0, max(plan.total_samples, plan.num_workers)
        if plan.pacing.mean_of == 1:
            # of a resume: what had waited under more workers
            least, most = 1, most if restart else 1
        yield "mean_of", entry.mean_of, least, most
        yield "rate", entry.lr, 0, sys.float_info.max
        for epoch, start, stop in entry.segments:
            yield "epoch", epoch, 0, plan.last_epoch
            yield "start", start, 0, plan.num_samples - 1
            yield "stop", stop, start + 1, plan.num_samples
        yield "skipped", entry.skipped, 0, entry.positions
        yield "scale", entry.scale, 0, 1


def _different(flat: FlatModel, found: State) -> list[str]:
    """Return the names of the parameters that a checkpoint does not hold to the bit."""
    return [
        name
        for name, parameter in flat.module.named_parameters()
        if not isinstance(found.get(name), torch.Tensor) or not torch.equal(parameter, found[name])
    ]


def _newest(run: RunDir, restart: int) -> tuple[State, int]:
    """Return the network of the newest checkpoint of a start of the run."""
    for directory, manifest in checkpoint.resumable(run):
        if manifest and manifest.restart == restart:
            return checkpoint.load(directory)[0], manifest.version
    raise RunDirError(
        f"{run.path} holds no checkpoint of its last start to compare with; "
        "give --until VERSION to see the weights without."
    )


if __name__ == "__main__":
    interpreter.loaded()
    interpreter.end(main())

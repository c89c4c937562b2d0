"""`python -m asgd_mpi.replay RUN_DIR`: compute a recorded run again, in one process and without MPI.

`pushes.log` says which worker pushed what in which order, and on which version it had computed. Nothing else is
needed: a gradient is a pure function of (weights, epoch, positions, seed). On the CPU, in float32, with the thread
counts of the ranks, the weights come out the same to the bit, over failures and restarts of the run. Every entry goes
through a ledger of its own invariants (versions in order, staleness not negative, the rate that the schedule gives).
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Optional

import msgspec
import torch
from tqdm import tqdm

from asgd_mpi.config import command_line, limits
from asgd_mpi.config import options as configuration
from asgd_mpi.config.topology import SERVER
from asgd_mpi.errors import DataError, RunDirError, tell
from asgd_mpi.offline.trainer import SingleProcessTrainer, Snapshot
from asgd_mpi.optim.replica import Replica
from asgd_mpi.optim.rules import Rule
from asgd_mpi.process import ending
from asgd_mpi.protocol.messages import Verdict
from asgd_mpi.record import checkpoint, history
from asgd_mpi.record.events import Member, Push, Resume, Start, Turn, read_events, read_log
from asgd_mpi.record.history import Session, lineage
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.runtime import trust
from asgd_mpi.runtime.resume import demand_same_data
from asgd_mpi.task import Task, open_task
from asgd_mpi.untrusted import bounded
from asgd_mpi.vector.flat import FlatModel

State = dict[str, torch.Tensor]


@dataclass
class Point:
    """Where a start of a run begins: what its checkpoint held."""

    version: int
    samples: int
    weights: torch.Tensor                                              # (P,) float32
    rule: State = field(default_factory=dict)
    momenta: list[State] = field(default_factory=list)                 # by worker; empty: from nothing


def replay(task: Task, pushes: Iterable[Push | Turn], num_workers: int, begin: Point | None = None,
           successor: Resume | None = None, threads: Mapping[int, int] = MappingProxyType({}),
           until: float = math.inf) -> tuple[FlatModel, Point | None]:
    """Apply the entries of one start's log; returns the network after the last push, and where `successor` begins.

    `until`: the version to stop at. `begin`: None for the first weights. `threads`: of each rank; the bits depend on how a
    vector is shared out among them. What was applied after the successor's checkpoint is computed, too: momenta may
    hold a little of it. Memory: one (P,) vector for each version that a worker may still have computed on, and one for
    each worker's momentum. Raises RunDirError.
    """
    first = begin and Snapshot(begin.version, begin.samples, begin.weights)
    computation = SingleProcessTrainer(task, num_workers, first)
    rule, replicas, schedule = computation.rule, computation.replicas, computation.schedule
    pacing = task.plan(num_workers).pacing
    latest = computation.first
    _load(rule, begin.rule if begin else {})
    for replica, state in zip(replicas, begin.momenta if begin else []):
        replica.load_(state)
    held: dict[int, int] = dict.fromkeys(range(num_workers), latest.version)  # worker -> the version it read last
    snapshots = {latest.version: latest}
    fetched: dict[int, int] = {}                                       # worker -> the version that its replica has
    handover = _Handover(successor, rule, latest, replicas)
    for entry in pushes:
        if isinstance(entry, Member):
            held[entry.worker] = entry.version
            computation.begin_anew_(entry.worker, latest)
            fetched.pop(entry.worker, None)
            handover.see_momentum(entry.worker, entry.version, replicas[entry.worker])
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
            raise RunDirError(f"pushes.log does not follow from itself: {push} began with version {begun}, which no worker held "
                              "then. It was cut or changed.")
        goes_on = fetched.get(push.worker) == begun or elastic and replica.base != -1
        _use(threads.get(push.worker + 1))
        computed = computation.compute_(push.worker, push.segments, None if goes_on else snapshots[begun],
                                        snapshots[push.read_version] if elastic else None)
        if computed.loss != push.loss:
            raise RunDirError(f"the push that made version {latest.version + 1} recorded a loss of {push.loss!r}, the "
                              f"replay computes {computed.loss!r}: the log, the data or the arithmetic (threads, library) differ.")
        fetched[push.worker] = push.read_version
        verdict = Verdict(push.lr, push.version, push.staleness, push.worker, rate=schedule(latest.samples),
                          mean_of=push.mean_of, scale=computed.scale)
        _use(threads.get(SERVER))
        latest = snapshots[push.version + 1] = computation.applied(latest, verdict, push.positions)
        handover.see_version(latest, rule)
        handover.see_momentum(push.worker, latest.version, replica)
        held[push.worker] = push.read_version                    # a worker never reads an older version again
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

    def __init__(self, successor: Resume | None, rule: Rule, first: Snapshot, replicas: list[Replica]):
        self._successor = successor
        self._point: Point | None = None
        self._momenta: list[State] = [{} for _ in successor.momenta] if successor else []
        self.see_version(first, rule)
        for worker, replica in enumerate(replicas):
            self.see_momentum(worker, first.version, replica)

    def see_version(self, latest: Snapshot, rule: Rule) -> None:
        if self._successor and self._successor.version == latest.version:
            self._point = Point(*latest, _clone(rule.state), self._momenta)

    def see_momentum(self, worker: int, made: int, replica: Replica) -> None:
        if worker < len(self._momenta) and self._successor.momenta[worker] == made:
            self._momenta[worker] = _clone(replica.state)

    def point(self) -> Point | None:
        if self._successor and self._point is None:
            raise RunDirError(f"a later start goes on from version {self._successor.version}, which the log does not reach.")
        return self._point


def _clone(state: State) -> State:
    return {name: vector.clone() for name, vector in state.items()}


def _load(rule: Rule, state: State) -> None:
    for name in rule.state.keys() & state.keys():
        rule.state[name].copy_(state[name])


def _check(push: Push, version: int, lr: float, snapshots: dict[int, Snapshot]) -> None:
    if push.version != version or push.read_version not in snapshots or push.lr != lr:
        raise RunDirError(f"pushes.log does not follow from itself: version {version} at rate {lr!r} was due, with a read "
                          f"of one of the versions {min(snapshots)} to {version}; it has {push}. It was cut or changed.")


RANGES = {"until": (limits.at_least(0, 2**62), "a version is a whole number from 0")}


def make_parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog="python -m asgd_mpi.replay", description="Compute a recorded run again and compare the weights.", ranges=RANGES,
        short={"--data": "--data.path"})
    parser.add_argument("run_dir", metavar="RUN_DIR", help="A directory that asgd_mpi.train made.")
    parser.add_argument("--until", type=Optional[int], metavar="VERSION", help="Stop at this version of the weights.")
    parser.add_argument("--debug", action="store_true",
                        help="Start the debugger there; `flat` is the network, `push` the next entry of the log.")
    parser.add_argument("--data.path", default="", metavar="DIR", help="Where the data set of the run lies, if not where its "
                        "configuration says: of a run that was copied from another machine. --data is short for it.")
    parser.add_argument("--model", default="", metavar="NAME", help="The network, by its name or as package.module:function, in "
                        "place of the one that the run names: code of your own is run only if you name it, or have trained "
                        "this run here with it.")
    return parser


@ending.of_command
def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().read(arguments)
    run, given = RunDir.open(options.run_dir), Given(options.data.path, options.model)
    if options.until is None:
        return _replay_and_compare(run, given)
    return _replay_until(run, options.until, options.debug, given)


@dataclass(frozen=True)
class Given:
    """Return what the user says in place of a run's configuration; empty: as it is there."""

    data: str = ""
    model: str = ""

    def task_of(self, run: RunDir, restart: int) -> Task:
        """Open the task of a start. Raises ConfigError if its network is code that the user has not named, DataError, and
        ConfigError if the data set is not the one of its checkpoints."""
        config = configuration.read(run.config_of(restart))
        model = self.model or config.model.name
        trust.demand(model, self.model, run.path)
        data = replace(config.data, path=self.data or config.data.path)
        try:
            task = open_task(replace(config, data=data, model=replace(config.model, name=model)))
        except DataError as error:
            if self.data or os.path.exists(data.path):
                raise
            raise DataError(f"{data.path}, the data set of {run.path}, is not here: if the run was copied from another directory "
                            "or machine, say where it lies with --data DIR.") from error
        manifest = next((manifest for _, manifest in checkpoint.resumable(run) if manifest), None)
        if manifest:
            demand_same_data(manifest, task.train.fingerprint, task.train.num_classes, data.path)
        return task


def _replay_and_compare(run: RunDir, given: Given) -> int:
    flat, point, done = None, None, 0
    sessions = lineage(run)
    _tell_versions(run, sessions)
    for session, successor in zip(sessions, [*sessions[1:], None]):
        flat, point, last = _replay_session(run, given, session, successor and successor.begin, point)
        done += last
    found, version = _newest(run, sessions[-1].restart)
    replayed = dict(flat.module.named_parameters())
    different = [name for name, parameter in replayed.items() if not torch.equal(parameter, found[name])]
    if different:
        tell(f"version {version} differs from its replay in {', '.join(different)}")
        return 1
    print(f"version {version}: {done} pushes replayed, the weights are the same to the bit")
    return 0


def _tell_versions(run: RunDir, sessions: list[Session]) -> None:
    """Say on stderr which starts ran under other versions: their arithmetic may differ in the last bits."""
    here = checkpoint.software()
    for session in sessions:
        path = run.versions_of(session.restart)
        try:
            there = bounded.decode_json(bounded.read(path), msgspec.json.Decoder(dict))
        except (OSError, ValueError):        # a start of before these were kept, or a damaged file: nothing is known
            continue
        differ = [f"{name} {there[name]}, this is {version}" for name, version in here.items()
                  if there.get(name) not in (None, version)]
        if differ:
            tell(f"note: start {session.restart} ran under {'; '.join(differ)}: a difference in bits may be due to that",
                  file=sys.stderr)


def _replay_until(run: RunDir, version: int, debug: bool, given: Given) -> int:
    """Replay up to a version, compare it with its checkpoint if there is one, and look at it."""
    last = max((push.version + 1 for push in history.pushes(run) if push), default=0)
    if not 0 <= version <= last:
        raise RunDirError(f"--until {version}: the run has the versions 0 to {last}.")
    flat, point = None, None
    sessions = lineage(run)
    for session, successor in zip(sessions, [*sessions[1:], None]):
        ends_here = successor is None or successor.begin.version >= version
        flat, point, _ = _replay_session(run, given, session, None if ends_here else successor.begin, point, version)
        if ends_here:
            break
    push = next((push for push in history.pushes(run) if push and push.version == version), None)
    print(f"version {version} of the weights: norm {flat.weights.norm().item():.9g}; the next push is {push}")
    directory = next((path for path, manifest in checkpoint.resumable(run) if manifest and manifest.version == version), None)
    status = 0
    if directory:
        found = checkpoint.load(directory)[0]
        same = all(torch.equal(parameter, found[name]) for name, parameter in flat.module.named_parameters())
        print(f"the weights are {'the same to the bit as' if same else 'not those'} in {directory}")
        status = 0 if same else 1
    if debug:
        breakpoint()
    return status


def _replay_session(run: RunDir, given: Given, session: Session, successor: Resume | None,
                    begin: Point | None, until: float = math.inf) -> tuple[FlatModel, Point | None, int]:
    """Replay one start of the run; also returns the number of its pushes."""
    starts = {rank: event for rank, restart, path in run.metrics_files if restart == session.restart
              for event in read_events(path) if isinstance(event, Start)}
    entries = list(read_log(session.log)) if session.log.is_file() else []
    if successor is not None:                 # what came after its checkpoint is needed for the momenta only
        needed = max([successor.version, *successor.momenta])
        entries = [entry for entry in entries if entry and (not isinstance(entry, Push) or entry.version < needed)]
    if not starts or None in entries or not entries and successor is None:
        raise RunDirError(f"{run.path}: the log of pushes or the metrics of the ranks are missing or damaged (start "
                          f"{session.restart}): a replay needs every push.")
    task = given.task_of(run, session.restart)
    pushes = sum(isinstance(entry, Push) for entry in entries)
    num_workers = next(iter(starts.values())).num_workers
    flat, point = replay(task, tqdm(entries, unit=" pushes"), num_workers, begin, successor,
                         {rank: start.threads for rank, start in starts.items()}, until)
    return flat, point, pushes


def _newest(run: RunDir, restart: int) -> tuple[State, int]:
    """The network of the newest checkpoint of a start of the run."""
    for directory, manifest in checkpoint.resumable(run):
        if manifest and manifest.restart == restart:
            return checkpoint.load(directory)[0], manifest.version
    raise RunDirError(f"{run.path} holds no checkpoint of its last start to compare with.")


if __name__ == "__main__":
    sys.exit(main())

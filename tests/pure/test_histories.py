"""Histories drawn at random: any rule, wire, groups and servers, with workers that die, come back, push what is no number or too late, and resumes.

Each is simulated to its end, start by start, as a run is: at some pushes the server takes a checkpoint, for which the workers save
what they keep, and the next start goes on from one of those, with the same or another number of workers. Then:

    every sample was used once; the log of every start replays to the bit, to the weights, to the state of the rule, and to what every
    worker has saved; and what a worker keeps is, before each of its pushes, what its last push that was applied had left.

The replay has never heard of a push that was dropped, so what is equal to it holds nothing of one.
HISTORIES=5000 pytest tests/pure/test_histories.py tries as many, at random, in place of the few that are always the same.
"""

import os
from heapq import heapify
from dataclasses import dataclass, field, replace
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from networks_for_tests import Counting
from torch import nn
from torch.nn import functional

import asgd_mpi
from asgd_mpi import replay
from asgd_mpi.config import rulebook
from asgd_mpi.config.failures import parse as parse_failures
from asgd_mpi.config.limits import check as check_limits
from asgd_mpi.config.options import Config
from asgd_mpi.config.rulebook import RULEBOOK
from asgd_mpi.errors import ConfigError, TrainingDiverged, WorkersLost
from asgd_mpi.offline import simulation, trainer
from asgd_mpi.offline.simulation import Machines, Simulation, Times
from asgd_mpi.optim.error_feedback import ErrorFeedback
from asgd_mpi.optim.rules import EMA, make_rule
from asgd_mpi.optim.step import ScaledLoss
from asgd_mpi.protocol import client
from asgd_mpi.protocol.ledger import Ledger
from asgd_mpi.protocol.messages import Header
from asgd_mpi.record.audit import audit
from asgd_mpi.record.events import Member, Push, Resume
from asgd_mpi.record.progress import Progress
from asgd_mpi.task import complete, open_task
from asgd_mpi.vector.groups import Settings, within
from asgd_mpi.vector.partition import cut, pieces

TRIED = int(os.environ.get("HISTORIES", "0"))
SAMPLES, EPOCHS, BATCH = 40, 1.6, 4
WIRES = ("float32", "bfloat16", "float16", "int8", "int4", "topk")


class Fit(asgd_mpi.Task):
    """A regression; one layer is frozen, one is large enough to be compressed, and parameters have settings of their own."""

    def __init__(self, counts, groups):
        self.counts, self.settings = counts, groups

    def train_set(self):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(SAMPLES, 64, generator=generator)
        return torch.utils.data.TensorDataset(x, x[:, :2].sum(1))

    def val_set(self):
        return torch.utils.data.Subset(self.train_set(), range(6))

    def module(self):
        first = Counting() if self.counts else nn.Identity()
        frozen = nn.Linear(72, 8).requires_grad_(False)
        return nn.Sequential(
            first, nn.Linear(64, 72), nn.Tanh(), frozen, nn.Dropout(0.1), nn.Linear(8, 1)
        )

    def loss(self, module, batch):
        x, y = batch
        return functional.mse_loss(module(x)[:, 0], y)


@dataclass
class Start:
    """What is planned for a start: its failures, what the server does after which push, and which gradients are no numbers."""

    num_workers: int
    servers: int = 1
    failures: str = ""
    # by the number of a push in this start: a checkpoint, workers to be retired until they are heard of, the end
    saves: tuple[int, ...] = ()
    retired: dict[int, int] = field(default_factory=dict)
    stops: int = 0
    # the numbers of gradients, in the order in which they are computed
    spoilt: tuple[int, ...] = ()
    goes_on: int = -1  # which of its checkpoints the next start goes on from
    late_s: float = 0.0  # how much later its last worker begins
    spread: float = 0.4
    # from this start on, in place of those of the history, as --override lets a resumed run have
    options: dict | None = None


@dataclass
class Saved:
    """A checkpoint: the server's part, and what workers have saved for it since, by worker: (version, state)."""

    ledger: dict
    first: trainer.Snapshot
    rule: dict
    workers: dict = field(default_factory=dict)


class Stopped(Exception):
    """The end of a start that does not come to the end of its run."""


def copy(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Slices(trainer.SingleProcessTrainer):
    """Applies as several servers do, each to its slice; holds every worker to what its last applied push has left."""

    def __init__(self, task, num_workers, saved, num_servers):
        super().__init__(task, num_workers, saved and saved.first)
        groups, rule = task.groups(self.flat.module), task.config.rule
        self.parts = [
            (part, make_rule(part.stop - part.start, rule, num_workers, within(groups, part)))
            for part in cut(self.flat.num_floats, num_servers)
        ]
        self.is_whole = True
        if saved:
            state = {EMA: saved.first.weights} | saved.rule
            self.is_whole = all([rule.load_(state, part) for part, rule in self.parts])
            for worker, (_, kept) in saved.workers.items():
                if worker < num_workers:
                    self.replicas[worker].load_(kept)
        self.kept = [copy(replica.state) for replica in self.replicas]
        # what it would be, by worker, if what it has computed last is applied
        self.finished = {}
        # slices are told what a worker computes on, too
        self.rule.read_ = self._read_

    def _read_(self, worker, weights):
        for part, rule in self.parts:
            rule.read_(worker, weights[part])

    @property
    def state(self):
        names = self.parts[0][1].state
        return {name: torch.cat([rule.state[name] for _, rule in self.parts]) for name in names}

    def compute_(self, worker, *rest):
        assert same(self.replicas[worker].state, self.kept[worker])
        computed = super().compute_(worker, *rest)
        self.finished[worker] = copy(self.replicas[worker].state)
        return computed

    def applied(self, latest, verdict, positions):
        weights = latest.weights.clone()
        for part, rule in self.parts:
            own, pushed = weights[part], self.flat.gradient[part]
            for piece in pieces(len(own)):
                rule.apply_(own, pushed, verdict, piece)
                rule.average_(own, verdict, piece)
        self.kept[verdict.worker] = self.finished[verdict.worker]
        return trainer.Snapshot(latest.version + 1, latest.samples + positions, weights)

    def begin_anew_(self, worker):
        super().begin_anew_(worker)
        self.kept[worker] = copy(self.replicas[worker].state)


class Turns(Progress):
    """Called after each push: does what is planned for then."""

    def __init__(self, start):
        super().__init__("none", 1, 1)
        self.start, self.num_pushes, self.game, self.points = start, 0, None, []

    def push(self, positions, loss):
        self.num_pushes += 1
        ledger, now = self.game.ledger, self.num_pushes
        if now in self.start.retired:
            worker = self.start.retired[now]
            if worker in ledger.members and len(ledger.members) > 1:
                ledger.retire(worker, for_good=False)
        if now in self.start.saves:
            self.save()
        if now == self.start.stops:
            raise Stopped

    def save(self):
        computation = self.game.computation
        self.points.append(
            Saved(self.game.ledger.state(), self.game.latest, copy(computation.state))
        )
        self.game.ledger.ask_to_save()


def client_of(game, points):
    """A protocol.Client whose worker saves what it keeps for the checkpoint that asks for it, and is heard of after it was retired."""

    class Saving(client.Client):
        def __init__(self, habits, cut, is_back):
            super().__init__(habits, cut, is_back)
            self.worker = is_back.__self__

        def work(self):
            actions, answer = super().work(), None
            while True:
                action, number = actions.send(answer), self.worker.number
                if isinstance(action, client.Save):
                    state = game().computation.replicas[number].state
                    points[action.number - 1].workers[number] = (action.made, copy(state))
                    answer = None
                elif isinstance(action, client.Say) and number not in game().ledger.members:
                    answer = self.heard(game(), action)
                else:
                    answer = yield action

        def heard(self, game, action):
            me = self.worker
            me.sent += 1
            header = Header(action.kind, me.number, me.sent, action.read_version, 0, 0, 0)
            game._refuse(me, game._membership.stray(header))
            game._post()
            return game._mail[me.number]

    return Saving


def balanced(push_):
    """Hold what is sent and what is kept to add up to what was to be pushed, to the bit."""

    def both_(self, pushed, kept):
        due = self.state["residual"] + pushed
        push_(self, pushed, kept)
        assert torch.equal(self.state["residual"] + pushed, due)

    return both_


def play(task, start, saved):
    """Simulate a start; returns the game, its checkpoints, and whether it came to the end of the run."""
    config, turns = task.config, Turns(start)
    computation = Slices(task, start.num_workers, saved, start.servers)
    state = saved and (saved.ledger if computation.is_whole else saved.ledger | {"steps": 0})
    with mock.patch.object(simulation, "Ledger", lambda plan, rate: Ledger(plan, rate, state)):
        game = Simulation(
            task.plan(start.num_workers),
            config.exchange,
            computation,
            Machines(
                Times(0.01, 0.002, 0.001, 0.002, start.spread), 0, parse_failures(start.failures)
            ),
            RULEBOOK[config.rule.name].moves,
            turns,
        )
    turns.game = game
    game._heap = [
        (now + start.late_s * (worker is game.workers[-1]), number, worker, process)
        for now, number, worker, process in game._heap
    ]
    heapify(game._heap)
    game.habits = replace(game.habits, saves=computation.replicas[0].keeps_state)
    gradients = iter(range(1, 10**9))
    compute_gradient_ = ScaledLoss.compute_gradient_

    def spoiling_(self, flat, *rest):
        loss = compute_gradient_(self, flat, *rest)
        number = next(gradients)
        if number in start.spoilt:
            flat.gradient[number % 64] = torch.nan
            return torch.inf if number % 2 else loss
        return loss

    with (
        mock.patch.object(ErrorFeedback, "push_", balanced(ErrorFeedback.push_)),
        mock.patch.object(ScaledLoss, "compute_gradient_", spoiling_),
        mock.patch.object(client, "Client", client_of(lambda: game, turns.points)),
    ):
        try:
            game.run()
            return game, turns.points, True
        except (Stopped, WorkersLost, TrainingDiverged):
            if not turns.points:
                turns.save()  # what the server holds at its end, without the workers
            return game, turns.points, False
        finally:
            computation.close()


def configured(options):
    """A configuration with values of options by their dotted names: quicker than a command line."""
    sections = {
        "model": {"name": "test_histories:Fit"},
        "data": {"source": "task", "batch_size": BATCH},
        "run": {"epochs": EPOCHS, "progress": "none"},
        "schedule": {"lr": 0.02},
    }
    for option, value in options.items():
        section, _, name = option.partition(".")
        sections.setdefault(section, {})[name] = value
    config = Config()
    for section, values in sections.items():
        config = replace(config, **{section: replace(getattr(config, section), **values)})
    return config


def live(options, starts, counts=False, groups=None):
    """A history to its end; checks it, and returns its games."""
    games, saved, point, log, own = [], None, None, [], Fit(counts, groups or {})
    planned, reads_own = iter(starts), True
    while True:
        start = next(planned, None) or Start(starts[-1].num_workers)
        options = start.options or options
        task = open_task(complete(configured(options)), own=own, metrics=["loss"])
        rulebook.check(task.config, start.num_workers)
        exchange = task.config.exchange
        reads_own &= not exchange.overlap and exchange.n_push == exchange.n_fetch
        game, points, is_over = play(task, start, saved)
        games.append(game)
        saved = None if is_over else points[start.goes_on % len(points)]
        computation = game.computation
        successor = None
        if saved:
            made = {worker: made for worker, (made, _) in saved.workers.items()}
            successor = Resume(
                *[0.0, len(games), len(games) - 1, *saved.first[:2], start.num_workers],
                [made.get(worker, -1) for worker in range(start.num_workers)],
            )
        seen = []
        with mock.patch.object(replay, "SingleProcessTrainer", remembering(seen)):
            flat, point = replay.replay(task, game.pushes, start.num_workers, point, successor)
        # ---- to the bit, at the end of this start and where the next one goes on
        assert torch.equal(flat.weights, game.latest.weights)
        assert same(seen[0].rule.state, computation.state)
        for worker in game.ledger.members:  # others may have forgotten all, which no log tells
            assert same(seen[0].replicas[worker].state, computation.kept[worker]), worker
        pushes = [push for push in game.pushes if isinstance(push, Push)]
        if saved is None:
            log += pushes
            break
        assert same(point.rule, saved.rule) and point.steps == saved.ledger["steps"]
        assert torch.equal(point.weights, saved.first.weights)
        for worker, (_, kept) in saved.workers.items():
            assert is_what_it_kept(point.momenta[worker], kept), worker
        log += [push for push in pushes if push.version < saved.first.version]
    # ---- every sample once
    total = round(SAMPLES * EPOCHS)
    found = audit(log, SAMPLES, total, reads_own_pushes=reads_own)
    assert not found.violations, found.violations
    given_up = sum(part.stop - part.start for part in game.ledger.given_up)
    covered = sum(epoch.covered for epoch in found.epochs)
    assert covered == sum(push.positions for push in log) == total - given_up
    return games


def is_what_it_kept(replayed, kept):
    """Return whether the replay has what a worker has saved; nothing in the replay is what a worker begins with."""
    if replayed:
        return same(replayed, kept)
    return not any(tensor.any() for tensor in kept.values())


def remembering(seen):
    class Remembering(trainer.SingleProcessTrainer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            seen.append(self)

    return Remembering


# ---- what is drawn


def drawn_options(draw, most_workers):
    """Options of a run: of those that are drawn, as many as go together."""
    name, n_push = draw(st.sampled_from(list(RULEBOOK))), draw(st.integers(1, 3))
    choices = {
        "rule.optimizer": [None, *rulebook.OPTIMIZERS],
        "rule.momentum_at": [None, *rulebook.MOMENTA],
        "exchange.wire": WIRES,
        "exchange.density": [0.05, 0.5],
        "exchange.fetch_wire": [None, "float32", "bfloat16", "int8"],
        "exchange.overlap": [False, True],
        "exchange.n_push": [None, 1, "auto", n_push],
        "exchange.n_fetch": [None, n_push, 2 * n_push],
        "rule.ema_samples": [0.0, 20.0],
        "rule.clip_norm": [None, 0.5],
        "rule.max_drift": [None, 0.05, 0.0],
        "rule.weight_decay": [None, 0.1],
        "rule.no_decay": [None, "bias"],
        "rule.warm_start_epochs": [0.0, 0.0, 0.4],
        "rule.staleness": [None, "inverse", "constant", "delay_adaptive"],
        "rule.outer_momentum": [0.0, 0.9],
        "rule.outer_pushes": [0, 1, 3],
        "rule.steps_by_speed": [False, True],
        "run.validate_every": [1.0, 0.3],
        "failure.max_nonfinite": [3, 1],
        "data.lease_batches": [8, 1],
        "rule.max_staleness": [1, 2, 4],
        "rule.splits": [1, 2],
        "rule.slack": [0, 2],
        "rule.backup": [0],
    }
    kept = {"rule.name": name, "rule.backup": int(most_workers > 1)}
    for option, values in choices.items():
        wanted = kept | {option: draw(st.sampled_from(values))}
        if goes_together(wanted, most_workers):
            kept = wanted
    return kept


def goes_together(options, most_workers):
    try:
        config = configured(options)
        check_limits(config)
        for num_workers in range(min(2, most_workers), most_workers + 1):
            rulebook.check(complete(config), num_workers)
        return True
    except ConfigError:
        return False


def drawn_start(draw, most_workers, is_last, is_changed):
    workers = draw(st.integers(2, most_workers)) if most_workers > 1 else 1
    ranks = range(1, workers + 1)
    failures = []
    for rank in ranks:
        failures += draw(
            st.sampled_from(
                [
                    [],
                    [],
                    [f"slow:{draw(st.sampled_from([2, 5, 20]))}x@rank{rank}"],
                    [f"kill@t=0.{draw(st.integers(0, 12)):02d}s:rank{rank}"],
                    [f"raise@step{draw(st.integers(1, 6))}:rank{rank}"],
                ]
            )
        )
    turns = st.integers(1, 16)
    return Start(
        workers,
        draw(st.integers(1, 3)),
        ",".join(failures),
        tuple(draw(st.lists(turns, max_size=3))),
        {turn: draw(st.integers(0, workers - 1)) for turn in draw(st.lists(turns, max_size=2))},
        0 if is_last else draw(turns),
        tuple(draw(st.lists(st.integers(1, 20), max_size=3))),
        draw(st.integers(0, 3)),
        draw(st.sampled_from([0.0, 0.0, 0.03])),
        draw(st.sampled_from([0.0, 0.4])),
        drawn_options(draw, most_workers) if is_changed and draw(st.integers(0, 2)) == 2 else None,
    )


GROUPS = {
    "1.weight": Settings(rate=0.5),
    "1.bias": Settings(weight_decay=0.0),
    "5.weight": Settings(rate=0.25, weight_decay=0.3),
    "5.bias": Settings(betas=(0.5, 0.7)),
}


def drawn(draw):
    """Return a history: options, starts, whether its network counts what it sees, and its parameters' own settings."""
    most_workers = draw(st.integers(1, 4))
    options = drawn_options(draw, most_workers)
    num_starts = draw(st.integers(1, 3))
    starts = [
        drawn_start(draw, most_workers, number == num_starts - 1, number > 0)
        for number in range(num_starts)
    ]
    groups = {name: own for name, own in GROUPS.items() if draw(st.booleans())}
    return options, starts, draw(st.booleans()), groups


@settings(
    max_examples=TRIED or 40,
    derandomize=not TRIED,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
    print_blob=False,
)
@given(data=st.data())
def test_whatever_happens_a_history_replays_to_the_bit_and_nothing_of_a_dropped_push_is_left(data):
    history = drawn(data.draw)
    note(f"live{history}")
    live(*history)


# ---- two that are to be the same

# deaths, a worker that is back, spoilt gradients, and a resume with one worker less
EVENTFUL = [
    Start(3, 1, "raise@step4:rank3", (5,), {3: 0}, stops=8, spoilt=(2, 7), goes_on=0),
    Start(2, spoilt=(3,)),
]
AT_WORKERS = {"rule.momentum_at": "worker", "exchange.n_push": 2}
SPARSE = [
    name
    for name in RULEBOOK
    if goes_together({"rule.name": name, "exchange.wire": "topk", **AT_WORKERS}, 3)
]


def end_of(rule, **options):
    """The weights at the end of an eventful history."""
    return live({"rule.name": rule} | options, EVENTFUL)[-1].latest.weights


def test_the_rules_that_take_topk():
    waiting = ["softsync", "ringmaster", "ssp", "sync", "sync_backup"]
    assert SPARSE == ["asgd", "sasgd", "downpour", "diloco", *waiting]


@pytest.mark.parametrize("rule", SPARSE)
def test_at_density_1_a_history_is_that_without_compression_to_the_bit(rule):
    whole = {**AT_WORKERS, "exchange.fetch_wire": "float32"}
    topk = {"exchange.wire": "topk", "exchange.density": 1.0}
    assert torch.equal(end_of(rule, **whole, **topk), end_of(rule, **whole))


def test_a_history_of_diloco_with_one_inner_step_and_no_outer_momentum_is_that_of_asgd():
    plain = {"rule.momentum": 0.0, "rule.momentum_at": "none", "rule.staleness": "constant"}
    plain |= {"schedule.name": "constant", "schedule.warmup_epochs": 0.0}
    plain |= {"exchange.n_push": 1, "rule.max_drift": 0.0}
    outer = {"rule.outer_rate": 1.0, "rule.outer_momentum": 0.0, "rule.outer_pushes": 1}
    torch.testing.assert_close(end_of("diloco", **plain, **outer), end_of("asgd", **plain))


# ---- what it has found, in its smallest form


def test_a_worker_of_diloco_whose_push_is_no_number_does_not_train_on_from_there_while_it_is_under_way():
    """It went on from the spoilt weights, or from a version that it had fetched twice, which the log does not tell apart."""
    for spoilt in range(1, 8):
        options = {"rule.name": "diloco", "exchange.overlap": True, "exchange.n_push": 1}
        [game] = live(options, [Start(1, spoilt=(spoilt,))])
        assert game.num_dropped == 1


def test_a_worker_that_is_back_works_on_the_lease_that_it_is_given_then():
    """With overlap it began that lease ahead of all else, broke it off as a new member, and took it for done."""
    options = {"rule.name": "sasgd", "exchange.overlap": True, "exchange.n_push": 2}
    [game] = live(options, [Start(2, failures="slow:5x@rank1", retired={4: 1})])
    assert [entry.worker for entry in game.pushes if isinstance(entry, Member)] == [1]


SAVED = {
    "the mail that told it of a dropped push asked for its state, which it wrote before it began anew": (
        "ringmaster",
        [Start(3, saves=(5, 13), retired={5: 0}, stops=13, goes_on=0, spread=0.0)],
    ),
    "it had begun anew after a push that was no number": (
        "diloco",
        [Start(2, saves=(2,), spoilt=(3,), stops=5, goes_on=0, spread=0.0)],
    ),
    "it began anew after that, and nobody had pushed since": (
        "diloco",
        [Start(1, saves=(1,), spoilt=(2,), stops=2, goes_on=0, spread=0.0)],
    ),
    "others had pushed when it came to a resumed run": (
        "diloco",
        [
            Start(2, saves=(3,), stops=6, goes_on=0, spread=0.0),
            Start(2, saves=(1,), stops=4, goes_on=0, spread=0.0, late_s=0.03),
        ],
    ),
}


@pytest.mark.parametrize("name", SAVED)
def test_what_a_worker_saves_is_what_a_replay_has_at_the_version_that_it_tells(name):
    rule, starts = SAVED[name]
    assert len(live({"rule.name": rule, "exchange.n_push": 1}, starts)) == len(starts) + 1


def test_a_worker_of_delay_compensation_that_is_retired_for_good_tells_no_more_what_it_reads():
    """It was told that this was dropped, began anew, told what it read then, and so on without end."""
    options = {"rule.name": "dc_asgd_a", "failure.max_nonfinite": 1}
    [game] = live(options, [Start(2, failures="slow:20x@rank1", spoilt=(3,), spread=0.0)])
    assert len(game.ledger.members) == 1 and game.num_dropped < 5

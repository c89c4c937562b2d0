"""Packets that contradict themselves, by field, by length and by content: refused before they change anything."""

import dataclasses
from contextlib import suppress

import pytest
import test_loops
import torch
from fakes import FakeOutbox
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loops import make_task

from asgd_mpi.errors import TrainingDiverged
from asgd_mpi.protocol.ledger import Ledger, LedgerError, Plan
from asgd_mpi.protocol.messages import Header, Kind, Work
from asgd_mpi.record import checkpoint
from asgd_mpi.record.audit import audit
from asgd_mpi.record.events import Retirement, read_events, read_log
from asgd_mpi.record.history import pushes as pushes_of
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.replay import main as replay_main
from asgd_mpi.replay import replay
from asgd_mpi.vector import finite
from asgd_mpi.vector.partition import PIECE

PLAN = Plan(
    num_workers=3,
    num_samples=50,
    num_validation=10,
    total_samples=120,
    batch_size=4,
    lease_batches=3,
    validate_every=0.5,
)
FIELDS = [field.name for field in dataclasses.fields(Header)]
NUMBERS = st.one_of(st.integers(-3, 70), st.sampled_from([-(2**63), 2**63 - 1, 2**40, 777]))
LOSSES = st.one_of(st.floats(), st.sampled_from([-0.5, 1e300, 3.0]))


class Play:
    """Three workers and a ledger; what a worker sends may be changed on the way, and who sends nonsense is retired."""

    def __init__(self):
        self.ledger = Ledger(PLAN, lr_at=lambda samples, staleness: 1.0)
        self.mail = dict(self.ledger.take_news())
        self.sent, self.read = [0] * 3, [0] * 3
        self.out, self.verdicts, self.scores = set(), [], []

    def send(self, worker, change):
        lease = next(iter(self.mail[worker].leases), None)
        if worker in self.out or lease is None:
            return
        start = self.ledger._accounts[worker].cursor
        count = lease.stop - start if lease.work != Work.TRAIN else min(4, lease.stop - start)
        self.sent[worker] += 1
        if lease.work == Work.TRAIN:
            header = Header(
                Kind.GRADIENT,
                worker,
                self.sent[worker],
                self.read[worker],
                lease.number,
                start,
                count,
                loss=2.0,
            )
        else:
            header = Header(
                Kind.VALIDATION,
                worker,
                self.sent[worker],
                self.ledger.version,
                lease.number,
                start,
                count,
                loss=3.0,
                top1=count // 2,
                top5=count,
            )
        self.deliver(worker, dataclasses.replace(header, **change))
        self.mail |= dict(self.ledger.take_news())
        self.read[worker] = self.ledger.version

    def deliver(self, worker, header):
        before = self.ledger.state()
        try:
            match header.kind:
                case Kind.GRADIENT:
                    self.verdicts.append(self.ledger.judge(header))
                case Kind.NONFINITE:
                    self.ledger.refuse(header)
                case Kind.VALIDATION:
                    self.scores.append(self.ledger.tally(header))
                case _:
                    self.ledger.acknowledge(header)
                    return
        except LedgerError:
            assert self.ledger.state() == before
            self.ledger.reject(worker)
            self.ledger.retire(worker, for_good=True)
        if worker not in self.ledger.members:
            self.out.add(worker)


@st.composite
def lies(draw):
    field = draw(st.sampled_from([name for name in FIELDS if name != "worker"]))
    kind = st.sampled_from([kind for kind in Kind if kind not in (Kind.GOODBYE, Kind.FAILED)])
    return {field: draw(kind if field == "kind" else LOSSES if field == "loss" else NUMBERS)}


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.integers(1, 2), st.none() | lies()), max_size=60))
def test_whatever_one_field_of_a_header_says_every_sample_is_used_once_and_every_score_is_possible(
    moves,
):
    play = Play()
    for worker, lie in moves:
        play.send(worker, lie or {})
    for _ in range(1000):
        if play.ledger.finished:
            break
        for worker in range(3):
            play.send(worker, {})
    assert play.ledger.finished
    used = [
        (part.epoch, position)
        for verdict in play.verdicts
        if not verdict.dropped
        for part in verdict.segments
        for position in range(part.start, part.stop)
    ]
    used += [
        (part.epoch, position)
        for part in play.ledger.given_up
        for position in range(part.start, part.stop)
    ]
    assert sorted(used) == [(number // 50, number % 50) for number in range(120)]
    assert all(
        0 <= score.top1_error <= 1
        and 0 <= score.top5_error <= score.top1_error
        and not score.loss < 0
        for score in play.scores
        if score
    )


GRADIENT = Header(
    Kind.GRADIENT, worker=0, packet=1, read_version=0, lease=1, start=0, count=4, loss=2.0
)


@pytest.mark.parametrize(
    "change, claim",
    [
        ({"skipped": 5}, "5 images left out, of 4"),
        ({"skipped": -1}, "-1 images left out"),
        ({"loss": -1e-3}, "a mean loss of"),
        ({"loss": 1e39}, "which no batch has"),
        ({"loss": float("nan")}, "not finite"),
        ({"top1": 1}, "top1 1"),
        ({"stored_top1": 0}, "stored_top1 0"),
        ({"base": 1}, "own weights that began with version 1"),
        ({"base": -2}, "own weights"),
    ],
)
def test_a_gradient_that_claims_what_cannot_be_is_refused(change, claim):
    with pytest.raises(LedgerError, match=claim):
        Ledger(PLAN, lr_at=lambda samples, staleness: 1.0).judge(
            dataclasses.replace(GRADIENT, **change)
        )


def test_own_weights_began_with_a_snapshot_that_their_worker_has_read_and_no_older_one():
    ledger = Ledger(dataclasses.replace(PLAN, moves_own=True), lr_at=lambda samples, staleness: 1.0)
    with pytest.raises(LedgerError, match="own weights that began with version -1"):
        ledger.judge(GRADIENT)
    ledger.judge(dataclasses.replace(GRADIENT, base=0))
    # it begins anew, at version 1
    ledger.refuse(Header(Kind.NONFINITE, 0, 2, 1, 1, 4, 4, base=0))
    with pytest.raises(LedgerError, match="the worker began at version 1"):
        ledger.judge(Header(Kind.GRADIENT, 0, 3, 1, 1, 8, 4, base=0))
    assert ledger.judge(Header(Kind.GRADIENT, 0, 3, 1, 1, 8, 4, base=1)).version == 1


@pytest.mark.parametrize(
    "change, claim",
    [
        ({"top1": 11, "top5": 11}, "first guesses right"),
        ({"top1": 5, "top5": 4}, "5 first guesses right and 4 among five"),
        ({"top1": -1}, "-1 first guesses"),
        ({"top5": 10, "skipped": 1}, "of 9 images"),
        ({"stored_top1": 3}, "at the end only"),
        ({"loss": -2.0}, "a loss of -2"),
        ({"count": 9, "top5": 9}, "all of .0, 10. is to be validated"),
        ({"base": 0}, "base 0"),
    ],
)
def test_a_validation_that_claims_what_cannot_be_is_refused(change, claim):
    ledger = Ledger(dataclasses.replace(PLAN, num_workers=1), lr_at=lambda samples, staleness: 1.0)
    for packet in range(1, 100):
        lease = dict(ledger.take_news())[0].leases[0]
        if lease.work == Work.VALIDATE:
            break
        start = ledger._accounts[0].cursor
        ledger.judge(
            Header(Kind.GRADIENT, 0, packet, 0, lease.number, start, min(4, lease.stop - start))
        )
    good = Header(Kind.VALIDATION, 0, packet, 1, lease.number, 0, 10, loss=20.0, top1=5, top5=10)
    with pytest.raises(LedgerError, match=claim):
        ledger.tally(dataclasses.replace(good, **change))
    assert ledger.tally(good).top1_error == 0.5


def test_a_score_whose_loss_is_not_finite_is_not_the_best():
    ledger = Ledger(
        dataclasses.replace(PLAN, num_workers=1, num_samples=4, total_samples=4),
        lr_at=lambda samples, staleness: 1.0,
    )
    ledger.judge(GRADIENT)
    [lease] = dict(ledger.take_news())[0].leases
    score = ledger.tally(
        Header(Kind.VALIDATION, 0, 2, 1, lease.number, 0, 10, loss=float("nan"), top1=10, top5=10)
    )
    assert score.final and ledger.best is None


def test_a_note_out_of_turn_or_with_a_range_is_refused():
    ledger = Ledger(PLAN, lr_at=lambda samples, staleness: 1.0)
    note = Header(Kind.SAVED, 1, 1, 0, 0, 0, 0)
    for change in (
        {"packet": 2},
        {"packet": 0},
        {"read_version": 1},
        {"count": 3},
        {"loss": 1.0},
        {"worker": 3},
    ):
        with pytest.raises(LedgerError):
            ledger.acknowledge(dataclasses.replace(note, **change))
    ledger.acknowledge(note)
    assert ledger._accounts[1].judged == 1


# ---- the loops


def lying(monkeypatch, lies):
    """Let the workers change a packet each: worker -> (which of its gradients, what of its header or its payload)."""

    class Outbox(FakeOutbox):
        gradients = 0

        def send(self, header, num_bytes):
            self.gradients += header.kind == Kind.GRADIENT
            number, change = lies.get(header.worker, (0, {}))
            if header.kind == Kind.GRADIENT and self.gradients == number:
                change = dict(change)
                if position := change.pop("payload", None):
                    self.payload.view(torch.float32)[position] = float("nan")
                header = dataclasses.replace(header, **change)
            super().send(header, num_bytes)

    monkeypatch.setattr(test_loops, "FakeOutbox", Outbox)


def test_workers_that_lie_are_retired_and_the_run_replays_to_the_bit(digits, tmp_path, monkeypatch):
    lying(
        monkeypatch,
        {1: (2, {"skipped": 33}), 2: (3, {"loss": -1.0}), 3: (1, {"base": 5}), 4: (4, {"top5": 3})},
    )
    cluster = test_loops.Cluster(
        make_task(digits, "--model", "networks_for_tests:without_dropout", epochs=0.5), 5, tmp_path
    )
    found = audit(cluster.train(), 1437, round(0.5 * 1437), 5)
    assert not found.violations and not found.epochs[0].missing
    gone = [
        event for event in read_events(cluster.run.metrics_of(0)) if isinstance(event, Retirement)
    ]
    assert sorted(event.rank for event in gone) == [2, 3, 4, 5]
    assert torch.equal(
        replay(cluster.task, list(read_log(cluster.run.pushes)), 5)[0].weights,
        cluster.server.window.latest,
    )


def test_one_nan_in_a_payload_whose_loss_is_finite_ends_the_run_and_is_in_no_checkpoint(
    digits, tmp_path, monkeypatch
):
    lying(monkeypatch, {0: (9, {"payload": 100})})
    cluster = test_loops.Cluster(
        make_task(digits, "--checkpoint.every_samples", "16", epochs=0.5), 1, tmp_path
    )
    work = cluster.work
    # nobody answers it in the end
    monkeypatch.setattr(cluster, "work", lambda number: suppressed(work, number))
    with pytest.raises(TrainingDiverged, match="no longer finite on the server.*--resume"):
        cluster.train()
    cluster.server.save()
    cluster.server.checkpointer.close()
    states = [checkpoint.load(path)[0] for path in cluster.run.checkpoints.glob("v*")]
    assert all(tensor.isfinite().all() for state in states for tensor in state.values())


def suppressed(work, number):
    with suppress(AssertionError):
        work(number)


@pytest.mark.parametrize("num_pieces", [1, 2, 61, 122, 4087])
def test_every_piece_is_looked_at_within_so_many_passes_as_one_of_the_strides(num_pieces):
    lookout = finite.Lookout(num_pieces * PIECE - 5)
    for damaged in {0, num_pieces // 2, num_pieces - 1}:
        with pytest.raises(TrainingDiverged, match="the weights: no longer finite"):
            for _ in range(max(finite.STRIDES)):
                for piece in range(num_pieces):
                    weights = torch.tensor([1.0, float("inf") if piece == damaged else 2.0])
                    lookout.look(weights, slice(0, 2))


def test_a_sum_that_overflows_is_finite_and_a_single_nan_or_inf_is_not():
    vector = torch.full([3 * PIECE + 7], 3e38)
    assert finite.is_finite(vector)
    for value in (float("nan"), float("inf"), -float("inf")):
        vector[2 * PIECE + 1] = value
        assert not finite.is_finite(vector)


# ---- MPI


def test_a_payload_that_is_longer_or_shorter_than_announced_is_refused_and_the_others_go_on(
    openmpi, digits, tmp_path
):
    done = openmpi.train(
        5,
        "--data",
        str(digits),
        "--epochs",
        "0.6",
        "--run.dir",
        "run",
        cwd=tmp_path,
        module="wrong_lengths",
    )
    assert done.returncode == 3, done.stdout + done.stderr
    run = RunDir.open(tmp_path / "run")
    gone = {
        event.rank: event.reason
        for event in read_events(run.metrics_of(0))
        if isinstance(event, Retirement)
    }
    assert (
        "a payload of 606248 bytes, where 605248 were due" in gone[1]
        and "604248 bytes" in gone[3]
        and "bytes, where its header is all that travels" in gone[4]
        and set(gone) == {1, 3, 4}
    )
    assert not audit(pushes_of(run), 1437, round(0.6 * 1437)).violations
    assert replay_main([str(run.path)]) == 0

"""The server's decisions, without a server."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgd_mpi.protocol import messages
from asgd_mpi.protocol.ledger import Ledger, LedgerError, Plan
from asgd_mpi.protocol.messages import Header, Kind, Mail, Work

PLAN = Plan(
    num_workers=3,
    num_samples=50,
    num_validation=10,
    total_samples=120,
    batch_size=4,
    lease_batches=3,
    validate_every=1.0,
)


class Game:
    """Workers that do what the ledger asks for, in an order that somebody else chooses."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.ledger = Ledger(plan, lr_at=lambda samples, staleness: 1.0)
        self.mail: dict[int, Mail] = dict(self.ledger.take_news())
        self.sent = [0] * plan.num_workers
        self.at = [0] * plan.num_workers  # position within the current lease
        self.read = [0] * plan.num_workers  # the version held
        self.used: list[tuple[int, int]] = []  # (epoch, position)
        self.verdicts, self.scores = [], []

    def header(self, worker: int) -> Header | None:
        """The packet that `worker` would send next."""
        leases = self.mail[worker].leases
        if not leases:
            return None
        lease = leases[0]
        start = lease.start + self.at[worker]
        if lease.work == Work.TRAIN:
            return Header(
                Kind.GRADIENT,
                worker,
                self.sent[worker] + 1,
                self.read[worker],
                lease.number,
                start,
                min(self.plan.batch_size, lease.stop - start),
            )
        version = self.ledger.version if lease.work == Work.FINAL else self.read[worker]
        return Header(
            Kind.VALIDATION,
            worker,
            self.sent[worker] + 1,
            version,
            lease.number,
            lease.start,
            lease.stop - lease.start,
            loss=float(lease.stop - lease.start),
            top1=lease.stop - lease.start,
            top5=lease.stop - lease.start,
        )

    def move(self, worker: int) -> None:
        header = self.header(worker)
        if header is None:
            return
        lease = self.mail[worker].leases[0]
        self.sent[worker] += 1
        if header.kind == Kind.GRADIENT:
            self.used += [
                (lease.epoch, position)
                for position in range(header.start, header.start + header.count)
            ]
            self.verdicts.append((worker, self.ledger.judge(header)))
        else:
            self.scores.append(self.ledger.tally(header))
        self.at[worker] = (
            0 if header.start + header.count == lease.stop else self.at[worker] + header.count
        )
        self.mail |= dict(self.ledger.take_news())

    def play(self, choices) -> None:
        """Each choice: who moves, and whether it reads the latest version or just the one after its own push."""
        for worker, reads_latest in choices:
            self.move(worker)
            self.read[worker] = max(
                self.read[worker],
                self.ledger.version if reads_latest else self.mail[worker].version,
            )
        while not self.ledger.finished:
            for worker in range(self.plan.num_workers):
                self.move(worker)
                self.read[worker] = max(self.read[worker], self.mail[worker].version)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=200), st.integers(0, 5))
def test_every_sample_of_every_epoch_is_used_exactly_once_in_any_order_of_arrivals(
    choices, lease_pushes
):
    game = Game(dataclasses.replace(PLAN, lease_pushes=lease_pushes))
    game.play(choices)
    assert sorted(game.used) == [(e, p) for e in range(3) for p in range(50 if e < 2 else 20)]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=200))
def test_every_push_is_applied_exactly_once_in_a_total_order(choices):
    game = Game(PLAN)
    game.play(choices)
    assert [verdict.version for _, verdict in game.verdicts] == list(range(game.ledger.version))
    assert all(verdict.staleness >= 0 for _, verdict in game.verdicts)


def test_the_staleness_identity_holds_for_workers_that_read_right_after_their_push():
    game = Game(PLAN)
    for turn in [0, 1, 2, 0, 0, 1, 0, 2, 2, 2, 1, 0, 1]:
        game.move(turn)
        game.read[turn] = game.ledger.version
    staleness = sum(verdict.staleness + 1 for _, verdict in game.verdicts)
    in_flight = sum(game.ledger.version - read for read in game.read)
    assert staleness + in_flight == 3 * game.ledger.version


def test_a_straggler_ten_times_slower_has_a_staleness_of_thirty():
    plan = dataclasses.replace(
        PLAN, num_workers=4, num_samples=10_000, total_samples=10_000, batch_size=1
    )
    game = Game(plan)
    for tick in range(1, 311):  # step times 1, 1, 1, 10
        for worker in (0, 1, 2) + ((3,) if tick % 10 == 0 else ()):
            game.move(worker)
            game.read[worker] = game.ledger.version
    by_worker = {w: [v.staleness for worker, v in game.verdicts if worker == w] for w in range(4)}
    assert set(by_worker[3]) == {30}
    pushes = [verdict.staleness for _, verdict in game.verdicts]
    ages = sum(game.ledger.version - read for read in game.read)
    assert sum(staleness + 1 for staleness in pushes) + ages == 4 * len(pushes)
    assert len(pushes) == 961 and 2.9 < sum(pushes) / len(pushes) < 3


def test_fast_workers_take_more_leases():
    game = Game(dataclasses.replace(PLAN, validate_every=10))
    for turn in [0] * 20 + [1, 2]:
        game.move(turn)
        game.read[turn] = game.ledger.version
    assert sum(worker == 0 for worker, _ in game.verdicts) == 20


def test_each_epoch_is_validated_once_and_the_last_version_by_everybody():
    game = Game(PLAN)
    game.play([])
    scores = [score for score in game.scores if score]
    assert [score.final for score in scores] == [False, False, True]
    assert scores[-1].version == game.ledger.version and scores[-1].num_images == 10
    assert scores[-1].loss == 1.0 and scores[-1].top1_error == 0.0


def test_the_clock_of_the_rate_is_the_samples_applied():
    ledger = Ledger(PLAN, lr_at=lambda samples, staleness: 1.0 / (1 + samples))
    rates = [
        ledger.judge(Header(Kind.GRADIENT, worker, 1, 0, 1, 12 * worker, 4)).lr
        for worker in range(3)
    ]
    assert rates == [1.0, 1 / 5, 1 / 9]


@pytest.mark.parametrize(
    "change, claim",
    [
        ({"worker": 3}, "no such worker"),
        ({"packet": 2}, "packet 1 of this worker is due"),
        ({"read_version": 1}, "may have read a version from 0 to 0"),
        ({"lease": 2}, "works on lease 1"),
        ({"start": 4}, "position 0 of the lease is due"),
        ({"count": 25}, "1 positions more than the worker was lent"),
        ({"count": 0}, "1 position or more"),
    ],
)
def test_a_packet_that_contradicts_the_ledger_is_refused_and_changes_nothing(change, claim):
    ledger = Ledger(PLAN, lr_at=lambda samples, staleness: 1.0)
    good = Header(Kind.GRADIENT, worker=0, packet=1, read_version=0, lease=1, start=0, count=4)
    with pytest.raises(LedgerError, match=claim):
        ledger.judge(dataclasses.replace(good, **change))
    assert ledger.judge(good).version == 0


def test_a_push_may_cover_several_leases_and_is_answered_with_as_many_new_ones():
    ledger = Ledger(PLAN, lr_at=lambda samples, staleness: 1.0)
    first = dict(ledger.take_news())[0].leases
    verdict = ledger.judge(Header(Kind.GRADIENT, 0, 1, 0, 1, first[0].start, 24))
    assert [(s.epoch, s.start, s.stop) for s in verdict.segments] == [
        (x.epoch, x.start, x.stop) for x in first
    ]
    assert [lease.number for lease in dict(ledger.take_news())[0].leases] == [3, 4]
    assert ledger.samples == 24


def test_a_lease_holds_several_pushes_like_the_last_one_but_near_the_end_no_more_than_an_even_share():
    ledger = Ledger(
        dataclasses.replace(PLAN, num_samples=1000, total_samples=240, lease_pushes=3),
        lr_at=lambda samples, staleness: 1.0,
    )
    starts = {worker: mail.leases[0].start for worker, mail in ledger.take_news()}

    def lengths_after_a_push(worker, count):
        ledger.judge(Header(Kind.GRADIENT, worker, 1, 0, 1, starts[worker], count))
        return [lease.stop - lease.start for lease in dict(ledger.take_news())[worker].leases]

    # of 240 samples 72 were lent, now 108
    assert lengths_after_a_push(0, 12) == [12, 3 * 12]
    # whole batches of 4: an even share is 29
    assert lengths_after_a_push(1, 24) == [(240 - 108) // 3, 32]


def test_a_header_survives_the_wire():
    header = Header(Kind.VALIDATION, 3, 17, 2**40, 5, 64, 128, 1, -0.125, 60, 63)
    packed = messages.pack_header(header)
    assert len(packed) == messages.HEADER_BYTES and messages.unpack_header(packed) == header
    with pytest.raises(ValueError, match="not one of asgd_mpi's"):
        messages.unpack_header(b"\1" * messages.HEADER_BYTES)


def test_mail_survives_the_window_and_half_written_mail_is_told_from_mail():
    ledger = Ledger(PLAN, lr_at=lambda samples, staleness: 1.0)
    old = dict(ledger.take_news())[0]
    ledger.judge(Header(Kind.GRADIENT, 0, 1, 0, 1, 0, 4))
    new = dict(ledger.take_news())[0]
    words = [messages.pack_mail(mail) for mail in (old, new)]
    assert [messages.unpack_mail(word) for word in words] == [old, new]
    for length in range(1, messages.MAIL_WORDS):
        mixed = words[1][:length] + words[0][length:]
        assert messages.unpack_mail(mixed) in (None, old, new)

"""The ledger when workers are retired, come back, refuse, and when a run is resumed: pure, in any order."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgd_mpi.protocol.barrier import Pacing
from asgd_mpi.protocol.ledger import Ledger, LedgerError, Plan
from asgd_mpi.protocol.messages import Header, Kind, Orders, Work

PLAN = Plan(
    num_workers=3,
    num_samples=50,
    num_validation=10,
    total_samples=120,
    batch_size=4,
    lease_batches=3,
    validate_every=1.0,
)
EVERYTHING = sorted(
    [(0, p) for p in range(50)] + [(1, p) for p in range(50)] + [(2, p) for p in range(20)]
)


class Cast:
    """Workers as they are in a run: each holds a lease that may have become void without its knowing."""

    def __init__(self, plan=PLAN, state=None, used=()):
        self.ledger = Ledger(plan, lambda samples, staleness: 1.0, state)
        # gradients that steps were made of
        self.taken = 0
        self.mail = dict(self.ledger.take_news())
        # (epoch, position) of what was applied
        self.used = list(used)
        # the last finished lease of each
        self.done = [0] * plan.num_workers
        self.at = {}  # worker -> (lease, position)
        self.sent = [0] * plan.num_workers
        self.read = [self.ledger.version] * plan.num_workers
        self.dead, self.waited = set(), set()

    def packet(self, worker, kind=None):
        if worker not in self.at:
            lease = next(
                (one for one in self.mail[worker].leases if one.number > self.done[worker]), None
            )
            if lease is None:
                return None
            self.at[worker] = (lease, lease.start)
        lease, position = self.at[worker]
        self.sent[worker] += 1
        if lease.work == Work.TRAIN:
            return Header(
                kind or Kind.GRADIENT,
                worker,
                self.sent[worker],
                self.read[worker],
                lease.number,
                position,
                min(4, lease.stop - position),
            )
        version = self.ledger.version if lease.work == Work.FINAL else self.read[worker]
        count = lease.stop - lease.start
        return Header(
            Kind.VALIDATION,
            worker,
            self.sent[worker],
            version,
            lease.number,
            position,
            count,
            loss=1.0,
            top1=count,
            top5=count,
        )

    def step(self, worker, kind=None):
        """One packet of a worker, as the server would treat it."""
        if worker in self.dead or self.mail[worker].hold and worker in self.ledger.members:
            return
        if worker in self.waited:  # a fetch comes after the wait
            self.waited.discard(worker)
            self.read[worker] = self.ledger.version
        packet = self.packet(worker, kind)
        if packet is None and self.mail[worker].orders == Orders.REPORT:
            self.sent[worker] += 1
            self.ledger.readmit(Header(Kind.HERE, worker, self.sent[worker], 0, 0, 0, 0))
            self.mail |= dict(self.ledger.take_news())
            self.read[worker] = self.ledger.version
        if packet is None:
            return
        lease, position = self.at[worker]
        if worker not in self.ledger.members:
            self.ledger.readmit(packet)
            del self.at[worker]
            self.done[worker] = lease.number
        else:
            if packet.kind == Kind.VALIDATION:
                self.ledger.tally(packet)
            elif packet.kind == Kind.NONFINITE:
                self.ledger.refuse(packet)
            else:
                verdict = self.ledger.judge(packet)
                self.taken += verdict.mean_of
                if not verdict.dropped:
                    self.used += [
                        (segment.epoch, p)
                        for segment in verdict.segments
                        for p in range(segment.start, segment.stop)
                    ]
            self.at[worker] = (lease, position + packet.count)
            if position + packet.count == lease.stop:
                del self.at[worker]
                self.done[worker] = lease.number
        self.mail |= dict(self.ledger.take_news())
        self.read[worker] = self.ledger.version
        if self.mail[worker].hold:
            self.waited.add(worker)

    def finish(self, rounds=2000):
        while not self.ledger.finished:
            rounds -= 1
            assert rounds, f"nobody can go on: {self.ledger.outstanding()}"
            for worker in range(self.ledger.plan.num_workers):
                self.step(worker)


ACTS = st.lists(
    st.tuples(
        st.sampled_from(["step"] * 12 + ["retire", "kill", "nonfinite", "resume"]),
        st.integers(0, 2),
    ),
    max_size=150,
)


PACES = [
    PLAN,
    *(
        dataclasses.replace(PLAN, pacing=pacing)
        for pacing in [
            Pacing(mean_of=2),
            Pacing(max_staleness=2),
            Pacing(slack=0),
            Pacing(slack=2),
            Pacing(mean_of=0),
            Pacing(mean_of=0, backup=1),
        ]
    ),
    dataclasses.replace(PLAN, warm_start=30),
    dataclasses.replace(PLAN, warm_start=30, pacing=Pacing(mean_of=0)),
]


@settings(deadline=None, max_examples=400)
@given(ACTS, st.sampled_from(PACES))
def test_every_sample_is_used_exactly_once_whoever_fails_and_however_often_it_is_resumed(
    acts, plan
):
    cast = Cast(plan)
    for act, worker in acts:
        if cast.ledger.finished:
            break
        if act == "step":
            cast.step(worker)
        elif act == "nonfinite" and len(cast.ledger.members) > 1:
            cast.step(worker, Kind.NONFINITE)
        elif act == "retire" and worker in cast.ledger.members:
            cast.ledger.retire(worker, for_good=False)
        elif act == "kill" and worker in cast.ledger.members and len(cast.ledger.members) > 1:
            cast.ledger.retire(worker, for_good=True, is_gone=True)
            cast.dead.add(worker)
        cast.mail |= dict(cast.ledger.take_news())
        if act == "resume":
            cast = Cast(plan, json.loads(json.dumps(cast.ledger.state())), cast.used)
    if not cast.ledger.finished and not set(cast.ledger.members) - cast.dead:
        cast = Cast(plan, cast.ledger.state(), cast.used)  # nobody was left
    cast.finish()
    given_up = sorted(
        (part.epoch, p) for part in cast.ledger.given_up for p in range(part.start, part.stop)
    )
    assert sorted(cast.used + given_up) == EVERYTHING
    assert cast.ledger.samples == len(cast.used)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_another_number_of_workers_goes_on_where_the_run_was(workers):
    cast = Cast()
    for turn in range(20):
        cast.step(turn % 3)
    plan = Plan(workers, *[getattr(PLAN, name) for name in PLAN.__dataclass_fields__][1:])
    other = Cast(plan, cast.ledger.state(), cast.used)
    assert (other.ledger.version, other.ledger.samples) == (
        cast.ledger.version,
        cast.ledger.samples,
    )
    other.finish()
    assert sorted(other.used) == EVERYTHING


def test_the_ranges_of_a_dead_worker_go_to_the_others_at_once_when_they_are_idle():
    cast = Cast()
    while any(cast.mail[worker].leases for worker in (0, 1)):
        cast.step(0)
        cast.step(1)
    assert cast.mail[2].leases and not cast.ledger.trained
    held = cast.ledger.retire(2, for_good=True, is_gone=True)
    cast.mail |= dict(cast.ledger.take_news())
    lent = sum(lease.stop - lease.start for worker in (0, 1) for lease in cast.mail[worker].leases)
    assert held == lent > 0


def test_a_retired_worker_that_is_heard_of_again_is_a_new_member_and_is_told():
    cast = Cast()
    cast.step(1)
    cast.ledger.retire(1, for_good=False)
    assert cast.ledger.members == [0, 2]
    cast.step(1)
    assert (
        cast.ledger.members == [0, 1, 2] and cast.mail[1].dropped == 1 and cast.mail[1].judged == 2
    )
    assert cast.mail[1].orders == Orders.GO_ON and cast.mail[1].leases


def test_a_worker_with_three_gradients_in_a_row_that_are_not_finite_rests():
    cast = Cast()
    for _ in range(2):
        cast.step(0, Kind.NONFINITE)
    cast.step(0)
    for _ in range(3):
        assert 0 in cast.ledger.members
        cast.step(0, Kind.NONFINITE)
    assert cast.ledger.members == [1, 2] and cast.mail[0].orders == Orders.REST


def test_a_range_that_is_never_finite_is_given_up_and_the_run_ends():
    plan = Plan(1, 20, 4, 20, 4, 5, 1.0, max_nonfinite=100)
    cast = Cast(plan)
    while not cast.ledger.trained:
        position = cast.at[0][1] if 0 in cast.at else cast.mail[0].leases[0].start
        cast.step(0, Kind.NONFINITE if position == 8 else Kind.GRADIENT)
    assert [(part.start, part.stop) for part in cast.ledger.given_up] == [(8, 12)]
    assert cast.ledger.samples == 16


def test_a_saved_ledger_that_does_not_add_up_is_refused():
    cast = Cast()
    cast.step(0)
    with pytest.raises(LedgerError, match="does not add up"):
        Cast(state=cast.ledger.state() | {"samples": 3})


@pytest.mark.parametrize(
    "change, claim",
    [
        ({"steps": 2}, "2 steps were made of 1 pushes"),
        ({"gathered": 9}, "9 of 1 pushes wait"),
        ({"best": [2, 4, 1.0, 0.5, 0.5]}, "the best version is 2"),
        ({"best": [1, 4, 1.0, -1.0, 0.5]}, "an error of -1.0"),
        ({"best": [1, 4, 1.0, 0.5, 1e300]}, r"an error of 1e\+300"),
        ({"best": [1, 4, 1.0, None, None]}, "an error of None"),
    ],
)
def test_a_saved_ledger_that_says_what_no_run_has_done_is_refused(change, claim):
    cast = Cast()
    cast.step(0)
    state = cast.ledger.state()
    Cast(state=state | {"best": [1, 4, 1.0, 0.5, 0.25]})
    with pytest.raises(LedgerError, match=claim):
        Cast(state=state | change)


def test_a_saved_ledger_that_would_use_a_sample_twice_is_refused_though_it_adds_up():
    cast = Cast()
    cast.step(0)
    state = cast.ledger.state()
    first = state["todo"][0]
    state["todo"].append(first)
    state["lent"] += first[3] - first[2]
    with pytest.raises(LedgerError, match="twice"):
        Cast(state=state)


def test_with_one_worker_the_resumed_leases_are_cut_as_they_would_have_been():
    plan = Plan(1, *[getattr(PLAN, name) for name in PLAN.__dataclass_fields__][1:])
    whole, cut = Cast(plan), Cast(plan)
    whole.finish()
    for _ in range(9):
        cut.step(0)
    resumed = Cast(plan, cut.ledger.state(), cut.used)
    resumed.finish()
    # in the same order, not only the same set
    assert resumed.used == whole.used


@settings(deadline=None, max_examples=200)
@given(
    st.builds(
        Header,
        st.sampled_from([Kind.GRADIENT, Kind.VALIDATION, Kind.NONFINITE]),
        st.integers(-2, 4),
        st.integers(-2, 4),
        st.integers(-2, 3),
        st.integers(-2, 4),
        st.integers(-5, 60),
        st.integers(-5, 200),
    )
)
def test_a_packet_that_makes_no_sense_is_refused_and_changes_nothing(header):
    cast = Cast()
    cast.step(0)
    before = cast.ledger.state()
    act = {
        Kind.GRADIENT: cast.ledger.judge,
        Kind.VALIDATION: cast.ledger.tally,
        Kind.NONFINITE: cast.ledger.refuse,
    }[header.kind]
    try:
        act(header)
    except LedgerError:
        assert cast.ledger.state() == before
    else:  # one that a worker might have sent
        lease = {0: 1, 1: 1, 2: 1}[header.worker]
        assert (
            header.lease == lease
            and header.count > 0
            and header.packet == (2 if header.worker == 0 else 1)
        )

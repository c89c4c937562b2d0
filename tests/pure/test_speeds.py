"""`--rule.steps_by_speed`: how many local batches each worker of diloco makes of a push, so that all push at one pace."""

import heapq

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_client import Server, kinds, lease, pushes
from test_diloco import outer
from test_loops import Cluster, make_task

from asgd_mpi.config import rulebook
from asgd_mpi.errors import ConfigError
from asgd_mpi.offline.simulation import Times, simulate
from asgd_mpi.protocol import messages
from asgd_mpi.protocol.client import Habits
from asgd_mpi.protocol.ledger import Ledger, Plan
from asgd_mpi.protocol.messages import Header, Kind, Mail
from asgd_mpi.protocol.speeds import RECENT, Speeds, batches_by_speed
from asgd_mpi.record.audit import audit
from asgd_mpi.record.events import Push, read_log
from asgd_mpi.replay import replay

LOCAL = Habits(n_push=8, n_fetch=8, overlap=False, moves="local")
BY_SPEED = ["--rule", "diloco", "--rule.steps_by_speed", "true"]
BATCH = 4


def plan(num_workers, most, pushes_of_each=40):
    total = num_workers * most * BATCH * pushes_of_each
    return Plan(num_workers, total, 0, total, BATCH, 1, 1.0, by_speed=most)


def test_a_worker_makes_as_many_batches_as_the_fastest_one_s_time_allows():
    speeds = [1 / seconds for seconds in (1, 1, 1, 10)]
    assert [batches_by_speed(50, speed, max(speeds)) for speed in speeds] == [50, 50, 50, 5]
    # a batch at least, and to the nearest number: 5 / 4 and 7 / 4 of one
    assert [batches_by_speed(most, 1.0, 4.0) for most in (1, 5, 7, 20)] == [1, 1, 2, 5]


def test_a_speed_is_that_from_push_to_push_and_is_not_measured_over_anything_else():
    speeds = Speeds(3, 10)
    everybody = range(3)
    for worker in (0, 1):
        speeds.begin(worker, 100.0)
    speeds.pushed(0, 40, 101.0)
    # the others were not heard of
    assert [speeds.batches(worker, everybody) for worker in everybody] == [10, 10, 10]
    speeds.pushed(1, 40, 102.0)
    assert [speeds.batches(worker, everybody) for worker in everybody] == [10, 5, 10]
    # it validates, and waits for work
    speeds.pause(1)
    speeds.pushed(1, 20, 190.0)
    assert speeds.batches(1, everybody) == 5
    # ... and is as fast as the other by and by: the last pushes alone count
    for push in range(RECENT):
        speeds.pushed(1, 40, 191.0 + push)
    assert speeds.batches(1, everybody) == 10
    speeds.pushed(1, 40, 204.0)
    assert speeds.batches(1, everybody) < 10
    # the fastest one is lost: who is left is the measure
    speeds.forget(0)
    assert speeds.batches(1, [1, 2]) == speeds.batches(0, [1, 2]) == 10
    assert Speeds(3, 0).batches(0, everybody) == 0


def paces(ledger, most, step_s, trip_s, change_s=()):
    """Let workers with these seconds a step and a trip work it off; returns when each pushed, how many batches, and of what lease.

    change_s: of the last three quarters of all pushes of each, in place of step_s.
    """
    mail, sent, at = dict(ledger.take_news()), [0] * len(step_s), [0] * len(step_s)
    done = [[] for _ in step_s]
    clock = []

    def set_out(worker, now):
        left = sum(one.stop - one.start for one in mail[worker].leases) - at[worker]
        count = min(BATCH * mail[worker].batches, left)
        slow = change_s and len(done[worker]) >= 10
        step = (change_s if slow else step_s)[worker]
        if count:
            later = now + count / BATCH * step + trip_s[worker]
            heapq.heappush(clock, (later, worker, count))

    ledger.begin(0.0)
    for worker in range(len(step_s)):
        set_out(worker, 0.0)
    while clock:
        now, worker, count = heapq.heappop(clock)
        first = mail[worker].leases[0]
        sent[worker] += 1
        begin = first.start + at[worker]
        ledger.judge(
            Header(Kind.GRADIENT, worker, sent[worker], ledger.version, first.number, begin, count),
            now,
        )
        before, mail = (
            {one.number: one for one in mail[worker].leases},
            {
                **mail,
                **dict(ledger.take_news()),
            },
        )
        at[worker] += count
        held = {one.number for one in mail[worker].leases}
        for number, one in before.items():
            if number not in held:
                at[worker] -= one.stop - one.start
        done[worker].append((now, count // BATCH, (first.stop - first.start) // BATCH))
        set_out(worker, now)
    assert ledger.trained
    return done


def intervals(done, last=5):
    """Return the mean time between the last pushes of each, a push that ended a lease early aside."""
    return [(one[-2][0] - one[-2 - last][0]) / last for one in done]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(1.0, 8.0), min_size=2, max_size=6),
    st.lists(st.floats(0.0, 3.0), min_size=6, max_size=6),
)
def test_workers_of_all_speeds_and_links_push_at_one_pace_within_a_fifth(step_s, trip_s):
    """Steps up to 8 times as long as others', and trips as long as 3 of the shortest steps."""
    most = 40
    done = paces(Ledger(plan(len(step_s), most), lambda *_: 1.0), most, step_s, trip_s)
    found = intervals(done)
    assert max(found) < 1.2 * min(found), (step_s, trip_s, done)


def test_a_worker_that_becomes_slower_pushes_at_the_pace_of_the_others_again():
    ledger = Ledger(plan(3, 20, pushes_of_each=60), lambda *_: 1.0)
    done = paces(ledger, 20, [1.0, 1.0, 2.0], [0.0] * 3, change_s=[1.0, 4.0, 1.0])
    assert [{batches for _, batches, _ in one[4:10]} for one in done] == [{20}, {20}, {10}]
    assert [{batches for _, batches, _ in one[20:40]} for one in done] == [{20}, {5}, {20}]


def test_the_mail_says_how_many_and_leases_are_no_longer_than_a_push():
    ledger = Ledger(plan(2, 20), lambda *_: 1.0)
    done = paces(ledger, 20, [1.0, 10.0], [0.0, 0.0])
    # it holds two leases of its first pushes' length
    assert {batches for _, batches, _ in done[1][2:-2]} == {2}
    assert {length for *_, length in done[1][25:-2]} == {2} and done[1][0][2] == 20
    mail = Mail(0, 0, read=-1, batches=17)
    assert messages.unpack_mail(messages.pack_mail(mail)) == mail


def test_a_worker_pushes_after_as_many_batches_as_it_is_told_and_fetches_with_each():
    told = Mail(0, 0, leases=(lease(1, 7),), batches=3)
    did = Server(told).live(LOCAL)
    assert kinds(did).startswith("t f t c c c t p t c c c t p t c t p t")
    assert [(one.sum.batches, one.fetch) for one in pushes(did)] == [
        (3, True),
        (3, True),
        (1, True),
    ]
    # the number changes amid a sum, with the mail of another packet
    did = Server(told, after={1: Mail(0, 0, leases=(lease(1, 7),), batches=2)}).live(LOCAL)
    assert [one.sum.batches for one in pushes(did)] == [3, 2, 2]


@pytest.mark.parametrize(
    "options", [[], ["--exchange.overlap", "true", "--exchange.wire", "int8"]], ids=["", "overlap"]
)
def test_a_training_with_a_slow_worker_keeps_pace_uses_every_sample_once_and_replays_to_the_bit(
    digits, options
):
    model = ["--model", "networks_for_tests:broad", "--inject", "slow:4x@rank1"]
    task = make_task(digits, *BY_SPEED, "--n-sync", "4", *model, *options, epochs=2)
    game = simulate(task, 3, Times(0.1, 0.01, 0.01, 0.01, spread=0.1))
    log = [push for push in game.pushes if isinstance(push, Push)]
    found = audit(log, 1437, 2 * 1437, 3, reads_own_pushes=not options)
    assert not found.violations and [epoch.missing for epoch in found.epochs] == [0, 0]
    assert torch.equal(replay(task, log, 3)[0].weights, game.latest.weights)
    held = [[push.positions for push in log if push.worker == worker] for worker in range(3)]
    size = task.config.data.batch_size
    # it was not measured at first, and with overlap one push more was summed up meanwhile
    assert held[0][0] == 4 * size and max(held[0][3:]) <= 2 * size
    assert len(held[0]) > len(held[1]) / 2 and max(held[1]) == 4 * size


def test_a_run_of_threads_uses_every_sample_once_and_replays_to_the_bit(digits, tmp_path):
    """Whatever speeds it measures."""
    options = ["--model", "networks_for_tests:without_dropout", "--exchange.overlap", "true"]
    task = make_task(digits, *BY_SPEED, "--n-sync", "5", *options)
    cluster = Cluster(task, 3, tmp_path)
    found = audit(cluster.train(), 1437, round(1.5 * 1437), 3, reads_own_pushes=False)
    assert not found.violations and [epoch.missing for epoch in found.epochs] == [0, 0]
    log = list(read_log(cluster.run.pushes))
    assert torch.equal(replay(task, log, 3)[0].weights, cluster.server.window.latest)


def test_a_batch_moves_the_weights_as_far_whether_its_push_holds_many_or_few():
    """What a worker pushes is the sum of its steps, so that pushes weigh by their samples."""
    steps = torch.randn(40, 1000)
    moved = [
        outer(
            torch.zeros(1000), [one.sum(0) for one in steps.split(lengths)], 4, outer_momentum=0.0
        )
        for lengths in ([10] * 4, [10, 2, 10, 2, 10, 2, 4])
    ]
    torch.testing.assert_close(*moved)
    torch.testing.assert_close(moved[0], -0.7 / 4 * steps.sum(0))


def test_it_is_for_diloco_alone(digits):
    task = make_task(digits, "--rule", "downpour", "--rule.steps_by_speed", "true")
    with pytest.raises(
        ConfigError, match="steps_by_speed true with --rule.name downpour: what its"
    ):
        rulebook.check(task.config, 2)

"""sync_backup: a step takes as long as the quickest n workers, since who is late leaves its gradient and begins the next step."""

import random

import pytest
from test_pace import cast, moves
from test_simulate import play

from asgd_mpi import replay
from asgd_mpi.protocol.ledger import LedgerError
from asgd_mpi.protocol.messages import Header, Kind
from asgd_mpi.record.audit import audit
from asgd_mpi.protocol.membership import GIVEN_UP
from asgd_mpi.record.events import Refusal, read_events
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.summary import summarize


def seconds_a_step(workers, backup, samples, seed, n_push=1):
    """Of workers whose batches take a time that is exponentially distributed, with a mean of 1 s / n_push."""
    chance = random.Random(seed)

    def watch(game):
        for worker in game.workers:
            worker.step_s = lambda: chance.expovariate(n_push)

    game = play(
        workers, samples, eta=1e-3, name="sync_backup", backup=backup, n_push=n_push, watch=watch
    )
    made = [push.t for push in game.pushes if push.mean_of == workers - backup]
    return game, (made[-1] - made[0]) / (len(made) - 1)


@pytest.mark.parametrize("workers, backup", [(5, 1), (8, 3), (4, 0)])
def test_a_step_takes_the_time_of_the_quickest_workers(workers, backup):
    """The mean of the k-th of n exponential times is 1/n + 1/(n - 1) + ... (k terms); its variance the sum of the squares."""
    rates = [1 / left for left in range(backup + 1, workers + 1)]
    game, found = seconds_a_step(workers, backup, 12_000, seed=3)
    steps = 12_000 / (workers - backup)
    # 1.283 for 4 + 1
    assert found == pytest.approx(
        sum(rates), abs=4 * (sum(rate**2 for rate in rates) / steps) ** 0.5
    )
    checked = audit(game.pushes, 1000, 12_000, workers)
    assert not checked.violations and [epoch.missing for epoch in checked.epochs] == [0] * 12
    assert game.num_dropped == pytest.approx(backup * steps, rel=0.02)


def test_a_late_worker_leaves_a_sum_of_batches_whole_and_its_images_are_lent_again():
    game, _ = seconds_a_step(5, 1, 3000, seed=1, n_push=3)
    given_up = [
        event
        for event in game.books[0].events
        if isinstance(event, Refusal) and event.reason == GIVEN_UP
    ]
    assert (
        len(given_up) > 100
        and game.ledger.samples == 3000
        and not audit(game.pushes, 1000, 3000, 5).violations
    )


def test_a_worker_that_never_is_in_time_begins_every_step_with_the_others():
    starts = []

    def watch(game):
        game.workers[3].step_s = lambda: starts.append(game.now) or 100.0

    game = play(4, 300, eta=1e-3, name="sync_backup", backup=1, watch=watch)
    steps = [push.t for push in game.pushes if push.mean_of == 3]
    assert starts[:50] == pytest.approx([0.0, *steps[:49]])
    assert {push.worker for push in game.pushes if push.t < 90} == {0, 1, 2}


def test_only_a_gradient_that_cannot_count_may_be_left():
    one = cast(mean_of=0, backup=1)
    left = Header(Kind.GIVEN_UP, 2, 1, 0, 1, one.mail[2].leases[0].start, 4)
    with pytest.raises(LedgerError, match="could still count"):
        one.ledger.give_back(left)
    assert moves(one, 0) and moves(one, 1) and one.mail[2].oldest == 2
    one.ledger.give_back(left)
    mail = dict(one.ledger.take_news())[2]
    assert (mail.judged, mail.version, mail.refused, mail.hold) == (1, 2, 0, False)


def test_a_late_worker_under_mpi_begins_the_next_step_without_finishing_its_batch(
    openmpi, digits, tmp_path
):
    """A batch of 20 parts would take rank 3 longer than 4 s; it looks at its mail before each pass."""
    done = openmpi.train(
        4,
        "--data",
        str(digits),
        "--rule",
        "sync_backup",
        "--model",
        "networks_for_tests:slow_on_rank_3",
        "--compute.micro_batches",
        "20",
        "--batch-size",
        "40",
        "--epochs",
        "0.5",
        "--data.lease_batches",
        "1",
        "--run.dir",
        "run",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunDir.open(tmp_path / "run")
    summary = summarize(run)
    assert (
        not summary.problems
        and not summary.audit.violations
        and [epoch.missing for epoch in summary.audit.epochs] == [0]
    )
    left = [
        event
        for event in read_events(run.metrics_of(0))
        if isinstance(event, Refusal) and event.rank == 3 and event.reason == GIVEN_UP
    ]
    gaps = [later.t - sooner.t for sooner, later in zip(left, left[1:])]
    assert min(gaps) < 20 * 0.2  # the passes of a batch cannot take less
    assert replay.main([str(run.path)]) == 0

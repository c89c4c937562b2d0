"""Who waits for whom, which gradients make a step together, which are too late: the ledger under every pacing."""

import dataclasses
import math

import pytest
from test_membership import Cast

from asgd_mpi.config import parse as configuration
from asgd_mpi.config.resolved import with_recipe
from asgd_mpi.config import rulebook
from asgd_mpi.errors import ConfigError
from asgd_mpi.model import networks
from asgd_mpi.protocol.barrier import Pacing, StepBarrier
from asgd_mpi.protocol.ledger import Ledger, Plan
from asgd_mpi.protocol.messages import Header, Kind

ENDLESS = Plan(
    num_workers=3,
    num_samples=10_000,
    num_validation=0,
    total_samples=10_000,
    batch_size=1,
    lease_batches=50,
    validate_every=10.0,
)


def cast(num_workers=3, warm_start=0, total=10_000, **pacing):
    return Cast(
        dataclasses.replace(
            ENDLESS,
            num_workers=num_workers,
            warm_start=warm_start,
            total_samples=total,
            pacing=Pacing(**pacing),
        )
    )


def moves(cast, worker):
    """Whether a worker can make a step."""
    before = cast.sent[worker]
    cast.step(worker)
    return cast.sent[worker] > before


def verdict(cast, worker):
    taken = cast.taken
    assert moves(cast, worker)
    return cast.taken - taken


def test_a_worker_is_at_most_slack_steps_ahead_of_the_slowest():
    """Step times 1 and 4, slack 3: Ho et al. 2013, and the start times that follow from it."""
    one, starts, busy = cast(2, slack=3), {0: [], 1: []}, {}
    for now in range(34):
        for worker in [worker for worker, until in busy.items() if until == now]:
            one.step(worker)
            del busy[worker]
        for worker in {0, 1} - busy.keys():
            if not one.mail[worker].hold:
                starts[worker].append(now)
                busy[worker] = now + (1, 4)[worker]
    assert starts[0] == [0, 1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32] and starts[1] == list(
        range(0, 34, 4)
    )


def test_nobody_waits_for_a_worker_that_is_retired():
    for options in ({"slack": 0}, {"mean_of": 0}):
        one = cast(**options)
        assert moves(one, 0) and moves(one, 1) and not moves(one, 0) and not moves(one, 1)
        one.ledger.retire(2, for_good=True, is_gone=True)
        one.mail |= dict(one.ledger.take_news())
        assert moves(one, 0) and moves(one, 1) and moves(one, 0)


def test_a_worker_that_comes_back_does_not_have_to_make_up_for_what_it_missed():
    one = cast(slack=1)
    one.ledger.retire(2, for_good=False)
    for _ in range(10):
        one.step(0), one.step(1)
    one.step(2)  # is dropped, and is a member again
    assert 2 in one.ledger.members and moves(one, 0) and moves(one, 1) and moves(one, 2)
    assert [moves(one, 0) for _ in range(3)] == [True, True, False]


def test_a_round_is_one_gradient_of_each_worker_and_its_step_is_their_mean():
    one = cast(mean_of=0)
    assert [verdict(one, worker) for worker in (1, 0, 2)] == [0, 0, 3]
    assert [verdict(one, worker) for worker in (2, 1)] == [0, 0] and not moves(one, 1)
    assert verdict(one, 0) == 3


def test_the_gradients_of_a_round_that_lost_a_worker_count_in_the_next_one():
    one = cast(mean_of=0)
    one.step(0), one.step(1)
    one.ledger.retire(2, for_good=True, is_gone=True)
    one.mail |= dict(one.ledger.take_news())
    assert [verdict(one, worker) for worker in (0, 1)] == [0, 4]


def test_what_comes_after_a_round_with_backup_workers_is_dropped_and_lent_again():
    one = cast(mean_of=0, backup=1)
    assert [verdict(one, worker) for worker in (0, 1)] == [0, 2]
    version = one.ledger.version
    assert verdict(one, 2) == 0 and one.ledger.version == version and one.mail[2].refused == 1
    assert not one.mail[2].hold and verdict(one, 2) == 0 and one.ledger.version == version + 1
    one.finish()
    assert (
        sorted(one.used) == [(0, position) for position in range(10_000)]
        if one.ledger.finished
        else True
    )


def test_a_gradient_that_is_too_stale_is_dropped_and_its_worker_is_told():
    one = cast(max_staleness=4)
    for _ in range(3):
        one.step(0)
    one.step(1)
    assert (one.ledger.version, one.mail[1].refused) == (4, 0)
    one.step(2)
    assert (one.ledger.version, one.mail[2].refused) == (4, 1)
    one.step(2)
    assert (one.ledger.version, one.mail[2].refused) == (5, 1)


def test_fewer_workers_than_before_make_a_step_of_all_that_had_waited_for_it():
    """Of softsync, whose steps are of as many gradients as there are workers: 3 of 4 wait, and a resume has 2."""
    barrier = StepBarrier(Pacing(mean_of=2), 2, version=7, gathered=3)
    steps = [barrier.take(0, 8 + number, lambda: [0, 1], False) for number in range(5)]
    assert steps == [4, 0, 2, 0, 2]


def test_the_last_step_is_the_mean_of_what_is_left():
    one = cast(2, total=18, mean_of=2)
    made = []
    while not one.ledger.trained:
        for worker in (0, 1):
            before = one.taken
            one.step(worker)
            made += [one.taken - before]
    assert [count for count in made if count] == [2, 2, 1]


def test_in_a_warm_start_one_worker_trains_alone_and_if_it_dies_the_next_one_does():
    one = cast(warm_start=120)
    assert not one.mail[1].leases and not one.mail[2].leases
    while one.ledger.samples < 60:
        one.step(0)
    one.ledger.retire(0, for_good=True, is_gone=True)
    one.mail |= dict(one.ledger.take_news())
    one.dead.add(0)
    while one.ledger.samples < 120:
        assert not one.mail[2].leases
        assert moves(one, 1)
    assert one.mail[2].leases and moves(one, 2)


def test_the_learning_rate_of_a_gathered_gradient_is_of_its_staleness_in_steps():
    ledger = Ledger(
        dataclasses.replace(ENDLESS, pacing=Pacing(mean_of=2)),
        lambda samples, staleness: 1.0 / (1 + staleness),
    )
    found = [
        ledger.judge(Header(Kind.GRADIENT, worker, 1, 0, 1, ledger._accounts[worker].cursor, 1))
        for worker in range(3)
    ]
    assert [(one.lr, one.rate, one.staleness) for one in found] == [
        (1.0, 1.0, 0),
        (1.0, 1.0, 1),
        (0.5, 1.0, 2),
    ]


def completed(*options):
    return with_recipe(configuration.parse(list(options)), networks.recipe("digits_cnn"))


def test_every_rule_is_complete_and_consistent_with_its_own_defaults():
    for name in rulebook.RULEBOOK:
        config = completed("--rule", name)
        rulebook.check(config, 4)
        assert all(count >= 0 for count in rulebook.vectors(config.rule, 4))
        assert "4 workers" in rulebook.expected_staleness(config.rule, 4, 4)
        assert math.isclose(
            config.schedule.lr,
            0.02
            if config.rule.momentum or name == "adagrad"
            else 0.001
            if rulebook.is_adaptive(config.rule)
            else 0.2,
        )


@pytest.mark.parametrize(
    "options, reason",
    [
        (
            ["--rule", "dc_asgd_c", "--rule.momentum", "0.9", "--rule.momentum_at", "dana"],
            "needs the gradient itself",
        ),
        (["--rule", "adagrad", "--rule.momentum", "0.9"], "gradients' squares"),
        (["--rule", "adamw", "--rule.momentum", "0.9"], "momentum of adamw is --rule.beta1"),
        (["--rule", "nadamw", "--rule.momentum_at", "dana"], "follows from the rule"),
        (["--rule", "adamw", "--rule.momentum_at", "server"], "dana and worker let the workers"),
        (["--rule", "adamw", "--rule.optimizer", "sgd"], "one for adamw alone; leave"),
        (["--rule", "dc_asgd_c", "--rule.optimizer", "adam"], "one for sgd alone"),
        (
            ["--rule", "softsync", "--rule.optimizer", "adam", "--rule.staleness", "inverse"],
            "the mean of gradients of several stalenesses.*take constant",
        ),
        (["--rule", "easgd", "--rule.momentum", "0.9"], "a difference of weights"),
        (
            ["--rule", "downpour", "--rule.momentum", "0.9", "--rule.momentum_at", "server"],
            "must know the whole step",
        ),
        (["--rule", "sync", "--exchange.overlap", "true"], "while it is to wait"),
        (["--rule", "ssp", "--n-sync", "auto"], "n_push auto needs the overlap"),
        (["--rule", "sasgd", "--rule.staleness", "constant"], "own weights \\(inverse\\)"),
        (
            ["--rule.momentum", "0.9", "--rule.momentum_at", "none"],
            "it is set to none; choose of dana",
        ),
        (["--rule", "sync_backup", "--rule.backup", "4"], "none would be waited for"),
        (["--rule", "softsync", "--rule.splits", "5"], "there are 4 workers"),
        (
            ["--rule", "dc_asgd_a", "--exchange.wire", "bfloat16"],
            "compensation is a difference .* what rounding them loses",
        ),
        (
            ["--rule", "eamsgd", "--exchange.wire", "float16"],
            "what is pushed is a difference .* take float32",
        ),
        (
            ["--rule", "easgd", "--exchange.fetch_wire", "bfloat16"],
            "--exchange.fetch_wire bfloat16",
        ),
        (["--rule", "adagrad", "--exchange.wire", "int8"], "adagrad squares what arrives"),
        (["--rule", "adamw", "--exchange.wire", "topk"], "adamw squares what arrives"),
        (
            ["--rule", "sync", "--rule.momentum", "0.9", "--exchange.wire", "topk"],
            "server_nag .* a velocity at the server goes on .* take dana or worker",
        ),
    ],
)
def test_a_combination_that_makes_no_sense_is_refused_with_the_reason(options, reason):
    with pytest.raises(ConfigError, match=reason):
        rulebook.check(completed(*options), 4)

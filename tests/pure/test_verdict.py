"""The verdict: every case of it from made-up numbers, and from run directories."""

import msgspec
import pytest
from test_compare import make_summary

from asgd_mpi.report.compare import Entry, Reached, compare
from asgd_mpi.report.verdict import judge

TARGET = 0.97


def entry(rule, num_workers, seconds, accuracy=0.98, samples=10_000, num_validations=10, n_push=1):
    """A run that took `seconds` to the target, or 100 s without getting there (None)."""
    reached = None if seconds is None else Reached(seconds, samples, 7.0, samples / seconds, None)
    return Entry(
        f"{rule}-{num_workers}",
        "finished",
        num_workers,
        [num_workers],
        rule,
        n_push,
        0.0,
        num_validations,
        100.0,
        500.0,
        1.0,
        1.0,
        num_workers - 1.0,
        0.1,
        accuracy,
        reached,
        None,
    )


ONE, SYNC, ASYNC = entry("asgd", 1, 40.0), entry("sync", 4, 20.0), entry("asgd", 4, 12.0)


def text(*entries):
    found = judge(entries, TARGET)
    return found.is_worth_it, found.text


def test_faster_than_one_worker_and_than_synchronous_training_is_worth_it():
    worth, said = text(ONE, SYNC, ASYNC)
    assert worth is True
    assert said.startswith(
        "Asynchronous training is worth it here, because 4 workers reached 97.0 % in 12.0 s"
    )
    assert (
        "3.3 times as fast as one worker and 1.7 times as fast as synchronous training with 4 workers"
        in said
    )
    assert "1.20 times the GPU time of one worker" in said  # 4 * 12 / 40


def test_what_never_got_there_was_slower_by_at_least_its_time():
    worth, said = text(entry("asgd", 1, None, 0.9), entry("sync", 4, None, 0.9), ASYNC)
    assert worth is True and said.count("at least 8.3 times as fast as") == 2  # 100 / 12


def test_faster_synchronous_training_is_said_with_what_the_times_are_made_of():
    worth, said = text(ONE, entry("sync", 2, 6.0, samples=8_000), ASYNC)
    assert (
        worth is False
        and "synchronous training is faster: 2 workers reached 97.0 % in 6.0 s" in said
    )
    # (10 / 12) / (8 / 6), 10 / 8
    assert "(0.63 times the images/s, 1.25 times the samples)" in said


def test_a_difference_that_may_be_chance_decides_nothing_for_asynchronous_training():
    for seconds in (11.5, 12.5):
        worth, said = text(ONE, entry("sync", 4, seconds), ASYNC)
        assert (
            worth is False and "not faster than synchronous training" in said and "chance" in said
        )


def test_workers_that_gain_nothing_over_one_are_not_worth_it():
    worth, said = text(entry("asgd", 1, 12.5), entry("sync", 4, 30.0), ASYNC)
    assert (
        worth is False
        and "more workers gain nothing: one reached 97.0 % in 12.5 s, 4 workers in 12.0 s" in said
    )


def test_lost_accuracy_is_not_worth_it_however_fast_it_came():
    worth, said = text(ONE, SYNC, entry("asgd", 4, None, 0.91))
    assert (
        worth is False
        and "accuracy is lost: asynchronously 4 workers came to 91.0 % at best" in said
    )
    assert "at a mean staleness of 3.0" in said
    assert (
        "reached by one worker in 40.0 s and synchronous training with 4 workers in 20.0 s" in said
    )


@pytest.mark.parametrize(
    "entries, part",
    [
        ([SYNC, ASYNC], "no run with one worker has 3 validations"),
        ([ONE, SYNC], "no run with several asynchronous workers has"),
        ([entry("asgd", 1, 40.0, num_validations=2), SYNC, ASYNC], "no run with one worker has"),
        (
            [
                ONE,
                entry("sync", 4, None, num_validations=0),
                entry("asgd", 4, 12.0, num_validations=1),
            ],
            "no run with several synchronous workers and none with several asynchronous workers has",
        ),
        (
            [entry(run.rule, run.num_workers, None, 0.5) for run in (ONE, SYNC, ASYNC)],
            "no run reached 97.0 %",
        ),
    ],
)
def test_too_little_is_said_and_what_to_do(entries, part):
    worth, said = text(*entries)
    assert worth is None and part in said and "train for longer (--minutes)" in said


def test_runs_that_were_never_validated_are_told_to_be():
    runs = [entry("asgd", 1, None, num_validations=0), entry("sync", 4, None, num_validations=0)]
    worth, said = text(*runs, entry("asgd", 4, None, num_validations=0))
    assert worth is None and "no run was validated: give the data a validation split" in said
    assert "--minutes" not in said


def test_without_a_synchronous_run_there_is_no_verdict():
    assert (
        judge([ONE, ASYNC], TARGET) is None
        and judge([ONE, entry("sync", 1, 40.0), ASYNC], TARGET) is None
    )


def test_the_best_of_several_settings_counts_and_of_seeds_the_median():
    lucky, usual, unlucky = (entry("asgd", 8, seconds) for seconds in (1.0, 15.0, None))
    assert "4 workers reached 97.0 % in 12.0 s" in text(ONE, SYNC, lucky, usual, unlucky, ASYNC)[1]
    assert (
        "4 workers and n_push 4 reached 97.0 % in 10.0 s"
        in text(ONE, SYNC, ASYNC, entry("asgd", 4, 10.0, n_push=4))[1]
    )


def test_the_target_is_just_below_the_best_of_all_runs_and_one_that_learns_nothing_does_not_lower_it(
    tmp_path,
):
    made = [
        ("one", 1, "asgd", [0.5, 0.3, 0.2, 0.1, 0.05]),
        ("a", 4, "asgd", [0.5, 0.2, 0.04]),
        ("s", 4, "sync", [0.9, 0.9, 0.9]),
    ]
    summaries = [
        make_summary(
            tmp_path / name, workers, 100.0 * workers, errors, name=name, config={"rule.name": rule}
        )
        for name, workers, rule, errors in made
    ]
    found = compare(summaries)
    assert found.target == pytest.approx(0.95)
    assert {one.name: one.reached and one.reached.seconds for one in found.entries} == {
        "one": 5.0,
        "a": 3.0,
        "s": None,
    }
    assert (
        found.verdict.is_worth_it is True
        and "1.7 times as fast as one worker" in found.verdict.text
    )


def test_the_time_between_two_starts_is_nobodys_training_time(tmp_path):
    summary = make_summary(tmp_path, 1, 100.0, [0.5, 0.3, 0.1])
    [first] = summary.restarts
    pause = 1000.0
    again = msgspec.structs.replace(
        first, restart=1, started=first.started + 2.5 + pause, ended=first.ended + pause
    )
    summary.restarts = [msgspec.structs.replace(first, ended=first.started + 2.5), again]
    summary.validations[2].made += pause
    assert compare([summary], 0.9).entries[0].reached.seconds == pytest.approx(3.0)

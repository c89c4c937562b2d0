"""`python -m asgd_mpi.report RUN --audit`: the account of each epoch, and an exit status that a script can rely on."""

import os

import msgspec
import pytest
from made_runs import MadeRun
from test_report import EPOCH, PUSHES, T0, cut, make_pushes, make_run, write_log

from asgd_mpi import report
from asgd_mpi.record.events import End, Resume, Start, read_events
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.summary import summarize


def audited(capsys, *runs):
    """(exit status, rows of the tables as lists of words, whole text)."""
    status = report.main([*(str(run.path) for run in runs), "--audit"])
    text = capsys.readouterr().out
    return (
        status,
        [
            line.split()
            for line in text.splitlines()
            if line.split() and line.split()[0].isdecimal()
        ],
        text,
    )


def change(pushes, number, **fields):
    return [
        *pushes[:number],
        msgspec.structs.replace(pushes[number], **fields),
        *pushes[number + 1 :],
    ]


def test_a_whole_run_has_every_sample_used_once_and_status_0(tmp_path, capsys):
    run = make_run(tmp_path / "run", make_pushes())
    before = sorted(tmp_path.rglob("*"))
    status, rows, text = audited(capsys, run)
    assert status == 0 and text.endswith("all of it holds\n") and "3 workers, 60 pushes" in text
    assert rows == [[str(epoch), "120", "120", "0", "0"] for epoch in range(5)]
    assert ["all", "600", "600", "0", "0"] in [line.split() for line in text.splitlines()]
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written


@pytest.mark.parametrize(("pushes", "words"), [
    (change(make_pushes(), 5, start=49, stop=59), "epoch 0: 1 samples repeated"),
    (make_pushes()[:-1], "the run finished, and 10 samples that were due were never used"),
    (make_pushes(24), "the run finished, and 360 samples that were due were never used"),
    ([*make_pushes()[:10], *make_pushes()[9:]], "the same or a later version came before"),
    (change(make_pushes(), 59, start=110, stop=130), "epoch 4: 10 samples used that were not due"),
    ([], "there is no applied push on record"),
])  # fmt: skip
def test_what_is_wrong_is_named_with_status_1(tmp_path, capsys, pushes, words):
    status, _, text = audited(capsys, make_run(tmp_path / "run", pushes))
    assert status == 1 and words in text.split("VIOLATED")[1]


def test_samples_repeated_and_missing_stand_in_the_row_of_their_epoch(tmp_path, capsys):
    _, rows, _ = audited(
        capsys, make_run(tmp_path / "run", change(make_pushes(), 5, start=49, stop=59))
    )
    assert rows[:2] == [["0", "120", "119", "1", "1"], ["1", "120", "120", "0", "0"]]


def test_a_killed_run_lists_the_epochs_to_come_and_is_not_violated(tmp_path, capsys):
    run = make_run(tmp_path / "run", make_pushes(30))
    cut(run.pushes, 9)
    for rank in range(4):
        cut(run.metrics_of(rank), 9)  # into the End event
    status, rows, text = audited(capsys, run)
    assert (
        status == 0
        and "missing samples are still to come" in text
        and "no sample was left out" not in text
    )
    assert [row[1:] for row in rows] == [
        ["120", "120", "0", "0"],
        ["120", "120", "0", "0"],
        ["120", "50", "0", "70"],
        ["120", "0", "0", "120"],
        ["120", "0", "0", "120"],
    ]


def test_a_damaged_line_of_a_finished_run_is_a_violation(tmp_path, capsys):
    run = make_run(tmp_path / "run", make_pushes())
    run.pushes.write_bytes(run.pushes.read_bytes() + b"[1,2]\n")
    status, _, text = audited(capsys, run)
    assert status == 1 and "1 unreadable line in pushes.log of a finished run" in text


def test_a_record_that_does_not_say_how_long_an_epoch_is_counts_up_to_the_largest_sample(
    tmp_path, capsys
):
    run = make_run(tmp_path / "run", make_pushes()[: PUSHES - 1])
    for rank in range(4):
        events = [
            msgspec.structs.replace(event, num_samples=0, total_samples=0)
            if isinstance(event, Start)
            else event
            for event in read_events(run.metrics_of(rank))
        ]
        run.metrics_of(rank).unlink()
        write_log(run.metrics_of(rank), events)
    status, rows, _ = audited(capsys, run)
    assert status == 0 and rows[4] == ["4", "110", "110", "0", "0"] and EPOCH == 120


def test_several_runs_are_shown_and_one_that_is_violated_sets_the_status(tmp_path, capsys):
    good, bad = (
        make_run(tmp_path / "good", make_pushes()),
        make_run(tmp_path / "bad", make_pushes()[:-1]),
    )
    assert audited(capsys, good)[0] == 0
    status, rows, text = audited(capsys, good, bad)
    assert (status, len(rows)) == (1, 10) and text.index("good: ") < text.index("bad: ")


def test_a_failed_run_says_why_and_no_name_can_obey_the_terminal(tmp_path, capsys):
    run = make_run(tmp_path / "run", make_pushes(12))
    write_log(run.metrics_of(0), [End(T0 + 9, "failed", "GPU\x1b[31m lost")])
    status, _, text = audited(capsys, run)
    assert status == 0 and r"failed (rank 0: GPU\x1b[31m lost)" in text and "\x1b" not in text


@pytest.mark.parametrize("total, missing", [(240, 0), (250, 10), (600, 360)])
def test_a_resume_is_held_to_the_epochs_that_it_was_asked_for(tmp_path, capsys, total, missing):
    run = make_run(tmp_path / "run", make_pushes(24))
    starts = [event for event in read_events(run.metrics_of(0)) if isinstance(event, Start)]
    again = msgspec.structs.replace(starts[0], t=T0 + 900, total_samples=total)
    write_log(run.metrics_of(0, 1), [again, End(T0 + 901, "finished")])
    write_log(run.pushes_of(1), [Resume(T0 + 900, 1, 0, 24, 240, 3, [])])
    status, rows, text = audited(capsys, run)
    assert status == (1 if missing else 0) and len(rows) == -(-total // EPOCH)
    assert sum(int(row[4]) for row in rows) == missing
    assert (f"{missing} samples that were due were never used" in text) == bool(missing)


@pytest.mark.parametrize("kind", ["gone", "directory", "pipe", "link"])
def test_the_log_of_a_later_start_that_is_lost_is_a_violation_also_of_a_killed_run(
    tmp_path, capsys, kind
):
    MadeRun(tmp_path / "run", 3, [2, 2], 8, is_whole=True)
    run = RunDir.open(tmp_path / "run")
    for rank in range(5):
        if run.metrics_of(rank, 1).exists():
            cut_end(run.metrics_of(rank, 1))
    assert report.main([str(run.path), "--audit"]) == 0
    before = run.pushes_of(1).read_text().count("\n") - 1
    replace_by(kind, run.pushes_of(1))
    capsys.readouterr()
    assert report.main([str(run.path), "--audit"]) == 1
    told = f"pushes.r1.log is missing, or no plain file, and start 1 has applied {before} pushes"
    assert told in capsys.readouterr().out
    assert told in " ".join(summarize(run).problems)


@pytest.mark.parametrize("rank, what", [(0, "how such a start ended"), (1, "")])
def test_the_metrics_of_one_start_that_are_lost_are_named(tmp_path, rank, what):
    MadeRun(tmp_path / "run", 3, [2, 2], 8, is_whole=True)
    run = RunDir.open(tmp_path / "run")
    assert not summarize(run).problems
    replace_by("pipe", run.metrics_of(rank, 1))
    [problem] = [one for one in summarize(run).problems if "no plain file" in one]
    assert f"metrics/rank00{rank}.r1.jsonl" in problem and what in problem


def cut_end(path):
    """Take the End event away, as a kill does."""
    path.write_text("".join(line for line in path.open() if '"end"' not in line))


def replace_by(kind, path):
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/dev/zero")

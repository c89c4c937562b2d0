"""The proof of concept: which runs, how long, what of them is kept; with a launcher that makes the runs up."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import own_tasks
from asgd_mpi import poc
from asgd_mpi.comm import wait
from asgd_mpi.config.options import Config, ExchangeConfig, RuleConfig
from asgd_mpi.config.rulebook import linear_scale
from asgd_mpi.process.launchers import Allocation
from asgd_mpi.poc import Trial, left_s, trials
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.runtime import supervise

DOUBLES = Path(__file__).parents[1] / "doubles"
LAUNCHER = f"{sys.executable} {DOUBLES / 'fake_launcher.py'}"
ERRORS = "0.5,0.3,0.1,0.05"


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{DOUBLES.parents[1]}{os.pathsep}{DOUBLES}")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "out"


def run(out, *options, workers="1,2"):
    return poc.main(["--workers", workers, "--out", str(out), "--launcher", LAUNCHER, *options])


def started(out):
    """The runs that the launcher has started, each as often as it was."""
    return sorted(
        line.split()[1]
        for file in out.glob("*.txt")
        for line in file.read_text().splitlines()
        if line.startswith("started")
    )


def test_one_worker_is_always_tried_and_every_other_number_with_both_rules():
    assert [trial.name for trial in trials([4, 2, 2])] == [
        "async-1",
        "sync-2",
        "async-2",
        "sync-4",
        "async-4",
    ]


def test_a_synchronous_run_gets_the_rate_of_one_worker_which_its_rule_multiplies_by_the_workers():
    assert Trial(True, 4).options(Config(), 0.02)[:4] == [
        "--rule.name",
        "sync",
        "--schedule.lr",
        "0.02",
    ]
    assert linear_scale(RuleConfig(name="sync"), 4) == 4
    assert Trial(False, 4).options(Config(), 0.02) == []


def test_synchronous_runs_have_no_overlap_whatever_the_others_have():
    auto = Config(exchange=ExchangeConfig(n_push="auto"))
    assert Trial(True, 2).options(auto, 0.1)[4:] == [
        "--exchange.overlap",
        "false",
        "--exchange.n_push",
        "1",
    ]
    assert Trial(False, 2).options(auto, 0.1) == []


@pytest.mark.parametrize(
    "trained, finished, left",
    [(0, False, 600), (200, False, 400), (595, False, 0), (700, False, 0), (10, True, 0)],
)
def test_a_run_is_done_when_it_is_finished_or_its_time_is_used_up(trained, finished, left):
    assert left_s(600, trained, finished) == left


def test_a_part_of_an_allocation_is_on_as_few_nodes_as_hold_it():
    whole = Allocation(num_tasks=9, num_nodes=2)
    assert whole.launchers()[0] == "srun --mpi=pmix"
    assert whole.part(3).launchers()[0] == "srun --mpi=pmix --nodes=1 --ntasks=3"
    assert whole.part(6).launchers() == [
        "srun --mpi=pmix --nodes=2 --ntasks=6",
        "srun --mpi=pmi2 --nodes=2 --ntasks=6",
        "env SLURM_MPI_TYPE=none mpirun -n 6",
    ]


def test_finished_runs_are_compared_and_not_started_again(out, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_ERRORS", ERRORS)
    assert run(out) == 0
    said = capsys.readouterr().out
    assert (
        "Asynchronous training is worth it here, because 2 workers reached 94.0 % in 2.0 s, 2.0 times as fast as one "
        "worker and 2.0 times as fast as synchronous training with 2 workers" in said
    )
    assert "worth it here" in (out / "comparison" / "comparison.html").read_text()
    assert run(out) == 0 and "3 done, 0.00 s to go" in capsys.readouterr().out
    assert started(out) == ["async-1", "async-2", "sync-2"]
    assert run(out, workers="1,2,3") == 0 and started(out) == [
        "async-1",
        "async-2",
        "async-3",
        "sync-2",
        "sync-3",
    ]


def test_a_run_whose_time_is_up_is_left_and_goes_on_only_with_more_time(out, capsys):
    assert run(out, "--minutes", "0.005") == 0
    assert capsys.readouterr().out.count("its time is up") == 3
    assert 0.3 <= supervise.trained_s(RunDir(out / "async-1")) < 2.0
    assert run(out, "--minutes", "0.005") == 0 and len(started(out)) == 3
    assert run(out, "--minutes", "0.05") == 0 and len(started(out)) == 6
    assert len(RunDir(out / "sync-2").metrics_files) == 2


def test_a_failed_run_is_shown_and_tried_again_and_the_others_are_compared(
    out, monkeypatch, capsys
):
    monkeypatch.setenv("FAKE_ERRORS", ERRORS)
    monkeypatch.setenv("FAKE_FAILS", "sync-2")
    assert run(out) == 1
    shown = capsys.readouterr()
    assert "sync-2 failed with status 2" in shown.err and "error: this run fails" in shown.err
    assert (out / "comparison" / "comparison.html").exists()
    monkeypatch.delenv("FAKE_FAILS")
    assert run(out) == 0 and started(out) == ["async-1", "async-2", "sync-2", "sync-2"]


def test_a_task_of_ones_own_brings_its_options_to_every_run(out, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_ERRORS", ERRORS)
    monkeypatch.setattr(
        own_tasks.Regression, "options", own_tasks.Regression.options | {"exchange.servers": 2}
    )
    assert run(out, "--task", "own_tasks:Regression") == 0
    told = (out / "sync-2.txt").read_text()
    assert "started sync-2 with 4 ranks" in told and "--task=own_tasks:Regression" in told
    assert "--schedule.lr 0.05" in told  # of the task, for one worker
    assert run(out, "--task", "own_tasks:Nope") == 2
    assert "--task own_tasks:Nope cannot be made" in capsys.readouterr().err


def test_runs_of_other_settings_are_not_mixed(out, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_ERRORS", ERRORS)
    assert run(out, "--", "--lr", "0.01") == 0
    assert run(out, "--", "--lr", "0.03") == 2
    assert "schedule.lr was 0.01, is 0.03" in capsys.readouterr().err
    assert (
        poc.main(["--workers", "1,2", "--out", str(out), "--sync-lr", "0.5", "--", "--lr", "0.01"])
        == 2
    )
    assert "poc.sync_lr was None, is 0.5" in capsys.readouterr().err
    assert "--lr 0.01" in (out / "async-1.txt").read_text()


@pytest.mark.parametrize(
    "options, part",
    [
        (["--workers", "1"], "2 or more among them"),
        (["--workers", "x"], "with commas"),
        (["--minutes", "0"], "above 0"),
        (["--launcher", "/no/such/launcher"], "there is no /no/such/launcher"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, part, out, capsys):
    assert poc.main(["--out", str(out), "--workers", "1,2", *options]) == 2
    assert part in capsys.readouterr().err


def test_interrupted_it_asks_the_run_to_leave_and_the_same_command_goes_on(out, tmp_path):
    command = [
        sys.executable,
        "-m",
        "asgd_mpi.poc",
        "--workers",
        "1,2",
        "--out",
        str(out),
        "--launcher",
        LAUNCHER,
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    wait.until(
        lambda: supervise.started_at(RunDir(out / "async-1"), 0.0) is not None,
        60,
        "the first run to start",
    )
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 75 and "the same command goes on where this one stopped" in said
    assert (
        '"status":"left"' in RunDir(out / "async-1").metrics_of(0).read_text()
        and not (out / "sync-2").exists()
    )
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"FAKE_ERRORS": ERRORS},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert (
        done.returncode == 0
        and "worth it here" in done.stdout
        and started(out)[:3] == ["async-1", "async-1", "async-2"]
    )

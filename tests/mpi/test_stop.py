"""`asgd_mpi.stop` ends the run that it is given, saved, and no other process."""

import os
import signal
import socket
import time

import pytest
from conftest import finish

from asgd_mpi import stop
from asgd_mpi.errors import RunDirError
from asgd_mpi.record.rundir import RunDir


@pytest.fixture
def run(tmp_path):
    run = RunDir.create(tmp_path / "run", "test")
    run.config.write_text("run: {}\n")
    return run


@pytest.fixture(autouse=True)
def no_signal_reaches_the_tests():
    before = signal.signal(signal.SIGUSR2, lambda *_: pytest.fail("the tests were asked to end"))
    yield
    signal.signal(signal.SIGUSR2, before)


def test_a_run_that_nobody_trains_is_not_stopped(run, capsys):
    assert stop.main([str(run.path)]) == 2
    assert "its lock names no process" in capsys.readouterr().err
    with run.locked():
        assert stop.find(run) == os.getpid()
    # the process lives, and does not hold this lock any more
    assert stop.main([str(run.path)]) == 2
    assert f"process {os.getpid()} on {socket.gethostname()}" in capsys.readouterr().err


def test_a_run_of_another_host_is_refused_with_the_command_to_run_there(run):
    run.lock.write_text(f"process {os.getpid()} on node17.cluster, since 2026-11-27 01:02:03\n")
    with pytest.raises(RunDirError) as error:
        stop.find(run)
    assert f"ssh node17.cluster python -m asgd_mpi.stop {run.path}" in str(error.value)


@pytest.mark.parametrize("kind", ["empty", "words", "directory", "pipe", "huge"])
def test_a_lock_that_says_nothing_is_no_process(run, kind):
    if kind == "directory":
        run.lock.mkdir()
    elif kind == "pipe":
        os.mkfifo(run.lock)
    else:
        text = {"empty": "", "words": "process -1 on x, since", "huge": "process " + "9" * 999}
        run.lock.write_text(text[kind])
    assert run.writer() == (0, "")
    with pytest.raises(RunDirError, match="nothing to stop"):
        stop.find(run)


def test_the_run_that_is_named_ends_saved_and_the_other_goes_on(openmpi, digits, tmp_path, capsys):
    paths = [tmp_path / name for name in ("a", "b")]
    options = ["--data", str(digits), "--epochs", "100000", "--run.validate_every", "100000"]
    jobs = [
        openmpi.start_training(2, *options, "--run.dir", str(path), cwd=tmp_path) for path in paths
    ]
    deadline = time.monotonic() + 120
    logs = [RunDir(path).pushes for path in paths]
    while not all(log.exists() and log.stat().st_size > 1000 for log in logs):
        assert time.monotonic() < deadline and all(job.poll() is None for job in jobs)
        time.sleep(0.2)
    for path, job in zip(paths, jobs):
        assert stop.main([str(path)]) == 0
        told = capsys.readouterr().out
        newest = RunDir(path).checkpoints_by_name[-1]
        assert f"newest checkpoint: {newest}\ngo on with --resume {path}" in told
        done = finish(job, 60)
        assert done.returncode == 75, done.stderr
        assert f"python -m asgd_mpi.stop {path}" in done.stdout  # how to stop it was told
        if path == paths[0]:  # the other one was not asked
            assert jobs[1].poll() is None

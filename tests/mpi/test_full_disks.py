"""A disk that is full or read-only is told in one message that says what to do, and costs no more than it must."""

import errno
import os
import re
import shutil
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TIMEOUT_S, kill_session
from full_disk import Full
from test_loops import Cluster, make_task

from asgd_mpi.config import parse as configuration
from asgd_mpi.errors import DiskRefuses, RunDirError, WorkersLost
from asgd_mpi.model import networks
from asgd_mpi.runtime import ranks
from asgd_mpi.record import checkpoint, disk, history, tensorboard
from asgd_mpi.record.events import Checkpoint, Note, Validation, read_events
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.runtime import checkpointer
from asgd_mpi.runtime.prepare import _demand_room
from asgd_mpi.runtime.worker_checkpointer import WorkerCheckpointer
from asgd_mpi.task import complete

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small file system")


@pytest.fixture
def mount():
    """Mount a tmpfs with options at a directory, until the test is over."""
    with ExitStack() as stack:

        def mount_at(path, options):
            path.mkdir(parents=True, exist_ok=True)
            if subprocess.run(
                ["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True
            ).returncode:
                pytest.skip("no file system may be mounted here")
            stack.callback(subprocess.run, ["umount", "-l", path], check=True)

        yield mount_at


def wait_until(holds, process, limit_s=TIMEOUT_S):
    until = time.monotonic() + limit_s
    while not holds():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)


@ROOT
def test_a_full_disk_ends_a_run_with_one_message_and_all_of_it_saved_though_its_metrics_were_full_before(
    openmpi, digits, tmp_path, mount
):
    run = RunDir(tmp_path / "disk" / "run")
    mount(tmp_path / "disk", "size=12m")
    mount(run.metrics, "size=12k")  # takes the first lines of each rank
    process = openmpi.start_training(
        2,
        "--data",
        str(digits),
        "--epochs",
        "400",
        "--run.dir",
        str(run.path),
        # no model is the best one meanwhile: its file comes and goes, and with it the room that is measured here
        "--run.validate_every",
        "400",
        "--checkpoint.every_s",
        "0",
        "--failure.stall_s",
        "1000",
        cwd=tmp_path,
    )
    with ExitStack() as stack:
        stack.callback(kill_session, process.pid)
        wait_until(lambda: run.pushes.exists() and run.pushes.stat().st_size > 20_000, process)
        fill = tmp_path / "disk" / "fill"
        fill.write_bytes(bytes(disk.free_bytes(run.path) - room_of_digits(1) + 20_000))
        out, err = process.communicate(timeout=TIMEOUT_S)
        stack.pop_all()
    errors = [
        line for line in err.splitlines() if "error" in line.lower() and "Errorcode" not in line
    ]
    assert (
        process.returncode == 2
        and len(errors) == 1
        and "Traceback" not in err
        and "retired" not in out + err
    ), err
    said = re.fullmatch(
        rf"error: rank 0 on \S+: \S+ MB are left on the disk of {run.path}, and a checkpoint takes up to \S+ MB: .*"
        rf"Free some space. Then go on with --resume {run.path}, from ({run.path}/checkpoints/v\d+)\.",
        errors[0],
    )
    assert said, errors
    saved = checkpoint.verify(run.path / said[1])
    # nothing is lost
    assert saved.version == sum(1 for _ in run.pushes.open()) and saved.momenta.keys() == {"0"}
    fill.unlink()
    done = openmpi.train(
        2,
        "--resume",
        str(run.path),
        "--epochs",
        f"{saved.samples // 1437 + 2}",
        "--override",
        "run.epochs",
        cwd=tmp_path,
    )
    assert done.returncode == 0 and "lost: 0 pushes" in done.stdout and run.finished.exists(), (
        done.stdout + done.stderr
    )
    assert not history.gap(run) and "Traceback" not in done.stderr


@ROOT
def test_a_resume_on_a_read_only_disk_is_refused_in_one_line(openmpi, tmp_path, mount):
    mount(tmp_path / "disk", "size=4m")
    shutil.copytree(Path(__file__).parents[1] / "runs" / "finished", tmp_path / "disk" / "run")
    subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
    done = openmpi.train(1, "--resume", str(tmp_path / "disk" / "run"), cwd=tmp_path)
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        line.startswith(f"error: cannot write {tmp_path}/disk/run/lock: Read-only file system.")
        and "mounted read-only" in line
    )


def room_of_digits(num_workers):
    config = complete(configuration.parse(["--model", "digits_cnn"]))
    return checkpointer.room_for(networks.build("digits_cnn", 10, 1, 8), [], config, num_workers)


def test_the_room_that_is_asked_for_is_what_a_checkpoint_takes_and_little_more(digits, tmp_path):
    cluster = Cluster(make_task(digits), 2, tmp_path)
    cluster.train()
    # more than one, if the last version was validated before the end: then it was saved as the best one, too
    took = max(
        event.num_bytes
        for event in read_events(cluster.run.metrics_of(0))
        if isinstance(event, Checkpoint) and event.version == cluster.server.ledger.version
    )
    model = (cluster.run.checkpoint(cluster.server.ledger.version) / "model.pt").stat().st_size
    room = checkpointer.room_for(cluster.task.build_module(), [], cluster.task.config, 2)
    assert took + model <= room


def test_a_run_that_could_not_be_saved_is_refused_before_it_with_both_numbers(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(disk, "free_bytes", lambda path: 9_999_999)
    with pytest.raises(
        DiskRefuses,
        match="10.0 MB are left on the disk of .*run, and a checkpoint takes up to 10.0 MB.*--run.dir DIR",
    ):
        _demand_room(tmp_path / "run", 10_000_000, keep=3)
    _demand_room(tmp_path / "run", 5_000_000, keep=3)
    assert "take up to 25.0 MB more (--checkpoint.keep 3)" in capsys.readouterr().out
    _demand_room(tmp_path / "run", 1_000_000, keep=3)
    # a file system that does not tell
    monkeypatch.setattr(disk, "free_bytes", lambda path: None)
    _demand_room(tmp_path / "run", 10**15, keep=3)
    assert capsys.readouterr().out == ""


def test_free_space_is_that_of_the_nearest_directory_that_is_there(tmp_path):
    there = disk.free_bytes(tmp_path)
    assert there > 0 and abs(disk.free_bytes(tmp_path / "not" / "yet") - there) < 1e9


def test_a_server_leaves_while_a_last_checkpoint_fits_and_says_so(digits, tmp_path, monkeypatch):
    cluster = Cluster(make_task(digits, "--epochs", "50"), 2, tmp_path)
    cluster.server.checkpointer._room = 1000
    monkeypatch.setattr("asgd_mpi.runtime.server.ROOM_LOOK_S", 0.0)
    monkeypatch.setattr(
        disk, "free_bytes", lambda path: 999 if cluster.server.ledger.version > 20 else 1000
    )
    with pytest.raises(DiskRefuses, match="ends while it can still be saved"):
        cluster.train()
    saved = checkpoint.verify(cluster.run.checkpoint(cluster.server.ledger.version))
    assert saved.momenta.keys() == {"0", "1"} and 20 < saved.samples < cluster.plan.total_samples
    monkeypatch.setattr(checkpoint, "stage", None)  # what is saved is not written again
    cluster.server.save()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_file_that_is_written_whole_is_the_old_one_whatever_call_is_refused(
    tmp_path, monkeypatch, call, error
):
    def refuse(*_):
        raise OSError(error, os.strerror(error))

    path = tmp_path / "finished.json"
    disk.write_whole(path, b"old")
    with (
        monkeypatch.context() as patch,
        pytest.raises(DiskRefuses, match=f"cannot write {path}: {os.strerror(error)}"),
    ):
        patch.setattr(os, call, refuse)
        disk.write_whole(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_momentum_that_is_refused_retires_no_worker_and_the_checkpoint_says_whose_it_lacks(
    digits, tmp_path, monkeypatch
):
    def refuse(staging, worker, *rest):
        if worker == 1:
            raise DiskRefuses("cannot write worker001.pt: No space left on device")
        return really_save(staging, worker, *rest)

    really_save = checkpoint.save_worker
    monkeypatch.setattr(checkpoint, "save_worker", refuse)
    cluster = Cluster(
        make_task(digits, "--epochs", "4", "--checkpoint.every_samples", "400"), 2, tmp_path
    )
    cluster.train()
    events = list(read_events(cluster.run.metrics_of(0)))
    lacking = [event for event in events if isinstance(event, Checkpoint) and event.without]
    assert (
        lacking
        and all(event.without == [2] for event in lacking)
        and cluster.server.ledger.members == [0, 1]
    )
    assert any(
        "without the momentum of rank 2," in event.text
        for event in events
        if isinstance(event, Note)
    )


def test_a_best_model_that_is_refused_is_told_once(tmp_path):
    def refuse(*_):
        raise DiskRefuses("cannot write model.pt: No space left on device")

    said = []
    checkpointer = WorkerCheckpointer(RunDir(tmp_path), 0, 0, said.append)
    checkpointer._write_best = refuse
    for version in (5, 9):
        checkpointer.save_best(version, {"x": torch.zeros(3)})
        assert checkpointer.take_done(wait=True) == []
    checkpointer.close()
    assert len(said) == 1 and "version 5" in said[0] and "No space left" in said[0]


def test_a_lock_is_held_on_a_full_disk_though_it_cannot_say_by_whom(tmp_path, monkeypatch):
    run, really_open = RunDir.create(tmp_path / "run", "net"), disk.open_own
    monkeypatch.setattr(disk, "open_own", lambda *how, **more: Full(really_open(*how, **more)))
    with run.locked():
        with pytest.raises(
            RunDirError, match="is being written by another job .it does not say which"
        ):
            run.locked().__enter__()


@pytest.mark.parametrize("name", ["checkpoints", "metrics", "."])
def test_a_directory_where_nothing_may_be_written_is_found_before_the_run(
    tmp_path, monkeypatch, name
):
    run = RunDir.create(tmp_path / "run", "net")
    closed = run.path / name
    # root may write anywhere
    monkeypatch.setattr(
        os, "access", lambda path, how: os.path.abspath(path) != os.path.abspath(closed)
    )
    with pytest.raises(DiskRefuses, match="Permission denied.*see that you may write there"):
        run.demand_own(0, 2)


def test_what_could_not_be_saved_is_said_beside_what_ended_the_run(tmp_path):
    def refuse():
        raise DiskRefuses("cannot write model.pt: No space left on device.")

    rank = SimpleNamespace(files=SimpleNamespace(run=RunDir(tmp_path)))
    server, books = (
        SimpleNamespace(save=refuse),
        SimpleNamespace(close=lambda: None, newest="v000000040"),
    )
    told = ranks._saved(rank, WorkersLost("no worker is left."), server, books, books)
    assert isinstance(told, WorkersLost) and str(told) == (
        f"no worker is left.\ncannot write model.pt: No space left on device. Then go on with --resume {tmp_path}, from v000000040."
    )
    told = ranks._saved(
        rank, DiskRefuses("cannot write pushes.log: Read-only file system."), server, books, books
    )
    assert str(told) == (
        f"cannot write pushes.log: Read-only file system. Then go on with --resume {tmp_path}, from v000000040."
    )


def test_a_board_that_cannot_be_written_is_told_once_and_ends_nothing(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensorboard, "find_writer", lambda: refuse)
    said = []
    shown = tensorboard.TensorBoard(tmp_path / "tensorboard", said.append)
    for version in (3, 4):
        shown.add(Validation(0.0, version, 120, 1.0, 50, 0.25, 0.05, None))
    assert len(said) == 1 and "TensorBoard: OSError: [Errno 28] No space left on device" in said[0]

"""What a run writes goes into its own directory: through no symbolic link, into no file that has another name."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from asgd_mpi import report
from asgd_mpi.errors import RunDirError
from asgd_mpi.record import checkpoint, disk, tee
from asgd_mpi.record.checkpoint import Manifest
from asgd_mpi.record.events import EventLog
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.watchdog import Watch
from asgd_mpi.report.trace import write_trace

FINISHED = Path(__file__).parents[1] / "runs" / "finished"


@pytest.fixture
def mine(tmp_path) -> Path:
    """A file of the user's, which nothing here may change."""
    path = tmp_path / "mine.txt"
    path.write_text("mine\n")
    yield path
    assert path.read_text() == "mine\n"


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """A directory of the user's, into which nothing here may write."""
    path = tmp_path / "elsewhere"
    path.mkdir()
    yield path
    assert list(path.iterdir()) == []


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir.create(tmp_path / "run", "net")


@pytest.mark.parametrize(
    "name",
    [
        "lock",
        "config.r1.yaml",
        "versions.r1.json",
        "pushes.r1.log",
        "finished.json",
        "error.rank001.txt",
        "metrics/rank000.r1.jsonl",
        "metrics/rank002.r1.jsonl",
        "log/rank001.txt",
        "report/report.html",
        "checkpoints/.saving000001.r1",
        "checkpoints/.best000000012.1.0",
    ],
)
def test_a_link_where_a_start_writes_is_refused_before_it_and_named_with_its_target(
    run, mine, name
):
    path = run.path / name
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(mine)
    with pytest.raises(
        RunDirError, match=f"{name} is a symbolic link to {mine}.*[Rr]emove the link"
    ) as refused:
        run.demand_own(1, 3)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name", ["metrics", "checkpoints", "report", "log", "stalls", "tensorboard"]
)
@pytest.mark.parametrize("leads", ["to a directory", "nowhere"])
def test_a_linked_directory_in_a_run_is_refused(run, elsewhere, name, leads):
    path = run.path / name
    shutil.rmtree(path, ignore_errors=True)
    path.symlink_to(elsewhere if leads == "to a directory" else "gone")
    with pytest.raises(RunDirError, match=f"{name} is a symbolic link to"):
        run.demand_own(0, 3)
    if name in ("metrics", "checkpoints", "report"):
        with pytest.raises(RunDirError, match="symbolic link"):
            RunDir.create(run.path, "net")


def test_links_under_names_that_this_start_does_not_write_are_the_users_own(run, mine):
    for name in (
        "notes.txt",
        "metrics/rank000.jsonl",
        "checkpoints/latest",
        "checkpoints/v000000012",
        "log/rank003.txt",
        "pushes.log",
    ):
        path = run.path / name
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(mine)
    run.demand_own(1, 3)


def test_a_run_directory_that_is_reached_by_links_is_one_like_any_other(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "scratch")
    run = RunDir.create(tmp_path / "runs" / "a", "net")
    (tmp_path / "b").symlink_to(run.path)
    for one in (run, RunDir.create(tmp_path / "b", "net")):
        with one.locked():
            one.demand_own(0, 2)
        EventLog(one.metrics_of(0)).close()
        disk.write_whole(one.finished, b"{}")
    assert (tmp_path / "scratch" / "a" / "metrics" / "rank000.jsonl").exists()


def test_no_file_is_opened_through_a_link_though_it_was_put_there_after_the_look(run, mine):
    run.logs.mkdir()
    for path in (run.lock, run.pushes, run.metrics_of(0), run.log_of(1), run.error_of(2)):
        path.symlink_to(mine)
    for act in (
        lambda: run.locked().__enter__(),
        lambda: EventLog(run.pushes),
        lambda: EventLog(run.metrics_of(0)),
        lambda: tee.keep(run.log_of(1), "rank 1"),
        lambda: tee.write_error(run.error_of(2), "short", "long"),
    ):
        with pytest.raises(RunDirError, match=f"is a symbolic link to {mine}"):
            act()


def test_a_checkpoint_is_written_into_no_linked_directory_and_its_name_is_taken_from_a_link(
    run, elsewhere
):
    run.staging(1).symlink_to(elsewhere)
    with pytest.raises(RunDirError, match="saving000001 is a symbolic link"):
        checkpoint.stage(run.staging(1))
    assert not checkpoint.save_worker(run.staging(1), 0, 3, {"velocity": torch.zeros(4)})
    run.staging(1).unlink()
    checkpoint.stage(run.staging(1))
    run.checkpoint(3).symlink_to(elsewhere)
    manifest = Manifest(3, 30, "net", 10, 1, 8, "data", [0.0], [1.0])
    assert checkpoint.commit(run.staging(1), run.checkpoint(3), manifest) > 0
    assert (
        not run.checkpoint(3).is_symlink()
        and checkpoint.read_manifest(run.checkpoint(3)).version == 3
    )


def test_what_is_replaced_whole_takes_the_place_of_a_link_and_of_its_own_temporary_name(run, mine):
    run.finished.symlink_to(mine)
    run.finished.with_name(f".finished.json.{os.getpid()}.tmp").symlink_to(mine)
    disk.write_whole(run.finished, b"{}")
    assert not run.finished.is_symlink() and run.finished.read_bytes() == b"{}"
    assert sorted(path.name for path in run.path.glob(".*")) == []


def test_a_file_with_another_name_is_not_written_in_place_and_not_emptied(run, mine):
    for path in (run.lock, run.error_of(1)):
        os.link(mine, path)
    with pytest.raises(
        RunDirError, match="lock is a hard link: the same file has another name.*cp lock new"
    ):
        run.locked().__enter__()
    with pytest.raises(RunDirError, match="error.rank001.txt is a hard link"):
        tee.write_error(run.error_of(1), "short", "long")
    with pytest.raises(RunDirError, match="is a hard link"):
        run.demand_own(1, 2)


def test_a_fifo_in_the_place_of_a_file_is_refused_and_not_waited_for(run):
    os.mkfifo(run.lock)
    os.mkfifo(run.pushes)
    for act in (lambda: run.locked().__enter__(), lambda: EventLog(run.pushes)):
        with pytest.raises(RunDirError, match="no regular file|cannot write"):
            act()


def test_a_stall_is_not_written_through_a_link_and_ends_nothing(run, elsewhere, capsys):
    class Stuck:
        last_progress, doing = -1e9, "compute"

    run.stalls.symlink_to(elsewhere)
    watch = Watch(run, 0, "here", Stuck(), 1e9, lambda: None, lambda: 0)
    watch._stall_s = 0.0
    watch.look()
    watch.close()
    assert "a stall could not be written down" in capsys.readouterr().err


def test_reports_and_traces_are_not_written_through_links_of_the_run(
    tmp_path, mine, elsewhere, capsys
):
    run = RunDir(tmp_path / "run")
    shutil.copytree(FINISHED, run.path)
    shutil.rmtree(run.report, ignore_errors=True)
    run.report.symlink_to(elsewhere)
    assert (
        report.main([str(run.path)]) == 2 and "report is a symbolic link" in capsys.readouterr().err
    )
    for path in (run.report / "trace.json", run.path / "trace.json"):
        (run.path / "trace.json").unlink(missing_ok=True)
        (run.path / "trace.json").symlink_to(mine)
        with pytest.raises(RunDirError, match="is a symbolic link"):
            write_trace(run, path)
    # the user's own place, and choice
    (tmp_path / "out.json").symlink_to(tmp_path / "real.json")
    write_trace(run, tmp_path / "out.json")
    assert msgspec.json.decode((tmp_path / "real.json").read_bytes())


def test_a_resume_names_a_linked_lock_in_one_line_and_leaves_its_target_alone(
    tmp_path, mine, openmpi
):
    shutil.copytree(FINISHED, tmp_path / "run")
    (tmp_path / "run" / "lock").unlink(missing_ok=True)
    (tmp_path / "run" / "lock").symlink_to(mine)
    done = subprocess.run(
        [sys.executable, "-m", "asgd_mpi.train", "--resume", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env=os.environ | openmpi.env | {"PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: {tmp_path}/run/lock is a symbolic link to {mine}")

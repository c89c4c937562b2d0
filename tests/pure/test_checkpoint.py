"""Checkpoints on disk: cut at every stage of the writing, damaged, on a full disk, pruned."""

import itertools
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from asgd_mpi.errors import RunDirError
from asgd_mpi.record import checkpoint
from asgd_mpi.record.checkpoint import LEDGER, MANIFEST, MODEL, SERVER, Manifest
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.runtime import resume

LEDGER_TEXT = (
    b'{"version": %d, "samples": 16, "lent": 16, "todo": [], "later": [], "given_up": [], "validations_due": 0,'
    b' "finished": false, "best": null}'
)
CUT_S = 60
CALLS = ("fsync", "replace", "open", "unlink", "rename", "rmdir")


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.BaseContext:
    """Processes forked from a fresh one with a single thread: forked from this one they could inherit a lock that nobody frees."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["asgd_mpi.record.checkpoint"])
    return context


def _act_until_the_power_fails(calls: int, act: Callable[[Path], None], path: Path) -> None:
    left = itertools.count(calls, -1)
    for name in CALLS:
        setattr(
            os,
            name,
            lambda *arguments, real=getattr(os, name), **options: (
                real(*arguments, **options) if next(left) > 0 else os._exit(9)
            ),
        )
    act(path)
    os._exit(0)


def cut_after(
    calls: int,
    act: Callable[[Path], None],
    path: Path,
    processes: multiprocessing.context.BaseContext,
) -> int:
    """The status of a process that does `act(path)`; the power fails, with status 9, after so many calls to the system."""
    process = processes.Process(target=_act_until_the_power_fails, args=(calls, act, path))
    process.start()
    process.join(CUT_S)
    if process.is_alive():
        process.kill()
        pytest.fail(f"{act.__name__}, cut after {calls} calls, hung for {CUT_S} s")
    return process.exitcode


def write(path: Path, version: int, restart: int = 0) -> Path:
    """A checkpoint as the server and one worker write it."""
    run = RunDir(path)
    staging = run.staging(version, restart)
    checkpoint.stage(staging)
    files = {
        MODEL: checkpoint.write_tensors(staging / MODEL, {"w": torch.full([1000], float(version))}),
        SERVER: checkpoint.write_tensors(staging / SERVER, {"velocity": torch.ones(1000)}),
    }
    assert checkpoint.save_worker(staging, 0, version - 1, {"velocity": torch.zeros(1000)})
    (staging / LEDGER).write_bytes(LEDGER_TEXT % version)
    files[LEDGER] = checkpoint.sha256(staging / LEDGER)
    directory = run.checkpoint(version, restart)
    checkpoint.commit(
        staging,
        directory,
        Manifest(version, 16, "m", 10, 1, 8, "f", [0.0], [1.0], restart=restart, files=files),
    )
    return directory


@pytest.fixture
def run(tmp_path) -> RunDir:
    run = RunDir.create(tmp_path / "run", "test")
    run.config.write_text("x")
    run.pushes.write_text("")
    write(run.path, 1)
    return run


def next_one(path: Path) -> None:
    write(path, 2)


def _write_model(run: RunDir, version: int, error: float, **files: str) -> None:
    staging = run.staging(9)
    checkpoint.stage(staging)
    files[MODEL] = checkpoint.write_tensors(staging / MODEL, {"w": torch.zeros(3)})
    if LEDGER in files:
        (staging / LEDGER).write_bytes(LEDGER_TEXT % version)
        files[LEDGER] = checkpoint.sha256(staging / LEDGER)
    checkpoint.commit(
        staging,
        run.checkpoint(version),
        Manifest(version, 16, "m", 10, 1, 8, "f", [0.0], [1.0], top1_error=error, files=files),
    )


def the_same_with_a_score(path: Path) -> None:
    _write_model(RunDir(path), 1, 0.1, **{LEDGER: ""})


def of_best(run, version, restart=0):
    """Commit the model of a version that was validated, with the statistics of its validation."""
    staging = run.staging(99, restart)
    checkpoint.stage(staging)
    files = {MODEL: checkpoint.write_tensors(staging / MODEL, {"w": torch.full([1000], -1.0)})}
    return checkpoint.commit(
        staging,
        run.checkpoint(version, restart),
        Manifest(
            version,
            16,
            "m",
            10,
            1,
            8,
            "f",
            [0.0],
            [1.0],
            0.25,
            0.1,
            files=files,
            statistics_of=version,
        ),
    )


def the_best_of_the_same_version(path: Path) -> None:
    of_best(RunDir(path), 1)


def without_the_former_best(path: Path) -> None:
    _write_model(RunDir(path), 2, 0.2)
    checkpoint.prune(RunDir(path), keep=1, best=1)


@pytest.mark.parametrize(
    "act, versions",
    [
        (next_one, (1, 2)),
        (the_same_with_a_score, (1, 1)),
        (the_best_of_the_same_version, (1, 1)),
        (without_the_former_best, (1, 1)),
    ],
)
def test_whatever_is_written_or_removed_and_wherever_it_is_cut_a_whole_checkpoint_is_there(
    run, act, versions, processes
):
    ends = []
    for calls in itertools.count():
        copy = RunDir(shutil.copytree(run.path, run.path.with_name(f"cut{calls}")))
        status = cut_after(calls, act, copy.path, processes)
        assert status in (0, 9)
        point = resume.find(copy)
        ends.append((status, point.version))
        assert not point.damaged
        checkpoint.verify(point.directory)
        if status == 0:
            break
    assert ends[-1] == (0, versions[1]) and len(ends) > 10
    # only the last step of all comes after the rename
    assert all(version == versions[0] for status, version in ends[:-3])
    checkpoint.clean(copy)
    assert not list(copy.checkpoints.glob(".*"))


@pytest.mark.parametrize("name", [MODEL, SERVER, LEDGER, "worker000.pt", MANIFEST])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(run, name, how):
    path = write(run.path, 2) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0x10
    {
        "flipped": lambda: path.write_bytes(content),
        "cut": lambda: path.write_bytes(content[: len(content) // 2]),
        "gone": path.unlink,
    }[how]()
    if name == MANIFEST and how == "flipped":
        path.write_bytes(path.read_bytes().replace(b'"version"', b'"vorsion"'))
    point = resume.find(run)
    assert point.version == 1
    assert (name == MANIFEST and how == "gone") or any(
        "v000000002" in text for text in point.damaged
    )
    if how != "gone" and name != MANIFEST:
        with pytest.raises(RunDirError, match=f"{name} is damaged: its sha256 is"):
            checkpoint.verify(path.parent)


def test_without_any_whole_checkpoint_all_are_named(run):
    (run.checkpoint(1) / MODEL).write_bytes(b"x")
    with pytest.raises(RunDirError, match="(?s)holds no whole checkpoint.*model.pt is damaged"):
        resume.find(run)


def test_a_run_without_a_checkpoint_begins_again(tmp_path):
    run = RunDir.create(tmp_path / "run", "test")
    run.config.write_text("x")
    run.pushes.write_text("")
    point = resume.find(run)
    assert (point.version, point.directory, point.restart) == (0, None, 1)


def test_a_full_disk_is_an_error_with_the_reason_and_the_previous_checkpoint_stays(
    run, monkeypatch
):
    def full(tensors, file):
        file.write(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        RunDirError, match="cannot write .*model.pt: No space left on device.*free some space"
    ):
        write(run.path, 2)
    assert resume.find(run).version == 1


def test_a_directory_that_cannot_be_written_is_an_error_with_the_reason(run, tmp_path):
    os.replace(run.checkpoints, tmp_path / "elsewhere")
    # root may write wherever there is a directory
    run.checkpoints.write_text("")
    with pytest.raises(RunDirError, match="cannot write .*Not a directory"):
        write(run.path, 2)


def test_the_later_start_wins_over_the_higher_version(run):
    write(run.path, 900)
    write(run.path, 30, restart=1)
    point = resume.find(run)
    assert (point.version, point.manifest.restart) == (30, 1)


def test_the_last_ones_and_the_best_are_kept(run):
    for version in range(2, 8):
        write(run.path, version)
    checkpoint.prune(run, keep=2, best=3)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [
        "v000000003",
        "v000000006",
        "v000000007",
    ]


def test_the_same_version_with_a_score_takes_the_place_of_one_without(run):
    the_same_with_a_score(run.path)
    assert checkpoint.verify(run.checkpoint(1)).top1_error == 0.1
    write(run.path, 1)  # and that one stays
    assert checkpoint.read_manifest(run.checkpoint(1)).top1_error == 0.1
    assert not list(run.checkpoints.glob(".*"))


def test_a_worker_that_comes_too_late_is_not_waited_for(run):
    assert not checkpoint.save_worker(run.staging(5), 0, 3, {"velocity": torch.zeros(3)})


def test_nothing_in_a_file_is_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/exploded",)

    torch.save({"w": Bomb()}, tmp_path / "model.pt")
    with pytest.raises(RunDirError, match="cannot be read as tensors"):
        checkpoint.read_tensors(tmp_path / "model.pt")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("best_first", [False, True])
def test_a_version_that_is_saved_whole_and_is_the_best_has_both_in_one_checkpoint(run, best_first):
    steps = [lambda: write(run.path, 7), lambda: of_best(run, 7)]
    for step in reversed(steps) if best_first else steps:
        step()
    manifest = checkpoint.verify(run.checkpoint(7))
    assert manifest.is_resumable and manifest.momenta == {"0": 6} and manifest.top1_error == 0.25
    assert manifest.statistics_of == 7 and manifest.top5_error == 0.1
    # as it was validated
    assert checkpoint.load(run.checkpoint(7))[0]["w"].eq(-1).all()
    assert set(manifest.files) == {MODEL, SERVER, LEDGER, "worker000.pt"}
    assert resume.find(run).version == 7
    assert {path.name for path in run.checkpoints.iterdir()} == {"v000000001", "v000000007"}
    assert of_best(run, 7) == 0  # nothing is new


def test_a_damaged_part_is_not_joined(run):
    directory = write(run.path, 7)
    (directory / SERVER).write_bytes(b"x")
    of_best(run, 7)
    manifest = checkpoint.verify(directory)
    assert manifest.top1_error == 0.25 and not manifest.is_resumable

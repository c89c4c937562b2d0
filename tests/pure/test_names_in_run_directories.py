"""What a run directory is called and what in it is the user's own: names are made once, and only whole names of ours are read."""

import os
import shutil
import time
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from asgd_mpi.errors import ConfigError, RunDirError
from asgd_mpi.optim import saved
from asgd_mpi.protocol.ledger import Plan
from asgd_mpi.record import checkpoint
from asgd_mpi.record.checkpoint import LEDGER, MODEL, Manifest
from asgd_mpi.record.disk import write_whole
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.runtime import resume

USERS_OWN = [
    "v000000105.release",
    "v000000105.r1.old",
    "v105",
    "v000000105 copy",
    "vnotes",
    "v000000105.r",
    "v000000105.r01",
    ".snapshot",
    ".savingmine",
    ".best",
    ".removed-by-me",
    ".replaced-vold",
]


@pytest.fixture
def run(tmp_path):
    return RunDir.create(tmp_path / "run", "test")


LEDGER_TEXT = (
    b'{"version": %d, "samples": 32, "lent": 40, "todo": [[1, 2, 0, 8]], "later": [], "given_up": [], "validations_due": 0,'
    b' "best": null}'
)


def save(run, version, restart=0):
    """A resumable checkpoint of one number."""
    staging = run.staging(version, restart)
    checkpoint.stage(staging)
    files = {MODEL: checkpoint.write_tensors(staging / MODEL, {"x": torch.zeros(1)})}
    write_whole(staging / LEDGER, LEDGER_TEXT % version)
    files[LEDGER] = checkpoint.sha256(staging / LEDGER)
    manifest = Manifest(
        version,
        32,
        "m",
        10,
        1,
        8,
        "data",
        [0.0],
        [1.0],
        files=files,
        restart=restart,
        software=checkpoint.software(),
    )
    checkpoint.commit(staging, run.checkpoint(version, restart), manifest)
    return manifest


def test_directories_of_the_users_own_beside_the_checkpoints_are_neither_read_nor_removed(run):
    for version in (100, 105, 110, 115):
        save(run, version)
    for name in USERS_OWN:
        shutil.copytree(run.checkpoint(105), run.checkpoints / name)
    (run.checkpoints / "v000000107").write_text("a file")
    os.symlink(run.checkpoint(105), run.checkpoints / "v000000120")
    checkpoint.prune(run, keep=2, best=100)
    assert resume.find(run).version == 115
    checkpoint.clean(run)
    left = {path.name for path in run.checkpoints.iterdir()}
    assert left == {
        *USERS_OWN,
        "v000000100",
        "v000000110",
        "v000000115",
        "v000000107",
        "v000000120",
    }


def test_what_a_crash_has_left_of_our_own_is_removed(run):
    save(run, 7)
    left = [
        run.staging(3, 2),
        run.staging(4),
        run.checkpoints / ".best000000009.0.1",
        run.checkpoints / ".removed-v000000003",
    ]
    for path in left:
        path.mkdir()
    checkpoint.clean(run)
    assert [path.name for path in run.checkpoints.iterdir()] == ["v000000007"]


def test_logs_and_metrics_of_the_users_own_are_no_starts_and_no_ranks(run):
    for name in (
        "pushes.log",
        "pushes.r2.log",
        "pushes.old.log",
        "pushes.r2.log.bak",
        "pushes.r1.copy.log",
        "pushes.r٣.log",
    ):
        (run.path / name).write_text("")
    for name in (
        "rank000.jsonl",
        "rank001.r2.jsonl",
        "rank001.copy.jsonl",
        "rank1.jsonl",
        "ranks.jsonl",
        "rank001.r2.x.jsonl",
    ):
        (run.metrics / name).write_text("")
    run.stalls.mkdir()
    for name in ("1730000000.txt", "1730000000.rank000.txt", "notes.txt"):
        (run.stalls / name).write_text("")
    assert run.restarts == [0, 2]
    assert [(rank, restart) for rank, restart, _ in run.metrics_files] == [(0, 0), (1, 2)]
    assert run.stall_requests == ["1730000000"]


def test_a_start_that_ended_before_its_log_leaves_its_number_to_nobody(run):
    run.config.write_text("")
    assert run.next_restart == 1
    run.metrics_of(3, 1).write_text("")
    assert run.next_restart == 2 and run.latest(run.config_of) == run.config


def test_runs_that_begin_in_the_same_second_get_directories_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form, *rest: "2030-01-01T000000")
    paths = [str(RunDir.create(None, "net").path) for _ in range(3)]
    assert paths == [f"runs/2030-01-01T000000_net{more}" for more in ("", "-2", "-3")]


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RunDirError, match="cannot make the run directory runs"):
        RunDir.create(None, "net")


def test_who_comes_second_has_written_nothing(run):
    with run.locked(), ExitStack() as second:
        before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
        with pytest.raises(RunDirError, match=f"process {os.getpid()} on"):
            second.enter_context(RunDir(run.path).locked())
        assert before == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def test_fewer_epochs_than_are_done_or_lent_are_refused_in_one_line(run):
    save(run, 2)
    point = resume.find(run)
    plan = Plan(1, 16, 8, 40, 8, 1, 1.0)
    resume.demand_samples_left(point, plan)
    with pytest.raises(
        ConfigError,
        match=r"--run.epochs 2 .* 32 images are trained and 40 are given out.* ask for 3 epochs",
    ):
        resume.demand_samples_left(point, replace(plan, total_samples=32))


@pytest.mark.parametrize(
    "old, new, said",
    [
        (b'"samples": 32', b'"samples": 24', "does not add up"),
        (
            b"[1, 2, 0, 8]",
            b"[1, 2, 8, 17]",
            r"positions \[8, 17\) of epoch 2, and this run has 16 to",
        ),
        (b"[1, 2, 0, 8]", b"[1, 3, 0, 8]", "of epoch 3, and this run has 16 to epoch 2"),
        (b"[1, 2, 0, 8]", b"[1, 2, 8, 0], [1, 2, 0, 16]", r"positions \[8, 0\)"),
        (
            b"[1, 2, 0, 8]",
            b"[1, 2, 0, 8], [2, 0, 0, 9]",
            r"\[0, 9\) of epoch 0, and this run has 8",
        ),
        (b'"version": 2', b'"version": 3', "is of version 3 .* manifest beside it of version 2"),
    ],
)
def test_a_ledger_that_this_run_cannot_have_saved_is_refused_in_one_line(run, old, new, said):
    save(run, 2)
    file = run.checkpoint(2) / LEDGER
    file.write_bytes(file.read_bytes().replace(old, new))
    point = resume.Point(1, run.checkpoint(2), checkpoint.read_manifest(run.checkpoint(2)))
    with pytest.raises(RunDirError, match=said) as refused:
        resume.demand_samples_left(point, Plan(1, 16, 8, 40, 8, 1, 1.0))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name, key", [(MODEL, "weight"), ("server.pt", "v"), ("worker000.pt", "u")]
)
def test_a_checkpoint_of_numbers_that_are_not_finite_is_refused_and_a_mask_of_infinities_is_not(
    run, name, key, value
):
    module = torch.nn.Linear(16, 1, bias=False)
    module.register_buffer("mask", torch.tensor([float("-inf"), 0.0]))
    save(run, 2)
    directory = run.checkpoint(2)
    kept = {
        MODEL: module.state_dict(),
        "server.pt": {"v": torch.ones(16)},
        "worker000.pt": {"u": torch.ones(16)},
    }
    for file, state in kept.items():
        checkpoint.write_tensors(directory / file, state)
    manifest = replace_files(checkpoint.read_manifest(directory), kept)
    point = resume.Point(1, directory, manifest)
    resume.demand_same_trained(point, module, [])
    kept[name] = {**kept[name], key: torch.full_like(kept[name][key], value)}
    checkpoint.write_tensors(directory / name, kept[name])
    told = f"{name} holds numbers in {key} that are not finite"
    with pytest.raises(RunDirError, match=told) as refused:
        resume.demand_same_trained(point, module, [])
    assert "\n" not in str(refused.value)


def replace_files(manifest, names):
    manifest.files = {**manifest.files, **dict.fromkeys(names, "")}
    return manifest


def test_what_a_checkpoint_of_other_settings_does_not_hold_is_zero_and_the_rest_goes_on():
    own = {"velocity": torch.ones(2), "residual": torch.ones(2)}
    saved.load_(own, {"velocity": torch.full((2,), 3.0)})
    assert {name: tensor.tolist() for name, tensor in own.items()} == {
        "velocity": [3, 3],
        "residual": [0, 0],
    }


def test_a_resume_under_other_versions_says_what_that_means(run):
    manifest = save(run, 2)
    assert not resume.other_software(manifest)
    assert not any(
        "version than" in line for line in resume.describe(run, resume.find(run), 1, 160)
    )
    manifest.software["torch"] = "1.0"
    assert "torch 1.0 then" in resume.other_software(
        manifest
    ) and "to the bit" in resume.other_software(manifest)

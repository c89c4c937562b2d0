"""Paths that cannot be meant, given to every command that reads one: one line, status 2, no traceback."""

import os
import shutil
import sys

import pytest
from test_plan import RUN

import data_prep
from asgd_mpi import evaluate, plan, poc, replay, report, simulate
from asgd_mpi.record.rundir import RunDir
from data_prep import fashion_mnist, imagenet, inspect, small, verify

KINDS = (
    "nowhere",
    "empty",
    "file",
    "file/below",
    "loop",
    "x" * 300,
    "/dev/null",
    "Gr\u00fc\u00dfe und mehr",
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    os.symlink("loop", tmp_path / "loop")
    return tmp_path


def refused(capsys, main, *arguments):
    assert main([str(argument) for argument in arguments]) == 2, arguments
    lines = [
        line
        for line in capsys.readouterr().err.splitlines()
        if "it/s" not in line and not line.startswith("note: ")
    ]
    assert len(lines) == 1 and lines[0].startswith("error: "), (arguments, lines)
    return lines[0]


def of(command, ranges=None, positional=False):
    def main(arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["it", *arguments])
            return data_prep._called(command, ranges or {}, positional)

    return main


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_directory_that_is_none_is_refused_by_every_command_that_takes_one(
    kind, place, capsys, digits
):
    for main, *options in (
        (report.main,),
        (report.main, "--audit"),
        (report.main, "--follow"),
        (report.main, "--trace", "t.json"),
        (report.main, RUN),
        (replay.main,),
        (replay.main, "--until", "3"),
        (plan.main,),
    ):
        refused(capsys, main, kind, *options)
    refused(capsys, simulate.main, "--data", digits, "--times-from", kind)
    refused(capsys, evaluate.main, kind, "--data", digits)
    if kind != "/dev/null":
        refused(capsys, poc.main, kind, "--workers", "1,2", "--launcher", "/no/such")
    assert {path.name for path in place.iterdir()} <= {"empty", "file", "loop"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_data_set_that_is_none_is_refused_by_every_command_that_takes_one(kind, place, capsys):
    refused(capsys, simulate.main, "--data", kind)
    refused(capsys, of(verify.verify, positional=True), kind)
    refused(capsys, of(inspect.inspect, inspect.RANGES, positional=True), kind)
    for module in (imagenet, small, fashion_mnist):
        refused(
            capsys,
            of(module.prepare, module.RANGES),
            "--source",
            kind,
            "--out",
            f"out_{module.__name__}",
        )
    assert {path.name for path in place.iterdir()} <= {"empty", "file", "loop"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"\xff\xfe: ["),
        lambda path: path.write_text("[1, 2]"),
        lambda path: path.write_text("run: 3"),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_a_configuration_that_was_damaged_ends_a_replay_in_one_line(damage, place, capsys):
    shutil.copytree(RUN, place / "run")
    damage(RunDir(place / "run").config)
    assert "config" in refused(capsys, replay.main, "run")


def test_a_shard_that_is_missing_is_named(place, capsys, digits):
    shutil.copytree(digits, "set")
    next((place / "set").glob("train-00001*")).unlink()
    assert "train-00001" in refused(capsys, of(verify.verify, positional=True), "set")


def test_a_device_that_is_not_here_is_refused_by_its_name(place, capsys, digits):
    for device in ("gpu", "cuda:99", "cpu:x", "meta"):
        assert f"--device {device}: " in refused(
            capsys, evaluate.main, "nowhere", "--data", digits, "--device", device
        )

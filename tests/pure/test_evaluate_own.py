"""A checkpoint of a task of a user's own, measured again: what the run recorded, to the last digit; and what is refused."""

import json
import re
import shutil

import msgspec
import pytest
import torch

from asgd_mpi import evaluate, simulate
from asgd_mpi.record import checkpoint
from asgd_mpi.record.rundir import RunDir

# two metrics, 70 samples in batches of 48 (not those of the task by itself), a mean over the batches' sizes
OPTIONS = ["--workers", "2", "--epochs", "0.5", "--batch-size", "48", "--run.progress", "none"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluated") / "run"
    command = ["--task", "own_tasks:Regression", "--rule.ema_samples", "50", *OPTIONS]
    assert simulate.main([*command, "--out", str(path)]) == 0
    return path


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "copy")
    return RunDir.open(tmp_path / "copy")


def only(run):
    [directory] = run.checkpoints.glob("v*")
    return directory


def change(run, **fields):
    """Let the manifest of the only checkpoint say something else."""
    manifest = msgspec.structs.replace(checkpoint.read_manifest(only(run)), **fields)
    manifest.sha256 = manifest.seal()
    (only(run) / "manifest.json").write_bytes(msgspec.json.encode(manifest))


def mse_of(said):
    return float(re.search(r"mse (\S+) ", said)[1])


TASK = ["--task", "own_tasks:Regression"]


def test_it_is_what_the_run_recorded_for_this_version(run, capsys):
    recorded = json.loads(run.finished.read_text())
    scores = f"mse {recorded['mse']:.6g} (lower is better), near {recorded['near']:.6g}"
    assert evaluate.main([str(run.path), *TASK]) == 0
    said = capsys.readouterr()
    whole = f"version {recorded['version']} of own_tasks:Regression, the best of {run.path}, 70 rows of its val_set: {scores}"
    assert said.out.strip() == whole and not said.err
    change(run, metrics={"mse": recorded["mse"], "near": 0.25})  # other batches: but for rounding
    assert evaluate.main([str(only(run)), *TASK, "--batch-size", "7", "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert mse_of(said.out) == pytest.approx(recorded["mse"], rel=1e-5)
    assert "the run recorded near 0.25 for this version" in said.err


def test_the_running_mean_has_other_scores(run, capsys):
    assert evaluate.main([str(only(run) / "ema.pt"), *TASK]) == 0
    said = capsys.readouterr().out
    assert "the running mean of the weights at version" in said
    latest = json.loads(run.finished.read_text())["mse"]
    assert mse_of(said) != pytest.approx(latest, rel=1e-3)


def test_statistics_of_batch_norm_are_measured_for_a_running_mean(tmp_path, capsys):
    command = ["--task", "own_tasks:Hits", "--rule.ema_samples", "50", *OPTIONS]
    assert simulate.main([*command, "--out", str(tmp_path / "run")]) == 0
    mean = capsys.readouterr().out
    file = only(RunDir.open(tmp_path / "run")) / "ema.pt"
    assert evaluate.main([str(file)]) == 0  # trained here: known without a name
    found = capsys.readouterr().out
    assert "(higher is better)" in found
    value = float(found.split("near ")[1].split()[0])
    assert f"near {value:.4f}" in mean.split("mean of the weights")[1]


def test_without_its_run_the_task_says_itself_how_it_is_measured(run, tmp_path, capsys):
    expected = json.loads(run.finished.read_text())
    alone = tmp_path / "elsewhere" / "checkpoints" / "saved"
    shutil.copytree(only(run), alone)
    assert evaluate.main([str(alone), *TASK]) == 0
    said = capsys.readouterr()
    assert mse_of(said.out) == pytest.approx(expected["mse"], rel=1e-5)
    assert "config.yaml is not there" in said.err


def test_what_cannot_be_measured_is_told_in_a_line(run, digits, monkeypatch, capsys):
    def refused(*words):
        assert evaluate.main([*map(str, words)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
        return said

    # a copy: nobody has named the task here, and its code is not run
    assert "name it: --task own_tasks:Regression" in refused(only(run))
    said = refused(only(run), *TASK, "--data", digits)
    assert f"--data.path {digits}" in said and "Leave --data.path out" in said
    assert "does not fit --task own_tasks:Hits" in refused(run.path, "--task", "own_tasks:Hits")
    assert "has no val_set" in refused(run.path, "--task", "own_tasks:Drawn")
    change(run, model="loop.py")
    said = refused(only(run))
    assert "training loop in loop.py" in said and f"asgd_mpi.report {run.path}" in said
    assert "model.load_state_dict(torch.load(FILE, weights_only=True))" in said
    loaded = torch.load(only(run) / "model.pt", weights_only=True)  # as it says
    assert loaded.keys() == checkpoint.load(only(run))[0].keys()
    images = {"num_classes": 10, "channels": 1, "image_size": 8, "mean": [0.5], "std": [0.5]}
    change(run, model="digits_cnn", is_own=False, **images)
    assert "--data DIR is missing" in refused(only(run))

"""A checkpoint as other programs read it: the same weights, the same outputs, and what is said of what cannot be exported."""

import importlib.util
import json
import shutil

import msgspec
import pytest
import torch

import own_tasks
from asgd_mpi import export, simulate
from asgd_mpi.model import networks
from asgd_mpi.record import checkpoint
from asgd_mpi.record.rundir import RunDir

OPTIONS = ["--workers", "2", "--epochs", "0.2", "--run.progress", "none"]


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "run"
    options = ["--data", str(digits), "--rule.ema_samples", "100", *OPTIONS]
    assert simulate.main([*options, "--out", str(path)]) == 0
    return RunDir.open(path)


@pytest.fixture
def own(tmp_path):
    """A run of a task of a user's own, with a mean of nothing."""
    command = ["--task", "own_tasks:Regression", *OPTIONS, "--out", str(tmp_path / "own")]
    assert simulate.main(command) == 0
    return RunDir.open(tmp_path / "own")


def only(run):
    [directory] = run.checkpoints.glob("v*")
    return directory


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def change(run, **fields):
    """Let the manifest of the only checkpoint say something else."""
    manifest = msgspec.structs.replace(checkpoint.read_manifest(only(run)), **fields)
    manifest.sha256 = manifest.seal()
    (only(run) / "manifest.json").write_bytes(msgspec.json.encode(manifest))


def evaluated(file, inputs):
    """Return the first output of an onnx graph, by the format's own evaluator; and its metadata."""
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    graph = onnx.load(file)
    onnx.checker.check_model(graph)
    [found] = ReferenceEvaluator(graph).run(None, {graph.graph.input[0].name: inputs.numpy()})
    return torch.from_numpy(found), {one.key: one.value for one in graph.metadata_props}


def test_state_dicts_are_those_of_the_checkpoint_to_the_bit(run, tmp_path, monkeypatch, capsys):
    safetensors = pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    version = checkpoint.read_manifest(only(run)).version
    assert export.main([str(run.path)]) == 0
    assert export.main([str(only(run)), "--format", "torch", "--out", "plain.pt"]) == 0
    assert export.main([str(run.path), "--mean", "true"]) == 0
    assert export.main([str(only(run) / "ema.pt"), "--out", "ema.safetensors"]) == 0
    assert f"the best of {run.path}: digits_cnn-v{version}.safetensors" in capsys.readouterr().out

    def read(name):
        with safetensors.safe_open(name, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()

    state, about = read(f"digits_cnn-v{version}.safetensors")
    expected = checkpoint.load(only(run))[0]
    assert same(state, expected) and same(torch.load("plain.pt", weights_only=True), expected)
    assert json.loads(about["class_names"]) == list("0123456789")
    assert json.loads(about["version"]) == version and about["network"] == "digits_cnn"
    mean, about = read(f"digits_cnn-v{version}-mean.safetensors")
    assert same(mean, checkpoint.load(only(run) / "ema.pt")[0]) and not same(mean, expected)
    assert same(read("ema.safetensors")[0], mean) and about["weights"] == "running mean"
    assert (tmp_path / "ema.safetensors").stat().st_mode == (tmp_path / "plain.pt").stat().st_mode
    assert not list(tmp_path.glob(".export-*"))


def test_tied_weights_have_all_their_names(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    weight = torch.randn(3, 4)
    state = {"in.weight": weight, "out.weight": weight, "turned": weight.t()}
    export._write_safetensors(tmp_path / "tied", state, {})
    assert same(safetensors.load_file(tmp_path / "tied"), state)


def test_onnx_computes_what_the_network_does_for_any_number_of_images(run, tmp_path):
    out = tmp_path / "digits.onnx"
    assert export.main([str(run.path), "--format", "onnx", "--out", str(out)]) == 0
    state, manifest = checkpoint.load(only(run))
    module = networks.build("digits_cnn", 10, 1, 8)
    module.load_state_dict(state)
    images = torch.randn(5, 1, 8, 8)
    found, about = evaluated(out, images)
    assert torch.allclose(found, module.eval()(images), atol=1e-5)
    assert json.loads(about["mean"]) == manifest.mean


def test_onnx_of_an_own_task_takes_what_its_score_gives_to_the_network(own, tmp_path, capsys):
    out = tmp_path / "own.onnx"
    assert export.main([str(own.path), "--format", "onnx", "--out", str(out)]) == 0
    assert "(N, 4)" in capsys.readouterr().out
    module = own_tasks.Regression().module()
    module.load_state_dict(checkpoint.load(only(own))[0])
    rows = torch.randn(7, 4)
    assert torch.allclose(evaluated(out, rows)[0], module.eval()(rows), atol=1e-5)
    change(own, model="own_tasks:Hits")
    words = [str(own.path), "--format", "onnx", "--out", str(tmp_path / "other.onnx")]
    assert export.main(words) == 2  # another class than was trained here: not run
    assert "name it: --task own_tasks:Hits" in capsys.readouterr().err
    assert export.main([*words, "--task", "own_tasks:Hits"]) == 2
    assert "does not fit own_tasks:Hits" in capsys.readouterr().err
    change(own, model="loop.py")
    assert export.main(words) == 2
    assert "training loop in loop.py" in capsys.readouterr().err


def test_of_a_run_the_best_version_is_taken_as_its_ledger_has_it(run, tmp_path, capsys):
    path = tmp_path / "run"
    shutil.copytree(run.path, path)
    copy = RunDir.open(path)
    newest, out = only(copy), tmp_path / "x.pt"
    ledger = json.loads((newest / "ledger.json").read_text())
    change(copy, version=3)
    newest.rename(copy.checkpoint(3))
    shutil.copytree(only(run), newest)
    for best, told in (
        ([3, 360, 0.1, 0.2, 0.3], "version 3 of digits_cnn, the best"),
        (None, "the last"),
    ):
        (newest / "ledger.json").write_text(json.dumps(ledger | {"best": best}))
        assert export.main([str(path), "--format", "torch", "--out", str(out)]) == 0
        assert told in capsys.readouterr().out
        out.unlink()


def test_what_cannot_be_exported_is_told_in_a_line(own, tmp_path, monkeypatch, capsys):
    def refused(*words):
        assert export.main([*map(str, words), "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
        assert not (tmp_path / "out").exists()
        return said

    assert "give one of safetensors, onnx, torch" in refused(own.path, "--format", "keras")
    assert "is not a checkpoint" in refused(tmp_path / "nowhere")
    assert "holds no running mean" in refused(own.path, "--mean", "true")
    taken = tmp_path / "taken"
    taken.write_text("mine")
    assert export.main([str(own.path), "--format", "torch", "--out", str(taken)]) == 2
    assert "is there already" in capsys.readouterr().err and taken.read_text() == "mine"
    file = only(own) / "model.pt"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"x")
    assert "is damaged" in refused(own.path, "--format", "torch")
    file.write_bytes(content)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = refused(own.path, "--format", "onnx")
    assert "needs onnx and onnxscript" in said and "pip install 'asgd_mpi[export]'" in said
    shutil.rmtree(own.checkpoints)
    own.checkpoints.mkdir()
    assert "holds no checkpoint" in refused(own.path, "--format", "torch")

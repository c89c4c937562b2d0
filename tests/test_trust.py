"""Code that a run directory names is imported only if the user has asked for it; nothing is run to find that out."""

import os
import subprocess
import sys

import msgspec
import pytest

from asgd_mpi import evaluate, replay, simulate
from asgd_mpi.errors import ConfigError, UserError
from asgd_mpi.record import checkpoint
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.runtime import trust
from asgd_mpi.runtime.prepare import prepare

NETWORK = "import pathlib\nfrom asgd_mpi.model.networks import digits_cnn as net\n(pathlib.Path(__file__).parent / 'RAN').touch()\n"
OPTIONS = ["--workers", "2", "--epochs", "0.1", "--run.progress", "none"]


@pytest.fixture
def received(digits, tmp_path, monkeypatch):
    """A run directory that names code which lies in it, and could be imported from here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert simulate.main(["--data", str(digits), *OPTIONS, "--out", "got"]) == 0
    run = RunDir.open("got")
    (run.path / "ours.py").write_text(NETWORK)
    run.config.write_text(run.config.read_text().replace("name: digits_cnn", "name: got.ours:net"))
    [directory] = run.checkpoints.glob("v*")
    manifest = checkpoint.read_manifest(directory)
    manifest.model = "got.ours:net"
    manifest.sha256 = manifest.seal()
    (directory / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    return run


def has_run(run):
    return (run.path / "RAN").exists()


def test_no_verb_imports_what_a_received_run_names_until_it_is_named(received, digits, capsys):
    [directory] = received.checkpoints.glob("v*")
    verbs = [lambda: evaluate.main([str(directory), "--data", str(digits)]), lambda: replay.main(["got"]),
             lambda: replay.main(["got", "--until", "2"]),
             lambda: simulate.main(["--config", "got/config.yaml", "--workers", "2", "--out", "other"])]
    for verb in verbs:
        assert verb() == 2 and not has_run(received)
        said = capsys.readouterr().err.strip()
        assert said.startswith("error: ") and "--model got.ours:net" in said and "\n" not in said
    for arguments in (["--resume", "got"], ["--config", "got/config.yaml"], ["--config=got/config.yaml", "--data", str(digits)]):
        with pytest.raises(ConfigError, match="--model got.ours:net"):
            prepare([*arguments, "--dry-run"], [{"host": "here", "gpus": []}], None, None)
        assert not has_run(received)
    assert replay.main(["got", "--model", "got.ours:net"]) == 0 and has_run(received)
    assert evaluate.main([str(directory), "--data", str(digits), "--model=got.ours:net"]) == 0
    assert evaluate.main([str(directory), "--data", str(digits), "--model", "digits_cnn"]) == 0


def test_a_run_of_ones_own_is_known_by_its_path_and_the_source_of_its_network(digits, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("")
    module = tmp_path / "mine" / "nets.py"
    module.write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert simulate.main(["--data", str(digits), *OPTIONS, "--model", "mine.nets:net", "--out", "run"]) == 0
    trust.demand("mine.nets:net", "", RunDir.open("run").path)
    assert replay.main(["run"]) == 0                                                   # without a word
    os.rename("run", "moved")
    assert replay.main(["moved"]) == 2
    os.rename("moved", "run")
    (tmp_path / "mine" / "__init__.py").write_text("# changed")
    with pytest.raises(ConfigError, match="its source is another one"):
        trust.demand("mine.nets:net", "", tmp_path / "run")
    (tmp_path / "mine" / "__init__.py").write_text("")
    with pytest.raises(ConfigError, match="there is no record"):
        trust.demand("mine.nets:other", "", tmp_path / "run")
    record = trust._file_of(tmp_path / "run")
    record.chmod(0o666)                                                                # others may write it
    assert replay.main(["run"]) == 2


def test_a_module_inside_of_the_run_directory_is_never_known(received):
    assert trust.record("got.ours:net", received.path) == ""
    with pytest.raises(ConfigError, match="ours.py"):
        trust.demand("got.ours:net", "", received.path)


def test_the_packages_own_networks_and_those_of_torchvisions_list_are_free(tmp_path):
    for model in ("resnet50", "torchvision:vgg16"):
        trust.demand(model, "", tmp_path)
    for model in ("torchvision.models:resnet18", "os:system", "a.b:c"):
        with pytest.raises(ConfigError, match=model):
            trust.demand(model, "", tmp_path)


def test_looking_for_a_source_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "outer").mkdir()
    for name in ("__init__.py", "inner.py"):
        (tmp_path / "outer" / name).write_text(NETWORK)
    assert [os.path.basename(file) for file in trust.find_sources("outer.inner:net")] == ["__init__.py", "inner.py"]
    assert not (tmp_path / "outer" / "RAN").exists() and "outer" not in sys.modules
    assert trust.find_sources("outer.missing:net") == trust.find_sources("nowhere:net") == {}


def test_a_received_directory_that_one_stands_in_does_not_replace_a_package(received):
    (received.path / "numpy.py").write_text(NETWORK)
    done = subprocess.run([sys.executable, "-m", "asgd_mpi.replay", "."], cwd=received.path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(trust.__file__))})
    assert done.returncode == 2 and "--model got.ours:net" in done.stderr and not has_run(received)


def test_what_an_error_shows_of_a_file_cannot_steer_the_terminal():
    assert str(UserError("a\x1b]0;title\x07\u202eb\nc\td")) == "a\\x1b]0;title\\x07\\u202eb\nc\td"


def test_a_replay_of_a_copied_run_takes_the_place_of_its_data_and_no_other_data(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.symlink(digits, "here")
    assert simulate.main(["--data", "here", *OPTIONS, "--out", "run"]) == 0
    os.rename("here", "there")
    assert replay.main(["run"]) == 2 and "--data DIR" in capsys.readouterr().err
    assert replay.main(["run", "--data", "there"]) == 0 and replay.main(["run", "--data.path=there", "--until", "3"]) == 0
    from data_prep import digits as maker

    maker.prepare(tmp_path / "other")
    manifest = tmp_path / "other" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    assert replay.main(["run", "--data", "other"]) == 2 and "fingerprint" in capsys.readouterr().err

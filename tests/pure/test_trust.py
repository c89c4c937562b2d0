"""Code that a run directory names is imported only if the user has asked for it; nothing is run to find that out."""

import grp
import os
import pwd
import stat
import subprocess
import sys
from pathlib import Path
from contextlib import ExitStack

import msgspec
import pytest

from asgd_mpi import evaluate, plan, replay, report, simulate
from asgd_mpi.errors import ConfigError, UserError
from asgd_mpi.record import checkpoint
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.runtime import trust
from asgd_mpi.runtime.prepare import prepare
from asgd_mpi.untrusted import writers

ROOT = Path(__file__).parents[2]
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
    verbs = [
        lambda: evaluate.main([str(directory), "--data", str(digits)]),
        lambda: replay.main(["got"]),
        lambda: replay.main(["got", "--until", "2"]),
        lambda: simulate.main(["--config", "got/config.yaml", "--workers", "2", "--out", "other"]),
    ]
    for verb in verbs:
        assert verb() == 2 and not has_run(received)
        said = capsys.readouterr().err.strip()
        assert said.startswith("error: ") and "--model got.ours:net" in said and "\n" not in said
    for arguments in (
        ["--resume", "got"],
        ["--config", "got/config.yaml"],
        ["--config=got/config.yaml", "--data", str(digits)],
    ):
        with pytest.raises(ConfigError, match="--model got.ours:net"):
            prepare([*arguments, "--dry-run"], [{"host": "here", "gpus": []}], None, None)
        assert not has_run(received)
    assert replay.main(["got", "--model", "got.ours:net"]) == 0 and has_run(received)
    assert evaluate.main([str(directory), "--data", str(digits), "--model=got.ours:net"]) == 0
    assert evaluate.main([str(directory), "--data", str(digits), "--model", "digits_cnn"]) == 0


def test_a_run_of_ones_own_is_known_by_its_path_and_the_source_of_its_network(
    digits, tmp_path, monkeypatch
):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("")
    module = tmp_path / "mine" / "nets.py"
    module.write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert (
        simulate.main(["--data", str(digits), *OPTIONS, "--model", "mine.nets:net", "--out", "run"])
        == 0
    )
    trust.demand("mine.nets:net", "", RunDir.open("run").path)
    # without a word
    assert replay.main(["run"]) == 0
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
    # others may write it
    record.chmod(0o666)
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
    assert [os.path.basename(file) for file in trust.find_sources("outer.inner:net")] == [
        "__init__.py",
        "inner.py",
    ]
    assert not (tmp_path / "outer" / "RAN").exists() and "outer" not in sys.modules
    assert trust.find_sources("outer.missing:net") == trust.find_sources("nowhere:net") == {}


def test_a_received_directory_that_one_stands_in_does_not_replace_a_package(received):
    (received.path / "numpy.py").write_text(NETWORK)
    done = subprocess.run(
        [sys.executable, "-m", "asgd_mpi.replay", "."],
        cwd=received.path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2 and "--model got.ours:net" in done.stderr and not has_run(received)


def test_what_an_error_shows_of_a_file_cannot_steer_the_terminal():
    assert str(UserError("a\x1b]0;title\x07\u202eb\nc\td")) == "a\\x1b]0;title\\x07\\u202eb\nc\td"


def test_a_replay_of_a_copied_run_takes_the_place_of_its_data_and_no_other_data(
    digits, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    os.symlink(digits, "here")
    assert simulate.main(["--data", "here", *OPTIONS, "--out", "run"]) == 0
    os.rename("here", "there")
    assert replay.main(["run"]) == 2 and "--data DIR" in capsys.readouterr().err
    assert (
        replay.main(["run", "--data", "there"]) == 0
        and replay.main(["run", "--data.path=there", "--until", "3"]) == 0
    )
    from data_prep import digits as maker

    maker.prepare(tmp_path / "other")
    manifest = tmp_path / "other" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    assert replay.main(["run", "--data", "other"]) == 2 and "fingerprint" in capsys.readouterr().err


def status(mode, owner=1000, group=1000):
    return os.stat_result((stat.S_IFDIR | mode, 0, 0, 1, owner, group, 0, 0, 0, 0))


@pytest.mark.parametrize(
    "mode, owner, private, passage, expected",
    [
        (0o755, 1000, False, False, ""),
        (0o755, 0, False, False, ""),
        (0o700, 1001, False, False, "belongs to user 1001"),
        (0o1777, 1001, False, True, "belongs to user 1001"),
        (0o775, 1000, True, False, ""),
        (0o775, 1000, False, False, "may be written by group 1000 (mode 0775)"),
        (0o777, 1000, True, False, "may be written by everybody (mode 0777)"),
        (0o702, 0, True, True, "may be written by everybody (mode 0702)"),
        (0o1777, 0, False, True, ""),
        (0o1775, 1000, False, True, ""),
        # who may make names in it can add a checkpoint
        (0o1777, 0, False, False, "may be written by everybody (mode 1777)"),
    ],
)
def test_who_else_may_write_is_told_by_owner_and_mode(mode, owner, private, passage, expected):
    assert writers.others(status(mode, owner), 1000, private, passage) == expected


def test_a_group_is_private_if_it_holds_this_user_alone(monkeypatch):
    users = {"ann": (1000, 1000), "bob": (1001, 1001), "eve": (1002, 50)}
    groups = {1000: ("ann", []), 1001: ("bob", ["ann"]), 50: ("lab", []), 60: ("two", ["ann"])}
    groups |= {70: ("all", ["ann", "bob"]), 80: ("nobodys", [])}
    entries = [pwd.struct_passwd((n, "x", u, g, "", "/", "")) for n, (u, g) in users.items()]
    monkeypatch.setattr(pwd, "getpwall", lambda: entries)
    monkeypatch.setattr(pwd, "getpwuid", {entry.pw_uid: entry for entry in entries}.__getitem__)
    found = {n: grp.struct_group((g, "x", n, some)) for n, (g, some) in groups.items()}
    monkeypatch.setattr(grp, "getgrgid", found.__getitem__)
    assert {n: writers.is_private(n, 1000) for n in (0, 50, 60, 70, 80, 90, 1000, 1001)} == {
        0: True,
        50: False,
        60: True,
        70: False,
        80: False,
        90: False,
        1000: True,
        1001: False,
    }
    monkeypatch.setattr(pwd, "getpwall", list)  # of a directory service that lists nobody
    assert writers.is_private(1000, 1000) and not writers.is_private(80, 1000)


@pytest.mark.parametrize("where", [".", "run", "run/config.yaml", "run/checkpoints/v000000001"])
def test_what_others_may_write_is_told_once_with_what_to_do(tmp_path, where):
    run = RunDir.create(tmp_path / "run", "net")
    run.config.write_text("")
    run.checkpoint(1).mkdir()
    assert writers.told(run.path) == ""
    os.symlink("run", tmp_path / "link")
    place = tmp_path / where
    place.chmod(0o777)
    said = writers.told(tmp_path / "link")
    assert said.count(f"{place.name} may be written by everybody") == 1 and "chmod go-w" in said
    assert "\n" not in said and " more" not in said


@pytest.mark.parametrize("where", ["", "kept", "kept/rank000.jsonl"])
def test_what_a_link_in_a_run_directory_leads_to_is_looked_at_like_what_lies_in_it(tmp_path, where):
    run = RunDir.create(tmp_path / "run", "net")
    run.config.write_text("")
    kept = tmp_path / "elsewhere" / "kept"
    kept.mkdir(parents=True)
    (kept / "rank000.jsonl").write_text("")
    run.metrics.rmdir()
    run.metrics.symlink_to(kept)
    (run.path / "notes").symlink_to(run.checkpoints)
    assert writers.told(run.path) == ""
    place = tmp_path / "elsewhere" / where
    place.chmod(0o777)
    said = writers.told(run.path)
    name = "run/metrics" if where == "kept" else place.name
    assert said.count(f"{name} may be written by everybody") == 1 and " more" not in said


def test_every_verb_that_believes_a_run_directory_says_who_else_may_write_it(
    received, digits, capsys
):
    [directory] = received.checkpoints.glob("v*")
    received.path.chmod(0o777)
    verbs = [
        lambda: evaluate.main([str(directory), "--data", str(digits)]),
        lambda: replay.main(["got"]),
        lambda: report.command.main(["got", "--no-write"]),
        lambda: report.command.main(["got", "--audit"]),
        lambda: plan.main(["got"]),
        lambda: simulate.main(["--times-from", "got", "--workers", "2", "--epochs", "0.1"]),
    ]
    for verb in verbs:
        verb()
        assert capsys.readouterr().err.count("got may be written by everybody (mode 0777)") == 1
    with ExitStack() as hold, pytest.raises(ConfigError):
        prepare(["--resume", "got"], [{"host": "a", "gpus": []}] * 3, None, hold)
    assert capsys.readouterr().err.count("got may be written by everybody") == 1


def test_a_new_run_says_that_others_may_write_where_it_is_made(digits, tmp_path, capsys):
    tmp_path.chmod(0o777)
    options = ["--data", str(digits), "--run.dir", str(tmp_path / "run")]
    with ExitStack() as hold:
        prepare(options, [{"host": "a", "gpus": []}] * 3, None, hold)
    assert capsys.readouterr().err.count(f"{tmp_path.name} may be written by everybody") == 1

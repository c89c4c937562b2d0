"""What a person who types a command for the first time reads: short help, all of it, and what was meant by an unknown option."""

import importlib
import importlib.machinery
import os
import re
import shlex
import shutil
import subprocess
import sys
import types

import pytest
from test_endings import ROOT
from test_limits_of_commands import COMMANDS

from asgd_mpi import __main__ as overview
from asgd_mpi import completion, slurm_scripts
from asgd_mpi.config import help_text, options, parse
from asgd_mpi.config.parse import ESSENTIALS, SHORTHANDS
from asgd_mpi.data import packers
from asgd_mpi.errors import ConfigError
from asgd_mpi.task.opening import complete


def printed(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        parse.parse(list(arguments))
    assert not end.value.code
    return capsys.readouterr().out


def test_the_help_of_train_is_short_and_all_of_it_is_asked_for(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    short = printed(capsys, "--help")
    options_, _, examples = short.partition("examples:")
    assert len(short.splitlines()) < 80 and max(map(len, options_.splitlines())) < 80
    assert all(f"\n  {name} " in short for name in ESSENTIALS if name != "--dry-run")
    assert "mpirun -np 4 python -m asgd_mpi.train" in examples
    assert printed(capsys, "-h") == short and printed(capsys, "--epochs", "3", "--help") == short
    whole = printed(capsys, "--help", "all")
    assert whole == printed(capsys, "--help=all")
    for kind in ("free", "defines"):
        for name in options.options(kind):
            if name != "run.dry_run":  # --dry-run, without a value
                assert whole.count(f"--{name} ") >= 1, name
    assert "The learning rate, a function of the samples" in whole  # the title of a group
    number = len(short.splitlines()), len(whole.splitlines())
    assert number[1] > 2 * number[0], number


def test_help_after_two_dashes_is_not_for_this_command():
    assert help_text.asked(["--data", "x", "--", "--help"]) is None
    assert help_text.asked(["--help", "--", "all"]) == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_lists_every_option_once_with_what_it_takes(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    parser = COMMANDS[name][0]()
    for wanted in (["--help"], ["--help", "all"]):
        with pytest.raises(SystemExit):
            parser.read(wanted)
        shown = capsys.readouterr().out
        assert shown.startswith(f"usage: {parser.prog} ")
        for action in parser._actions:
            if action.dest == "help" or not action.option_strings:
                continue
            name = max(action.option_strings, key=len)
            assert len(re.findall(rf"^  (?:\S+, )?{name}(?: .*)?$", shown, re.MULTILINE)) == 1, name
    assert "NoneType" not in shown and "typing" not in shown and "Literal" not in shown


def test_every_example_is_one_that_its_command_takes():
    assert set(help_text.EXAMPLES) <= set(overview.VERBS)
    for verb, examples in help_text.EXAMPLES.items():
        for example in examples:
            words = shlex.split(example)
            arguments = words[words.index(f"asgd_mpi.{verb}") + 1 :]
            if verb == "train":
                parse.parse(arguments)
            elif verb != "slurm_scripts":
                own = arguments[: arguments.index("--")] if "--" in arguments else arguments
                module = "asgd_mpi.report.command" if verb == "report" else f"asgd_mpi.{verb}"
                importlib.import_module(module).make_parser().read(own)


@pytest.mark.parametrize(
    "given, meant",
    [
        ("--learning-rate", "--lr"),
        ("--batchsize", "--batch-size"),
        ("--epoch", "--epochs"),
        ("--taks", "--task"),
        ("--warmup", "--schedule.warmup_epochs"),
        ("--momentum", "--rule.momentum"),
        ("--schedule.learning_rate", "--schedule.lr"),
        ("--workers", "mpirun -np 5"),
        ("--output-dir", "--run.dir"),
        ("--num-workers", "--data.threads"),
    ],
)
def test_an_unknown_option_is_told_with_what_was_meant(given, meant):
    with pytest.raises(ConfigError) as error:
        parse.parse([given, "3"])
    assert str(error.value).startswith(f"unknown option {given}") and meant in str(error.value)
    assert "--exchange " not in str(error.value)  # a section is no option


def test_an_option_is_taken_with_dashes_for_underscores():
    config = parse.parse(["--data.batch-size", "7", "--checkpoint.every-s=9"])
    assert config.data.batch_size == 7 and config.checkpoint.every_s == 9
    assert set(ESSENTIALS) & set(SHORTHANDS)


def test_a_shell_completes_verbs_options_and_what_they_take(tmp_path):
    found = completion.of_verbs(["train", "stop", "local"])
    (tmp_path / "script").write_text(completion.script(found, ("data_prep.small",)))
    lines = ["tr", "data", "train --rule a", "train --run.di", "stop --w", "local --", "x --"]
    code = """source ./script; while read -r line; do
    COMP_WORDS=(asgd-mpi $line); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _asgd_mpi; echo "${COMPREPLY[*]}"; done"""
    done = subprocess.run(
        ["bash", "-c", code],
        cwd=tmp_path,
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
    )
    rules = next(one.choices for one in found["train"] if "--rule" in one.names)
    of_a = " ".join(rule for rule in rules if rule.startswith("a"))
    assert len(of_a.split()) > 2
    expected = ["train", "data_prep.small", of_a, "--run.dir", "--wait-s", "--help", ""]
    assert (done.stdout.splitlines(), done.stderr) == (expected, "")


# A terminal with a zsh in it: what is typed, a Tab, and what the command then gets.
TYPE = """zmodload zsh/zpty; zpty z zsh -f -i
zpty -w z 'source ./script; asgd-mpi() { print GOT $* END }; print READ""Y'
zpty -r z seen '*READY*'
while read -r line; do
    zpty -w z "asgd-mpi $line"$'\\t'; zpty -r z seen '*GOT*END*'; print -r -- ${${seen##*GOT }%% END*}
done"""


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh here")
def test_zsh_completes_the_same(tmp_path):
    found = completion.of_verbs(["train", "stop"])
    (tmp_path / "script").write_text(completion.script(found))
    lines = ["tr", "stop --w", "train --data.augment pad", "train --run.di"]
    done = subprocess.run(
        ["zsh", "-f", "-c", TYPE],
        cwd=tmp_path,
        env=os.environ | {"HOME": str(tmp_path)},
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.splitlines() == [
        "train",
        "stop --wait-s",
        "train --data.augment pad_crop",
        "train --run.dir",
    ], done.stderr


def test_a_verb_is_run_as_its_module_is(tmp_path):
    def run(*words):
        return subprocess.run(
            [sys.executable, "-m", "asgd_mpi", *words],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        )

    done = run("slurm-scripts", "slurm")
    assert done.returncode == 0, done.stderr
    written = {path.name for path in (tmp_path / "slurm").iterdir()}
    assert written == {path.name for path in (ROOT / "slurm").iterdir()} and "train.sh" in written
    (tmp_path / "slurm" / "env.sh").write_text("mine")
    assert "0 files written" in run("slurm-scripts", "slurm").stdout
    assert (tmp_path / "slurm" / "env.sh").read_text() == "mine"
    assert run("local").stdout.startswith("export ")
    assert run("launch", "--quick").returncode == 2
    assert "usage: python -m data_prep.verify ROOT" in run("data_prep.verify", "--help").stdout
    (tmp_path / "data_prep").mkdir()
    (tmp_path / "data_prep" / "__init__.py").write_text("")
    hidden = run("data_prep.verify", "--help")
    assert hidden.returncode == 2 and "another package is called data_prep" in hidden.stderr
    wrong = run("trian")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("error: trian is no command. Did you mean train?")


def test_a_data_prep_of_somebody_else_is_named_where_ours_is_needed(tmp_path, monkeypatch):
    assert packers.packer("digits").prepare_once
    other = types.ModuleType("data_prep")
    origin = str(tmp_path / "data_prep" / "__init__.py")
    other.__spec__ = importlib.machinery.ModuleSpec("data_prep", None, origin=origin)
    monkeypatch.setitem(sys.modules, "data_prep", other)
    monkeypatch.chdir(tmp_path)  # without data/digits
    with pytest.raises(ConfigError, match=f"another package is called data_prep .{origin}"):
        complete(options.Config())


def test_scripts_that_cannot_be_written_are_told_in_a_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert slurm_scripts.main([str(tmp_path / "file" / "slurm")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert slurm_scripts.main([]) == 2 and "no directory" in capsys.readouterr().err

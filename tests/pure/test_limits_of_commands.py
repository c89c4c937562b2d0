"""What the options of all commands but train's refuse: each number has a limit, and each refusal is a line that names the option."""

import argparse
import ast
import importlib
import re
import sys

import pytest
from test_endings import ROOT, SOURCES, guard

import asgd_mpi
from asgd_mpi import __main__ as overview
from asgd_mpi.config import command_line
from asgd_mpi.errors import ConfigError
from asgd_mpi.report import command

WITHOUT_OPTIONS = (
    "asgd_mpi.local",
    "asgd_mpi.segments",
    "asgd_mpi.launch",
    "asgd_mpi.slurm_scripts",
    "asgd_mpi.completion",
    "asgd_mpi.__main__",
)
TRAINING = ("asgd_mpi.train",)  # its options: test_limits
NUMBERS = (
    "nan",
    ".nan",
    "inf",
    ".inf",
    "-.inf",
    "-1",
    "0",
    "1e30",
    "1" + "0" * 30,
    "0.5",
    "x",
    "",
    "1,2",
    "0x10",
    "1_0",
    "true",
)
# a task's own metric may lie below 0
SIGNED = {"--target"}
# options that must be given
GIVEN = {"--data.path": "there", "--out": "made", "--source": "there", "--work": "there"}


def commands():
    """The parser and the main of each command, by its module."""
    found = {"asgd_mpi.report": (command.make_parser, command.main)}
    for path in SOURCES:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        statements, _ = guard(path)
        if (
            not statements
            or name.startswith("benchmarks.")
            and "run(" != ast.unparse(statements[-1])[:4]
            or name in (*WITHOUT_OPTIONS, *TRAINING)
        ):
            continue
        module = importlib.import_module(name)
        if hasattr(module, "make_parser"):
            found[name] = module.make_parser, module.main
        else:
            found[name] = _of_function(module, ast.unparse(statements[-1]))
    return found


def _of_function(module, call):
    """The same of a module of data_prep, which ends with such as `run(prepare, RANGES)`."""
    import data_prep

    def given(command, ranges={}, positional=False):
        return command, ranges, positional

    about = eval(call, vars(module) | {"run": given})

    def main(arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["it", *arguments])
            return data_prep._called(*about)

    return lambda: data_prep.make_parser(*about), main


COMMANDS = commands()


def options_of(parser):
    return [
        action
        for action in parser._actions
        if action.dest != "help" and action.help != argparse.SUPPRESS
    ]


def others(parser, option):
    """A command line that lacks nothing but what is tried."""
    named = [
        text
        for action in options_of(parser)
        if action.option_strings and command_line.name_of(action) in GIVEN and action is not option
        for text in (command_line.name_of(action), GIVEN[command_line.name_of(action)])
    ]
    return [
        *(
            "there"
            for action in options_of(parser)
            if not action.option_strings and action is not option
        ),
        *named,
    ]


def refusal(parser, arguments):
    try:
        parser.read(arguments)
    except ConfigError as error:
        return str(error)


def is_number(action):
    return bool({int, float} & {*command_line.kinds_of(action)})


def test_the_commands_are_found():
    assert {
        "asgd_mpi.evaluate",
        "asgd_mpi.replay",
        "asgd_mpi.report",
        "asgd_mpi.simulate",
        "asgd_mpi.plan",
        "asgd_mpi.poc",
        "asgd_mpi.doctor",
        "data_prep.imagenet",
        "data_prep.verify",
        "benchmarks.convergence",
    } < set(COMMANDS)
    assert (
        sum(is_number(action) for make, _ in COMMANDS.values() for action in options_of(make()))
        > 50
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_number_has_a_limit_and_is_refused_by_its_name_before_any_work(
    name, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    make, main = COMMANDS[name]
    parser = make()
    assert {
        command_line.name_of(action).lstrip("-")
        for action in options_of(parser)
        if is_number(action)
    } == set(parser.ranges)
    for action in filter(is_number, options_of(parser)):
        option = command_line.name_of(action)
        refused = {}
        for value in NUMBERS:
            message = refusal(parser, [*others(parser, action), f"{option}={value}"])
            if message:
                assert re.match(rf"{option} \S+: \w", message) and "\n" not in message, message
                refused[value] = message
        wrong = "x" if option in SIGNED else "-1"
        assert {
            "nan",
            ".nan",
            ".inf",
            "-.inf",
            wrong,
            "1e30",
            "1" + "0" * 30,
            "x",
            "",
            "1,2",
            "true",
        } <= set(refused), (option, set(refused))
        assert main([*others(parser, action), f"{option}={wrong}"]) == 2
        assert capsys.readouterr().err == f"error: {refused[wrong]}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", COMMANDS)
def test_text_that_cannot_be_meant_is_refused_by_its_name(name):
    parser = COMMANDS[name][0]()
    for action in options_of(parser):
        if (
            action.nargs == 0
            or not {str} & {*command_line.kinds_of(action)}
            and "path" not in str(command_line.kinds_of(action)).lower()
        ):
            continue
        option = command_line.name_of(action)
        for value in (
            "a\nb",
            "Gr\udcfc\udcdfe",
            "x" * 5000,
            *([""] if action.default != "" else []),
        ):
            arguments = [f"{option}={value}"] if action.option_strings else [value]
            message = refusal(parser, [*arguments, *others(parser, action)])
            assert (
                message
                and "\n" not in message
                and message.startswith((option, "an argument '': it is empty"))
            ), (option, value, message)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistyped_option_is_told_with_the_one_that_was_meant(name):
    parser = COMMANDS[name][0]()
    # the rest of its options are those of a training
    if isinstance(parser, command_line.FirstParser):
        return
    for action in options_of(parser):
        if action.option_strings:
            option = command_line.name_of(action)
            message = refusal(parser, [*others(parser, action), f"{option}z", "3"])
            assert (
                message.startswith(f"unknown option {option}z. Did you mean")
                and option in message.partition("Did you mean")[2]
            ), message


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_missing_is_named_as_the_user_gives_it(name):
    parser = COMMANDS[name][0]()
    for action in options_of(parser):
        if action.required and action.nargs != "*":
            assert command_line.name_of(action) in refusal(parser, others(parser, action))


@pytest.mark.parametrize("name", ["local", "segments", "launch"])
def test_a_command_without_options_says_what_it_is_and_takes_none(name, capsys):
    module = importlib.import_module(f"asgd_mpi.{name}")
    assert module.main(["--quick"]) == 2 and capsys.readouterr().err.startswith(
        "error: unknown option --quick: "
    )
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert not ended.value.code and capsys.readouterr().out == module.__doc__ + "\n"


@pytest.mark.parametrize("text", ["", "0", "1,,2", "1,-2", "1;2", "1.5", "5000", "1,5000", "1e3"])
def test_numbers_of_workers_are_whole_within_the_limit_and_have_commas_between_them(text):
    with pytest.raises(
        ConfigError, match="^--workers .*: give whole numbers from 1 to 4096 with commas"
    ):
        command_line.counts("--workers", text, 4096)
    assert command_line.counts("--workers", "8, 1,2,2", 4096) == [1, 2, 8]


def test_the_package_lists_its_commands_a_line_each(capsys):
    own = {
        path.stem
        for path in (ROOT / "asgd_mpi").glob("*.py")
        if guard(path)[0] and path.stem != "__main__"
    }
    assert set(overview.VERBS) == own | {"report"}
    assert overview.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for verb in overview.VERBS:
        assert sum(f"python -m asgd_mpi.{verb} " in line for line in lines) == 1
    prepared = {path.stem for path in (ROOT / "data_prep").glob("*.py") if guard(path)[0]}
    assert all(name in overview.DATA for name in prepared)
    assert (
        overview.main(["--version"]) == 0 and capsys.readouterr().out == f"{asgd_mpi.__version__}\n"
    )
    assert overview.main(["rport"]) == 2 and "Did you mean report?" in capsys.readouterr().err

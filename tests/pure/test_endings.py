"""How commands end: quietly when nobody reads on, in one line when output cannot be written, with a status that is documented."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_plan import RUN
from test_report import make_pushes, make_run

from asgd_mpi import plan, report
from asgd_mpi.errors import ConfigError
from asgd_mpi.process import ending

ROOT = Path(__file__).parents[2]
SOURCES = [
    path
    for room in ("asgd_mpi", "data_prep", "benchmarks")
    for path in sorted((ROOT / room).rglob("*.py"))
    if "peers" not in path.relative_to(ROOT).parts
]  # those are the ranks of a benchmark
COMMAND = """
import sys
from asgd_mpi.process import ending
from asgd_mpi.errors import ConfigError

@ending.of_command
def main():
    kind = sys.argv[1]
    if kind == "help":
        import argparse
        argparse.ArgumentParser(description="much " * 4000).parse_args(["--help"])
    print("lines\\n" * {"many": 100_000, "few": 2, "wrong": 1, "fault": 1}[kind])
    print("beside", file=sys.stderr)
    if kind == "wrong":
        raise ConfigError("this cannot be meant")
    if kind == "fault":
        raise ArithmeticError("a fault of ours")
    return 3

sys.exit(main())
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    path = tmp_path_factory.mktemp("command") / "command.py"
    path.write_text(COMMAND)

    def call(kind, redirections="", stdout=subprocess.PIPE):
        done = subprocess.run(
            [
                "bash",
                "-c",
                f'"{sys.executable}" "{path}" {kind} {redirections}; exit "${{PIPESTATUS[0]}}"',
            ],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    return call


@pytest.fixture
def left():
    """A pipe whose reader has left before anything is written."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize("kind", ["few", "many", "help"])
def test_a_command_whose_reader_has_left_ends_quietly_with_the_status_of_sigpipe(
    command, kind, left
):
    status, _, said = command(kind, stdout=left)
    assert status == 141 and said in ("", "beside\n")


def test_what_a_reader_wants_it_gets_before_it_leaves(command):
    assert command("many", "| head -1") == (141, "lines\n", "")


@pytest.mark.parametrize("kind", ["few", "many", "help"])
def test_output_that_a_disk_refuses_is_an_error_of_one_line(command, kind):
    status, _, said = command(kind, "> /dev/full")
    last = said.splitlines()[-1]
    assert (
        status == 2
        and last.startswith("error: standard output cannot be written (No space left on device)")
        and "Trace" not in said
    )


@pytest.mark.parametrize("redirections", [">&-", "2>&-", "2> /dev/full", ">&- 2>&- <&-"])
def test_output_that_was_closed_and_errors_that_nobody_takes_change_no_status(
    command, redirections
):
    assert command("few", redirections)[0] == 3
    assert command("wrong", redirections)[0] == 2


def test_a_mistake_of_the_user_is_a_line_and_a_fault_of_ours_keeps_its_traceback(command, left):
    assert command("wrong") == (2, "lines\n\n", "beside\nerror: this cannot be meant\n")
    status, printed, said = command("fault")
    assert (
        (status, printed) == (1, "lines\n\n")
        and said.startswith("beside\nTraceback")
        and "ArithmeticError" in said
    )
    assert command("wrong", "2>&1", stdout=left)[0] == 141


def test_a_name_that_the_terminal_cannot_show_is_written_out(tmp_path):
    code = "import sys; from asgd_mpi.process import ending; sys.exit(ending.of_command(lambda: print('Gr\\u00fc\\udce4e'))())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "Gr\\xfc\\udce4e\n")


def guard(path):
    """The statements below `if __name__ == "__main__":`, and the functions of the module by name."""
    tree = ast.parse(path.read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    found = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
    ]
    return (found[-1].body if found else []), functions


def test_every_command_ends_by_the_same_way():
    commands = {path: guard(path) for path in SOURCES if guard(path)[0]}
    assert len(commands) > 25
    for path, (statements, functions) in commands.items():
        last = ast.unparse(statements[-1])
        if last in ("sys.exit(main())", "interpreter.end(main())"):
            assert [ast.unparse(one) for one in functions["main"].decorator_list] == [
                "ending.of_command"
            ], path
        else:  # data_prep.run, a training with something replaced, or a loop, which init sees to
            text = path.read_text()
            known = any(call in text for call in ("train.main()", "asgd_mpi.init("))
            assert last.startswith("run(") or known, path


class Leaves:
    """A reader that has left."""

    def write(self, text):
        raise ending.ReaderLeft

    def flush(self):
        pass

    def isatty(self):
        return False


def test_results_are_written_before_text_that_nobody_may_read(tmp_path, monkeypatch):
    runs = [str(make_run(tmp_path / name, make_pushes()).path) for name in "ab"]
    monkeypatch.setattr(sys, "stdout", Leaves())
    monkeypatch.chdir(tmp_path)
    assert report.main(runs[:1]) == ending.READER_LEFT
    assert {path.name for path in (tmp_path / "a" / "report").iterdir()} == {
        "report.html",
        "report.json",
        "report.md",
    }
    assert report.main([*runs, "--out", "beside"]) == ending.READER_LEFT
    assert len(list((tmp_path / "beside").iterdir())) == 3
    assert plan.main([str(RUN), "--out", "plan"]) == ending.READER_LEFT
    assert len(list((tmp_path / "plan").iterdir())) == 2


def test_the_text_of_a_report_is_printed_where_no_file_can_be_written(tmp_path, capsys):
    run = make_run(tmp_path / "run", make_pushes())
    run.report.rmdir()
    run.report.write_text("a file in the way")
    assert report.main([str(run.path)]) == 2
    shown = capsys.readouterr()
    assert shown.out.startswith("run: finished") and shown.err.startswith("error: cannot make")


def test_every_status_is_in_the_table_of_the_documents():
    table = (
        (ROOT / "docs" / "reliability.md")
        .read_text()
        .partition("| status |")[2]
        .partition("\n\n")[0]
    )
    documented = {int(number) for number in re.findall(r"^\| *(\d+) *\|", table, re.MULTILINE)}
    assert documented == {
        0,
        ending.FAULT,
        ending.WRONG,
        ending.DEGRADED,
        ending.RESUME_ME,
        ending.INTERRUPTED,
        ending.READER_LEFT,
    }


def test_the_status_of_an_error_is_two_and_of_an_interrupt_that_of_sigint(capsys):
    def raises(error):
        raise error

    assert (
        ending.of_command(raises)(ConfigError("no")) == 2
        and capsys.readouterr().err == "error: no\n"
    )
    assert ending.of_command(raises)(KeyboardInterrupt()) == 130
    assert ending.of_command(lambda: None)() == 0

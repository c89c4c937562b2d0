"""Names and texts out of a run directory are shown and never obeyed: by a terminal, a browser, a reader of Markdown or a trace."""

import ast
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from test_checkpoint import write
from test_page import without_own_script

from asgd_mpi import evaluate, plan, report
from asgd_mpi.errors import LONGEST, one_line, printable
from asgd_mpi.record import checkpoint
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.report import svg
from asgd_mpi.report.follow import follow
from asgd_mpi.report.markdown import _plain

HOSTILE = (
    "\x1b[2J\x1b]0;owned\x07\u202egnp.\u2066\u200f\x9b31m\r\n| a | b |\n# head <script>alert(1)</script><img src=x onerror=y>"
    '" onload="z ![i](http://evil.example/x) [l](javascript:1) `code` $x^{2}_{$ www.evil.example @someone \ufeff\u2028'
)
RAW = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029\ufeff]"
)
RUN = Path(__file__).parents[1] / "runs" / "finished"
NAME = "run \u202e <b>$x$ |`"


@pytest.fixture
def hostile(tmp_path):
    """A run directory with a hostile name, and hostile text wherever a line, a setting or a version holds text."""
    path = tmp_path / NAME
    shutil.copytree(RUN, path)
    for file in (path / "metrics").iterdir():
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for facts in lines:
            facts.pop("crc32", None)
            facts.update(
                {
                    key: HOSTILE
                    for key, value in facts.items()
                    if isinstance(value, str) and key not in ("event", "role", "status", "phase")
                }
            )
        lines.append({"event": "note", "t": lines[-1].get("t", 1.0), "text": HOSTILE})
        lines.append(
            {"event": "refusal", "t": lines[-1]["t"], "rank": 1, "version": 1, "reason": HOSTILE}
        )
        lines.append(
            {
                "event": "retirement",
                "t": lines[-1]["t"],
                "rank": 1,
                "version": 1,
                "positions": 1,
                "reason": HOSTILE,
                "for_good": True,
            }
        )
        lines.append({"event": "end", "t": lines[-1]["t"], "status": "failed", "reason": HOSTILE})
        file.write_text("".join(json.dumps(facts) + "\n" for facts in lines))
    text = "".join(
        f"{section}:\n" + "".join(f"  {key}: {json.dumps(HOSTILE)}\n" for key in keys)
        for section, keys in {
            "model": ["name"],
            "data": ["path", "batch_size"],
            "run": ["epochs", "seed"],
            "rule": ["name", "momentum", "warm_start_epochs"],
            "schedule": ["lr"],
            "exchange": ["n_push", "n_fetch", "wire", "servers"],
            "stages": ["number", "cut"],
        }.items()
    )
    (path / "config.yaml").write_text(
        text + f"{json.dumps(HOSTILE)}:\n  {json.dumps(HOSTILE)}: 1\n"
    )
    (path / "versions.json").write_text(
        json.dumps({"torch": HOSTILE, HOSTILE: HOSTILE, "ranks": [{"host": HOSTILE}]})
    )
    (path / f"error.rank000{HOSTILE.replace('/', '')[:60]}.txt").write_text("x")
    return path


class Page(HTMLParser):
    """The tags and attributes that a browser would see."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}


def check_terminal(said):
    for text in said:
        assert not RAW.search(text), RAW.search(text)


def check_page(text):
    page = Page(text)
    assert not RAW.search(text) and not {"script", "img"} & page.tags
    assert not any(name.startswith("on") for name in page.attributes)


def check_markdown(text):
    assert not RAW.search(text) and "<script" not in re.sub(r"\\<", "", text)
    assert not re.search(r"(?<!\\)!?\[[^\]]*(?<!\\)\]\(", text) and not re.search(
        r"https?://|(?<!\\)@someone|www\.", text
    )
    assert not re.search(r"^# head", text, re.MULTILINE) and not re.search(r"(?<!\\)`code", text)


def test_a_report_of_a_hostile_run_shows_its_texts_and_obeys_none(hostile, capsys):
    assert report.main([str(hostile)]) == 0
    check_terminal(capsys.readouterr())
    check_page(without_own_script((hostile / "report" / "report.html").read_text()))
    check_markdown((hostile / "report" / "report.md").read_text())
    assert "\x1b" not in (hostile / "report" / "report.json").read_text()


def test_a_comparison_with_a_hostile_run_is_made(hostile, tmp_path, capsys):
    assert report.main([str(hostile), str(RUN), "--out", str(tmp_path / "both")]) == 0
    check_terminal(capsys.readouterr())
    check_page(without_own_script((tmp_path / "both" / "comparison.html").read_text()))
    check_markdown((tmp_path / "both" / "comparison.md").read_text())


def test_following_auditing_and_tracing_a_hostile_run_prints_no_sequence(hostile, tmp_path, capsys):
    follow(RunDir.open(hostile))
    report.main([str(hostile), "--audit"])
    assert report.main([str(hostile), "--trace", str(tmp_path / "trace.json")]) == 0
    check_terminal(capsys.readouterr())
    text = (tmp_path / "trace.json").read_text()
    assert not RAW.search(text) and json.loads(text)


def test_errors_about_hostile_names_are_one_line_without_a_sequence(
    hostile, tmp_path, digits, capsys
):
    directory = (
        write(tmp_path / NAME, 7) if not (tmp_path / NAME / "checkpoints").exists() else hostile
    )
    for verb in (
        lambda: plan.main([str(hostile)]),
        lambda: evaluate.main([str(directory), "--data", str(digits)]),
        lambda: report.main([str(hostile / HOSTILE[:20])]),
    ):
        status, said = verb(), capsys.readouterr()
        check_terminal(said)
        assert (
            status == 0
            or len([line for line in said.err.splitlines() if line.startswith("error: ")]) == 1
        )


def test_one_value_is_one_line_and_not_longer_than_is_read():
    assert "\n" not in one_line(HOSTILE) and not RAW.search(one_line(HOSTILE))
    assert len(one_line("x" * 10**6)) < LONGEST + 40 and "1000000 characters" in one_line(
        "x" * 10**6
    )
    assert (
        printable("a\udcffb") == "a\\udcffb" and printable("naïve 名前 🙂\n") == "naïve 名前 🙂\n"
    )
    assert (
        _plain("# a") == r"\# a"
        and _plain("1. a") == r"1\. a"
        and _plain("-5.0 %") == "-5.0 %"
        and _plain("n_push") == "n_push"
    )


def test_a_picture_shows_a_dollar_and_tags_of_a_name_as_they_are():
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(svg.SETTINGS):
        figure = Figure()
        figure.subplots().set_xlabel("$x^{2}_{$ <script> \u202e")
        text = svg.to_svg(figure, "one", '" onload="z')
    check_page(text)
    assert "$x^{2}_{$ &lt;script&gt; \\u202e" in text


def test_an_audit_of_a_run_that_claims_endless_epochs_ends(tmp_path, capsys):
    shutil.copytree(RUN, tmp_path / "run")
    start = {
        "event": "start",
        "t": 1.0,
        "rank": 9,
        "role": "worker",
        "host": "h",
        "device": "cpu",
        "num_workers": 3,
        "num_parameters": 1,
        "num_samples": 1,
        "total_samples": 10**14,
    }
    (tmp_path / "run" / "metrics" / "rank009.jsonl").write_text(json.dumps(start) + "\n")
    assert report.summarize(RunDir.open(tmp_path / "run")).total_samples < 10**14
    report.main([str(tmp_path / "run"), "--audit"])
    assert len(capsys.readouterr().out) < 10**5


# what is made printable before it is printed, or holds numbers alone
PRINTED = {
    "poc": 1,  # the progress line of a terminal
    "plan": 1,
    "replay": 1,
    "inspect": 1,
}
COMMANDS = ("evaluate", "poc", "simulate", "doctor", "plan", "replay")


def test_commands_print_names_and_texts_by_tell():
    root = Path(__file__).parents[2]
    files = [root / "asgd_mpi" / f"{name}.py" for name in COMMANDS]
    found = Counter(
        path.stem
        for path in [*files, *(root / "data_prep").glob("*.py")]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
        and not all(isinstance(argument, ast.Constant) for argument in node.args)
    )
    assert found == PRINTED, "print names out of files with asgd_mpi.errors.tell"


def test_evaluate_shows_what_a_manifest_says_and_obeys_nothing(tmp_path, digits, capsys):
    directory = write(tmp_path, 7)
    manifest = checkpoint.read_manifest(directory)
    manifest.data, manifest.model = "\x1b[2J", "digits_cnn"
    manifest.sha256 = manifest.seal()
    (directory / checkpoint.MANIFEST).write_bytes(msgspec.json.encode(manifest))
    evaluate.main([str(directory), "--data", str(digits)])
    said = capsys.readouterr()
    assert "trained on \\x1b[2J" in said.err and not RAW.search(said.out + said.err)

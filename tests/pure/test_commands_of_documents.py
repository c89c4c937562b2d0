"""Every command of the documents is run by a test, or it is said why not (tests/commands.tsv); those that cost little are run here."""

import contextlib
import io
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import shown
from test_documents import ROOT, WRITTEN, commands_in_text
from test_small_sets import cifar10

from data_prep import synthetic

# of runpy: what this process has imported is run anew
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")

TABLE = ROOT / "tests" / "commands.tsv"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
BLOCK = re.compile(r"^ *```bash\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
HEAD = re.compile(r"^ {4}((?:python|mpirun) .*)$", re.MULTILINE)
GIVEN = re.compile(r"[A-Z_]+=")
# What a reader puts in, here.
MEANT = {
    "RUN_DIR": "runs/first",
    "DIR": "runs/first",
    "runs/JOB": "runs/first",
    "TREE": "demo/tree",
    "/data/ILSVRC2012": "demo/archives",
    "/scratch/imagenet": "shards",
}


class Row(NamedTuple):
    page: str
    command: str
    state: str

    @property
    def is_run_here(self):
        return self.state.partition(" ")[0] in ("runs", "simulated")


def rows():
    lines = [line for line in TABLE.read_text().splitlines() if not line.startswith("#")]
    return [Row(*line.split("\t")) for line in lines[1:]]


def without_comment(line):
    """The command of a line; what its comment says is left out."""
    return re.sub(r"\s+# .*$", "", line).strip()


def all_shown():
    """Page and command of each line of a block of commands, of each in the text, and of the heads of the examples."""
    found = set()
    for page in (*WRITTEN, *EXAMPLES):
        if page.suffix == ".md":
            blocks = (block.replace("\\\n", " ") for block in BLOCK.findall(page.read_text()))
            lines = [line for block in blocks for line in block.splitlines()]
            lines += commands_in_text(page.read_text())
        else:
            lines = HEAD.findall(page.read_text().split('"""')[1])
        name = str(page.relative_to(ROOT))
        found |= {(name, " ".join(without_comment(line).split())) for line in lines}
    return {(page, command) for page, command in found if command}


def test_every_command_has_a_state_and_no_state_is_of_a_command_that_is_gone():
    listed = [(row.page, row.command) for row in rows()]
    assert len(listed) == len(set(listed))
    assert set(listed) == all_shown(), "write into tests/commands.tsv what becomes of it"


def test_the_tests_that_are_named_exist_and_what_is_not_run_has_a_reason():
    for row in rows():
        kind, _, rest = row.state.partition(" ")
        if kind == "test":
            file, _, name = rest.partition("::")
            words = f"def {name}(" if file.endswith(".py") else name
            assert words in (ROOT / file).read_text(), row
        elif kind == "not:":
            assert len(rest.split()) > 3, row
        else:
            assert row.is_run_here, row


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A directory as a reader has it: images of theirs, the classes of the page on one's own training, the examples."""
    text = (ROOT / "docs" / "own-training.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    own = [block for block in blocks if "(asgd_mpi.Task)" in block or "(asgd_mpi.Rule)" in block]
    assert len(own) == 2
    (tmp_path / "mine.py").write_text("import dataclasses\n" + "\n".join(own))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    synthetic.generate(Path("demo"), classes=2, train=4, val=2, width=64, height=48)
    yield tmp_path
    sys.modules.pop("mine", None)


def words_of(row, number):
    """The module of a command and its words, as they are run here."""
    kind, *added = row.state.split()
    put_in = MEANT | dict(word.split("=") for word in added if GIVEN.match(word))
    words = [put_in.get(word, word) for word in shlex.split(row.command) if word != "..."]
    words = [newest_checkpoint() if "/checkpoints/" in word else word for word in words]
    module, own = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
    if kind == "simulated":
        ranks = int(words[words.index("-np") + 1])
        own = ["--workers", str(ranks - 1), "--out", f"runs/simulated{number}", *own]
        module = "asgd_mpi.simulate"
    return module, own + [word for word in added if not GIVEN.match(word)]


def newest_checkpoint():
    return str(max(Path(MEANT["RUN_DIR"], "checkpoints").iterdir()))


def run(module, words):
    """Run a command in this process. Return its status and what it printed."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *words])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
                status = 0
            except SystemExit as end:
                status = end.code or 0
    return status, out.getvalue()


def test_the_commands_that_cost_little_do_what_the_pages_say(reader):
    """One after the other, in the order of the table, as somebody would type them."""
    wrong = []
    for number, row in enumerate(rows()):
        if row.is_run_here:
            module, words = words_of(row, number)
            status, said = run(module, words)
            if status:
                wrong.append(
                    f"{row.page}: {row.command}\n{module} {words}: {status}\n{said[-600:]}"
                )
    assert not wrong, "\n".join(wrong)
    made = (
        "runs/first/report/report.html",
        "t.json",
        "sheet.png",
        "slurm/train.sh",
        "shards",
        "data/mine",
    )
    assert all((reader / name).exists() for name in made)


# The blocks that show what a program prints, and the tests that compare them with it.
COMPARED = {
    "README.md": "mpi/test_train_mpi.py",
    "docs/get-started.md": "mpi/test_train_mpi.py",
    "docs/own-training.md": "pure/test_commands_of_documents.py",
    "docs/several-gpus.md": "mpi/test_stages_mpi.py",
    "docs/slurm.md": "slurm/test_slurm.py",
}


def test_what_a_page_shows_of_a_program_is_compared_with_what_it_prints():
    pages = [page for page in WRITTEN if shown.blocks(page)]
    assert {str(page.relative_to(ROOT)) for page in pages} == set(COMPARED)
    assert all(len(shown.blocks(page)) == 1 for page in pages)
    for page, test in COMPARED.items():
        text = (ROOT / "tests" / test).read_text()
        assert "shown.not_printed(" in text and Path(page).name in text, page


def test_a_line_that_a_program_can_no_longer_print_is_found():
    printed = " 25%   1,423 images/s, epoch 10.1, loss 0.049, 2 min 00 s left\n"
    block = printed.replace("1,423", "93").replace("2 min 00", "5")
    assert shown.not_printed(block, printed) == []
    for other in (block.replace("images", "samples"), block.replace(" left", ""), "report: x\n"):
        assert shown.not_printed(other, printed) == [other.rstrip("\n")]


def test_a_small_set_is_packed_and_its_dry_run_says_what_the_page_shows(tmp_path, monkeypatch):
    page = ROOT / "docs" / "own-training.md"
    [block], commands = shown.blocks(page), commands_in_text(page.read_text())
    [pack] = [line for line in commands if "data_prep.small" in line]
    [dry] = [line for line in commands if "data/cifar10" in line]
    monkeypatch.chdir(tmp_path)
    cifar10(tmp_path / "source")
    words = pack.replace("DIR", "source", 1).replace("DIR", "data/cifar10").split()
    assert run(words[2], words[3:])[0] == 0
    status, printed = run(dry.split()[2], [*dry.split()[3:], "--epochs", "5"])
    assert status == 0
    assert shown.not_printed(block, printed) == []

"""What the documents say: pages made from the code are current, links lead somewhere, and every command is one that is taken."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_limits_of_commands import COMMANDS

from asgd_mpi import evaluate, replay, report, simulate
from asgd_mpi.config import parse as configuration
from asgd_mpi.config.command_line import FirstParser

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MADE = ("options.md", "messages.md", "api.md")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
WRITTEN = [page for page in PAGES if page.name not in (*MADE, "contributing.md", "changes.md")]
NOT_RUN = re.compile(r"<!-- not run: \w.* -->\s*$")
# commands of others
OTHERS = {"pip", "git", "cd", "eval", ".", "python3", "zensical", "pipx", "pytest", "export"}
# what a script of slurm/ passes its options on to
SCRIPTS = {
    "train": "asgd_mpi.train",
    "train_het": "asgd_mpi.train",
    "doctor": "asgd_mpi.doctor",
    "data_prep": "data_prep.imagenet",
    "report": "asgd_mpi.report",
    "poc": "asgd_mpi.poc",
}


def maker():
    spec = importlib.util.spec_from_file_location("docs_make", DOCS / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_that_are_made_from_the_code_are_current():
    stale = [path.name for path, text in maker().made().items() if path.read_text() != text]
    assert not stale, f"{stale}: run `python docs/make.py`, and commit what it writes"


def test_every_error_that_is_raised_with_words_is_on_the_page_of_messages():
    page = (DOCS / "messages.md").read_text()
    assert page.count("\n- ") > 200
    assert "every process is in a world of …" in page  # of a string in parts
    assert "already holds a run (config.yaml)" in page
    assert "GPUs | rank … sees no GPU, others do | Ask for GPUs on every host" in page
    assert "- the report could not be made: …" in page


def test_every_error_says_what_to_do():
    make = maker()
    silent = [one for one in make.raised() if not make.says_what_to_do(one[1])]
    assert not silent, "add what to do, in a clause that begins with a verb of docs/make.py:DOING"
    silent = [row for row in make.found_by_doctor() if not make.says_what_to_do(row[2])]
    assert not silent
    assert not make.says_what_to_do("the file of … is damaged: 3 bytes of 5 are there")
    assert not make.says_what_to_do("… takes a directory, and … is a file")


def rows(page, title):
    """The cells of the table below a heading of a page."""
    part = page.read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_every_message_that_a_table_explains_is_one_that_is_printed_and_has_a_remedy():
    """Capitals stand for what is put in; the words between them are in the code, or in a script of Slurm."""
    files = [*(ROOT / "asgd_mpi").rglob("*.py"), *(ROOT / "slurm").glob("*.sh")]
    code = "\n".join(path.read_text() for path in files)
    code = " ".join(re.sub(r'"\s*f?"', "", code).split())
    ours = rows(DOCS / "troubleshooting.md", "Launchers and Slurm")
    assert len(ours) > 8
    for message, cause, do in ours:
        assert cause and do, message
        for quoted in re.findall("`([^`]+)`", message):
            for words in re.split(r"\b[A-Z1]\b|\.\.\.", quoted):
                assert words.strip() in code, f"{quoted}: nothing prints `{words.strip()}`"
    assert all(
        len(row) == 3 and all(row)
        for row in rows(DOCS / "troubleshooting.md", "Other programs' messages")
    )


def test_the_readme_is_short_and_holds_what_others_look_for():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 10_000
    for mark in ("train", "tests"):
        assert re.search(rf"<!-- {mark} -->\n```bash\n.*\n```\n<!-- end -->", text), mark
    assert "<!-- own loop -->" in text


def anchors(page):
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.is_relative_to(ROOT) and path.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(path), f"{page.name}: {target}"
        if page.parent == DOCS and path.suffix == ".md":
            assert path.parent == DOCS, f"{page.name}: {target} is not on the site"


def test_every_page_is_in_the_menu_of_the_site_once():
    def files(entries):
        for entry in entries:
            for what in entry.values():
                yield from files(what) if isinstance(what, list) else [what]

    listed = list(files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(listed) == sorted(path.name for path in DOCS.glob("*.md"))


def commands_of(page):
    """The commands in the blocks and in the text of a page, but those that are marked as not run."""
    text, found = page.read_text(), []
    for block in re.finditer(r"^( *)```bash\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        if not NOT_RUN.search(text[: block.start()]):
            found += block[2].replace("\\\n", " ").splitlines()
    return [line for line in (*found, *commands_in_text(text)) if line.strip()]


def commands_in_text(text):
    """The commands between backticks in what is not a block; a variable may stand before a script of slurm/."""
    rest = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    begins = r"python\s|mpirun\s|srun\s|sbatch\s|asgd-mpi\s|[A-Z]+=[^`]*\sslurm/"
    return [" ".join(span.split()) for span in re.findall(rf"`((?:{begins})[^`]+)`", rest)]


def meant(words):
    """Words as somebody would give them: letters that stand for numbers, and a file of settings that is there."""
    words = [word for word in words if word not in ("...", "…")]
    words = ["3" if re.fullmatch("[A-Z]", word) else word for word in words]
    for number, word in enumerate(words[:-1]):
        if word == "--config":
            words[number + 1] = "slurm/imagenet_alexnet.yaml"
    return ["slurm/imagenet_alexnet.yaml" if word == "CONFIG" else word for word in words]


def check(module, words):
    """Raise ConfigError unless a command takes these words."""
    if module == "asgd_mpi.train":
        configuration.parse(words)
    elif module == "asgd_mpi.poc" or "--" in words:
        cut = words.index("--") if "--" in words else len(words)
        COMMANDS[module][0]().read(words[:cut])
        configuration.parse(words[cut + 1 :])
    elif module in COMMANDS:
        parser = COMMANDS[module][0]()
        options = parser.read(words)
        if isinstance(parser, FirstParser):
            configuration.parse(options[1])
    else:  # without options, or with a parser of argparse
        assert importlib.util.find_spec(module), module


def check_line(line):
    """Check each command of a line of a shell."""
    words = shlex.split(line, comments=True)
    ends = [number for number, word in enumerate(words) if word in ("&&", ";", "|")]
    for first, last in zip([-1, *ends], [*ends, len(words)]):
        command = [word.removesuffix(";") for word in words[first + 1 : last]]
        while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):  # a variable
            del command[0]
        if not command or command[0] in OTHERS:
            continue
        script = next(
            (re.search(r"slurm/(\w+)\.sh$", word) for word in command if ".sh" in word), None
        )
        if script:
            assert (ROOT / script[0]).exists(), line
            own = command[command.index(next(word for word in command if script[0] in word)) + 1 :]
            if own and "..." not in own:
                # run and not submitted, it submits trainings
                module = SCRIPTS[script[1]] if command[0] == "sbatch" else "asgd_mpi.train"
                check(module, meant(own))
        elif "python" in command and "-m" in command[command.index("python") :]:
            place = command.index("-m", command.index("python"))
            module = command[place + 1]
            if module in ("pytest", "venv", "mpi4py") or module.startswith("data_prep..."):
                continue
            if re.fullmatch(r"[\w.]+", module) and not module.startswith("tests."):
                own = command[place + 2 :]
                if own and own != ["..."]:  # its name alone is spoken of
                    check(module, meant(own))
                else:
                    assert importlib.util.find_spec(module), line
        elif command[0] == "python":
            assert len(command) == 1 or (ROOT / command[1]).exists(), line
        else:
            assert command[0] in ("mpirun", "srun", "sbatch", "scontrol", "asgd-mpi"), line


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_every_command_on_a_page_is_one_that_is_taken(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    wrong = []
    for line in commands_of(page):
        try:
            check_line(line)
        except SystemExit as end:  # --help
            assert not end.code
        except Exception as error:
            wrong.append(f"{line}\n    {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


def test_the_commands_that_follow_a_training_do_what_the_pages_say(digits, tmp_path, capsys):
    """Those of docs/report.md, on a run of a simulation, which leaves what a training leaves."""
    run, data = tmp_path / "run", ["--data", str(digits)]
    options = ["--workers", "4", "--slow", "3x@2", "--epochs", "1", "--run.progress", "none"]
    assert simulate.main([*options, *data, "--out", str(run)]) == 0
    assert report.main([str(run)]) == 0 and (run / "report" / "report.html").exists()
    assert report.main([str(run), "--audit"]) == 0
    assert report.main([str(run), "--trace", str(tmp_path / "t.json")]) == 0
    newest = sorted((run / "checkpoints").iterdir())[-1]
    assert evaluate.main([str(newest), *data]) == 0
    assert replay.main([str(run), *data]) == 0
    assert "error" not in capsys.readouterr().err


def test_the_class_of_the_page_trains(tmp_path, monkeypatch):
    """docs/own-training.md: its file, and its dry run."""
    page = (DOCS / "own-training.md").read_text()
    [(name, code)] = re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / name).write_text(code)
    commands = commands_of(DOCS / "own-training.md")
    [command] = [line for line in commands if "mine:Line" in line and "--dry-run" in line]
    done = subprocess.run(
        [sys.executable, *shlex.split(command)[1:]],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "mine:Line on 4096 training and 1 validation sample" in done.stdout

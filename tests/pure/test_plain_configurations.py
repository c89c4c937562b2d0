"""A configuration holds settings and nothing else: no file of somebody else's imports code or reads other files."""

import sys

import pytest

from asgd_mpi.config import parse, written
from asgd_mpi.errors import ConfigError

BASE = written.to_yaml(parse.parse([]))
HARM = {
    "a class at the top": "class_path: harmful.C\n",
    "a class in a section": "run:\n  class_path: harmful.C\n",
    "a class in place of a section": "run:\n  class_path: harmful.C\n  init_args: {}\n",
    "its key in escapes": 'run:\n  "\\x63lass_path": harmful.C\n  "init_args": {}\n',
    "a section as text": "run: '{class_path: harmful.C, init_args: {}}'\n",
    "a section as JSON text": 'run: \'{"\\u0063lass_path": "harmful.C"}\'\n',
    "a value as text": "model:\n  name: '{class_path: harmful.C}'\n",
    "a value that is a class": "schedule:\n  lr: {class_path: harmful.C}\n",
    "another file": "config: other.yaml\n",
    "a section in another file": "run: other.yaml\n",
    "a tag": "run:\n  seed: !!python/object/apply:harmful.C []\n",
    "a dotted name": "run.class_path: harmful.C\n",
    "lists within lists": "model:\n  name: [[class_path]]\n",
    "far too long": "# " + "x" * (1 << 20) + "\n",
}


@pytest.fixture(autouse=True)
def harmful(tmp_path, monkeypatch):
    """A module whose import is seen."""
    (tmp_path / "harmful.py").write_text("class C:\n    pass\n")
    (tmp_path / "other.yaml").write_text("run:\n  class_path: harmful.C\n  init_args: {}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield
    assert sys.modules.pop("harmful", None) is None


@pytest.mark.parametrize("what", HARM)
def test_what_a_run_directory_holds_is_refused_before_anything_of_it_is_loaded(what):
    with pytest.raises(ConfigError):
        written.from_yaml(HARM[what])


@pytest.mark.parametrize("what", HARM)
@pytest.mark.parametrize("form", ["--config=c.yaml", "--config c.yaml"])
def test_a_file_of_the_command_line_is_refused_likewise_by_its_name(tmp_path, what, form):
    (tmp_path / "c.yaml").write_text(HARM[what])
    with pytest.raises(ConfigError, match="config"):
        parse.parse(form.split())


def test_settings_are_read_as_before(tmp_path):
    assert written.from_yaml(BASE) == parse.parse([])
    (tmp_path / "c.yaml").write_text(
        "run:\n  epochs: 3\nrule.momentum: 0.5\nexchange:\n  n_push: auto\n"
    )
    config = parse.parse(["--config", "c.yaml"])
    assert (config.run.epochs, config.rule.momentum, config.exchange.n_push) == (3, 0.5, "auto")

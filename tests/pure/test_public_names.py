"""What `import asgd_mpi` offers: a new name is a decision, each is told on the page of the API, and its examples run."""

import doctest
import inspect
import re
import sys
from pathlib import Path

import pytest

import asgd_mpi
from asgd_mpi import launched

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
NAMES = {
    "init": "",
    "Run": "batches is_alone log on_event should_stop step validate",
    "Task": "begin collate forward loss module prepare schedule score train_set val_set",
    "Rule": "apply_ average_ load_ read_",
    "train": "",
    "launch": "",
}


def things():
    """The public names, and what a user calls."""
    for name in asgd_mpi.PUBLIC:
        thing = getattr(asgd_mpi, name)
        yield name, getattr(launched, name) if inspect.ismodule(thing) else thing


def test_the_public_names_are_these_in_the_order_in_which_a_reader_wants_them():
    assert list(asgd_mpi.PUBLIC) == list(NAMES)
    assert set(NAMES) <= set(dir(asgd_mpi)) and callable(asgd_mpi.launch)
    for name, thing in things():
        told = re.findall(rf"^### {name}\.(\w+)", PAGE, re.MULTILINE)
        assert sorted(told) == NAMES[name].split()
        assert inspect.getdoc(thing) and all(inspect.getdoc(getattr(thing, one)) for one in told)
    assert re.findall(r"^## (\w+)", PAGE, re.MULTILINE) == list(NAMES)
    with pytest.raises(AttributeError, match="no attribute 'Worker'"):
        asgd_mpi.Worker  # noqa: B018


@pytest.mark.parametrize("name", ["init", "Task", "Rule", "train", "launch"])
def test_the_examples_of_docstrings_run(name):
    thing = dict(things())[name]
    examples = doctest.DocTestFinder(recurse=False).find(
        thing, name, module=sys.modules[thing.__module__]
    )
    assert sum(len(one.examples) for one in examples)
    runner = doctest.DocTestRunner()
    for one in examples:
        runner.run(one)
    assert not runner.failures

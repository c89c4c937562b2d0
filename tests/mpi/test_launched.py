"""Ranks that a script or a notebook starts (asgd_mpi.launch): what they find, what their errors become."""

import linecache
import sys
from types import ModuleType

import pytest
import torch

import asgd_mpi
from asgd_mpi import replay, report
from asgd_mpi.errors import ConfigError, RankFailed, RanksLost
from asgd_mpi.launched import source, start
from asgd_mpi.process import launchers

CELL = """
import math
import torch
from torch import nn
from torch.nn.functional import mse_loss as error
import asgd_mpi

FAILS, RATE, TABLE = 2, 0.1, {"rows": [64, 3]}
noise = torch.ones(3)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return TABLE["rows"][0]

    def __getitem__(self, row):
        return torch.full((3,), row / 64), torch.ones(1)


def network():
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def train():
    model = network()
    run = asgd_mpi.init(model, torch.optim.SGD(model.parameters(), lr=RATE))
    for number, (x, y) in enumerate(run.batches(Rows(), batch_size=4)):
        loss = error(model(x), y)
        loss.backward()
        run.step(loss)
        if run.rank == FAILS and number == 1 and not run.is_alone:
            raise ZeroDivisionError("my own fault")


def noisy():
    return math.exp(noise.sum())


@torch.no_grad()
class Line(asgd_mpi.Task):
    def train_set(self):
        return Rows()
"""


@pytest.fixture
def notebook(monkeypatch, tmp_path):
    """A notebook with CELL run in it, as IPython does it."""
    cell, main = CELL.replace("@torch.no_grad()\nclass", "class"), ModuleType("__main__")
    monkeypatch.setitem(
        linecache.cache, "<cell 1>", (len(cell), None, cell.splitlines(True), "<cell 1>")
    )
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.chdir(tmp_path)
    exec(compile(cell, "<cell 1>", "exec"), vars(main))
    return main


def test_the_source_of_a_cell_comes_with_what_it_uses_and_nothing_else(notebook):
    place = source.located(notebook.train)
    text = open(f"{place.directory}/train.py").read()
    for part in (
        "import asgd_mpi",
        "RATE = 0.1",
        "TABLE = {",
        "class Rows",
        "def network",
        "FAILS = 2",
    ):
        assert text.count(part) == 1, text
    assert (
        "__name__ = " not in text
        and "math" not in text
        and "noise" not in text
        and "class Line" not in text
    )
    written = {"__name__": "train"}
    exec(compile(text, "train.py", "exec"), written)
    assert torch.equal(written["network"]().weight, notebook.network().weight)
    place = source.located(notebook.Line)
    assert (place.module, place.name) == ("Line", "Line")
    assert "class Line(asgd_mpi.Task):" in open(f"{place.directory}/Line.py").read()


def test_what_other_processes_cannot_have_is_refused_by_its_name(notebook, monkeypatch):
    with pytest.raises(ConfigError, match="noise is a Tensor of this notebook.*Make noise within"):
        asgd_mpi.launch(notebook.noisy)
    with pytest.raises(ConfigError, match="<lambda> cannot be found by other processes"):
        asgd_mpi.launch(lambda: None)
    with pytest.raises(ConfigError, match="give module:function"):
        asgd_mpi.launch("train")
    with pytest.raises(ConfigError, match="learning_rate=...: there is no such option"):
        asgd_mpi.launch(notebook.train, learning_rate=1)
    notebook.Line.__init__ = lambda self, width: None
    with pytest.raises(ConfigError, match="every rank makes a Line of its own"):
        asgd_mpi.launch(notebook.Line(3))
    monkeypatch.setenv("PMI_SIZE", "3")
    assert launchers.starts_several()
    with pytest.raises(ConfigError, match="called on a rank, which starts no ranks"):
        asgd_mpi.launch(notebook.train)


def test_functions_and_tasks_are_found_by_their_modules():
    assert source.located(source.located) == ("", "asgd_mpi.launched.source", "located")
    assert source.located("a.b:c.d") == ("", "a.b", "c.d")


def test_an_error_of_a_rank_is_raised_here_and_its_run_replays(
    openmpi, notebook, monkeypatch, capfd
):
    for name, value in openmpi.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(start, "_mpirun", lambda ranks: [openmpi.mpirun, "-np", str(ranks)])
    with pytest.raises(
        RankFailed, match="rank 2: ZeroDivisionError: my own fault\\n\\nTrace"
    ) as said:
        asgd_mpi.launch(notebook.train, ranks=3, options={"run.dir": "run"}, epochs=2)
    assert "raise ZeroDivisionError" in str(said.value)
    assert "rank 2 is retired" in capfd.readouterr().out  # the others went on, and it was seen
    run = str(said.value.directory)
    assert run == "run" and report.main([run, "--audit"]) == 0
    script = f"{source.located(notebook.train).directory}/train.py"
    assert replay.main([run, "--script", script]) == 0
    assert "the same to the bit" in capfd.readouterr().out


def test_ranks_that_end_without_an_exception_are_told_by_what_they_said(
    notebook, monkeypatch, capfd
):
    monkeypatch.setattr(start, "_mpirun", lambda ranks: [])
    with pytest.raises(RanksLost, match="--schedule.lr -3"):
        asgd_mpi.launch(notebook.Line, lr=-3)
    assert "error: --schedule.lr -3" in capfd.readouterr().out

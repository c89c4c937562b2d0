"""The run for TensorBoard: what is written at which step, with a writer that is made up."""

import sys
from contextlib import ExitStack
from types import SimpleNamespace

import msgspec
import pytest
from test_report import BATCH, T0, make_pushes

from asgd_mpi.errors import ConfigError
from asgd_mpi.record.events import End, EventLog, Interval, Resume, Validation
from asgd_mpi.record.tensorboard import WRITERS, TensorBoard, find_writer
from asgd_mpi.runtime import prepare


class Writer:
    """In place of SummaryWriter."""

    made = []

    def __init__(self, path, purge_step=None):
        self.path, self.purge_step, self.scalars, self.is_closed = path, purge_step, [], False
        Writer.made.append(self)

    def add_scalar(self, name, value, step, walltime):
        self.scalars.append((name, value, step, walltime))

    def close(self):
        self.is_closed = True


@pytest.fixture(params=WRITERS)
def writers(request, monkeypatch):
    """The list of the writers that were made; one package has them, the other is not installed."""
    monkeypatch.setattr(Writer, "made", [])
    for name in WRITERS:
        monkeypatch.setitem(
            sys.modules,
            name,
            SimpleNamespace(SummaryWriter=Writer) if name == request.param else None,
        )
    return Writer.made


def test_an_interval_writes_the_means_of_its_pushes_at_the_samples_applied(writers, tmp_path):
    board, pushes = TensorBoard(tmp_path / "board"), make_pushes()[:6]
    log = EventLog(tmp_path / "log.jsonl", board.add)
    for push in pushes:
        log.write(push)
    log.write(Interval(T0, T0 + 2, apply=1.0, checkpoint=0.5, idle=0.5))
    log.write(Interval(T0 + 2, T0 + 3))  # without pushes
    [writer] = writers
    assert writer.path == str(tmp_path / "board")
    assert {step for _, _, step, _ in writer.scalars} == {6 * BATCH} and {
        t for *_, t in writer.scalars
    } == {T0 + 2}
    assert {name: value for name, value, *_ in writer.scalars} == {
        "training/loss": pytest.approx(sum(push.loss for push in pushes) / 6),
        "training/learning rate": pytest.approx(sum(push.lr for push in pushes) / 6),
        "exchange/images per s": 6 * BATCH / 2,
        "exchange/server busy": 0.75,
        "exchange/staleness": pytest.approx(sum(push.staleness for push in pushes) / 6),
    }


def test_images_that_were_left_out_are_samples_and_no_images(writers, tmp_path):
    board, push = TensorBoard(tmp_path), msgspec.structs.replace(make_pushes()[0], skipped=4)
    board.add(push)
    board.add(Interval(T0, T0 + 2, apply=1.0, idle=1.0))
    [writer] = writers
    told = {name: (value, step) for name, value, step, _ in writer.scalars}
    assert told["exchange/images per s"] == ((BATCH - 4) / 2, BATCH) and told["training/loss"][
        0
    ] == pytest.approx(push.loss)


def test_a_validation_is_written_at_its_own_samples_and_the_end_closes(writers, tmp_path):
    board = TensorBoard(tmp_path)
    board.add(Validation(T0, 3, 120, 1.0, 50, 0.25, 0.05, None))
    board.add(End(T0 + 1, "finished"))
    [writer] = writers
    assert writer.scalars == [
        ("validation/top-1 accuracy", 0.75, 120, T0),
        ("validation/top-5 accuracy", 0.95, 120, T0),
    ]
    assert writer.is_closed


def test_a_resumed_run_goes_on_at_its_samples_and_drops_what_was_forgotten(writers, tmp_path):
    board = TensorBoard(tmp_path)
    board.add(Resume(T0, 1, 0, 40, 400, 3, []))
    board.add(make_pushes()[0])
    board.add(Interval(T0, T0 + 1))
    [writer] = writers
    assert writer.purge_step == 400 + BATCH and {step for _, _, step, _ in writer.scalars} == {
        400 + BATCH
    }


def test_without_a_package_the_option_is_refused_before_the_run(monkeypatch, tmp_path):
    for name in WRITERS:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ConfigError, match=r"neither tensorboard nor tensorboardX.*asgd_mpi\[tensorboard\]"
    ):
        find_writer()
    monkeypatch.chdir(tmp_path)
    ranks = [{"host": "a", "gpus": []}] * 2
    with pytest.raises(ConfigError, match="neither tensorboard nor"):
        prepare.prepare(
            ["--record.tensorboard", "true", "--run.dir", "run"], ranks, None, ExitStack()
        )
    assert not (tmp_path / "run").exists()

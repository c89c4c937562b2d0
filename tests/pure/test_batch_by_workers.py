"""The batch and the rate that a run takes for many workers, when the user leaves both open."""

from contextlib import ExitStack

import pytest
from torch import nn

from asgd_mpi import simulate
from asgd_mpi.config import parse, written
from asgd_mpi.config.options import Recipe
from asgd_mpi.config.resolved import with_recipe
from asgd_mpi.config.rulebook import LEAST_BATCH, LEAST_PUSHES, batch_divisor
from asgd_mpi.runtime.prepare import prepare
from asgd_mpi.task import complete, for_workers, open_task

RECIPE = Recipe(4, 32, "none", 0.9, 0.0, "cosine", 0.4)


def divisor(num_workers, num_samples, *options, least=LEAST_BATCH):
    config = with_recipe(parse.parse(list(options)), RECIPE)
    return batch_divisor(config, num_workers, num_samples, least)


def test_more_workers_than_eight_have_no_more_under_way_than_eight_in_a_short_run():
    assert [divisor(n, 60_000) for n in (1, 8, 9, 16, 17, 32, 64)] == [1, 1, 2, 2, 4, 4, 8]
    # down to the least batch
    assert divisor(1000, 60_000) == 8 and divisor(32, 60_000, least=16) == 2
    assert divisor(32, 60_000, "--batch-size", "7") == 1


def test_a_run_in_which_every_worker_pushes_often_keeps_the_batch_of_its_recipe():
    epochs, images, workers = 4, 32, 16
    enough = LEAST_PUSHES * workers * images // epochs
    assert divisor(workers, enough) == 1 and divisor(workers, enough - 1) == 2


@pytest.mark.parametrize(
    "options",
    [
        ["--rule", "sync"],
        ["--rule", "softsync"],
        ["--rule", "sasgd"],
        ["--rule", "downpour"],
        ["--rule", "dc_asgd_c"],
        ["--rule", "nadamw"],
        ["--n-sync", "4"],
        ["--compute.micro_batches", "2"],
    ],
    ids=" ".join,
)
def test_what_was_not_measured_keeps_the_batch_of_its_recipe(options):
    assert divisor(32, 60_000) == 4 and divisor(32, 60_000, *options) == 1


def opened(digits, *options, num_workers=32):
    """The configuration of a run of the digits, and what is said of it."""
    asked = parse.parse(["--data", str(digits), "--epochs", "20", *options])
    task, told = for_workers(open_task(complete(asked)), asked, num_workers)
    return task.config, told


def test_the_batch_and_the_rate_are_divided_alike_and_said_unless_one_of_them_is_given(digits):
    config, [told] = opened(digits)
    assert (config.data.batch_size, config.schedule.lr) == (4, 0.005)
    assert "32 workers: batches of 4 at lr 0.005, not of 16 at 0.02" in told
    assert "each pushes 225 times only" in told and "--batch-size 16 --lr 0.02" in told
    for given in (["--batch-size", "16"], ["--lr", "0.02"]):
        config, told = opened(digits, *given)
        assert (config.data.batch_size, config.schedule.lr, told) == (16, 0.02, [])
    config, told = opened(digits, num_workers=8)
    assert (config.data.batch_size, config.schedule.lr, told) == (16, 0.02, [])


def test_the_rate_of_adamw_is_divided_by_the_root(digits):
    config, [told] = opened(digits, "--rule", "adamw")
    assert (config.data.batch_size, config.schedule.lr) == (4, 0.0005)
    assert "32 workers: batches of 4 at lr 0.0005, not of 16 at 0.001" in told


def test_a_run_that_goes_on_with_another_number_of_workers_keeps_its_batch(digits):
    config, _ = opened(digits)
    again = parse.parse([], base=written.asked(written.record(config, 32)))
    task, told = for_workers(open_task(complete(again)), again, 64)
    assert (task.config.data.batch_size, task.config.schedule.lr, told) == (4, 0.005, [])


def with_batch_norm(num_classes, channels):
    return nn.Sequential(nn.BatchNorm2d(channels), nn.Flatten(), nn.Linear(64, num_classes))


def test_a_network_with_batch_norm_has_batches_of_sixteen_or_more(digits):
    name = f"{__name__}:with_batch_norm"
    options = ["--model", name, "--model.recipe", "small_images", "--epochs", "20"]
    config, _ = opened(digits, *options, num_workers=64)
    assert (config.data.batch_size, config.schedule.lr) == (16, 0.0125)


def test_a_simulation_and_a_run_take_the_same_batch_and_say_so_before_they_begin(
    digits, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    options = ["--data", str(digits), "--epochs", "0.1", "--run.progress", "none"]
    out = tmp_path / "simulated"
    assert simulate.main([*options, "--workers", "32", "--out", str(out)]) == 0
    line = "32 workers: batches of 4 at lr 0.005, not of 16 at 0.02"
    assert line in capsys.readouterr().err
    ranks = [{"host": "here", "gpus": []} for _ in range(33)]
    with ExitStack() as hold:
        setup = prepare([*options, "--run.dir", str(tmp_path / "run")], ranks, None, hold)
    assert line in capsys.readouterr().out
    for text in (setup["config"], (out / "config.yaml").read_text()):
        config = written.from_yaml(text)
        assert (config.data.batch_size, config.schedule.lr) == (4, 0.005)

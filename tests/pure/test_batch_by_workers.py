"""The batch and the rate that a run takes for many workers, when the user leaves both open."""

from argparse import Namespace
from contextlib import ExitStack

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import asgd_mpi
from asgd_mpi import Task, plan, simulate
from asgd_mpi.config import parse, written
from asgd_mpi.config.options import Recipe
from asgd_mpi.config.resolved import with_recipe
from asgd_mpi.config.rulebook import LEAST_PUSHES, batch_divisor
from asgd_mpi.runtime import prepare as prepared
from asgd_mpi.runtime.prepare import as_given, configured, prepare
from asgd_mpi.task import complete, for_workers, open_task

RECIPE = Recipe(4, 32, "none", 0.9, 0.0, "cosine", 0.4)


def divisor(num_workers, num_samples, *options, least=1):
    config = with_recipe(parse.parse(list(options)), RECIPE)
    return batch_divisor(config, num_workers, num_samples, least)


def test_eight_workers_or_more_have_no_more_under_way_than_four_batches_or_128_images_in_a_short_run():
    assert [divisor(n, 60_000) for n in (1, 7, 8, 9, 16, 17, 64)] == [1, 1, 2, 4, 4, 8, 8]
    for images, found in ((16, [1, 2, 2, 4]), (64, [2, 4, 4, 8]), (512, [2, 4, 4, 8])):
        options = ["--batch-size", str(images), "--epochs", "1"]
        assert [divisor(n, 60_000, *options) for n in (8, 9, 16, 32)] == found
    # down to the least batch
    assert divisor(1000, 60_000) == 8 and divisor(32, 60_000, least=16) == 2
    assert divisor(32, 60_000, "--batch-size", "7") == 1


def test_adamw_of_eight_workers_or_more_has_no_more_under_way_than_two_down_to_one_image():
    adamw = ["--rule", "adamw"]
    found = [divisor(n, 6_000, *adamw) for n in (1, 7, 8, 9, 16, 17, 32, 64, 1000)]
    assert found == [1, 1, 4, 8, 8, 16, 16, 32, 32]
    assert divisor(64, 6_000, *adamw, least=2) == 16
    assert divisor(32, 6_000, "--rule", "asgd", "--rule.optimizer", "adamw") == 16


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
        ["--rule", "own_rule:Lion"],
        ["--n-sync", "4"],
        ["--compute.micro_batches", "2"],
    ],
    ids=" ".join,
)
def test_what_was_not_measured_keeps_the_batch_of_its_recipe(options):
    assert divisor(32, 60_000) == 8 and divisor(32, 60_000, *options) == 1


def opened(digits, *options, num_workers=32):
    """The configuration of a run of the digits, and what is said of it."""
    asked = parse.parse(["--data", str(digits), "--epochs", "20", *options])
    task, told = for_workers(open_task(complete(asked)), asked, num_workers)
    return task.config, told


def test_the_batch_and_the_rate_are_divided_alike_and_said_unless_one_of_them_is_given(digits):
    config, [told] = opened(digits)
    assert (config.data.batch_size, config.schedule.lr) == (4, 0.005)
    assert "32 workers: batches of 4 at lr 0.005 and max_drift 0.5, not of 16 at 0.02" in told
    assert config.rule.max_drift == 0.5
    assert "each pushes 225 times only" in told and "--batch-size 16 --lr 0.02" in told
    for given in (["--batch-size", "16"], ["--lr", "0.02"]):
        config, told = opened(digits, *given)
        assert (config.data.batch_size, config.schedule.lr, told) == (16, 0.02, [])
    config, told = opened(digits, num_workers=8)
    assert (config.data.batch_size, config.schedule.lr, told) == (16, 0.02, [])


def test_a_limit_of_drift_is_kept_if_it_is_given_and_otherwise_larger_by_the_root_of_the_divisor(
    digits,
):
    assert opened(digits, num_workers=16)[0].rule.max_drift == 0.354
    for given in (["--rule.max_drift", "0.25"], ["--rule.max_drift", "0"]):
        config, [told] = opened(digits, *given)
        assert config.rule.max_drift == float(given[1]) and "max_drift" not in told


def test_adamw_has_the_rate_divided_by_the_root_and_its_means_at_the_workers(digits):
    config, [told] = opened(digits, "--rule", "adamw", num_workers=8)
    assert (config.data.batch_size, config.schedule.lr, config.rule.momentum_at) == (
        4,
        5e-4,
        "dana",
    )
    assert config.rule.max_drift is None
    assert "8 workers: batches of 4 at lr 0.0005, AdamW's means kept by the workers, not of" in told
    assert "16 at 0.001 as the recipe has for one" in told and "4 times the exchanges" in told
    for few in (["--batch-size", "16", "--lr", "0.001"], ["--rule.momentum_at", "none"]):
        config, _ = opened(digits, "--rule", "adamw", *few, num_workers=8)
        assert config.rule.momentum_at == "none"
    # and where they would wait or be cut, or know too little
    for options in (["--rule", "ssp"], ["--stages", "2"], ["--epochs", "2"]):
        adamw = ["--rule", "asgd", "--rule.optimizer", "adamw"]
        config, told = opened(digits, *adamw, *options, num_workers=8)
        assert config.data.batch_size == 4 and config.rule.momentum_at == "none" and told


class Pairs(Task):
    """Its own batch and rate are those of one worker. A loss of pairs has no gradient for one sample."""

    options = {"rule.name": "adamw", "schedule.lr": 0.004, "data.batch_size": 16, "run.epochs": 4}
    compares = False

    def train_set(self):
        return TensorDataset(torch.linspace(-1, 1, 1024)[:, None])

    def module(self):
        return nn.Linear(1, 1)

    def loss(self, module, batch):
        found = module(batch[0])
        return (found - found.mean()).square().mean() + (0 if self.compares else found.mean())


class OfPairs(Pairs):
    compares = True


def own(kind, *options, num_workers=32, given=()):
    """The same of a task; `given`: what a call of asgd_mpi.train gives of its options."""
    arguments = [f"--task={__name__}:{kind.__name__}", *options]
    asked = configured(arguments)
    task = open_task(complete(asked))
    task.own.given = given
    task, told = for_workers(task, as_given(arguments, asked, task), num_workers)
    return task.config, told


def test_the_batch_and_the_rate_of_a_task_are_those_of_one_worker():
    config, [told] = own(Pairs)
    assert (config.data.batch_size, config.schedule.lr) == (1, 0.001)
    assert "32 workers: batches of 1 at lr 0.001, AdamW's means" in told
    assert "not of 16 at 0.004 as the task has for one" in told
    assert "To have the task's: --batch-size 16 --lr 0.004" in told
    # what is given is taken, if it is the same, too
    for options, given in (
        (["--lr", "0.004"], ()),
        (["--batch-size", "16"], ()),
        ([], ["schedule.lr"]),
    ):
        config, told = own(Pairs, *options, given=given)
        assert (config.data.batch_size, config.schedule.lr, told) == (16, 0.004, [])
    config, told = own(Pairs, num_workers=7)
    assert (config.data.batch_size, config.schedule.lr, told) == (16, 0.004, [])


def test_a_run_that_goes_on_is_not_told_that_its_batch_is_not_the_one_of_one_worker():
    config, _ = own(Pairs)
    task = Pairs()
    in_vain = prepared._said_in_vain(task, config)
    assert dict(in_vain) == {"rule.name": "adamw", "run.epochs": 4}
    task.given = ["schedule.lr"]
    assert prepared._said_in_vain(task, config) == Pairs.options
    alone, _ = own(Pairs, num_workers=1)
    assert prepared._said_in_vain(Pairs(), alone) == Pairs.options


def test_a_call_that_trains_a_task_says_what_it_gives(monkeypatch):
    def train(own, arguments):
        found.append((own.options["schedule.lr"], set(own.given)))
        raise SystemExit

    found = []
    monkeypatch.setattr("asgd_mpi.api.train", train)
    monkeypatch.setattr("asgd_mpi.api.demand_first", lambda: None)
    for short in ({}, {"lr": 0.5}):
        with pytest.raises(SystemExit):
            asgd_mpi.train(Pairs, **short)
    assert found == [(0.004, set()), (0.5, {"schedule.lr"})]


def test_a_loss_that_compares_samples_with_each_other_has_two_of_them():
    config, _ = own(OfPairs)
    assert (config.data.batch_size, config.schedule.lr) == (2, 0.004 / 8**0.5)


def test_a_run_that_goes_on_with_another_number_of_workers_keeps_its_batch(digits):
    config, _ = opened(digits)
    again = parse.parse([], base=written.asked(written.record(config, 32)))
    task, told = for_workers(open_task(complete(again)), again, 64)
    assert (task.config.data.batch_size, task.config.schedule.lr, told) == (4, 0.005, [])


def test_a_plan_names_the_batch_of_many_workers_if_the_run_is_one_of_few(digits, tmp_path):
    options = ["--data", str(digits), "--epochs", "0.1", "--rule", "adamw", "--run.progress=none"]
    for workers in (2, 8):
        out = str(tmp_path / str(workers))
        assert simulate.main([*options, "--workers", str(workers), "--out", out]) == 0
    asked = {"probe": None, "batch_size": None}
    [told] = plan._smaller_batches(Namespace(run_dir=[tmp_path / "2"], **asked), 8)
    assert "takes batches of 4" in told
    # the batch of that one has been divided
    assert plan._smaller_batches(Namespace(run_dir=[tmp_path / "8"], **asked), 32) == []


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
    line = "32 workers: batches of 4 at lr 0.005 and max_drift 0.5, not of 16 at 0.02"
    assert line in capsys.readouterr().err
    ranks = [{"host": "here", "gpus": []} for _ in range(33)]
    with ExitStack() as hold:
        setup = prepare([*options, "--run.dir", str(tmp_path / "run")], ranks, None, hold)
    assert line in capsys.readouterr().out
    for text in (setup["config"], (out / "config.yaml").read_text()):
        config = written.from_yaml(text)
        assert (config.data.batch_size, config.schedule.lr) == (4, 0.005)

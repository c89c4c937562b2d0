"""The command line and the files of a run's configuration."""

import dataclasses

import pytest

from asgd_mpi.config import options as configuration, parse, written
from asgd_mpi.config.resolved import with_recipe
from asgd_mpi.errors import ConfigError
from asgd_mpi.model import networks


def refused(*arguments):
    with pytest.raises(ConfigError) as caught:
        parse.parse(list(arguments))
    return str(caught.value)


def test_the_short_forms_of_the_readme_reach_their_fields():
    config = parse.parse(["--data", "DIR", "--model=alexnet", "--lr", "0.5", "--epochs", "3"])
    assert (config.data.path, config.model.name, config.schedule.lr, config.run.epochs) == (
        "DIR",
        "alexnet",
        0.5,
        3,
    )


def test_a_file_is_read_and_the_command_line_overrides_it(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("data:\n  batch_size: 7\nmodel:\n  name: resnet18\n")
    config = parse.parse(["--config", str(file), "--data.batch_size", "9"])
    assert (config.data.batch_size, config.model.name) == (9, "resnet18")


def test_what_is_written_to_the_run_directory_reads_back_the_same():
    arguments = ["--schedule.gamma", "0.25", "--n-sync", "3", "--exchange.n_fetch", "6"]
    config = with_recipe(parse.parse(arguments), networks.recipe("alexnet"))
    exchange = config.exchange
    assert (exchange.ring, exchange.n_push, exchange.n_fetch) == (3, 3, 6)
    assert (exchange.overlap, exchange.fetch_wire) == (False, "float32")
    again = written.from_yaml(written.to_yaml(config))
    assert configuration.settings(again) == configuration.settings(config)


def test_a_complete_configuration_holds_nothing_open_but_what_follows_from_the_ranks():
    for rule in configuration.RULES:
        config = with_recipe(parse.parse(["--rule", rule]), networks.DIGITS)
        found = {name for name, value in configuration.settings(config).items() if value is None}
        assert found == {"data.min_batch", "rule.max_drift", "rule.clip_norm"}
        settled = configuration.settings(written.in_force(config, num_workers=4))
        assert None not in settled.values()


def test_a_recipe_fills_in_only_what_was_left_open():
    config = with_recipe(parse.parse(["--lr", "0.125"]), networks.recipe("alexnet"))
    assert (config.schedule.lr, config.data.batch_size, config.rule.weight_decay) == (
        0.125,
        128,
        5e-4,
    )
    assert not [
        value
        for section in dataclasses.asdict(config).values()
        for name, value in section.items()
        if value is None
        and name
        not in ("image_size", "resize", "mean", "std", "min_batch", "max_drift", "clip_norm")
    ]


def test_an_unknown_option_is_named_with_the_one_that_was_meant():
    assert "unknown option --schedule.lrr. Did you mean --schedule.lr" in refused(
        "--schedule.lrr", "0.1"
    )


def test_an_unknown_key_of_a_file_is_named(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("data:\n  pth: x\n")
    assert "pth" in refused("--config", str(file))


def test_a_missing_file_is_named():
    assert "/no/such/file.yaml" in refused("--config", "/no/such/file.yaml")


@pytest.mark.parametrize(
    "option, value, part",
    [
        ("--schedule.lr", "fast", "float"),
        ("--data.batch_size", "0", "1 image or more"),
        ("--rule.momentum", "1.0", "below 1"),
        ("--data.augment", "blur", "paper"),
        ("--exchange.ring", "1", "at least 2"),
        ("--exchange.ring", "32", "31 at most"),
        ("--exchange.wire", "int3", "bfloat16"),
        ("--exchange.n_push", "0", "1 batch or more"),
        ("--exchange.n_push", "often", "auto"),
        ("--run.epochs", "-1", "more than 0"),
        ("--rule.name", "sgdd", "asgd"),
        ("--run.timeout_s", "0", "limit"),
    ],
)
def test_a_wrong_value_is_refused_with_the_option_and_the_reason(option, value, part):
    message = refused(option, value)
    assert option.removeprefix("--") in message and part in message


def test_settings_of_the_exchange_that_contradict_each_other_are_refused_with_the_reason():
    assert "a multiple of n_push (2)" in refused(
        "--exchange.n_push", "2", "--exchange.n_fetch", "3"
    )
    assert "needs the overlap" in refused(
        "--exchange.n_push", "auto", "--exchange.overlap", "false"
    )
    assert "every push fetches" in refused("--exchange.n_push", "auto", "--exchange.n_fetch", "3")

"""Values that cannot be meant: each is refused in one line that names the option, before anything is begun."""

import dataclasses
from contextlib import ExitStack

import pytest
from torch import nn

from asgd_mpi.config import limits
from asgd_mpi.config.resolved import with_recipe
from asgd_mpi.config import options as configuration, parse
from asgd_mpi.config.options import Config
from asgd_mpi.errors import ConfigError, UserError
from asgd_mpi.model import networks
from asgd_mpi.runtime.prepare import prepare

RANK = [{"host": "here", "gpus": []}]
FIELDS = {option: kinds for option, _, kinds in limits.values(Config())}
NUMBERS = [option for option, kinds in FIELDS.items() if {int, float} & {*kinds}]


def test_every_number_of_the_configuration_has_a_range():
    assert set(NUMBERS) == set(limits.RANGES)


@pytest.fixture
def parser(monkeypatch):
    """One for all calls: it takes longer to make than to use."""
    one = parse.make_parser()
    monkeypatch.setattr(parse, "make_parser", lambda: one)


def test_no_option_takes_nonsense_through_a_file_or_the_command_line_but_in_one_line_that_names_it(
    parser, tmp_path
):
    file = tmp_path / "wild.yaml"
    for number, option in enumerate(FIELDS):
        section, name = option.split(".")
        for place, value in enumerate(("", "[]", '"\\0"', "x" * 5000)):
            file.write_text(f"{section}:\n  {name}: {value}\n")
            # each option and each value both ways, but not each of their pairs: a call takes 12 ms
            given = (["--config", str(file)], [f"--{option}={value}"])[(number + place) % 2]
            try:
                parse.parse(given)
            except ConfigError as error:
                assert str(error).startswith(f"--{option} ") and "\n" not in str(error), error


def tiny(num_classes, channels):
    """In place of the network of the digits: its step before the run takes most of the time of a dry run."""
    return nn.Sequential(
        nn.Conv2d(channels, 2, 3, padding=1),
        nn.AdaptiveMaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )


@pytest.mark.parametrize("option", NUMBERS)
def test_a_number_is_refused_by_its_name_or_passes_the_dry_run(
    option, digits, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(networks.NETWORKS, "digits_cnn", (tiny, networks.DIGITS))
    for value in (float("nan"), float("inf"), -float("inf"), -1, 0, 1e-300, 7, 2**31 - 1, 10**30):
        if FIELDS[option][0] is int and not isinstance(value, int):
            continue
        config = _with(option, value, path=str(digits))
        monkeypatch.setattr(parse, "parse", lambda arguments: limits.check(config) or config)
        try:
            assert prepare([], RANK, None, ExitStack()) == {"status": 0}
        except UserError as error:
            # refuse other sizes
            others = (
                ("--data.augment shift ", "--model.name ") if option == "data.image_size" else ()
            )
            assert str(error).startswith((f"--{option} ", *others)) and "\n" not in str(error), (
                error
            )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option, value",
    [
        ("run.seed", -7),
        ("run.seed", 2**63),
        ("compute.threads", -3),
        ("schedule.step_epochs", 0.0),
        ("rule.weight_decay", -1e-9),
        ("data.image_size", 0),
        ("schedule.gamma", -0.1),
        ("schedule.warmup_epochs", -1.0),
        ("record.spans", -1),
    ],
)
def test_a_number_just_outside_of_its_range_is_refused(option, value):
    with pytest.raises(ConfigError, match=f"^--{option} "):
        limits.check(_with(option, value))


def test_a_section_that_is_no_section_and_a_key_without_a_value_are_named(tmp_path):
    file = tmp_path / "run.yaml"
    for text, part in (
        ("failure: 5\n", "failure is 5"),
        ("rule: [asgd]\n", "rule is"),
        ("record:\n", "record:"),
        ("", "--config"),
        ("stages:\n  cut:\n", "--stages.cut"),
        ("- x\n", "--config"),
        ("rule: {name: asgd\n", "parsing"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError) as caught:
            parse.parse(["--config", str(file)])
        assert part in str(caught.value) and "\n" not in str(caught.value)
    file.write_bytes("model:\n  weights: Gr\u00fc\u00dfe.pt\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        parse.parse(["--config", str(file)])
    file.write_text("model:\n  weights:\n")
    with pytest.raises(ConfigError, match="--model.weights"):
        parse.parse(["--config", str(file)])
    file.write_text("data:\n  image_size:\n")  # None is a value that it has
    assert parse.parse(["--config", str(file)]).data.image_size is None


@pytest.mark.parametrize("option", limits.PATHS)
def test_a_home_directory_and_a_variable_are_what_a_shell_makes_of_them(option, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.setenv("SCRATCH", "/fast")
    section, name = option.split(".")

    def parsed(path):
        return getattr(getattr(parse.parse([f"--{option}={path}"]), section), name)

    assert parsed("~/x/~") == "/somewhere/x/~"
    assert parsed("$SCRATCH/${HOME}") == "/fast//somewhere"
    assert parsed("a$b~") == "a$b~"
    for path in ("~nobody-of-that-name/x", "$NO_SUCH_VARIABLE/x"):
        with pytest.raises(ConfigError, match=f"^--{option} .*no such home"):
            parsed(path)


def test_spans_of_less_than_an_image_are_refused_once_the_data_set_is_known():
    config = with_recipe(
        parse.parse(["--schedule.name", "step"]),
        configuration.Recipe(2, 4, "none", 0, 0, "step", 0.1),
    )
    limits.check_with_data(config, 100)
    for section, changes in (
        ("run", {"epochs": 0.004}),
        ("schedule", {"step_epochs": 0.004}),
        ("schedule", {"gamma": 1e9, "step_epochs": 0.1}),
        ("run", {"epochs": 1e17}),
    ):
        changed = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **changes)}
        )
        with pytest.raises(ConfigError, match="^--"):
            limits.check_with_data(changed, 100)


@pytest.mark.parametrize(
    "text",
    [
        "slow:1.2.3x@rank1",
        "slow:0.5x@rank1",
        "kill@t=..s:rank1",
        f"raise@step{10**40}:rank1",
        "kill@rank٣",
    ],
)
def test_failures_to_rehearse_that_cannot_be_meant_are_refused(text, digits):
    with pytest.raises(ConfigError, match="^--run.inject "):
        prepare(
            ["--inject", text, "--data.path", str(digits), "--dry-run"], RANK, None, ExitStack()
        )


def test_a_failure_of_a_rank_that_is_not_there_is_refused(digits):
    with pytest.raises(ConfigError, match="ranks of this run are 0 to 1"):
        prepare(
            ["--inject", "kill@step3:rank2", "--data.path", str(digits), "--dry-run"],
            RANK * 2,
            None,
            ExitStack(),
        )


def _with(option, value, path="digits"):
    """What `parse` gives for a dry run with one value."""
    section, name = option.split(".")
    config = Config()
    config = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, dry_run=True),
        data=dataclasses.replace(config.data, path=path),
    )
    return dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **{name: value})}
    )

"""A rule of a user's own (asgd_mpi.Rule, --rule package.module:Class): whole, in slices, saved, replayed; what is refused."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

import asgd_mpi
from asgd_mpi import replay, simulate
from asgd_mpi.config import parse as configuration
from asgd_mpi.config import rulebook
from asgd_mpi.config.options import RuleConfig
from asgd_mpi.config.parse import long_names
from asgd_mpi.errors import ConfigError
from asgd_mpi.optim.rules import EMA, make_rule
from asgd_mpi.protocol.messages import Verdict
from asgd_mpi.vector.partition import PIECE, pieces

SIZE = PIECE + 48  # a piece, and a rest
EXAMPLES = Path(__file__).parents[2] / "examples"
NAMED = ["--rule", "own_rule:Lion"]


class NoRule:
    pass


class Fails(asgd_mpi.Rule):
    def __init__(self, *arguments):
        raise RuntimeError("my own fault")


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


def lion(num_parameters=SIZE, options="", **more):
    return make_rule(
        num_parameters, RuleConfig(own="own_rule:Lion", own_options=options, **more), 2
    )


def push_(rule, weights, gradient, step):
    verdict = Verdict(0.01, rate=0.02, step=step, samples=16 * step, count=16)
    for piece in pieces(len(weights)):
        rule.apply_(weights, gradient, verdict, piece)
        rule.average_(weights, verdict, piece)


def test_its_steps_are_those_of_the_paper_and_the_same_in_slices_to_the_bit():
    torch.manual_seed(0)
    weights, cut = torch.randn(SIZE), PIECE - 1024
    parts, x, mean = weights.clone(), weights.clone(), torch.zeros(SIZE)
    whole, first, second = lion(), lion(cut), lion(SIZE - cut)
    for step in range(1, 6):
        gradient = torch.randn(SIZE)
        push_(whole, weights, gradient, step)
        push_(first, parts[:cut], gradient[:cut], step)
        push_(second, parts[cut:], gradient[cut:], step)
        moved = torch.sign(0.9 * mean + 0.1 * gradient)
        x, mean = x - 0.01 * (moved + 0.1 * x), 0.99 * mean + 0.01 * gradient
    assert torch.equal(weights, parts)
    assert torch.allclose(weights, x, atol=1e-5)
    assert torch.equal(whole.state["mean"], torch.cat([first.state["mean"], second.state["mean"]]))
    again = lion()
    assert again.load_(whole.state) and torch.equal(again.state["mean"], whole.state["mean"])
    assert not lion().load_({})  # the ledger counts steps anew


@pytest.mark.parametrize("name", ["asgd", "sync", "dc_asgd_c", "diloco"])
def test_the_running_mean_of_the_weights_is_kept_under_every_rule(name):
    config = RuleConfig(
        name=name,
        momentum=0.0,
        weight_decay=0.0,
        dc_lambda=0.0,
        outer_rate=1.0,
        outer_ahead=0.5,
        ema_samples=10**6,
    )
    rule, weights = make_rule(48, config, 2), torch.ones(48)
    push_(rule, weights, torch.zeros(48), 0)
    assert torch.equal(rule.state[EMA], weights)


def test_its_options_are_those_of_its_dataclass_in_their_types():
    assert dataclasses.asdict(lion(16, "beta2=0.95, decay=0").options) == {
        "beta1": 0.9,
        "beta2": 0.95,
        "decay": 0.0,
    }
    with pytest.raises(ConfigError, match="no option beta3; give some of beta1, beta2, decay"):
        lion(16, "beta3=1")
    with pytest.raises(ConfigError, match="Expected `float`.*give values of the types of Settings"):
        lion(16, "beta1=high")
    with pytest.raises(ConfigError, match="beta1 has no value; give name=value"):
        lion(16, "beta1")


def test_a_name_with_a_colon_is_a_class_and_momentum_is_none_unless_it_is_asked_for():
    for words in (NAMED, ["--rule=own_rule:Lion"], ["--rule.name", "own_rule:Lion"]):
        config = configuration.parse(words)
        assert (config.rule.name, config.rule.own) == ("asgd", "own_rule:Lion")
    assert long_names({"rule": "own_rule:Lion"}) == {"rule.own": "own_rule:Lion"}
    assert rulebook.momenta(config.rule)[0] == "none"
    assert rulebook.max_drift(config.rule, 8) == 0


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ("test_own_rules:NoRule", "it must be a class that inherits from asgd_mpi.Rule"),
        ("test_own_rules:Fails", "cannot be made: RuntimeError: my own fault .*in __init__"),
        ("nowhere_to_be_found:Lion", "cannot be made: ModuleNotFoundError"),
        ("own_rule", "name a class as package.module:Class"),
    ],
)
def test_what_is_no_rule_is_told(own, words):
    with pytest.raises(ConfigError, match=words):
        make_rule(16, RuleConfig(own=own), 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rule.name", "sync", "--rule.own", "own_rule:Lion"], "take asgd, sasgd, ssp or ringm"),
        ([*NAMED, "--rule.optimizer", "adamw"], "without --rule.optimizer"),
        (["--rule.own_options", "beta=1"], "name it with --rule package.module:Class"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options, words):
    task = ["--task", "own_rule:Spirals", "--workers", "2"]
    with pytest.raises(ConfigError, match=words):
        simulate.main.__wrapped__([*task, *options])


def test_a_run_is_replayed_to_the_bit_by_who_names_the_rule_and_by_nobody_else(tmp_path, capsys):
    run, task = str(tmp_path / "run"), ["--task", "own_rule:Spirals"]
    assert simulate.main([*task, *NAMED, "--workers", "3", "--epochs", "2", "--out", run]) == 0
    sys.modules.pop("own_rule")
    assert replay.main([run, "--model", "own_rule:Spirals"]) == 2
    said = capsys.readouterr().err
    assert "names the rule own_rule:Lion" in said and "own_rule" not in sys.modules
    assert replay.main([run, "--model", "own_rule:Spirals", *NAMED]) == 0
    assert "64 pushes replayed, the weights are the same to the bit" in capsys.readouterr().out

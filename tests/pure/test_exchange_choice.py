"""What is chosen by measured links and steps: `--exchange.wire auto`, diloco's batches, and what planner and doctor name."""

import dataclasses
import functools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loops import make_task
from test_pace import completed

from asgd_mpi import plan
from asgd_mpi.config import exchange_choice, limits
from asgd_mpi.config.resolved import with_recipe
from asgd_mpi.config.exchange_choice import (
    ENOUGH,
    TRIED,
    Load,
    Measured,
    bytes_of_push,
    fetch_wire,
)
from asgd_mpi.config import options as configuration, parse, written
from asgd_mpi.errors import ConfigError
from asgd_mpi.model import networks
from asgd_mpi.offline.forecast import Costs
from asgd_mpi.offline.simulation import Times, simulate
from asgd_mpi.runtime import findings

P = 11_700_000
AUTO = ["--exchange.wire", "auto"]
DILOCO = ["--rule", "diloco", "--exchange.n_push", "auto"]


def link(megabits, step_s=0.1):
    return Measured(P, step_s, megabits * 1e6 / 8, megabits * 1e6 / 8)


@functools.cache
def config_of(*options):
    return completed(*options)


def chosen(measured, *options):
    return exchange_choice.chosen(config_of(*options), measured, 8).exchange


def test_the_share_of_steps_is_that_of_a_push_and_a_fetch_one_after_the_other():
    # 46.8 MB each way at 117 MB/s: 0.4 s and 0.4 s
    one = Measured(P, 0.2, 117e6, 117e6)
    float32 = Load("float32", 0.01)
    assert one.trip_s(float32) == pytest.approx(0.8)
    assert one.in_steps(float32, 1, overlap=False) == pytest.approx(0.2)
    assert one.in_steps(float32, 1, overlap=True) == pytest.approx(0.25)
    assert one.in_steps(float32, 4, overlap=True) == 1
    assert one.hiding(float32) == 4
    # a number in bfloat16 and its place in 12 bits, of one in a hundred; weights in bfloat16
    assert one.trip_s(Load("topk", 0.01)) == pytest.approx(0.2 + 0.2 * 0.0175)
    # half a byte and a byte for 4, and 1/256 for each of both
    narrow = Load("int4", 0.01, fetched="int8")
    assert one.trip_s(narrow) == pytest.approx(0.05 + 0.1 + 0.8 / 1024)
    # small parameters travel in float32 beside them, which only formats do that code the others
    small = dataclasses.replace(one, num_small=P // 10)
    assert small.trip_s(narrow) == pytest.approx(one.trip_s(narrow) + 2 * 0.04)
    assert small.trip_s(float32) == pytest.approx(0.8)


@pytest.mark.parametrize(
    "megabits, wire",
    [(math.inf, "float32"), (180_000, "float32"), (90_000, "bfloat16"), (60_000, "int8")],
)
def test_the_first_format_that_leaves_enough_time_is_chosen(megabits, wire):
    found = chosen(link(megabits), *AUTO)
    assert (found.wire, found.fetch_wire) == (wire, fetch_wire(wire))


def test_where_none_leaves_enough_the_one_that_leaves_most_is_chosen():
    assert chosen(link(100), *AUTO).wire == "topk"


def test_with_an_overlap_or_sums_a_slower_link_bears_float32():
    assert chosen(link(8_000), *AUTO).wire == "topk"
    assert chosen(link(8_000), *AUTO, "--exchange.overlap", "true").wire == "float32"
    assert chosen(link(2_000), *AUTO, "--exchange.n_push", "auto").wire == "float32"


@pytest.mark.parametrize(
    "options, wires",
    [
        (["--rule", "easgd"], ["float32"]),
        (["--rule", "adamw"], ["float32", "bfloat16"]),
        (["--rule.momentum_at", "server"], ["float32", "bfloat16", "int8", "int4"]),
        ([], list(TRIED)),
    ],
)
def test_only_formats_that_the_rule_bears_are_chosen(options, wires):
    found = {chosen(link(10.0**power), *AUTO, *options).wire for power in range(1, 9)}
    assert found <= set(wires) and chosen(link(1), *AUTO, *options).wire == wires[-1]


@settings(deadline=None, max_examples=50)
@given(st.floats(1e-3, 10), st.floats(0.1, 1e6), st.floats(1.0, 100.0))
def test_a_slower_link_never_gets_more_bytes_and_diloco_hides_what_travels(step, megabits, times):
    def wire(speed):
        return chosen(link(speed, step), *AUTO).wire

    assert bytes_of_push(wire(megabits), 0.01) <= bytes_of_push(wire(megabits * times), 0.01)
    measured = link(megabits, step)
    local = chosen(measured, *DILOCO, *AUTO)
    assert local.n_push == local.n_fetch >= 10 and local.overlap
    load = exchange_choice.load_of(local)
    assert measured.in_steps(load, local.n_push, overlap=True) == 1
    choice = exchange_choice.advise(measured)
    assert measured.in_steps(choice.load, choice.n_push, choice.overlap) >= ENOUGH


def test_nothing_is_left_open_and_a_resume_keeps_what_was_chosen():
    asked = completed(*DILOCO, *AUTO)
    first = exchange_choice.chosen(asked, link(20), 8)
    assert exchange_choice.is_open(asked) and not exchange_choice.is_open(first)
    limits.check(first)
    # the same command line again, on top of what the run has written down
    text = written.record(first, 8)
    old = written.asked(text)
    base = exchange_choice.before_choice(old, asked)
    again = parse.parse([*DILOCO, *AUTO], base=base)
    again = with_recipe(again, networks.DIGITS)
    assert exchange_choice.as_chosen_before(again, old).exchange == first.exchange
    # what was not left open then is not what is asked for now
    other = dataclasses.replace(asked, exchange=dataclasses.replace(asked.exchange, wire="int4"))
    assert exchange_choice.as_chosen_before(other, first).exchange.wire == "int4"
    different = {
        name
        for name, value in configuration.settings(asked).items()
        if value != configuration.settings(first)[name] and name != "exchange.fetch_wire"
    }
    assert different == {"exchange.wire", "exchange.n_push", "exchange.n_fetch"}
    assert "--exchange.wire float32 and --exchange.n_push 229" in exchange_choice.told(
        exchange_choice.chosen(completed(*DILOCO), link(36), 8), link(36)
    )


def test_the_batches_that_hide_a_trip_are_those_of_the_formats_that_were_asked_for():
    """46.8 MB at 4.5 MB/s: 10.4 s for a vector in float32, of a step of 100 ms."""
    found = {
        fetched: chosen(link(36), *DILOCO, "--exchange.wire=int4", *fetched).n_push
        for fetched in ((), ("--exchange.fetch_wire=float32",), ("--exchange.fetch_wire=int8",))
    }
    # 1.1 times 1/8 and 1/2, 1/8 and 1, 1/8 and 1/4
    assert list(found.values()) == [73, 130, 44]


def test_where_more_than_the_fewest_local_batches_are_needed_what_travels_is_narrower():
    assert exchange_choice.advise(link(600)).arguments.endswith(
        "--n-sync 10 --exchange.overlap true --exchange.wire int8"
    )
    choice = exchange_choice.advise(link(100))
    assert completed(*choice.arguments.split()).exchange.fetch_wire == "int8"
    assert link(100).hiding(Load("int8", 0.01)) > choice.n_push > 10


def test_planner_and_doctor_name_the_same_choice_for_the_same_link():
    measured = link(100)
    told = exchange_choice.advice_told(measured)
    assert "--rule diloco --n-sync 17 --exchange.overlap true --exchange.wire int4" in told
    # options that a training takes
    assert completed(*exchange_choice.advise(measured).arguments.split()).exchange.n_push == 17
    costs = Costs(32, 0.1, 0.001, 0.001, link_s=4 * P / 12.5e6)
    assert plan.advice(costs, P) == [f"for {told}"]
    assert plan.advice(dataclasses.replace(costs, link_s=0.0), P) == []
    assert plan.advice(costs.cut(2, 4), P) == []  # stages refuse what it names
    ranks = [findings.Rank(host, "Open MPI", "Open MPI", "multiple", 2) for host in ("a", "b")]
    far = findings.Link(1, "b", 1e-3, 12.5e6, 1e-3, 12.5e6)
    found = findings.Findings(
        ranks, 2, links=[far], need=findings.Need("resnet18", P, 3, 1, 1), step_s=0.1
    )
    [row] = findings._exchange(found)
    assert told in row.fact


def test_a_simulation_has_no_link_to_choose_by(digits):
    with pytest.raises(ConfigError, match="which a simulation does not have"):
        simulate(make_task(digits, *AUTO), 2, Times(0.1, 0.01, 0.01, 0.01))

"""The plan: identities of the model, its calibration, and the command on a recorded run."""

import json
import math
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_page import Reader
from test_report import raw

from asgd_mpi import plan
from asgd_mpi.offline import forecast
from asgd_mpi.offline.forecast import (
    Costs,
    Observation,
    _Simulation,
    calibrate,
    simulate,
    what_moves,
)
from asgd_mpi.pipeline.schedule import bubble, one_f_one_b, timeline
from asgd_mpi.record.events import Cut, Interval
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.report import planned

RUN = Path(__file__).parents[1] / "runs" / "finished"
# a knee of 12 workers
COSTS = Costs(batch=32, step_s=0.05, apply_s=0.004, fetch_s=0.003, travel_s=0.002, overhead_s=0.001)


def test_one_worker_pays_every_cost_in_turn_and_is_never_stale():
    found = simulate(COSTS, 1)
    assert found.images_per_s == pytest.approx(32 / (0.05 + 0.004 + 0.003 + 0.002 + 0.001))
    assert (found.staleness, found.staleness_max, found.wait_s) == (0, 0, pytest.approx(0))


@pytest.mark.parametrize(
    "changes, num_workers",
    [
        ({"n_push": 10**15}, 2),
        ({"n_push": 10**6, "n_fetch": 10**9}, 2),
        ({"n_push": "auto", "step_s": 1e-300}, 2),
        ({"n_push": "auto", "step_s": 1e-6}, 64),
        ({"n_push": "auto", "latency_s": 1e300}, 1),
        ({"n_push": "auto", "overlap": True, "apply_s": 100.0}, 8),
    ],
)
def test_settings_that_nobody_has_are_planned_in_as_few_events_as_others(
    changes, num_workers, monkeypatch
):
    done = {"events": 0, "steps": 0}

    def counted(what, call):
        def counting(*arguments):
            done[what] += 1
            assert done[what] < 1_000_000
            return call(*arguments)

        return counting

    monkeypatch.setattr(_Simulation, "_plan", counted("events", _Simulation._plan))
    monkeypatch.setattr(random.Random, "lognormvariate", counted("steps", random.Random.lognormvariate))  # fmt: skip
    found = simulate(replace(COSTS, spread=0.1, **changes), num_workers)
    assert found.images_per_s > 0 and math.isfinite(found.images_per_s)


@pytest.mark.parametrize("n_push", [200, 256, 257, 1000])
def test_many_batches_take_as_long_whether_they_are_drawn_one_by_one_or_as_a_sum(n_push):
    costs = replace(COSTS, n_push=n_push, spread=0.5, apply_spread=0.0)
    assert simulate(costs, 3).images_per_s == pytest.approx(3 * costs.alone, rel=0.01)


@pytest.mark.parametrize(
    "n_push, n_fetch, cycle_s",
    [
        (4, None, 4 * 0.05 + 0.004 + 0.003 + 0.002 + 0.001),
        (2, 8, 2 * 0.05 + 0.004 + 0.003 / 4 + 0.002 + 0.001),
    ],
)
def test_batches_of_a_push_share_its_costs_and_pushes_between_two_fetches_those_of_a_fetch(
    n_push, n_fetch, cycle_s
):
    found = simulate(replace(COSTS, n_push=n_push, n_fetch=n_fetch), 1)
    assert (
        found.images_per_s == pytest.approx(n_push * 32 / cycle_s, rel=1e-3)
        and found.batches == n_push
    )
    # own pushes, which the weights do not hold
    since_fetch = [0] if n_fetch is None else [0, 1, 2, 3]
    assert found.staleness == pytest.approx(sum(since_fetch) / len(since_fetch), abs=0.01)


def test_overlap_costs_the_longer_of_step_and_trip_and_makes_the_gradients_of_one_worker_stale():
    long, short = replace(COSTS, overlap=True), replace(COSTS, overlap=True, step_s=0.002)
    assert simulate(long, 1).images_per_s == pytest.approx(32 / 0.05)
    assert simulate(short, 1).images_per_s == pytest.approx(32 / (0.004 + 0.003 + 0.002 + 0.001))
    assert simulate(long, 1).staleness == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("num_workers", [1, 8, 100])
def test_n_push_auto_never_waits_and_sends_the_larger_pushes_the_fuller_the_server_is(num_workers):
    found = simulate(replace(COSTS, n_push="auto"), num_workers)
    assert found.images_per_s == pytest.approx(num_workers * 32 / 0.05, rel=0.01)
    # pushes at the server's pace
    assert found.batches == pytest.approx(max(1.0, num_workers * 0.005 / 0.05), rel=0.1)


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 64), st.integers(1, 80))
def test_servers_share_the_update_but_not_what_each_message_costs(num_servers, num_workers):
    """Equal servers without chance are each a server of a part of the vector."""
    alone = replace(COSTS, apply_s=COSTS.apply_s / num_servers, link_s=0.01 / num_servers)
    found = simulate(replace(COSTS, num_servers=num_servers), num_workers)
    assert found == simulate(replace(alone, link_s=0.0), num_workers)
    assert replace(COSTS, num_servers=num_servers, link_s=0.01).slowest_s == pytest.approx(
        alone.slowest_s
    )


def test_the_slowest_of_many_servers_is_waited_for():
    quiet = replace(COSTS, num_servers=32, apply_s=0.064, apply_spread=0.0)
    noisy = replace(quiet, apply_spread=1.0)
    assert simulate(noisy, 1).images_per_s < 0.95 * simulate(quiet, 1).images_per_s
    assert simulate(replace(noisy, num_servers=1), 1).images_per_s == pytest.approx(
        simulate(replace(quiet, num_servers=1), 1).images_per_s, rel=0.05
    )


def test_a_narrower_wire_and_more_servers_widen_a_link_that_is_the_limit():
    slow = replace(COSTS, link_s=0.04, latency_s=0.001)
    limits = [
        simulate(costs, 100).images_per_s
        for costs in (slow, replace(slow, wire="bfloat16"), replace(slow, num_servers=4))
    ]
    assert limits == pytest.approx([32 / 0.04, 32 / 0.02, 32 / 0.01], rel=1e-2)
    assert simulate(slow, 1).images_per_s == pytest.approx(
        32 / (COSTS.cycle_s + 2 * 0.04 + 2 * 0.001)
    )


@pytest.mark.parametrize("num_workers", [3, 6])
def test_below_the_knee_equal_workers_end_up_taking_turns_without_waiting(num_workers):
    found = simulate(COSTS, num_workers)
    assert found.images_per_s == pytest.approx(num_workers * 32 / COSTS.cycle_s, rel=0.01)
    assert found.staleness == pytest.approx(num_workers - 1, abs=0.5)


@pytest.mark.parametrize("num_workers", [24, 100, 1000])
def test_above_the_knee_the_server_sets_the_pace_and_staleness_is_workers_less_one(num_workers):
    found = simulate(COSTS, num_workers)
    assert found.images_per_s == pytest.approx(COSTS.limit) == pytest.approx(32 / 0.005)
    assert (found.queue_busy, found.server_busy, found.staleness) == (
        pytest.approx(1.0),
        pytest.approx(0.8),
        pytest.approx(num_workers - 1, rel=0.05),
    )


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 60), st.floats(0, 1), st.floats(0, 0.01))
def test_workers_equal_pushes_per_second_times_cycle_and_wait(num_workers, spread, travel_s):
    """Little's law: every worker is somewhere in its cycle, or waits."""
    costs = replace(COSTS, spread=spread, travel_s=travel_s)
    found = simulate(costs, num_workers)
    assert found.images_per_s / 32 * (costs.cycle_s + found.wait_s) == pytest.approx(
        num_workers, rel=0.1
    )
    assert (
        found.images_per_s <= costs.limit * 1.001
        and found.images_per_s <= 1.1 * num_workers * 32 / costs.cycle_s
    )


def test_a_link_slower_than_the_server_is_the_limit():
    found = simulate(replace(COSTS, link_s=0.01), 50)
    assert found.images_per_s == pytest.approx(
        32 / 0.01, rel=1e-3
    ) and found.queue_busy == pytest.approx(0.5, rel=0.01)


def test_the_same_seed_gives_the_same_outcome():
    noisy = replace(COSTS, spread=0.5)
    assert simulate(noisy, 9, seed=3) == simulate(noisy, 9, seed=3) != simulate(noisy, 9, seed=4)


def observed(costs, num_workers):
    """What a run with these costs would have measured: travel and overhead are not on any clock."""
    return Observation(
        replace(costs, travel_s=0.0, overhead_s=0.0),
        num_workers,
        simulate(costs, num_workers).images_per_s,
    )


def test_one_run_tells_the_travel():
    known = replace(COSTS, overhead_s=0.0)
    assert calibrate([observed(known, 1)]).travel_s == pytest.approx(known.travel_s, rel=0.01)


@pytest.mark.parametrize("overhead_s", [0.0, 0.001, 0.005])
def test_runs_of_two_sizes_tell_the_servers_overhead_and_so_the_sizes_between(overhead_s):
    known = replace(COSTS, overhead_s=overhead_s, travel_s=0.006)
    found = calibrate([observed(known, 1), observed(known, 20)])
    for num_workers in (2, 7, 14, 40):
        assert simulate(found, num_workers).images_per_s == pytest.approx(
            simulate(known, num_workers).images_per_s, rel=0.05
        )


def test_what_ranks_that_share_cores_cannot_compute_at_a_time_counts_for_each_batch_of_a_push():
    known = replace(COSTS, travel_s=0.0, overhead_s=0.0, shared_s=0.01)
    measured = Observation(
        replace(known, step_s=known.step_s + known.shared_s, shared_s=0.0),
        1,
        simulate(known, 1).images_per_s,
    )
    found = calibrate(
        [measured, replace(measured, num_workers=7, images_per_s=simulate(known, 7).images_per_s)]
    )
    for n_push in (1, 4):
        for num_workers in (1, 2, 7):
            assert simulate(
                replace(found, n_push=n_push), num_workers
            ).images_per_s == pytest.approx(
                simulate(replace(known, n_push=n_push), num_workers).images_per_s, rel=0.05
            )


def test_an_update_slowed_by_many_ranks_is_taken_from_the_larger_run():
    alone, crowded = replace(COSTS, overhead_s=0.0), replace(COSTS, apply_s=0.012, overhead_s=0.0)
    found = calibrate([observed(alone, 1), observed(crowded, 20)])
    assert found.apply_s == pytest.approx(0.012) and found.cycle_s == pytest.approx(
        alone.cycle_s, rel=0.01
    )
    assert simulate(found, 40).server_busy == pytest.approx(1.0, abs=0.05)
    assert simulate(found, 40).images_per_s == pytest.approx(32 / 0.012, rel=0.05)


@pytest.mark.parametrize("n_push", [1, 4])
def test_runs_with_several_batches_a_push_tell_the_same(n_push):
    known = replace(COSTS, n_push=n_push)
    found = calibrate([observed(known, 1), observed(known, 40)])
    for setting in (known, replace(known, n_push=8)):
        for num_workers in (2, 20, 80):
            assert simulate(
                replace(found, n_push=setting.n_push), num_workers
            ).images_per_s == pytest.approx(simulate(setting, num_workers).images_per_s, rel=0.05)


def test_a_larger_run_with_smaller_batches_is_fitted_and_missed_as_one_with_those_batches():
    known = replace(COSTS, overhead_s=0.003)
    quarter = replace(known, batch=8, step_s=known.step_s / 4)
    runs = [observed(known, 1), observed(replace(quarter, n_push=2), 20)]
    found = calibrate(runs)
    assert found.overhead_s == pytest.approx(0.003, rel=0.1)
    for setting in (known, replace(known, n_push=4)):
        for num_workers in (2, 20, 60):
            assert simulate(
                replace(found, n_push=setting.n_push), num_workers
            ).images_per_s == pytest.approx(simulate(setting, num_workers).images_per_s, rel=0.05)
    missed = planned.misses(found, runs)
    assert [abs(miss.share) < 0.01 for miss in missed] == [True, True]
    outcomes = [simulate(found, count) for count in (1, 40)]
    sure = planned.answers(found, outcomes, what_moves(found, 40), missed)[1]
    assert sure.state == "open" and "Their batches are of 8 to 32 samples" in sure.text


def test_what_moves_a_saturated_server_is_its_own_time_and_the_batch():
    moves = {name: (gain, knee) for name, gain, knee in what_moves(COSTS, 100)}
    assert moves["twice the batch, in steps twice as long"][0] == pytest.approx(1.0, abs=0.01)
    assert moves["the update twice as fast"] == (
        pytest.approx(5 / 3 - 1, abs=0.01),
        pytest.approx(58 / 3, rel=0.01),
    )
    assert moves["workers twice as fast"][0] == pytest.approx(0, abs=0.01)


def test_the_spread_of_steps_is_found_from_the_means_over_intervals():
    intervals = [
        Interval(0, 1, compute=10 * 0.1 + error, pushes=10) for error in (0.05, -0.05) * 20
    ]
    sums = [(interval.compute, interval.pushes) for interval in intervals]
    assert plan._spread(sums, 0.1) == pytest.approx(0.05 / math.sqrt(10) / 0.1)


def test_the_observation_of_a_run_is_that_of_its_raw_lines():
    lines = [
        line
        for rank in (1, 2, 3)
        for line in raw(RunDir(RUN).metrics_of(rank))
        if line["event"] == "interval"
    ]
    server = [line for line in raw(RunDir(RUN).metrics_of(0)) if line["event"] == "interval"]
    pushes = sum(line.get("pushes", 0) for line in lines)
    found = plan.observe(RunDir.open(RUN))
    assert found.num_workers == 3
    assert found.costs.batch == pytest.approx(sum(line.get("images", 0) for line in lines) / pushes)
    assert found.costs.step_s == pytest.approx(
        sum(line.get("data", 0) + line.get("compute", 0) for line in lines) / pushes
    )
    assert found.costs.apply_s == pytest.approx(
        sum(line.get("apply", 0) for line in server) / sum(line.get("pushes", 0) for line in server)
    )


def test_the_command_plans_from_a_recorded_run(tmp_path, capsys):
    assert (
        plan.main([str(RUN), "--workers", "1,3,64", "--link-gbit", "1", "--out", str(tmp_path)])
        == 0
    )
    printed = capsys.readouterr().out
    facts = json.loads((tmp_path / "plan.json").read_bytes())
    assert [row["num_workers"] for row in facts["predicted"]] == [1, 3, 64]
    assert facts["costs"]["link_s"] == pytest.approx(4 * 151312 * 8 / 1e9)
    assert f"the knee is at about {facts['knee_workers']:.0f} workers" in printed
    # of 24 images, a quarter
    assert "with 64 workers a training as short as this one" in printed
    assert "plan with --batch-size 6" in printed
    seen = Reader((tmp_path / "plan.html").read_text())
    asked, *rest = printed.splitlines()[0].split(". ", 1)
    assert (
        asked.startswith("How many workers? Up to ") and asked in seen.text and rest[0] in seen.text
    )
    assert "svg" in seen.tags and str(tmp_path / "plan.html") in printed
    # its own run, on the model without the link: all of it is exact but the queues' chance
    [miss] = facts["calibration"]
    assert miss["measured"] == pytest.approx(plan.observe(RunDir.open(RUN)).images_per_s)
    assert miss["predicted"] == pytest.approx(miss["measured"], rel=0.02)


def test_the_command_plans_for_other_settings(tmp_path, capsys):
    options = [
        "--workers",
        "1,512",
        "--servers",
        "64",
        "--wire",
        "int8",
        "--link-gbit",
        "1",
        "--n-push",
        "4",
        "--n-fetch",
        "8",
        "--overlap",
        "--step-ms",
        "100",
        "--batch-size",
        "64",
        "--spread",
        "0.1",
        "--link-latency-us",
        "20",
    ]
    assert plan.main([str(RUN), *options, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "64 servers share it" in printed
    costs = json.loads((tmp_path / "plan.json").read_bytes())["costs"]
    asked = {
        "num_servers": 64,
        "wire": "int8",
        "n_push": 4,
        "n_fetch": 8,
        "overlap": True,
        "step_s": 0.1,
        "batch": 64,
        "spread": 0.1,
        "latency_s": 2e-5,
    }
    assert {name: costs[name] for name in asked} == pytest.approx(asked)


def test_a_link_carries_a_push_and_a_fetch_in_the_formats_of_the_run():
    costs = replace(COSTS, link_s=4.0)
    assert (costs.sent_s, costs.read_s) == (4.0, 4.0)
    narrow = replace(costs, wire="float16")
    assert (narrow.sent_s, narrow.read_s) == (2.0, 2.0)
    sparse = replace(costs, wire="topk", density=0.01)
    assert (sparse.sent_s, sparse.read_s) == (pytest.approx(0.035), 2.0)
    assert replace(sparse, fetch_wire="float32").read_s == 4.0
    # what becomes of a run that fetches int8, if it pushes bfloat16: it goes on to fetch int8
    narrow = replace(COSTS, link_s=4.0, fetch_wire="int8")
    [(_, change)] = [one for one in forecast.CHANGES if "--exchange.wire bfloat16" in one[0]]
    assert change(narrow).read_s == narrow.read_s == pytest.approx(1 + 1 / 256)
    assert change(replace(narrow, fetch_wire="float32")).read_s == 2.0
    assert simulate(sparse, 1).images_per_s > 1.5 * simulate(costs, 1).images_per_s


def told(observations, counts=(1, 2, 4)):
    """The three answers of a plan from made-up runs."""
    calibrated = calibrate(observations)
    outcomes = [simulate(calibrated, count) for count in counts]
    missed = planned.misses(calibrated, observations)
    moves = what_moves(calibrated, counts[-1])
    return planned.answers(calibrated, outcomes, moves, missed)


def seen_runs(**rates):
    """Runs of so many workers, as fast as COSTS has them but for those given."""
    rate = {n: simulate(COSTS, n).images_per_s for n in (1, 2, 4)}
    rate |= {int(name.removeprefix("n")): value for name, value in rates.items()}
    return [Observation(replace(COSTS, travel_s=0.0, overhead_s=0.0), n, rate[n]) for n in rate]


def test_a_plan_whose_limit_is_one_worker_says_so_of_one_worker():
    costs = replace(COSTS, apply_s=20 * COSTS.step_s)
    assert round(costs.knee) == 1
    runs = [Observation(costs, n, simulate(costs, n).images_per_s) for n in (1, 2, 4)]
    many, _, moves = told(runs)
    assert "From about 1 worker on, " in many.text
    assert moves.text.endswith("is then at about 1 worker.")


def test_the_plan_says_first_how_far_it_misses_the_runs_that_it_was_calibrated_with():
    many, sure, moves = told(seen_runs())
    assert sure.state == "good" and (many.short, many.state) == ("Up to 4 and more", "good")
    middle = simulate(COSTS, 2).images_per_s
    _, sure, _ = told(seen_runs(n2=middle / 1.3))
    assert sure.state == "bad" and re.fullmatch(r"Off by (29|30|31) % at worst", sure.short)
    assert re.search(r"1 worker: [+-]0 %; 2 workers: \+(29|30|31) %; 4 workers: [+-]0 %", sure.text)


def test_a_plan_from_one_size_or_far_beyond_its_runs_is_no_sure_one():
    _, sure, _ = told(seen_runs()[:1], counts=(1, 4))
    assert sure.state == "open" and "do not show what workers share" in sure.text
    _, sure, _ = told(seen_runs(), counts=(1, 64))
    assert sure.state == "open" and "64 workers are 16 times as many as were measured" in sure.text


def test_the_plan_says_up_to_which_number_a_worker_is_worth_its_gpu_and_what_would_move_that():
    many, _, moves = told(seen_runs(), counts=(1, 8, 16, 64))  # the knee is at 12
    assert many.short == "Up to 16" and "images/s is the limit (the queue's" in many.text
    assert "With 64 it is" in many.text and moves.text.startswith("Expected: +")
    best = what_moves(calibrate(seen_runs()), 64)[0]
    assert moves.short.lower() == best[0].lower() and f"{100 * best[1]:+.0f} %" in moves.text


@pytest.mark.parametrize("wire", ["bfloat16", "float16"])
def test_the_wire_formats_of_a_training_are_no_future_and_that_of_the_run_is_taken(
    tmp_path, capsys, wire
):
    shutil.copytree(RUN, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("  ring: 3", f"  ring: 3\n  wire: {wire}"))
    assert (
        plan.main([str(tmp_path / "run"), "--link-gbit", "1", "--out", str(tmp_path / "plan")]) == 0
    )
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "plan" / "plan.json").read_bytes())["costs"]["wire"] == wire
    assert "of the model only" not in printed and "2 bytes a number" not in printed
    assert (
        plan.main(
            [
                str(tmp_path / "run"),
                "--link-gbit",
                "1",
                "--wire",
                "float32",
                "--out",
                str(tmp_path / "plan"),
            ]
        )
        == 0
    )
    assert "2 bytes a number on the links (--exchange.wire bfloat16): +" in capsys.readouterr().out


def test_a_replica_of_stages_is_faster_by_their_number_less_the_bubble_and_the_balance():
    for stages, parts, balance in ((1, 1, 1.0), (2, 1, 1.0), (2, 4, 1.0), (4, 8, 0.8)):
        found = replace(COSTS, spread=0.0).cut(stages, parts, balance)
        assert found.bubble == bubble(stages, parts)
        seconds = [COSTS.step_s / stages / parts / 3] * (stages - 1) + [
            COSTS.step_s / stages / parts / balance / 3
        ]
        passes = timeline(one_f_one_b, seconds, [2 * each for each in seconds], parts)
        slowest = max(stage[-1].stop for stage in passes)
        assert found.step_s >= slowest - 1e-12 and (
            balance < 1 or found.step_s == pytest.approx(slowest)
        )
        assert found.num_ranks(7) == 1 + 7 * stages
        assert found.cut(1, 1).step_s == pytest.approx(COSTS.step_s)
    apart = replace(COSTS, apply_s=0.0, fetch_s=0.0, travel_s=0.0, overhead_s=0.0)
    assert simulate(apart.cut(4, 4), 1).images_per_s == pytest.approx(
        4 * 4 / 7 * simulate(apart, 1).images_per_s
    )


def test_the_command_plans_for_stages(tmp_path, capsys):
    assert (
        plan.main(
            [
                str(RUN),
                "--workers",
                "1,4",
                "--stages",
                "4",
                "--micro-batches",
                "8",
                "--balance",
                "0.9",
                "--step-ms",
                "100",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    printed, facts = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_bytes())
    assert facts["ranks"] == [5, 17] and facts["bubble"] == pytest.approx(3 / 11)
    assert facts["costs"]["step_s"] == pytest.approx(0.1 * 11 / 8 / 4 / 0.9)
    assert (
        "a worker is 4 stages, each on a GPU: a step takes 38 % of that of one GPU (100 ms)"
        in printed
    )
    assert (
        re.search(r"(?m)^ +4 +17 ", printed)
        and "twice the micro-batches (--compute.micro_batches): +" in printed
    )


@pytest.mark.parametrize(
    "options, part",
    [
        (["--servers", "65"], "from 1 to 64 servers"),
        (["--servers", "0"], "from 1 to 64 servers"),
        (["--n-push", "x"], "1 batch or more"),
        (["--n-push", "4", "--n-fetch", "6"], "multiple"),
        (["--balance", "1.5"], "1 or less"),
        (["--stages", "2", "--overlap"], "cannot overlap"),
        (["--step-ms", "-1"], "above 0"),
        (["--probe"], "not both"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, part, tmp_path, capsys):
    assert plan.main([str(RUN), *options, "--out", str(tmp_path)]) == 2
    assert part in capsys.readouterr().err


def test_a_run_that_hides_its_pushes_cannot_calibrate(tmp_path, capsys):
    shutil.copytree(RUN, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("  ring: 3", "  ring: 3\n  overlap: true"))
    assert plan.main([str(tmp_path / "run"), "--out", str(tmp_path / "plan")]) == 2
    assert "hides what a push costs" in capsys.readouterr().err
    config.write_text(config.read_text().replace("  overlap: true", "  servers: 2"))
    assert plan.main([str(tmp_path / "run"), "--out", str(tmp_path / "plan")]) == 2
    assert "had several servers" in capsys.readouterr().err
    plain = (RUN / "config.yaml").read_text()
    config.write_text(plain.replace("rule:\n", "rule:\n  steps_by_speed: true\n"))
    assert plan.main([str(tmp_path / "run"), "--out", str(tmp_path / "plan")]) == 2
    assert "as each worker's speed allowed" in capsys.readouterr().err
    config.write_text(plain)
    with open(tmp_path / "run" / "metrics" / "rank000.jsonl", "ab") as metrics:
        metrics.write(
            msgspec.json.encode(Cut(0.0, 2, 1, "columns", 0.0, ["lower.0.0", "lower.1.0"])) + b"\n"
        )
    assert plan.main([str(tmp_path / "run"), "--out", str(tmp_path / "plan")]) == 2
    assert "had a network in columns" in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["", "1,x", "0,2", "5000"])
def test_numbers_of_workers_that_make_no_sense_are_refused(workers, tmp_path, capsys):
    assert plan.main([str(RUN), "--workers", workers, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: --workers {workers}")


def test_a_long_list_of_workers_is_refused_before_it_is_played(tmp_path, capsys):
    many = ",".join(map(str, range(1, 1000)))
    assert plan.main([str(RUN), "--workers", many, "--out", str(tmp_path / "plan")]) == 2
    said = capsys.readouterr().err
    assert "these are 999 numbers" in said and "give 64 at most" in said and len(said) < 400
    assert not (tmp_path / "plan").exists()
    few = ",".join(["1", "2"] * 1000)  # each is played once
    assert plan.main([str(RUN), "--workers", few, "--out", str(tmp_path / "plan")]) == 0


def test_a_run_without_pushes_cannot_calibrate(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("")
    assert plan.main([str(tmp_path), "--out", str(tmp_path / "plan")]) == 2
    assert "nothing to calibrate with" in capsys.readouterr().err

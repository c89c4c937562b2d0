"""Several runs side by side: the fit, the time to an accuracy, the cost, the page."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_page import Reader, without_own_script
from test_report import T0, make_pushes, make_run

from asgd_mpi import report
from asgd_mpi.record.summary import summarize
from asgd_mpi.report import comparison
from asgd_mpi.report.answers import compared
from asgd_mpi.report.compare import Fit, compare, fit
from asgd_mpi.report.comparison import page


def make_summary(path, num_workers, images_per_s, errors, **changes):
    """A run of `num_workers` whose k-th validation, at k seconds and k * 100 samples per worker, has the k-th error."""
    summary = summarize(
        make_run(path / f"run{num_workers}", make_pushes(), validations=len(errors))
    )
    for number, (score, error) in enumerate(zip(summary.validations, errors), start=1):
        score.made, score.samples, score.epoch, score.top1_error = (
            T0 + number,
            100 * number * num_workers,
            float(number),
            error,
        )
    starts = [
        msgspec.structs.replace(start, num_workers=num_workers, num_computing=num_workers)
        for start in summary.restarts
    ]
    return msgspec.structs.replace(
        summary, num_workers=num_workers, images_per_s=images_per_s, restarts=starts, **changes
    )


@pytest.fixture
def summaries(tmp_path):
    return [
        make_summary(tmp_path, 4, 320.0, [0.4, 0.1, 0.05]),
        make_summary(tmp_path, 1, 100.0, [0.5, 0.3, 0.2, 0.1]),
    ]


@given(st.floats(1e-4, 1.0), st.floats(1e-6, 1.0))
def test_the_fit_finds_the_law_that_made_the_numbers(worker_s, shared_s):
    law = Fit(worker_s, shared_s)
    found = fit([(n, law.images_per_s(n)) for n in (1, 2, 4, 8, 16)])
    assert (
        found.limit == pytest.approx(1 / shared_s, rel=1e-3)
        or found.shared_s < 1e-3 * worker_s / 16
    )
    assert [found.images_per_s(n) for n in (1, 5, 16)] == pytest.approx(
        [law.images_per_s(n) for n in (1, 5, 16)], rel=1e-4
    )


def test_the_half_gain_is_where_the_slope_is_half_of_the_first():
    law = Fit(0.01, 0.0005)
    n, step = law.half_gain_workers, 1e-4
    slope = (law.images_per_s(n + step) - law.images_per_s(n)) / step
    first = 1 / law.worker_s  # the slope at no workers
    assert slope / first == pytest.approx(0.5, rel=1e-3)


def test_runs_in_proportion_show_no_limit_and_fewer_than_three_numbers_of_workers_no_fit():
    assert (
        fit([(1, 100.0), (2, 200.0), (4, 400.0)]).limit is None
        or fit([(1, 100.0), (2, 200.0), (4, 400.0)]).limit > 1e9
    )
    assert fit([(1, 100.0), (2, 230.0), (3, 350.0)]).limit is None
    assert (
        fit([(3, 100.0), (3, 110.0)]) is None
        and fit([(1, 100.0), (1, 99.0), (4, 350.0), (4, 340.0)]) is None
    )


def test_workers_that_bring_nothing_give_a_flat_fit():
    found = fit([(1, 100.0), (2, 95.0), (4, 90.0)])
    assert found.images_per_s(1) == found.images_per_s(100) == pytest.approx(95, abs=1)


def test_speed_up_and_efficiency_are_against_the_run_with_one_worker(summaries):
    small, large = compare(summaries).entries
    assert (small.num_workers, small.speedup, small.efficiency) == (1, 1.0, 1.0)
    assert (large.speedup, large.efficiency) == (3.2, 0.8)


def test_the_time_to_a_target_is_samples_over_images_per_second(summaries):
    found = compare(summaries)
    assert found.target == pytest.approx(0.9)  # the best that both reach
    small, large = (entry.reached for entry in found.entries)
    assert (small.seconds, small.samples, small.images_per_s) == (4.0, 400, 100.0)
    assert (large.seconds, large.samples, large.images_per_s) == (2.0, 800, 400.0)
    assert (
        "4.00 times the images/s, 2.00 times the samples to that accuracy, so 2.00 times as fast"
        in " ".join(found.sentences)
    )


def test_the_cost_to_a_target_is_that_of_the_gpus_until_then(summaries):
    entries = compare(summaries, price_per_gpu_hour=3600.0).entries
    assert [entry.reached.cost for entry in entries] == [1 * 4.0, 4 * 2.0]


def test_a_target_that_a_run_misses_is_said(summaries):
    found = compare(summaries, target=0.93)
    assert [entry.reached is not None for entry in found.entries] == [False, True]
    assert "Not reached by run1." in found.sentences


def test_other_settings_that_differ_are_named(summaries):
    summaries[0].settings = summaries[0].settings | {"run.seed": 4}
    assert compare(summaries).differences == {"run.seed": ["3", "4"]}
    assert "run.seed: 3, 4" in Reader(page(compare(summaries), summaries)).text


def make_kinds(path, **lr):
    """One worker, and 2 and 4 of both rules, as a poc trains them; `lr`: by rule and number of workers."""
    kinds = [("asgd", 1), ("asgd", 2), ("asgd", 4), ("sync", 2), ("sync", 4)]
    return [
        make_summary(
            path / f"{rule}{number}",
            number,
            100.0 * number,
            [0.5, 0.3, 0.1],
            name=f"{rule}{number}",
            config={"rule.name": rule},
            settings={
                "rule.name": rule,
                "schedule.lr": lr.get(f"{rule}{number}", lr[rule]),
                "rule.max_drift": 0.25 if rule == "asgd" and number > 1 else 0,
                "rule.momentum_at": "dana" if rule == "asgd" else "server_nag",
            },
        )
        for rule, number in kinds
    ]


def test_what_a_rule_brings_along_is_shown_and_no_difference_that_warns(tmp_path):
    found = compare(make_kinds(tmp_path / "poc", asgd=0.1, sync=0.02))
    assert found.differences == {}
    assert found.options["schedule.lr"] == ["0.1", "0.1", "0.02", "0.1", "0.02"]
    assert set(found.options) == {"rule.name", "schedule.lr", "rule.max_drift", "rule.momentum_at"}
    # --sync-lr: one rate of the step, shared out over the workers
    assert not compare(
        make_kinds(tmp_path / "given", asgd=0.1, sync2=0.2, sync4=0.1, sync=0)
    ).differences
    wrong = compare(
        make_kinds(tmp_path / "wrong", asgd=0.1, sync2=0.2, sync4=0.2, asgd4=0.3, sync=0)
    )
    assert wrong.differences == {"schedule.lr": ["0.1", "0.2", "0.3"]}


def test_the_page_shows_each_option_that_differs_beside_its_run(tmp_path):
    summaries = make_kinds(tmp_path, asgd=0.1, sync=0.02)
    seen = Reader(page(compare(summaries), summaries)).text
    assert "option asgd1 asgd2 sync2 asgd4 sync4" in seen
    assert "schedule.lr 0.1 0.1 0.02 0.1 0.02" in seen and "differ in more" not in seen


def test_the_answers_of_several_runs_are_against_one_worker_or_say_that_none_was_measured(
    summaries,
):
    fast, right, take = compared(compare(summaries), summaries)
    assert (fast.short, fast.state) == ("3.20 times one worker", "good")
    assert "efficiency of 80 %" in fast.text
    assert (right.short, right.state) == ("95.00 % accuracy", "open")  # 5 points apart
    assert take.short == "run4: 4 workers"
    fast, _, _ = compared(compare(summaries[:1]), summaries[:1])
    assert fast.state == "open" and "no run had one" in fast.text and "times" not in fast.short
    summaries[1].audit.violations = ["1 sample repeated"]
    _, right, _ = compared(compare(summaries), summaries)
    assert right.state == "bad" and "audit of run1 is violated" in right.text


@pytest.mark.parametrize("errors", [[0.9, 0.6], [0.4, 0.1]])
def test_the_curves_lie_within_their_axis(tmp_path, errors):
    runs = [make_summary(tmp_path, number, 100.0, errors) for number in (1, 2)]
    figure, numbers = comparison._curves(compare(runs), runs, by_time=True)
    low, high = figure.axes[0].get_ylim()
    drawn = [row[2] for row in numbers.rows]
    assert low <= min(drawn) and max(drawn) <= high < 2 * max(drawn)


def test_the_curves_of_a_metric_of_ones_own_are_drawn(tmp_path):
    runs = [make_summary(tmp_path, number, 100.0, [0.5, 0.4]) for number in (1, 2)]
    for run in runs:
        for score in run.validations:
            score.metrics, score.maximize = {"mse": score.top1_error}, False
            score.top1_error = None
    _, numbers = comparison._curves(compare(runs), runs, by_time=True)
    assert [row[2] for row in numbers.rows] == pytest.approx([0.5, 0.4] * 2)


def test_the_best_and_the_worst_are_two_runs_that_were_validated(summaries, tmp_path):
    summaries.append(make_summary(tmp_path / "no", 8, 600.0, [], name="run8"))
    [_, right, _] = compared(compare(summaries), summaries)
    assert right.text.startswith(
        "The best of the 2 validated runs is run4; the worst, run1, came to"
    )
    [_, right, _] = compared(compare(summaries[1:]), summaries[1:])
    assert right.text.startswith("Only run1 of 2 runs was validated.") and right.state == "open"
    alike = [make_summary(tmp_path / "a", n, 100.0, [0.1], name=f"run{n}") for n in (1, 2)]
    [_, right, _] = compared(compare(alike), alike)
    assert right.text.startswith("The 2 validated runs came to the same.") and right.state == "good"


def test_runs_without_numbers_are_compared_as_far_as_they_go(summaries):
    summaries[0] = msgspec.structs.replace(
        summaries[0], images_per_s=None, validations=[], started=None
    )
    found = compare(summaries, price_per_gpu_hour=1.0)
    assert found.fit is None and found.target is None
    assert Reader(page(found, summaries)).tags.count("svg") == 4


def make_grid(path, starts):
    """Runs of 1 and 4 workers, n_push 1 and 8, each cold or warm."""
    return [
        make_summary(
            path / f"{n_push}-{warm}",
            workers,
            100.0 * workers,
            [0.4, 0.2, 0.1, 0.05],
            name=f"{n_push} {warm}",
            config={"exchange.n_push": n_push, "rule.warm_start_epochs": warm},
        )
        for workers in (1, 4)
        for n_push in (1, 8)
        for warm in starts
    ]


@pytest.mark.parametrize("starts", [[0.0], [0.0, 2.0]])
def test_runs_that_differ_in_workers_and_n_push_give_the_papers_figure(tmp_path, starts):
    summaries = make_grid(tmp_path, starts)
    found = compare(summaries)
    assert not found.differences and found.verdict is None
    seen = Reader(page(found, summaries))
    assert "Workers x n_sync" in seen.text and "accuracy (%)" in seen.text
    assert all(
        text in seen.text
        for text in ("1 worker", "4 workers", "n_push 1", "n_push 8", "cold start")
    )
    assert ("warm start" in seen.text) == (len(starts) > 1)


def test_without_two_numbers_of_workers_and_of_n_push_there_is_no_grid(tmp_path):
    summaries = make_grid(tmp_path, [0.0])
    for part in (summaries[:2], summaries[::2]):
        assert "Workers x n_sync" not in Reader(page(compare(part), part)).text


def test_the_command_compares_several_runs_and_escapes_their_names(tmp_path, capsys):
    paths = [make_run(tmp_path / name, make_pushes()).path for name in ("a<script>", "c|d")]
    out = tmp_path / "out"
    assert report.main([*map(str, paths), "--out", str(out), "--price-per-gpu-hour", "1"]) == 0
    markdown, _, where = capsys.readouterr().out.partition("\npage:")
    assert where.split()[0] == str(out / "comparison.html")
    assert (
        (out / "comparison.md").read_text() == markdown
        and r"a\<script\>" in markdown
        and r"c\|d" in markdown
    )
    assert json.loads((out / "comparison.json").read_bytes())["entries"][0]["name"] == "a<script>"
    seen = Reader(without_own_script((out / "comparison.html").read_text()))
    assert "script" not in seen.tags and "a<script>" in seen.text
    assert not any(path.joinpath("report", "report.md").exists() for path in paths)

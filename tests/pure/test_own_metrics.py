"""Reports of a task with metrics of its own: their names and unit in every page, the best by the first of them."""

import json

import pytest
from msgspec.structs import replace
from test_page import Reader, without_own_script
from test_report import EPOCH, PUSHES, T0, cells, make_pushes, make_run, raw, write_log

from asgd_mpi import plan, report
from asgd_mpi.record.events import Validation
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.summary import summarize
from asgd_mpi.report import follow
from asgd_mpi.report.advice import advise
from asgd_mpi.report.answers import answers
from asgd_mpi.report.compare import compare
from asgd_mpi.report.comparison import page as comparison_page
from asgd_mpi.report.measure import measures
from asgd_mpi.report.page import page

NAME = "rmse <b>"  # a name that a page has to escape


def made_after(number):
    """Seconds from the first Start until the version of the `number`-th value was made."""
    return 1 + (12 * number - 1) / 10


def make_own(path, values, name=NAME, maximize=False, num_workers=3, rule="asgd"):
    """A run on samples; the version of every 12th push, of `made_after`, has the next value of its metric, and a second one."""
    pushes = make_pushes()
    if num_workers == 1:
        pushes = [replace(push, worker=0, read_version=push.version) for push in pushes]
    run = make_run(path, pushes, num_workers=num_workers)
    run.config.write_text(json.dumps({"model": {"name": "own"}, "rule": {"name": rule}}))
    for rank in range(num_workers + 1):
        lines = [line for line in raw(run.metrics_of(rank)) if line["event"] != "validation"]
        for line in lines:
            line.pop("crc32", None)
            if line["event"] == "start":
                line["unit"] = "samples"
        run.metrics_of(rank).write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = [
        Validation(
            T0 + 10,
            12 * number,
            number * EPOCH,
            float(number),
            50,
            None,
            None,
            2.0,
            metrics={name: value, "bias": 0.5 + number},
            maximize=maximize,
        )
        for number, value in enumerate(values, start=1)
    ]
    write_log(run.metrics_of(0), scores)
    return run


@pytest.fixture
def run(tmp_path):
    return make_own(tmp_path / "run", [0.5, 0.25, 0.375, None])


def test_the_first_metric_decides_which_version_is_the_best_in_the_direction_that_it_has(
    run, tmp_path
):
    summary = summarize(run)
    assert (summary.unit, summary.best.version) == ("samples", 24)
    first, second = measures(summary.validations)
    assert (first.name, second.name, first.maximize) == (NAME, "bias", False)
    assert first.best(summary.validations) == 0.25
    high = summarize(make_own(tmp_path / "high", [0.5, 0.75, 0.25], maximize=True))
    assert high.best.version == 24 and measures(high.validations)[0].best(high.validations) == 0.75


def test_the_page_has_the_metrics_by_their_names_and_samples_for_images(run):
    summary = summarize(run)
    seen = Reader(without_own_script(page(summary)))
    assert "script" not in seen.tags and f"{NAME} bias loss" in seen.text
    assert "0.25 (best)" in seen.text and "The best was 0.25." in seen.text
    assert f"{summary.images_per_s:,.0f} samples/s" in seen.text
    assert "Samples per second" in seen.text and "Rmse <b> over time" in seen.text
    body = seen.text.split("What to change?")[1].split("Settings")[0]
    assert "images" not in body and "ccuracy" not in body


def test_markdown_short_form_and_screen_have_them_too(run, capsys):
    summary = summarize(run)
    rows = cells(report.render(summary), "samples/s")
    assert rows and rows[0][1].startswith(f"{summary.images_per_s:,.1f} in total")
    assert r"| rmse \<b\> | bias | loss |" in report.render(summary)
    assert report.main([str(run.path), "--no-write"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Is it right? n/a {NAME}. The best was 0.25." in shown and "599 samples" in shown
    assert f"{NAME}  n/a at epoch 4.0" in follow.screen(summary, T0 + 8)


def test_the_numbers_of_the_figure_are_those_of_the_raw_lines(run):
    text = Reader(page(summarize(run))).text.split("Rmse <b> over time")[1]
    table = text.split("Numbers of this figure")[1].split("Rmse <b> over epochs")[0]
    raws = [line for line in raw(run.metrics_of(0)) if line["event"] == "validation"]
    for number, line in enumerate(raws, start=1):
        value = line["metrics"][NAME]
        row = f"{made_after(number):,.6g} {'n/a' if value is None else f'{value:,.6g}'} "
        assert row in table, (row, table)


def test_runs_are_compared_at_a_value_of_the_first_metric_and_less_is_better(tmp_path, capsys):
    worse = make_own(tmp_path / "one", [0.5, 0.4, 0.3, 0.25], num_workers=1)
    better = make_own(tmp_path / "three", [0.4, 0.25, 0.2])
    summaries = [summarize(worse), summarize(better)]
    found = compare(summaries)
    assert found.target == 0.25  # the best that both reach
    assert [entry.best for entry in found.entries] == [0.25, 0.2]
    reached = [entry.reached.seconds for entry in found.entries]
    assert reached == pytest.approx([made_after(4), made_after(2)])
    assert f"{NAME} 0.25 was reached first by three" in " ".join(found.sentences)
    seen = Reader(without_own_script(comparison_page(found, summaries)))
    assert f"To {NAME} 0.25" in seen.text and "samples/s" in seen.text
    assert f"0.2 {NAME}" in seen.text and "ccuracy" not in seen.text.split("</style>")[-1][200:]
    paths = [str(worse.path), str(better.path), "--out", str(tmp_path / "out")]
    assert report.main([*paths, "--target", "0.3"]) == 0
    assert json.loads((tmp_path / "out" / "comparison.json").read_bytes())["target"] == 0.3
    assert report.main([*paths, "--target-accuracy", "90"]) == 2
    assert f"judged by {NAME}: give the value to compare them at by --target" in (
        capsys.readouterr().err
    )
    images = [str(make_run(tmp_path / name, make_pushes()).path) for name in "ab"]
    assert report.main([*images, "--target", "0.3", "--out", str(tmp_path / "images")]) == 2
    assert "judged by accuracy: give the value to compare them at by --target-accuracy" in (
        capsys.readouterr().err
    )
    assert report.main([*paths, "--target", "1", "--target-accuracy", "90"]) == 2


def test_the_verdict_is_on_the_metric(tmp_path):
    values = {
        ("one", 1, "asgd"): [0.5, 0.4, 0.35, 0.3, 0.2],
        ("sync", 3, "sync"): [0.5, 0.4, 0.3, 0.2],
        ("three", 3, "asgd"): [0.3, 0.2, 0.2],
    }
    summaries = [
        summarize(make_own(tmp_path / name, found, num_workers=number, rule=rule))
        for (name, number, rule), found in values.items()
    ]
    found = compare(summaries)
    assert found.target == pytest.approx(0.2 * 1.01)  # a share above the best of any
    assert found.verdict.is_worth_it is True
    assert f"3 workers reached {NAME} 0.202 in 3.3 s, 2.1 times as fast as one worker" in (
        found.verdict.text
    )


def test_no_better_since_is_told_of_a_metric_by_its_share(tmp_path):
    plateau = summarize(make_own(tmp_path / "flat", [900.0, 500.0, 400.0, 400.0, 399.9, 400.0]))
    assert any(f"No better since epoch 3.0 ({NAME} 400)" in text for text in advise(plateau))
    falls = summarize(make_own(tmp_path / "falls", [900.0, 500.0, 400.0, 380.0, 390.0, 300.0]))
    assert not any("No better since" in text for text in advise(falls))
    assert answers(falls)[1].short == f"300 {NAME}"


def test_a_plan_speaks_of_samples(run, tmp_path, capsys):
    assert plan.main([str(run.path), "--workers", "1,3", "--out", str(tmp_path / "plan")]) == 0
    shown = capsys.readouterr().out
    assert "samples/s" in shown and "images" not in shown
    seen = Reader(without_own_script((tmp_path / "plan" / "plan.html").read_text()))
    assert "Predicted samples per second" in seen.text and "images" not in seen.text.split("}")[-1]


def test_a_task_that_measures_nothing_else_is_judged_by_its_validation_loss(run):
    summary = summarize(run)
    summary.validations = [replace(score, metrics={}) for score in summary.validations]
    assert [measure.name for measure in measures(summary.validations)] == ["validation loss"]
    assert answers(summary)[1].short == "2 validation loss"
    assert "Validation loss over time" in Reader(page(summary)).text and report.render(summary)


def test_a_run_of_before_there_were_names_is_judged_by_accuracy(tmp_path):
    run = make_run(tmp_path / "run", make_pushes())
    assert "metrics" not in raw(run.metrics_of(0))[1] and len(make_pushes()) == PUSHES
    found = summarize(RunDir.open(run.path))
    assert [measure.name for measure in measures(found.validations)] == [
        "accuracy",
        "top-5 accuracy",
    ]
    assert found.unit == "images"

"""The page: its numbers against the raw lines of recorded runs, nothing from outside, everything escaped, every kind of run."""

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_report import T0, cut, make_pushes, make_run, raw, write_log

from asgd_mpi import report
from asgd_mpi.record.events import End, Interval, Note, Push, Start
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.summary import summarize
from asgd_mpi.record.timeline import FINEST_S, MAX_BINS, MAX_SERIES, Bins
from asgd_mpi.report import figures, follow, svg, units
from asgd_mpi.report.advice import advise
from asgd_mpi.report.cost import price
from asgd_mpi.report.page import HERE, page, template
from asgd_mpi.report.palette import LINES, PHASE_COLOURS, contrast, text_on
from asgd_mpi.report.svg import VARIABLES

RUNS = Path(__file__).parents[1] / "runs"
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Reader(HTMLParser):
    """Collects what a page holds, and checks that its tags are balanced."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def without_own_script(text):
    """A page without the one script that its policy allows."""
    own = f"<script>{(HERE / 'page.js').read_text()}</script>"
    assert text.count(own) == 1
    return text.replace(own, "")


@pytest.fixture(params=["finished", "oldest"])
def recorded(request, tmp_path):
    """A recorded run of 3 workers on the digits; `oldest` has every line in its shortest form, and a log cut short."""
    return RunDir.open(shutil.copytree(RUNS / request.param, tmp_path / request.param))


def server_intervals(run):
    return [line for line in raw(run.metrics_of(0)) if line["event"] == "interval"]


def test_the_numbers_on_the_page_are_those_of_the_raw_lines(recorded):
    pushes = raw(recorded.pushes)
    started = min(raw(recorded.metrics_of(rank))[0]["t"] for rank in range(4))
    images = sum(push[6] - push[5] for push in pushes)
    busy = sum(line.get("apply", 0) for line in server_intervals(recorded))
    covered = sum(line["t1"] - line["t0"] for line in server_intervals(recorded))
    text = Reader(page(summarize(recorded))).text
    assert f"{images / (pushes[-1][0] - started):,.0f} images/s By 3 workers" in text
    assert f"{100 * busy / (covered):.0f} % of the time the server is busy" in text
    assert f"{sum(p[1] - p[3] for p in pushes) / len(pushes):.2f} mean staleness" in text
    assert f"{images:,} applied" in text
    for worker in range(3):
        own = [push for push in pushes if push[2] == worker]
        rate = sum(push[6] - push[5] for push in own) / (pushes[-1][0] - started)
        assert f"{worker + 1} cpu node0 {rate:,.1f} " in text


def test_the_time_line_adds_up_to_the_raw_lines(recorded):
    pushes, summary = raw(recorded.pushes), summarize(recorded)
    line = summary.timeline
    edges = [summary.started]
    for middle in line.t:
        edges.append(2 * (summary.started + middle) - edges[-1])
    assert edges[-1] == pytest.approx(pushes[-1][0], abs=1e-6)
    for number, (low, high) in enumerate(zip(edges, edges[1:])):
        last = number == len(line.t) - 1
        own = [
            push
            for push in pushes
            if low - 1e-6 <= push[0] < high - 1e-6 or last and push[0] >= high - 1e-6
        ]
        assert line.images_per_s[number] * (high - low) == pytest.approx(
            sum(push[6] - push[5] for push in own), rel=1e-4
        )
        if own:
            assert line.staleness[number] == pytest.approx(
                sum(push[1] - push[3] for push in own) / len(own)
            )
            assert line.staleness_max[number] == max(push[1] - push[3] for push in own)
            assert line.lr[number] == pytest.approx(sum(push[7] for push in own) / len(own))
        each = [series.images_per_s[number] for series in line.workers]
        assert sum(each) == pytest.approx(line.images_per_s[number])
        assert (line.worker_lowest[number], line.worker_highest[number]) == (min(each), max(each))


def test_the_page_takes_nothing_from_outside_and_its_ids_are_its_own(recorded):
    text = without_own_script(page(summarize(recorded)))
    seen = Reader(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(seen.tags)
    assert not [
        value
        for name, value in seen.attributes
        if name in ("src", "href") and not value.startswith("#")
    ]
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    ids = [value for name, value in seen.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 100
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    assert used and used <= set(ids)


def test_every_figure_is_drawn_and_has_units_and_takes_the_colours_of_the_page(recorded):
    text = page(summarize(recorded))
    # the oldest intervals count no bytes
    missing = ["traffic"] if recorded.path.name == "oldest" else []
    assert Reader(text).tags.count("svg") == 11 - len(missing)
    assert ("for lack of data: traffic." in text) == bool(missing) == ("Not drawn" in text)
    for label in (
        "images/s, total",
        "share of the rank's time (%)",
        "staleness (versions)",
        "accuracy (%)",
        "samples applied",
        "learning rate",
        "server busy (%)",
        *(() if missing else ("traffic (MB/s)",)),
        "time (s)",
    ):
        assert label in Reader(text).texts or label in text
    assert "var(--ink)" in text and "prefers-color-scheme: dark" in text and "@media print" in text
    assert not [colour for colour in VARIABLES if colour in text]  # no marker colour is left


def test_every_figure_is_drawn_once_and_looks_as_when_it_is_laid_out_by_drawing_it_twice(
    recorded, monkeypatch
):
    summary, drawn = summarize(recorded), []

    class Counted(figures.Figure):
        def draw(self, renderer):
            drawn.append(self)
            super().draw(renderer)

    monkeypatch.setattr(figures, "Figure", Counted)
    once, _ = figures.pictures(summary)
    assert len(drawn) == len(once)
    monkeypatch.setattr(svg, "_lay_out", lambda figure: None)
    twice, _ = figures.pictures(summary)
    assert len(drawn) == 3 * len(once)
    assert [picture.svg for picture in once] == [picture.svg for picture in twice]


def test_a_page_is_the_same_bytes_each_time(recorded):
    assert page(summarize(recorded)) == page(summarize(recorded))


def test_what_users_named_is_escaped_everywhere(tmp_path):
    evil = "<script>alert('1')</script>&\"$x_$"
    run = make_run(tmp_path / "run", make_pushes(), model=evil)
    write_log(
        run.metrics_of(1),
        [Note(T0, evil), Start(T0, 1, "worker", evil, evil, 3, 10), End(T0 + 8, "failed", evil)],
    )
    run.versions.write_text(json.dumps({evil: evil}))
    seen = Reader(without_own_script(page(summarize(run), price(summarize(run), 1.0))))
    assert "script" not in seen.tags and seen.text.count(evil) >= 6


def test_a_killed_run_has_a_page_that_says_what_is_missing(recorded):
    for path in [recorded.pushes, *(recorded.metrics_of(rank) for rank in range(4))]:
        cut(path, 9)
    text = Reader(page(summarize(recorded))).text
    assert "killed or still running" in text and "no End event from rank 0, 1, 2, 3" in text
    assert "pushes.log: 1 unreadable line left out" in text


def test_a_failure_and_a_rank_that_fell_silent_are_on_the_time_axis(recorded):
    assert ">failed</text>" not in page(summarize(recorded)) and ">ended early</text>" not in page(
        summarize(recorded)
    )
    first = raw(recorded.metrics_of(2))[0]["t"]
    write_log(recorded.metrics_of(1), [End(first + 1, "failed", "gone")])
    write_log(recorded.metrics_of(3), [Note(first + 60, "the last word, long after rank 2's")])
    text = page(summarize(recorded))
    assert ">failed</text>" in text and ">ended early</text>" in text


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(
        [
            "pushes.log",
            "config.yaml",
            "versions.json",
            "metrics/rank000.jsonl",
            "metrics/rank002.jsonl",
        ]
    ),
    st.lists(st.tuples(st.integers(0, 10_000), st.binary(max_size=6)), min_size=1, max_size=8),
    st.integers(0, 10_000),
)
def test_no_damage_to_a_file_stops_the_report(tmp_path, name, changes, length):
    shutil.copytree(RUNS / "finished", tmp_path, dirs_exist_ok=True)
    content = bytearray((tmp_path / name).read_bytes())
    for at, what in changes:
        at %= len(content)
        content[at : at + len(what)] = what
    (tmp_path / name).write_bytes(content[: len(content) - length % len(content)])
    summary = summarize(RunDir.open(tmp_path))
    assert report.render(summary, price(summary, 1.0)) and follow.screen(summary, T0)


@pytest.mark.parametrize("field, value", [(0, 1e300), (2, 10**9), (2, -1), (6, 0), (9, 1000)])
def test_a_push_that_no_run_can_have_made_is_left_out_and_counted(recorded, field, value):
    lines = raw(recorded.pushes)
    # the oldest form has no count of skipped images
    lines[5] = [*lines[5], 0][:10]
    lines[5][field] = value
    recorded.pushes.write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = summarize(recorded)
    assert (
        summary.unreadable_lines == {"pushes.log": 1} and summary.audit.num_pushes == len(lines) - 1
    )
    assert report.render(summary)


def test_without_pushes_the_page_shows_the_images_of_the_metrics(recorded):
    recorded.pushes.unlink()
    summary = summarize(recorded)
    assert (
        summary.timeline.images_per_s
        and "lack of data: training loss, staleness, pushes by staleness, learning" in page(summary)
    )
    trained = sum(
        line["images"]
        for rank in (1, 2, 3)
        for line in raw(recorded.metrics_of(rank))
        if "images" in line
    )
    assert f"{trained:,} trained by the workers" in Reader(page(summary)).text


def test_a_run_directory_with_nothing_but_a_configuration_has_a_page(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    seen = Reader(page(summarize(RunDir.open(tmp_path))))
    assert "svg" not in seen.tags and "metrics/ holds no file" in seen.text


def test_the_command_writes_the_page_beside_markdown_and_json(recorded, capsys):
    assert report.main([str(recorded.path), "--price-per-gpu-hour", "2"]) == 0
    total = price(summarize(recorded), 2.0).total
    written = (recorded.report / "report.html").read_text()
    summary = summarize(recorded)
    assert written == page(summary, price(summary, 2.0))
    facts = json.loads((recorded.report / "report.json").read_bytes())
    assert facts["advice"] == advise(
        summary, price(summary, 2.0)
    ) and f"cost {total:,.4g}, " in " ".join(capsys.readouterr().out.split())
    assert facts["cost"]["total"] == pytest.approx(3 * 2 * summary.duration_s / 3600)


def test_the_page_needs_neither_torch_nor_mpi(tmp_path):
    code = (
        f"import sys, asgd_mpi.report as r; r.main([{str(shutil.copytree(RUNS / 'oldest', tmp_path / 'run'))!r}]);"
        "print(sorted({'torch', 'mpi4py', 'h5py'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=RUNS.parents[1],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(RUNS.parents[1])},
    )
    assert (done.stderr, done.returncode) == ("[]\n", 0)


def test_the_time_line_of_a_long_run_stays_short_and_complete():
    bins, count = Bins(), 5000
    for number in range(count):
        bins.add_push(
            Push(
                T0 + 3.0 * number,
                number,
                number % 20,
                number,
                0,
                10 * number,
                10 * number + 10,
                0.1,
                1.0,
            )
        )
    line = bins.timeline(T0, T0 + 3.0 * (count - 1), num_workers=20)
    assert MAX_BINS / 2 - 1 <= len(line.t) <= MAX_BINS and line.width_s > FINEST_S
    assert sum(line.images_per_s) * line.width_s == pytest.approx(10 * count, rel=0.02)
    assert len(line.workers) == MAX_SERIES


def test_a_clock_far_off_does_not_stop_the_time_line():
    bins = Bins()
    for t in (T0, T0 + 1, 1e17):
        bins.add_push(Push(t, 0, 0, 0, 0, 0, 10, 0.1, 1.0))
    assert len(bins.timeline(T0, 1e17, num_workers=1).t) <= MAX_BINS


def test_intervals_are_spread_over_the_bins_that_they_touch():
    bins = Bins()
    bins.add_interval(Interval(T0, T0 + 2, apply=1.0), rank=0)
    bins.add_interval(Interval(T0 + 1, T0 + 2, bytes_pushed=800), rank=1)
    line = bins.timeline(T0, T0 + 2, num_workers=1)
    assert line.server_busy == pytest.approx([0.5] * 8)
    assert line.pushed_bytes_per_s == pytest.approx([0] * 4 + [800] * 4)


@pytest.mark.parametrize(
    "value, text",
    [(None, "n/a"), (0.00047, "470 us"), (0.0186, "18.6 ms"), (2.5, "2.5 s"), (0, "0 us")],
)
def test_short_durations_have_a_fitting_unit(value, text):
    assert units.short(value) == text


def make_summary(tmp_path, **changes):
    return msgspec.structs.replace(summarize(make_run(tmp_path / "run", make_pushes())), **changes)


def test_every_worker_costs_a_gpu_unless_their_number_is_given(tmp_path):
    summary = make_summary(tmp_path, duration_s=7200.0)
    cost = price(summary, 3.0)
    assert (cost.num_gpus, cost.gpu_hours, cost.total) == (3, 6.0, 18.0)
    assert cost.per_epoch == pytest.approx(18.0 / 5) and cost.per_million_images == pytest.approx(
        18e6 / summary.images
    )
    assert price(summary, 3.0, num_gpus=2).total == 12.0


def test_a_busy_server_is_named_with_the_gain_of_a_larger_batch(tmp_path):
    # apply 6 s of 8 for 60 pushes: 0.1 s an update
    summary = make_summary(tmp_path)
    summary.server_busy = 0.92
    sentence = next(text for text in advise(summary) if "busy 92 %" in text)
    assert (
        "one update takes 100 ms, so it applies at most 100 images/s at 10 images a push"
        in sentence
    )
    # a step of 0.75 s without waits, twice the batch: 3 workers x 20 images in 1.6 s, a rate below the bound 200
    gain = (3 * 20 / (2 * 0.75 + 0.1)) / summary.images_per_s - 1
    assert gain < 0.05 and "--data.batch_size" not in sentence
    summary.images_per_s = 25.0
    assert "--data.batch_size 20" in next(text for text in advise(summary) if "busy 92 %" in text)
    assert "+50 %" in next(text for text in advise(summary) if "busy 92 %" in text)


def test_a_server_with_room_says_for_how_many_workers(tmp_path):
    summary = make_summary(tmp_path, server_busy=0.1, apply_s=0.1)  # a step of 0.75 s
    assert any("about 8 workers" in text for text in advise(summary))


def test_each_long_wait_is_named_with_its_share_and_its_option(tmp_path):
    summary = make_summary(tmp_path, server_busy=0.1)
    for phase, option in (
        ("data", "--data.threads"),
        ("fetch", "--data.batch_size"),
        ("validate", "--run.validate_every"),
        ("push", "they wait for the message"),
    ):
        for rank in summary.ranks:
            rank.phases = {
                **dict.fromkeys(rank.phases, 0.0),
                "compute": 0.6 * rank.seconds,
                phase: 0.4 * rank.seconds,
            }
        assert any("40 %" in text and option in text for text in advise(summary)), phase


def test_a_wait_for_a_lease_is_named_where_it_lasts_and_not_where_a_run_only_begins_and_ends(
    tmp_path,
):
    summary = make_summary(tmp_path)
    for seconds, is_named in ((10.0, False), (20.0, True)):  # 40 % of them idle
        for rank in summary.ranks:
            rank.seconds = seconds
            rank.phases = dict.fromkeys(rank.phases, 0.0) | {
                "compute": 0.6 * seconds,
                "idle": 0.4 * seconds,
            }
        assert any("idle 40 %" in text for text in advise(summary)) == is_named


def test_stragglers_torn_reads_and_damaged_images_are_named_with_their_numbers(tmp_path):
    text = " ".join(
        advise(make_summary(tmp_path, torn_reads=10, fetches=100, skipped_images=3, read_retries=7))
    )
    assert (
        "rank 3 (cuda:0 on node1)" in text
        and "10 reads of 100 fetches were torn" in text
        and "3 damaged images" in text
    )
    assert "Failed and repeated: 7 reads of shards" in text


def test_the_accuracy_with_the_statistics_of_the_workers_is_told_where_it_differs(tmp_path):
    summary = make_summary(tmp_path)
    assert not any("Batch norm" in text for text in advise(summary))
    summary.validations[-1].stored_top1_error = summary.validations[-1].top1_error
    assert not any("Batch norm" in text for text in advise(summary))
    summary.validations[-1].top1_error, summary.validations[-1].stored_top1_error = 0.125, 0.25
    assert any(
        "accuracy is 87.50 % with" in text and "75.00 % with those" in text
        for text in advise(summary)
    )


def test_a_plateau_is_named_with_what_it_cost(tmp_path):
    summary = summarize(make_run(tmp_path / "run", make_pushes(), validations=9))
    summary.duration_s = 8.0
    for number, score in enumerate(summary.validations):
        score.top1_error, score.made = max(0.1, 0.5 - 0.1 * number), T0 + number
    found = [
        text
        for text in advise(summary, price(summary, 3600.0))
        if text.startswith("No better since epoch 5.0")
    ]
    assert (
        found
        and "accuracy 90.00 %" in found[0]
        and "the last 50 % of the run (4.0 s, 12 of the 24 that" in found[0]
    )
    for number, score in enumerate(summary.validations):
        score.top1_error = 0.5 - 0.05 * number
    assert not any(text.startswith("No better") for text in advise(summary))


def test_a_run_without_numbers_gets_no_advice(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    assert advise(summarize(RunDir.open(tmp_path))) == []


# Seen without long, middle or short cones: Machado et al. 2009, severity 1, on linear RGB.
DEFICIENCIES = {
    "none": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


def seen_as(colour, matrix):
    """CIE L*a*b* of `#rrggbb` as somebody with that matrix sees it."""
    values = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    rgb = [min(1, max(0, sum(a * b for a, b in zip(row, linear)))) for row in matrix]
    to_xyz = (
        (0.4339, 0.3762, 0.1899),  # over the white point
        (0.2126, 0.7152, 0.0722),
        (0.0177, 0.1095, 0.8728),
    )
    x, y, z = (
        t ** (1 / 3)
        if (t := sum(a * b for a, b in zip(row, rgb))) > 0.008856
        else 7.787 * t + 4 / 29
        for row in to_xyz
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("kind", DEFICIENCIES)
def test_the_colours_of_the_time_bars_are_told_apart_by_any_eyes(kind):
    """A distance of 2.3 is just seen; these lie side by side in small areas."""
    colours = {name: seen_as(c, DEFICIENCIES[kind]) for name, c in PHASE_COLOURS.items()}
    distances = {
        (one, other): math.dist(colours[one], colours[other])
        for one, other in itertools.combinations(colours, 2)
    }
    closest = min(distances, key=distances.get)
    assert distances[closest] > 15, (closest, distances[closest])


def themes():
    """The colours of each theme of the page, by name."""
    css = (HERE / "page.css").read_text()
    found = [
        dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    ]
    assert len(found) == 3 and all(len(theme) == 9 for theme in found)  # light, dark, printed
    return found


@pytest.mark.parametrize("number", range(3))
def test_all_text_has_a_contrast_of_4_5_and_all_lines_of_3(number):
    theme = themes()[number]
    for ground in ("paper", "card"):
        for text in ("ink", "faint", "accent", "good", "bad", "open"):
            assert contrast(theme[text], theme[ground]) >= 4.5, (text, ground)
    for line in LINES:
        assert contrast(line, theme["paper"]) >= 3, line


def test_no_line_of_a_worker_is_fainter_than_its_colour(tmp_path):
    figure, _ = figures._each(make_summary(tmp_path))
    lines = figure.axes[0].get_lines()
    assert len(lines) > 2 and {line.get_alpha() for line in lines} <= {None, 1}


def test_the_text_in_the_time_bars_has_a_contrast_of_4_5():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # of the WCAG's examples
    for phase, colour in PHASE_COLOURS.items():
        assert contrast(text_on(colour), colour) >= 4.5, phase


def test_no_line_end_cuts_an_option():
    kept = template("page.html.j2").environment.filters["unbroken"]
    assert kept("1 < 2: --n-sync 4.") == '1 &lt; 2: <span class="option">--n-sync</span> 4.'
    assert kept("in parts -- or (--run.dir)") == (
        'in parts -- or (<span class="option">--run.dir</span>)'
    )
    assert ".option { white-space: nowrap; }" in (HERE / "page.css").read_text()


def test_every_figure_says_its_numbers_and_every_table_that_scrolls_takes_the_focus(recorded):
    summary = summarize(recorded)
    text = page(summary)
    images = re.findall(r'<svg [^>]*role="img" aria-label="([^"]+)"', text)
    assert len(images) == text.count("<svg") == text.count("Numbers of this figure</summary>")
    assert all(re.search(r"from -?[\d.,e+]+ to [\d.,e-]+", label) for label in images), images
    frames = re.findall(r'<div class="scroll"[^>]*>', text)
    assert len(frames) == text.count("<table") - text.count('<table class="pairs"') > 3
    assert all('tabindex="0" role="region" aria-label="' in frame for frame in frames)
    pushes = Reader(text).text.split("Pushes by staleness")[1].split("Numbers of this figure")[1]
    first = summary.staleness.histogram[0]
    assert pushes.strip().startswith(
        f"staleness from to pushes {first.low} {first.high} {first.pushes}"
    )


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def dump_dom(url, tmp_path, *options):
    """What a browser without a window makes of a page."""
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--allow-file-access-from-files",
            f"--user-data-dir={tmp_path / 'profile'}",
            *options,
            "--dump-dom",
            url,
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.stdout


MEASURE = """
const seen = {};
document.querySelectorAll("iframe").forEach((frame) => {
  const page = frame.contentDocument, heads = page.querySelectorAll("table.sorts th");
  const last = [...page.querySelectorAll(".answer")].at(-1);
  const column = (n) => [...page.querySelector("table.sorts").tBodies[0].rows].map((r) => r.cells[n].textContent);
  const before = column(0);
  heads[3].querySelector("button").click();
  seen[frame.title] = { width: page.documentElement.scrollWidth, answers: page.querySelectorAll(".answer").length,
    bottom: last.getBoundingClientRect().bottom, before, after: column(3), sort: heads[3].getAttribute("aria-sort"),
    hacked: frame.contentWindow.hacked === true, buttons: page.querySelectorAll("th button").length, heads: heads.length };
});
document.body.textContent = "MEASURED" + JSON.stringify(seen) + "END";
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_in_a_browser_the_first_screen_answers_tables_sort_and_no_other_script_is_run(tmp_path):
    """A laptop's screen and a phone's; nothing is wider than they are."""
    sizes = {"laptop": (1280, 800), "phone": (390, 844)}
    run = RunDir.open(shutil.copytree(RUNS / "finished", tmp_path / "run"))
    text = page(summarize(run)).replace("</main>", "<script>window.hacked = true</script></main>")
    (tmp_path / "page.html").write_text(text)
    frames = "".join(
        f'<iframe title="{name}" src="page.html" width="{w}" height="{h}" style="border:0"></iframe>'
        for name, (w, h) in sizes.items()
    )
    (tmp_path / "frames.html").write_text(
        f"<body>{frames}<script>window.onload = () => {{ {MEASURE} }}</script>"
    )
    found = dump_dom(f"file://{tmp_path / 'frames.html'}", tmp_path, "--virtual-time-budget=10000")
    seen = json.loads(found.split("MEASURED")[1].split("END")[0])
    for name, (width, height) in sizes.items():
        found = seen[name]
        assert found["answers"] == 3 and 0 < found["bottom"] <= height, (name, found)
        assert found["width"] <= width, (name, found)
        assert found["buttons"] == found["heads"] > 10 and found["sort"] == "descending"
        speeds = [float(text.replace(",", "")) for text in found["after"]]
        assert len(speeds) == 3 and speeds == sorted(speeds, reverse=True)
        assert not found["hacked"]

"""The numbers of several runs side by side, as `report A B` and `poc` write them, and of a plan, against the raw lines of the runs."""

import json
import re
from collections import defaultdict

import numpy as np
import pytest
from made_runs import MadeRun
from test_every_number import RUNS, Raw, kept_until, recomputed
from test_every_point import Drawing
from test_page import Reader

from asgd_mpi import plan, report

TARGET = 60.0  # percent


def table(page, label):
    """The rows of a table of a page: its cells as text."""
    [body] = re.findall(rf'aria-label="{label}">.*?<tbody>(.*?)</tbody>', page, re.DOTALL)
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows]


def drawing(page, title):
    [svg] = re.findall(rf"<h3>{title}</h3>\s*(<svg.*?</svg>)", page, re.DOTALL)
    return Drawing(svg)


def number(text):
    return float(re.sub("[^-0-9.e]", "", text))


def seconds(text):
    """`2 min 05 s` -> 125."""
    found = re.fullmatch(r"(?:([\d,]+) h )?(?:(\d+) min )?([\d.]+) s", text)
    hours, minutes, rest = (float((part or "0").replace(",", "")) for part in found.groups())
    return 3600 * hours + 60 * minutes + rest


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One worker, synchronous and asynchronous ones, a run of two starts with other workers, and a second with 4."""
    place, found = tmp_path_factory.mktemp("several"), {}
    for name, seed, crews, rule in (
        ("one", 1, [1], "asgd"),
        ("sync-2", 2, [2], "sync"),
        ("async-2", 3, [2], "asgd"),
        ("async-4", 4, [4, 4], "asgd"),
        ("async-4b", 5, [4], "asgd"),
        ("mixed", 6, [3, 5], "asgd"),
    ):
        MadeRun(place / name, seed, crews, 90, rule)
        found[name] = place / name
    return found


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    options = ["--price-per-gpu-hour", "3600", "--target-accuracy", str(TARGET)]
    assert report.main([*map(str, runs.values()), *options, "--out", str(out)]) == 0
    return json.loads((out / "comparison.json").read_bytes()), (out / "comparison.html").read_text()


@pytest.fixture(scope="module")
def right(runs):
    """Name -> the numbers of a run that a comparison has."""
    return {name: of_run(path) for name, path in runs.items()}


def of_run(path):
    raw, found = Raw(path), recomputed(path)
    versions = sorted(int(key[1:-9]) for key in found if re.fullmatch(r"v\d+ accuracy", key))
    scores = defaultdict(list)
    for line in sorted(raw.events("validation"), key=lambda line: line["t"]):
        if line["version"] < kept_until(raw, line):
            scores[line["version"]].append(1 - line["top1_error"])
    computing = {
        start: sum(raw.role(rank, of) != "server" for rank, of in raw.files if of == start)
        for start in raw.starts
    }
    numbers = {
        "workers": max(raw.workers.values()),
        "mixed": len(set(raw.workers.values())) > 1,
        "seconds": found["training"],
        "images/s": found["images/s"],
        "staleness": found["staleness"],
        "busy": found["server busy"],
        "best": max(value for version in versions for value in scores[version]),
        "cost": found["GPU seconds"],
        "length": raw.files[0, raw.starts[-1]][0]["num_samples"],
        "reached": None,
        "curve": [
            (found[f"v{version} made after"], found[f"v{version} samples"], 100 * value)
            for version in versions
            for value in scores[version]
        ],
    }
    for after, samples, percent in numbers["curve"]:
        if percent >= TARGET - 1e-9:
            begins = [raw.at(raw.begins[start]) for start in raw.starts]
            begins[0] = 0.0
            ends = [*begins[1:], raw.at(raw.last)]
            cost = sum(
                computing[start] * max(0.0, min(after, end) - begin)
                for start, begin, end in zip(raw.starts, begins, ends)
            )
            numbers["reached"] = after, samples, cost
            break
    return numbers


def test_each_run_of_a_comparison_has_the_numbers_of_its_raw_lines(written, right):
    entries = {entry["name"]: entry for entry in written[0]["entries"]}
    assert entries.keys() == right.keys()
    alone = right["one"]["images/s"]
    for name, mine in right.items():
        entry = entries[name]
        for key, value in (
            ("num_workers", mine["workers"]),
            ("seconds", mine["seconds"]),
            ("images_per_s", mine["images/s"]),
            ("mean_staleness", mine["staleness"]),
            ("server_busy", mine["busy"]),
            ("best", mine["best"]),
            ("cost", mine["cost"]),
        ):
            assert entry[key] == pytest.approx(value, rel=1e-5), (name, key)
        if mine["mixed"]:
            assert entry["speedup"] is None and entry["efficiency"] is None
        else:
            assert entry["speedup"] == pytest.approx(mine["images/s"] / alone)
            assert entry["efficiency"] == pytest.approx(entry["speedup"] / mine["workers"])
        assert (entry["reached"] is None) == (mine["reached"] is None)
        if mine["reached"]:
            after, samples, cost = mine["reached"]
            reached = entry["reached"]
            assert reached["seconds"] == pytest.approx(after, abs=1e-4)
            assert reached["samples"] == samples
            assert reached["epoch"] == pytest.approx(samples / mine["length"])
            assert reached["images_per_s"] == pytest.approx(samples / after, rel=1e-4)
            assert reached["cost"] == pytest.approx(cost, rel=1e-3)
    assert sum(mine["reached"] is not None for mine in right.values()) > 3


def test_the_fit_is_that_of_least_squares(written, right):
    points = [
        (mine["workers"], mine["images/s"])
        for name, mine in right.items()
        if not mine["mixed"] and not name.startswith("sync")
    ]
    rows = np.array([[rate / workers, rate] for workers, rate in points])
    worker_s, shared_s = np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)[0]
    if shared_s < 0:
        shared_s, worker_s = 0.0, np.linalg.lstsq(rows[:, :1], np.ones(len(rows)), rcond=None)[0][0]
    elif worker_s < 0:
        worker_s, shared_s = 0.0, np.linalg.lstsq(rows[:, 1:], np.ones(len(rows)), rcond=None)[0][0]
    found = written[0]["fit"]
    assert (found["worker_s"], found["shared_s"]) == pytest.approx((worker_s, shared_s), rel=1e-6)


def test_the_tables_of_the_page_say_the_same(written, right):
    facts, page = written
    speed, there = table(page, "Speed"), table(page, "To the target")
    assert [row[0] for row in speed] == [entry["name"] for entry in facts["entries"]]
    for row, other in zip(speed, there):
        mine = right[row[0]]
        assert number(row[6]) == pytest.approx(mine["images/s"], abs=0.05)
        if not mine["mixed"]:
            speedup = mine["images/s"] / right["one"]["images/s"]
            assert number(row[7]) == pytest.approx(speedup, abs=0.006)
            assert number(row[8]) == pytest.approx(100 * speedup / mine["workers"], abs=0.51)
            law = facts["fit"]["worker_s"] / mine["workers"] + facts["fit"]["shared_s"]
            assert number(row[9]) == pytest.approx(1 / law, abs=0.06)
        assert number(row[10]) == pytest.approx(mine["staleness"], abs=0.006)
        assert number(row[11]) == pytest.approx(100 * mine["busy"], abs=0.51)
        assert number(other[2]) == pytest.approx(100 * mine["best"], abs=0.006)
        assert number(other[-1]) == pytest.approx(mine["cost"], rel=1e-3)
        if mine["reached"]:
            after, samples, cost = mine["reached"]
            assert seconds(other[3]) == pytest.approx(after, abs=0.51 if after > 120 else 0.06)
            assert number(other[4]) == pytest.approx(samples / mine["length"], abs=0.006)
            assert number(other[5]) == samples
            assert number(other[6]) == pytest.approx(samples / after, abs=0.06)
            assert number(other[7]) == pytest.approx(cost, rel=2e-3)
        else:
            assert other[3] == "not reached"


def test_every_point_of_a_comparison_stands_where_its_run_puts_it(written, right):
    _, page = written
    whole = [mine for mine in right.values() if not mine["mixed"]]
    picture = drawing(page, "Images per second against workers")
    x = picture.place("x", [mine["workers"] for mine in whole])
    y = picture.place("y", [mine["images/s"] for mine in whole])
    assert picture.has_marks(x, y)
    picture = drawing(page, "Efficiency")
    alone = right["one"]["images/s"]
    y = picture.place("y", [100 * one["images/s"] / alone / one["workers"] for one in whole])
    assert picture.has_marks(picture.place("x", [mine["workers"] for mine in whole]), y)
    there = [mine for mine in whole if mine["reached"]]
    longest = max(mine["reached"][0] for mine in right.values() if mine["reached"])
    scale = 60 if longest >= 180 else 1
    picture = drawing(page, "Time to the target")
    y = picture.place("y", [mine["reached"][0] / scale for mine in there])
    assert picture.has_marks(picture.place("x", [mine["workers"] for mine in there]), y)
    last = max(mine["curve"][-1][0] for mine in right.values())
    for title, column in (("Accuracy over time", 0), ("Accuracy over samples", 1)):
        picture = drawing(page, title)
        scale = 60 if column == 0 and last >= 180 else 1
        for name, mine in right.items():
            x = picture.place("x", [point[column] / scale for point in mine["curve"]])
            values = np.array([point[2] for point in mine["curve"]])
            y = picture.place("y", values, lambda y: -np.log10(np.maximum(100 - y, 0.1)))
            assert picture.passes(x, y), (title, name)


def test_the_verdict_and_the_sentences_name_the_numbers_of_the_runs(written, right):
    facts, page = written
    text = Reader(page).text
    there = {name: mine for name, mine in right.items() if mine["reached"]}
    first = min(there, key=lambda name: there[name]["reached"][0])
    [sentence] = [one for one in facts["sentences"] if "was reached first by" in one]
    assert f"{TARGET:.1f} % accuracy was reached first by {first} (" in sentence
    said = seconds(re.search(r"after (.* s)\.", sentence)[1])
    assert said == pytest.approx(there[first]["reached"][0], abs=0.51)
    [sentence] = [one for one in facts["sentences"] if "Cheapest" in one]
    cheapest = min(there, key=lambda name: there[name]["reached"][2])
    assert f": {cheapest} (" in sentence and sentence in text
    said = number(sentence.rpartition(", ")[2].removesuffix("."))
    assert said == pytest.approx(there[cheapest]["reached"][2], rel=2e-3)
    several = [name for name in there if name.startswith(("async", "mixed"))]
    assert facts["verdict"]["text"] in text.replace("\u200b", "") and several


def of_plan(path):
    """What a plan is calibrated with."""
    raw = Raw(path)
    workers, server = raw.intervals("worker"), raw.intervals("server", 0)

    def total(lines, *names):
        return sum(line.get(name, 0) for line in lines for name in names)

    pushes = total(workers, "pushes")
    cycles = defaultdict(lambda: [0.0, 0, 0])
    for (rank, start), file in raw.files.items():
        if raw.role(rank, start) == "worker":
            for line in file:
                one = cycles[rank]
                one[0] += total([line], "data", "compute", "push", "fetch")
                one[1] += line.get("pushes", 0)
    batch = total(workers, "images") / pushes
    return {
        "batch": batch,
        "step_s": total(workers, "data", "compute") / pushes,
        "apply_s": total(server, "apply") / total(server, "pushes"),
        "fetch_s": total(workers, "fetch") / total(workers, "fetches"),
        "images/s": sum(batch * count / spent for spent, count, _ in cycles.values()),
    }


def test_a_plan_and_its_page_have_the_numbers_of_its_costs_and_these_those_of_the_run(
    tmp_path, capsys
):
    run = RUNS / "finished"
    options = ["--workers", "1,3,12,64", "--link-gbit", "10", "--link-latency-us", "30"]
    assert plan.main([str(run), *options, "--out", str(tmp_path)]) == 0
    facts, page = (
        json.loads((tmp_path / "plan.json").read_bytes()),
        (tmp_path / "plan.html").read_text(),
    )
    costs, mine = facts["costs"], of_plan(run)
    for name in ("batch", "step_s", "apply_s", "fetch_s"):
        assert facts["observed"][0]["costs"][name] == pytest.approx(mine[name]), name
    assert facts["observed"][0]["images_per_s"] == pytest.approx(mine["images/s"])
    link_s = 4 * 8 * 151312 / 10e9
    trip_s = (
        costs["travel_s"]
        + costs["apply_s"]
        + costs["overhead_s"]
        + costs["fetch_s"]
        + 2 * (30e-6 + link_s)
    )
    cycle_s = costs["step_s"] + costs["shared_s"] + trip_s
    slowest_s = max(costs["apply_s"] + costs["overhead_s"] + costs["shared_s"], link_s)
    assert facts["knee_workers"] == pytest.approx(cycle_s / slowest_s)
    assert facts["limit_images_per_s"] == pytest.approx(costs["batch"] / slowest_s)
    alone = costs["batch"] / cycle_s
    rows, predicted = table(page, "Predicted"), facts["predicted"]
    assert [number(row[0]) for row in rows] == [1, 3, 12, 64]
    for row, one in zip(rows, predicted):
        rate = one["images_per_s"]
        assert rate < 1.02 * min(one["num_workers"] * alone, facts["limit_images_per_s"])
        right = one["num_workers"] + 1, rate, 100 * rate / alone / one["num_workers"]
        for cell, value, close in zip(row[1:], right, (0, 0.051, 0.51)):
            assert number(cell) == pytest.approx(value, abs=close)
        # what a server does in a second: a push of a batch each
        busy = 100 * min(1, rate / costs["batch"] * costs["apply_s"])
        assert number(row[5]) == pytest.approx(busy, abs=0.51)
    for title, columns in (
        ("Predicted images per second", [[one["images_per_s"] for one in predicted]]),
        ("Predicted staleness", [[one["staleness"] for one in predicted]]),
        (
            "Predicted load of the server",
            [[100 * one[name] for one in predicted] for name in ("queue_busy", "server_busy")],
        ),
    ):
        picture = drawing(page, title)
        for values in columns:
            x = picture.place("x", [1, 3, 12, 64], np.log2)
            assert picture.passes(x, picture.place("y", values)), title
    [measured] = [facts["calibration"][0]["measured"]]
    picture = drawing(page, "Predicted images per second")
    assert picture.has_marks(picture.place("x", [3], np.log2), picture.place("y", [measured]))
    share = 100 * (facts["calibration"][0]["predicted"] / measured - 1)
    assert f"3 workers: {share:+.0f} %" in Reader(page).text

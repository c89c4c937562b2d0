"""Every point of the figures of a page: the numbers beside a figure against the raw lines, and what is drawn against those numbers.

A point is found in the SVG by the axis's own ticks: where they stand, and what is written beside them.
"""

import re
from collections import defaultdict
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from made_runs import MadeRun
from test_every_number import RUNS, Raw, recomputed

from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.summary import summarize
from asgd_mpi.report import figures
from asgd_mpi.report.svg import SETTINGS

SEEDS = range(3)
CLOSE = 0.4  # points of a picture that is 288 of them wide


class Drawing(HTMLParser):
    """An SVG of a page: its ticks, its lines, its filled shapes."""

    def __init__(self, svg):
        super().__init__()
        self.groups, self.ticks = [], defaultdict(list)  # axis -> [place, text]
        self.lines, self.shapes = [], []  # arrays (N, 2)
        self.marks = []  # (x, y)
        self.feed(svg)
        self.close()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag == "g":
            self.groups.append(found.get("id", ""))
        axis = self._axis
        if axis and tag == "use":
            at = float(found[axis[0]])
            if not self.ticks[axis] or self.ticks[axis][-1][1] is not None:
                self.ticks[axis].append([at, None])
        if tag == "use" and not axis and "legend" not in "".join(self.groups):
            self.marks.append((float(found["x"]), float(found["y"])))
        if tag == "path" and not axis and "d" in found and "legend" not in "".join(self.groups):
            numbers = re.findall(r"[MLz]|-?[\d.]+(?:e-?\d+)?", found["d"])
            points = np.array([float(word) for word in numbers if word not in "MLz"])
            if len(points) % 2 == 0 and "C" not in found["d"] and "Q" not in found["d"]:
                is_line = "fill: none" in found.get("style", "")
                breaks = [i for i, word in enumerate(w for w in numbers if w == "M" or w == "L")]
                kinds = [word for word in numbers if word in "ML"]
                pieces, points = [], points.reshape(-1, 2)
                for i, kind in zip(breaks, kinds):
                    if kind == "M":
                        pieces.append([])
                    pieces[-1].append(points[i])
                (self.lines if is_line else self.shapes).append([np.array(p) for p in pieces])

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag == "g":
            self.groups.pop()

    def handle_data(self, data):
        if self._axis and data.strip() and self.ticks[self._axis]:
            if self.ticks[self._axis][-1][1] is None:
                self.ticks[self._axis][-1][1] = data.strip()

    @property
    def _axis(self):
        """`x` or `y` within a tick of it, `x above` within one of a second axis."""
        found = re.search(r"([xy])tick_\d+( |$)", " ".join(self.groups))
        is_second = sum("-axes_" in name for name in self.groups) > 1
        return found[1] + " above" * is_second if found else ""

    def place(self, axis, values, law=lambda value: value):
        """Return where values of an axis stand; `law`: what is proportional to the place."""
        known = [
            (at, float(text.replace(",", "").replace("\u2212", "-")))
            for at, text in self.ticks[axis]
            if text
        ]
        assert len(known) > 1, known
        at, value = (np.array(column) for column in zip(*known))
        slope, offset = np.polyfit(law(value), at, 1)
        assert slope * law(value) + offset == pytest.approx(at, abs=0.1)
        return slope * law(np.asarray(values, float)) + offset

    def has_marks(self, x, y):
        """Return whether there is a mark at each of the points."""
        marks = np.array(self.marks)
        return all(np.hypot(*(marks - point).T).min() < CLOSE for point in zip(x, y))

    def passes(self, x, y):
        """Return whether one line goes through all of the points."""
        points = np.column_stack([x, y])
        return any(
            all(min(distance(piece, point) for piece in line) < CLOSE for point in points)
            for line in self.lines
        )


def distance(line, point):
    """From a polyline."""
    if len(line) == 1:
        return np.hypot(*(line[0] - point))
    begin, along = line[:-1], np.diff(line, axis=0)
    length = (along**2).sum(axis=1)
    share = ((point - begin) * along).sum(axis=1) / np.where(length, length, 1)
    nearest = begin + np.clip(share, 0, 1)[:, None] * along
    return np.hypot(*(nearest - point).T).min()


@pytest.fixture(scope="module", params=["resumed", "finished", *SEEDS])
def run(request, tmp_path_factory):
    if isinstance(request.param, str):
        return RUNS / request.param
    path = tmp_path_factory.mktemp("made") / "run"
    MadeRun(path, request.param)
    return path


@pytest.fixture(scope="module")
def drawn(run):
    summary, found = summarize(RunDir.open(run)), {}
    with matplotlib.rc_context(SETTINGS):
        for kind in figures.KINDS:
            if drawing := kind.draw(summary):
                figure, numbers = drawing
                svg = figures.picture(kind.name, kind.title, "", figure, numbers).svg
                found[kind.name] = numbers, Drawing(svg)
    return found


def edges(middles):
    """The bins' ends, from their middles: the first one begins with the run."""
    found = [0.0]
    for middle in middles:
        found.append(2 * middle - found[-1])
    return found


class Bin:
    """Of the raw lines, what lies between two training times; `is_last`: the end included."""

    def __init__(self, raw, low, high, is_last):
        inside = lambda t: low <= raw.at(t) < high or (is_last and abs(raw.at(t) - high) < 1e-4)
        self.seconds = high - low
        self.pushes = [push for push in raw.pushes if inside(push["t"])]
        self.images = sum(push["images"] for push in self.pushes)
        self.stale = [push["version"] - push["read"] for push in self.pushes]


def test_the_numbers_of_speed_loss_rate_and_staleness_are_those_of_the_pushes_of_their_time(
    run, drawn
):
    raw = Raw(run)
    rows = {name: drawn[name][0] for name in ("speed", "workers", "loss", "rate", "staleness")}
    ends = edges([row[0] for row in rows["speed"].rows])
    assert ends[-1] == pytest.approx(recomputed(run)["training"], abs=1e-4)
    for number, (low, high) in enumerate(zip(ends, ends[1:])):
        one = Bin(raw, low, high, number == len(ends) - 2)
        speed, workers, loss, rate, stale = (found.rows[number][1:] for found in rows.values())
        assert speed == [pytest.approx(one.images / one.seconds, rel=1e-3)]
        own = [
            sum(push["images"] for push in one.pushes if push["worker"] == worker) / one.seconds
            for worker in range(max(raw.workers.values()))
        ]
        assert workers[1:] == pytest.approx(own, rel=1e-3)
        assert workers[0] == pytest.approx(np.median(own), rel=1e-3)
        if not one.pushes:
            assert [*loss, *rate, *stale] == [None] * 4
            continue
        losses = [push["loss"] * push["images"] for push in one.pushes]
        assert loss == [pytest.approx(sum(losses) / one.images)]
        assert rate == [pytest.approx(np.mean([push["lr"] for push in one.pushes]))]
        assert stale == [pytest.approx(np.mean(one.stale)), max(one.stale)]


def test_the_numbers_of_load_and_traffic_are_those_of_the_intervals_spread_over_their_time(
    run, drawn
):
    raw = Raw(run)
    ends = edges([row[0] for row in drawn["load"][0].rows])
    busy, covered, pushed, fetched = (np.zeros(len(ends) - 1) for _ in range(4))
    width = 2 ** np.round(np.log2(np.median(np.diff(ends))))
    wide = list(zip(ends, ends[1:]))
    wide[0] = np.floor(raw.zero / width) * width - raw.zero, wide[0][1]
    wide[-1] = wide[-1][0], np.ceil((raw.zero + ends[-1]) / width) * width - raw.zero
    first, last = np.inf, -np.inf
    for (rank, _), file in raw.files.items():
        offset = file[0].get("clock_offset_s", 0.0)
        for line in file:
            if line["event"] != "interval":
                continue
            begin, end = (raw.at(line[name] + offset) for name in ("t0", "t1"))
            length = line["t1"] - line["t0"]
            if rank:
                first, last = min(first, begin), max(last, end)
            for number, (low, high) in enumerate(wide):
                share = max(0.0, min(end, high) - max(begin, low)) / length
                if (
                    low <= end < high
                ):  # what was written in the pause after a start goes where it ended
                    share += 1 - (end - begin) / length
                if rank == 0:
                    busy[number] += share * (line.get("apply", 0) + line.get("checkpoint", 0))
                    covered[number] += share * length
                else:
                    pushed[number] += share * line.get("bytes_pushed", 0)
                    fetched[number] += share * line.get("bytes_fetched", 0)
    for number, (low, high) in enumerate(wide):
        seconds = min(high, last) - max(low, first)  # of which there are intervals
        if covered[number]:
            told = drawn["load"][0].rows[number][1]
            assert told == pytest.approx(100 * busy[number] / covered[number], rel=1e-3), number
        told = drawn["traffic"][0].rows[number][1:]
        right = [pushed[number] / seconds / 1e6, fetched[number] / seconds / 1e6]
        assert told == pytest.approx(right, rel=1e-3), number


def test_what_is_drawn_over_time_goes_through_the_numbers(drawn):
    for name in ("speed", "workers", "loss", "rate", "staleness", "load", "traffic"):
        numbers, drawing = drawn[name]
        for column in range(1, len(numbers.columns)):
            points = [
                (row[0], row[column])
                for row in numbers.rows
                if row[column] is not None and row[column] == row[column]
            ]
            x, y = zip(*points)
            at = drawing.place("x", x), drawing.place("y", y)
            assert drawing.passes(*at), (name, numbers.columns[column])


def test_accuracies_are_drawn_where_their_errors_put_them(drawn):
    for name in ("accuracy", "epochs"):
        numbers, drawing = drawn[name]
        best = max(max(row[-2:]) for row in numbers.rows)

        def law(y, finest=max(1e-4, 50 / 500)):
            return -np.log10(np.maximum(100 - y, finest)) if best > 50 else y

        x = drawing.place("x", [row[0] for row in numbers.rows])
        for column in (-2, -1):
            values = np.array([row[column] for row in numbers.rows])
            assert drawing.passes(x, drawing.place("y", values, law)), (name, column)
    samples = drawing.place("x above", [row[1] for row in numbers.rows])
    assert samples == pytest.approx(x, abs=CLOSE)


def test_the_bars_are_as_long_as_their_numbers(run, drawn):
    numbers, drawing = drawn["histogram"]
    total = sum(pushes for *_, pushes in numbers.rows)
    zero, *heights = drawing.place("y", [0, *(100 * row[2] / total for row in numbers.rows)])
    tops = [shape[0][:, 1].min() for shape in drawing.shapes if is_bar(shape)]
    assert sorted(tops) == pytest.approx(sorted(h for h in heights), abs=CLOSE)
    numbers, drawing = drawn["split"]
    zero, whole = drawing.place("x", [0, 100])
    shares = [
        value
        for phase in range(1, len(numbers.columns))
        if max(row[phase] for row in numbers.rows) >= 0.05
        for value in (row[phase] for row in numbers.rows)
    ]
    widths = [np.ptp(shape[0][:, 0]) for shape in drawing.shapes if is_bar(shape)]
    assert widths == pytest.approx([share / 100 * (whole - zero) for share in shares], abs=CLOSE)


def is_bar(shape):
    """Return whether a filled shape is a rectangle of the data, not the background of the picture or its axes."""
    return len(shape) == 1 and len(shape[0]) in (4, 5)

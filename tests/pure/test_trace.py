"""The trace: every rank on one clock, every span and push in its place, bounded, and whatever the run left behind."""

import json

import msgspec
import pytest
from test_report import PUSHES, T0, cut, make_pushes, make_run, write_log

from asgd_mpi import report
from asgd_mpi.record.events import EventLog, Interval, Span, read_events
from asgd_mpi.record.meter import Meter
from asgd_mpi.report import trace

SKEW = 100.0  # seconds that the clock of rank 2 is behind


@pytest.fixture
def run(tmp_path):
    """A run whose rank 2 has a clock of its own, and a span on each rank at second 3 of rank 0's clock."""
    run = make_run(tmp_path / "run", make_pushes())
    for rank in range(4):
        events = list(read_events(run.metrics_of(rank)))
        run.metrics_of(rank).unlink()
        skew = SKEW if rank == 2 else 0.0
        shifted = [
            msgspec.structs.replace(event, t0=event.t0 - skew, t1=event.t1 - skew)
            if isinstance(event, Interval)
            else msgspec.structs.replace(event, t=event.t - skew)
            for event in events
        ]
        shifted[0] = msgspec.structs.replace(
            shifted[0], clock_offset_s=skew, clock_error_s=0.001 * rank
        )
        write_log(run.metrics_of(rank), [*shifted, Span(T0 + 3 - skew, "compute", 0.25)])
    return run


def traced(run, path):
    assert report.main([str(run.path), "--trace", str(path)]) == 0
    return json.loads(path.read_text())


def of(found, **fields):
    return [
        event
        for event in found["traceEvents"]
        if all(event.get(name) == value for name, value in fields.items())
    ]


def test_the_same_moment_lies_at_the_same_place_for_ranks_whose_clocks_differ(run, tmp_path):
    found = traced(run, tmp_path / "trace.json")
    spans = of(found, name="compute", ph="X")
    assert [span["pid"] for span in spans] == [0, 1, 2, 3]
    # the first Start is at T0
    assert [(span["ts"], span["dur"]) for span in spans] == [(3e6, 250_000)] * 4
    assert found["otherData"] == {"run": "run", "clock_error_s": 0.003}


def test_every_push_is_a_mark_with_its_numbers_and_every_interval_a_slice(run, tmp_path):
    found, pushes = traced(run, tmp_path / "trace.json"), make_pushes()
    marks = of(found, name="push", pid=0)
    assert [mark["ts"] for mark in marks] == pytest.approx([1e6 * (push.t - T0) for push in pushes])
    assert [mark["args"]["staleness"] for mark in marks] == [push.staleness for push in pushes]
    slices = of(found, ph="X", tid=trace.INTERVALS, pid=1)
    assert len(slices) == sum(push.worker == 0 for push in pushes)
    assert (
        slices[0]["name"] == "mostly compute"
        and slices[0]["args"]["data"] == 0.25
        and slices[0]["args"]["images"] == 10
    )
    names = [event["args"]["name"] for event in of(found, name="process_name")]
    assert names[1] == "rank 1, worker (cuda:0 on node0)"
    assert {event["name"] for event in of(found, ph="i", pid=0)} == {
        "push",
        "validation",
        "checkpoint",
        "note",
        "end",
    }


def test_a_long_run_is_thinned_and_says_so(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trace, "MAX_EVENTS", 20)
    found = traced(run, tmp_path / "trace.json")
    assert (
        len(of(found, name="push")) == PUSHES // 3
        and len(of(found, ph="X", tid=trace.INTERVALS)) <= 20
    )
    # spans were bounded when they were written
    assert len(of(found, name="compute")) == 4
    assert (
        found["otherData"]["pushes"] == "one of 3 is kept"
        and "pushes: one of 3 is kept" in capsys.readouterr().err
    )


def test_a_killed_run_and_one_without_pushes_give_a_trace_of_what_there_is(run, tmp_path, capsys):
    cut(run.metrics_of(1), 9)
    run.pushes.unlink()
    found = traced(run, tmp_path / "trace.json")
    assert len(of(found, name="compute")) == 3 and not of(found, name="push")
    told = capsys.readouterr().err
    assert "rank001.jsonl: 1 unreadable line" in told and "pushes.log cannot be read" in told


def test_a_trace_that_cannot_be_written_and_two_runs_in_one_file_are_errors(run, tmp_path, capsys):
    assert report.main([str(run.path), "--trace", str(tmp_path / "none" / "trace.json")]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert report.main([str(run.path), str(run.path), "--trace", str(tmp_path / "trace.json")]) == 2


def test_a_meter_writes_the_first_spans_and_they_add_up_to_the_intervals(tmp_path):
    log = EventLog(tmp_path / "log.jsonl")
    meter = Meter(log, interval_s=1e9, spans=5)
    for _ in range(3):
        with meter.phase("data"):
            pass
    # timed elsewhere: the two have just ended, in this order
    meter.add(push=0.5, fetch=0.25, images=8)
    meter.add(torn_reads=1)
    with meter.phase("compute"):
        pass  # beyond the five
    meter.flush()
    log.close()
    *spans, interval = read_events(tmp_path / "log.jsonl")
    assert [span.phase for span in spans] == ["data", "data", "data", "push", "fetch"]
    assert sum(span.seconds for span in spans[:3]) == pytest.approx(interval.data)
    assert spans[4].t == pytest.approx(spans[3].t + 0.5) and (
        spans[3].seconds,
        spans[4].seconds,
    ) == (0.5, 0.25)


def test_no_spans_are_written_unless_asked_for(tmp_path):
    log = EventLog(tmp_path / "log.jsonl")
    meter = Meter(log, interval_s=1e9)
    with meter.phase("compute"):
        pass
    meter.flush()
    log.close()
    assert [type(event) for event in read_events(tmp_path / "log.jsonl")] == [Interval]


def with_steps(run, pushes, waits=True):
    """Stretches around each push: 20 ms of push until the server has written it down, 5 ms of update, 3 ms of fetch."""
    for push in pushes:
        rank, skew = push.worker + 1, SKEW if push.worker + 1 == 2 else 0.0
        begin = push.t - (0.02 if waits else 0.5)
        length = 0.0205 if waits else 0.01
        write_log(
            run.metrics_of(rank),
            [Span(begin - skew, "push", length), Span(begin - skew + length, "fetch", 0.003)],
        )
        write_log(run.metrics_of(0), [Span(push.t - 0.005, "apply", 0.0049)])


def slice_at(found, event):
    """The stretch that an arrow's end lies in."""
    [one] = [
        other
        for other in of(found, ph="X", pid=event["pid"], tid=event["tid"], cat="phase")
        if other["name"] != "compute"
        and other["ts"] <= event["ts"] + 0.2 < other["ts"] + other["dur"]
    ]
    return one


def test_arrows_lead_from_each_push_to_its_update_and_to_the_next_fetch(run, tmp_path):
    pushes = make_pushes()
    with_steps(run, pushes)
    found = traced(run, tmp_path / "trace.json")
    for kind, phase in (("s", "push"), ("t", "apply"), ("f", "fetch")):
        ends = of(found, ph=kind, cat="flow")
        assert sorted(end["id"] for end in ends) == list(range(PUSHES))
        assert {slice_at(found, end)["name"] for end in ends} == {phase}
    for begin in of(found, ph="s", cat="flow"):
        version = slice_at(found, begin)["args"]["version"]
        assert begin["pid"] == pushes[version].worker + 1
        [update] = of(found, ph="t", id=begin["id"])
        [fetch] = of(found, ph="f", id=begin["id"])
        assert update["ts"] == pytest.approx(1e6 * (pushes[version].t - 0.005 - T0), abs=1)
        assert (update["pid"], fetch["pid"]) == (0, begin["pid"])
        assert begin["ts"] < update["ts"] < fetch["ts"]


def test_without_stretches_or_where_no_worker_waits_there_are_no_arrows(run, tmp_path):
    assert not of(traced(run, tmp_path / "none.json"), cat="flow")
    with_steps(run, make_pushes(), waits=False)
    assert not of(traced(run, tmp_path / "overlap.json"), cat="flow")


def test_counters_are_the_rates_of_the_intervals_and_what_the_pushes_had(run, tmp_path):
    found, pushes = traced(run, tmp_path / "trace.json"), make_pushes()
    rates = of(found, ph="C", name="rates", pid=1)
    assert len(rates) == sum(push.worker == 0 for push in pushes)
    assert rates[0]["args"] == {"images/s": 10.0, "MB/s": pytest.approx(0.012)}
    counted = of(found, ph="C", name="pushes", pid=0)
    assert [one["args"]["staleness"] for one in counted] == [push.staleness for push in pushes]
    assert counted[3]["args"]["loss"] == pushes[3].loss

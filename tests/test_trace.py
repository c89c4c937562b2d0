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
        shifted = [msgspec.structs.replace(event, t0=event.t0 - skew, t1=event.t1 - skew) if isinstance(event, Interval)
                   else msgspec.structs.replace(event, t=event.t - skew) for event in events]
        shifted[0] = msgspec.structs.replace(shifted[0], clock_offset_s=skew, clock_error_s=0.001 * rank)
        write_log(run.metrics_of(rank), [*shifted, Span(T0 + 3 - skew, "compute", 0.25)])
    return run


def traced(run, path):
    assert report.main([str(run.path), "--trace", str(path)]) == 0
    return json.loads(path.read_text())


def of(found, **fields):
    return [event for event in found["traceEvents"] if all(event.get(name) == value for name, value in fields.items())]


def test_the_same_moment_lies_at_the_same_place_for_ranks_whose_clocks_differ(run, tmp_path):
    found = traced(run, tmp_path / "trace.json")
    spans = of(found, name="compute", ph="X")
    assert [span["pid"] for span in spans] == [0, 1, 2, 3]
    assert [(span["ts"], span["dur"]) for span in spans] == [(3e6, 250_000)] * 4     # the first Start is at T0
    assert found["otherData"] == {"run": "run", "clock_error_s": 0.003}


def test_every_push_is_a_mark_with_its_numbers_and_every_interval_a_slice(run, tmp_path):
    found, pushes = traced(run, tmp_path / "trace.json"), make_pushes()
    marks = of(found, name="push", pid=0)
    assert [mark["ts"] for mark in marks] == pytest.approx([1e6 * (push.t - T0) for push in pushes])
    assert [mark["args"]["staleness"] for mark in marks] == [push.staleness for push in pushes]
    slices = of(found, ph="X", tid=trace.INTERVALS, pid=1)
    assert len(slices) == sum(push.worker == 0 for push in pushes)
    assert slices[0]["name"] == "mostly compute" and slices[0]["args"]["data"] == 0.25 and slices[0]["args"]["images"] == 10
    names = [event["args"]["name"] for event in of(found, name="process_name")]
    assert names[1] == "rank 1, worker (cuda:0 on node0)"
    assert {event["name"] for event in of(found, ph="i", pid=0)} == {"push", "validation", "checkpoint", "note", "end"}


def test_a_long_run_is_thinned_and_says_so(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trace, "MAX_EVENTS", 20)
    found = traced(run, tmp_path / "trace.json")
    assert len(of(found, name="push")) == PUSHES // 3 and len(of(found, ph="X", tid=trace.INTERVALS)) <= 20
    assert len(of(found, name="compute")) == 4               # spans were bounded when they were written
    assert found["otherData"]["pushes"] == "one of 3 is kept" and "pushes: one of 3 is kept" in capsys.readouterr().err


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
    meter.add(push=0.5, fetch=0.25, images=8)                # timed elsewhere: the two have just ended, in this order
    meter.add(torn_reads=1)
    with meter.phase("compute"):
        pass                                                 # beyond the five
    meter.flush()
    log.close()
    *spans, interval = read_events(tmp_path / "log.jsonl")
    assert [span.phase for span in spans] == ["data", "data", "data", "push", "fetch"]
    assert sum(span.seconds for span in spans[:3]) == pytest.approx(interval.data)
    assert spans[4].t == pytest.approx(spans[3].t + 0.5) and (spans[3].seconds, spans[4].seconds) == (0.5, 0.25)


def test_no_spans_are_written_unless_asked_for(tmp_path):
    log = EventLog(tmp_path / "log.jsonl")
    meter = Meter(log, interval_s=1e9)
    with meter.phase("compute"):
        pass
    meter.flush()
    log.close()
    assert [type(event) for event in read_events(tmp_path / "log.jsonl")] == [Interval]

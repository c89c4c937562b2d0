"""The screen of a run that is going on."""

import threading
import time

import pytest
from test_report import T0, cut, make_pushes, make_run, write_log

from asgd_mpi import report
from asgd_mpi.record.events import End
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.summary import summarize
from asgd_mpi.report import follow


@pytest.fixture
def run(tmp_path):
    """A run without its End events."""
    run = make_run(tmp_path / "run", make_pushes())
    for rank in range(4):
        cut(run.metrics_of(rank), 9)
    return run


def test_the_screen_has_the_numbers_of_the_summary(run):
    summary = summarize(run)
    text = follow.screen(summary, now=T0 + 8)
    assert f"{summary.timeline.images_per_s[-1]:,.0f} now, {summary.images_per_s:,.0f} mean" in text
    assert "5.00, 599 images" in text and f"{summary.staleness.max} at most" in text and "rank 3" in text
    assert "unfinished, 8.0 s, 3 workers" in text and "silent" not in text


def test_a_rank_without_a_line_for_long_is_named(run):
    last = {rank.rank: rank.last_t for rank in summarize(run).ranks}
    now = sorted(last.values())[1] + follow.SILENT_S + 0.001
    silent = [rank for rank, t in last.items() if now - t > follow.SILENT_S]
    assert 0 < len(silent) < 4
    assert f"rank {', '.join(map(str, silent))}: no line" in follow.screen(summarize(run), now)


def test_a_name_cannot_command_the_terminal(run):
    summary = summarize(run)
    summary.name = "a\x1b[2J\nb"
    assert "\x1b" not in follow.screen(summary, T0 + 8) and r"a\x1b[2J b" in follow.screen(summary, T0 + 8)


def test_an_empty_run_has_a_screen(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    assert "not validated yet" in follow.screen(summarize(RunDir.open(tmp_path)), T0)


def test_follow_ends_with_the_run_and_writes_nothing(run, monkeypatch, capsys):
    monkeypatch.setattr(follow, "PAUSE_S", 0.01)
    thread = threading.Thread(target=report.main, args=([str(run.path), "--follow"],))
    thread.start()
    time.sleep(0.2)
    assert thread.is_alive()
    for rank in range(4):
        write_log(run.metrics_of(rank), [End(T0 + 9, "finished")])   # the cut line swallows the first of two
        write_log(run.metrics_of(rank), [End(T0 + 9, "finished")])
    thread.join(timeout=30)
    assert not thread.is_alive() and "run, finished" in capsys.readouterr().out
    assert list(run.report.iterdir()) == []


def test_several_runs_cannot_be_followed_at_once(run, capsys):
    assert report.main([str(run.path), str(run.path), "--follow"]) == 2
    assert "one run at a time" in capsys.readouterr().err

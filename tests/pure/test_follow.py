"""The screen of a run that is going on."""

import http.server
import re
import threading
import time

import msgspec
import pytest
from test_page import CHROMIUM, dump_dom
from test_report import T0, cut, make_pushes, make_run, write_log

from asgd_mpi import report
from asgd_mpi.comm import wait
from asgd_mpi.record.events import End
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.summary import summarize
from asgd_mpi.report import follow
from asgd_mpi.report.page import Live, page


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
    assert (
        "5.00, 599 images" in text
        and f"{summary.staleness.max} at most" in text
        and "rank 3" in text
    )
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
    assert "\x1b" not in follow.screen(summary, T0 + 8) and r"a\x1b[2J b" in follow.screen(
        summary, T0 + 8
    )


def test_an_empty_run_has_a_screen(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    assert "not validated yet" in follow.screen(summarize(RunDir.open(tmp_path)), T0)


@pytest.mark.parametrize("options", [[], ["--no-write"]])
def test_follow_ends_with_the_run_and_leaves_the_page_of_its_end(run, options, monkeypatch, capsys):
    monkeypatch.setattr(follow, "PAUSE_S", 0.01)
    monkeypatch.setattr(follow, "SHARE", 0)
    thread = threading.Thread(target=report.main, args=([str(run.path), "--follow", *options],))
    thread.start()
    wait.until(
        lambda: bool(options) or follow.live_page(run).exists(), 60, "the page of the run under way"
    )
    assert thread.is_alive()
    if not options:
        text = follow.live_page(run).read_text()
        assert '<meta http-equiv="refresh" content="1">' in text and ">unfinished<" in text
    for rank in range(4):
        # the cut line swallows the first of two
        write_log(run.metrics_of(rank), [End(T0 + 9, "finished")])
        write_log(run.metrics_of(rank), [End(T0 + 9, "finished")])
    thread.join(timeout=120)
    assert not thread.is_alive() and "run, finished" in capsys.readouterr().out
    assert list(run.report.iterdir()) == ([] if options else [follow.live_page(run)])
    if not options:
        text = follow.live_page(run).read_text()
        assert 'http-equiv="refresh' not in text and ">finished<" in text


def test_a_directory_that_one_may_only_read_is_followed_without_a_page(run, monkeypatch, capsys):
    run.report.rmdir()
    run.report.write_text("a file in the way")
    for rank in range(4):
        write_log(run.metrics_of(rank), [End(T0 + 9, "finished")])
        write_log(run.metrics_of(rank), [End(T0 + 9, "finished")])
    assert report.main([str(run.path), "--follow"]) == 0
    shown = capsys.readouterr()
    assert "run, finished" in shown.out and shown.err.count("no page is written") == 1


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_a_browser_loads_the_page_anew_until_the_run_is_over(run, tmp_path):
    """A server hands out the page as it is written: twice of the run under way, then of its end.

    On the first one a reader sorts a table and opens the numbers of a figure; the last one still has it so.
    """
    going, now = summarize(run), time.time()
    over = msgspec.structs.replace(going, status="finished")
    pages = [page(going, live=Live(now, 1)), page(going, live=Live(now - 100, 1))]
    policy = re.search("<meta http-equiv=.Content-Security-Policy.*?>", pages[0])[0]
    by_hand = (
        "<script>document.querySelectorAll('table.sorts th button')[3].click();"
        "document.querySelectorAll('details')[1].open = true</script></body>"
    )
    pages[0] = pages[0].replace(policy, "").replace("</body>", by_hand)
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/live.html":
                asked.append(self.path)
            number = min(len(asked), 3)
            text = page(over, live=Live(now, 0)) if number == 3 else pages[max(0, number - 1)]
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/live.html"
        seen = dump_dom(url, tmp_path, "--virtual-time-budget=20000")
        server.shutdown()
    assert len(asked) == 3 and ">finished<" in seen and "anew every" not in seen
    heads = re.findall("<th [^>]*>", seen[seen.index('class="sorts"') :])
    assert ["aria-sort" in head for head in heads[:5]] == [False, False, False, True, False]
    assert ["open" in one for one in re.findall("<details[^>]*>", seen)[:3]] == [False, True, False]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_a_page_that_nobody_writes_any_more_says_so(run, tmp_path):
    for age_s, is_late in (
        (1, False),
        (7200, True),
    ):  # from 30 + 5 x 600 s on, however long a browser takes to start
        text = page(summarize(run), live=Live(time.time() - age_s, 600))
        (tmp_path / "live.html").write_text(text)
        seen = dump_dom(f"file://{tmp_path / 'live.html'}", tmp_path)
        assert (
            "Nobody writes this page any more: start report --follow again.</p>" in seen
        ) == is_late


def test_several_runs_cannot_be_followed_at_once(run, capsys):
    assert report.main([str(run.path), str(run.path), "--follow"]) == 2
    assert "one run at a time" in capsys.readouterr().err

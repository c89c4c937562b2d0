"""`--follow`: the state of a run that is going on, on one screen of text and as a page, until it ends.

The page is one file, `report/live.html`, written whole each time; a browser that shows it loads it anew by itself, and stops
when the run is over. The files are read anew for every screen; the pause grows with the time that takes, so that following
costs at most a tenth of a core however long the run is.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

from asgd_mpi.errors import RunDirError, few, one_line, tell
from asgd_mpi.record.disk import make_directory, write_whole
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.summary import Summary, summarize
from asgd_mpi.record.unit import one_of
from asgd_mpi.report.measure import measures
from asgd_mpi.report.units import count, number, percent, seconds, workers

PAUSE_S = 2.0
SHARE = 9  # pauses are at least this many times as long as reading took
SILENT_S = 30.0  # without a line from a rank: it is named
BLOCKS = " ▁▂▃▄▅▆▇█"
CLEAR = "\x1b[H\x1b[2J"


def follow(run: RunDir, writes_page: bool = True) -> None:
    """Print screens, and write the page, until the run has finished or failed, or the user stops it (Ctrl-C)."""
    pause_s = PAUSE_S
    try:
        while True:
            started = time.monotonic()
            summary = summarize(run)
            is_over = summary.status != "unfinished"
            if writes_page:
                reload_s = 0 if is_over else math.ceil(pause_s)
                writes_page = _write_page(run, summary, reload_s)
            if sys.stdout.isatty():
                print(CLEAR, end="")
            print(screen(summary, time.time()), flush=True)
            if writes_page:
                print(f"{'page':>10}  {one_line(str(live_page(run)))}", flush=True)
            if is_over:
                return
            pause_s = max(PAUSE_S, SHARE * (time.monotonic() - started))
            time.sleep(pause_s)
    except KeyboardInterrupt:
        print()


def live_page(run: RunDir) -> Path:
    return run.report / "live.html"


def _write_page(run: RunDir, summary: Summary, every_s: int) -> bool:
    """Write the page; returns whether it could be, and says once why not: who follows may not own the directory."""
    from asgd_mpi.report.page import Live, page  # loads matplotlib

    try:
        make_directory(run.report)
        write_whole(live_page(run), page(summary, live=Live(time.time(), every_s)).encode())
    except (RunDirError, OSError) as error:
        tell(f"no page is written: {error}", file=sys.stderr)
        return False
    return True


def screen(summary: Summary, now: float) -> str:
    """Return the state at `now`, Unix seconds, as lines of at most 80 columns or so."""
    measure = measures(summary.validations)[0]
    line = summary.timeline
    ran_s = None
    if summary.started is not None:
        until = now if summary.status == "unfinished" else _end(summary)
        ran_s = summary.seconds_at(until)
    result = "not validated yet"
    if summary.validations:
        last = summary.validations[-1]
        result = f"{measure.cell(measure.of(last))} at epoch {last.epoch:.1f}"
    reason, images_per_s = "", None
    if summary.status == "failed":
        reason = f" ({one_line(summary.reason)})"
    if line.t:
        images_per_s = line.images_per_s[-1]
    rows = [
        (
            "run",
            f"{one_line(summary.name)}, {summary.status}{reason}, {seconds(ran_s)}, {workers(summary.crews)}",
        ),
        (
            f"{summary.unit}/s",
            f"{number(images_per_s, 0)} now, {number(summary.images_per_s, 0)} mean",
        ),
        ("", _spark(line.images_per_s[-60:])),
        (
            "epochs",
            f"{number(summary.epochs_done, 2)}, {count(summary.images, one_of(summary.unit))}",
        ),
        ("loss", f"{number(_newest(line.loss), 4)}, learning rate {_newest(line.lr) or 0:.4g}"),
        (one_line(measure.name), result),
        (
            "staleness",
            f"{number(_newest(line.staleness), 2)} now, "
            f"{number(summary.staleness and summary.staleness.max, 0)} at most",
        ),
        ("server", f"busy {percent(_newest(line.server_busy), 0)}"),
    ]
    if summary.stragglers:
        rows.append(("stragglers", _ranks([worker.rank for worker in summary.stragglers])))
    silent = [
        rank.rank
        for rank in summary.present
        if rank.ended is None and rank.last_t is not None and now - rank.last_t > SILENT_S
    ]
    if silent and summary.status == "unfinished":
        rows.append(("silent", f"{_ranks(silent)}: no line for {SILENT_S:.0f} s or more"))
    return "\n".join(f"{name:>10}  {text}" for name, text in rows)


def _end(summary: Summary) -> float:
    return summary.started + (summary.duration_s or 0.0)


def _newest(values: list[float | None]) -> float | None:
    return next((value for value in reversed(values) if value is not None), None)


def _spark(values: list[float]) -> str:
    largest = max(values, default=0.0) or 1.0
    return "".join(BLOCKS[round(value / largest * (len(BLOCKS) - 1))] for value in values)


def _ranks(numbers: list[int]) -> str:
    return f"rank {few(numbers, 8)}"

"""`--follow`: the state of a run that is going on, on one screen of text, until it ends.

The files are read anew for every screen; the pause grows with the time that takes, so that following costs at most a
tenth of a core however long the run is.
"""

from __future__ import annotations

import sys
import time

from asgd_mpi.errors import one_line
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.summary import Summary, summarize
from asgd_mpi.report.units import count, number, percent, seconds, workers

PAUSE_S = 2.0
SHARE = 9             # pauses are at least this many times as long as reading took
SILENT_S = 30.0       # without a line from a rank: it is named
BLOCKS = " ▁▂▃▄▅▆▇█"
CLEAR = "\x1b[H\x1b[2J"


def follow(run: RunDir) -> None:
    """Print screens until the run has finished or failed, or the user stops it (Ctrl-C)."""
    try:
        while True:
            started = time.monotonic()
            summary = summarize(run)
            if sys.stdout.isatty():
                print(CLEAR, end="")
            print(screen(summary, time.time()), flush=True)
            if summary.status != "unfinished":
                return
            time.sleep(max(PAUSE_S, SHARE * (time.monotonic() - started)))
    except KeyboardInterrupt:
        print()


def screen(summary: Summary, now: float) -> str:
    """The state at `now`, Unix seconds, as lines of at most 80 columns or so."""
    line, last = summary.timeline, summary.validations[-1] if summary.validations else None
    ran_s = None if summary.started is None else summary.seconds_at(now if summary.status == "unfinished" else _end(summary))
    reason = f" ({one_line(summary.reason)})" if summary.status == "failed" else ""
    rows = [
        ("run", f"{one_line(summary.name)}, {summary.status}{reason}, {seconds(ran_s)}, {workers(summary.crews)}"),
        ("images/s", f"{number(line.images_per_s[-1] if line.t else None, 0)} now, {number(summary.images_per_s, 0)} mean"),
        ("", _spark(line.images_per_s[-60:])),
        ("epochs", f"{number(summary.epochs_done, 2)}, {count(summary.images, 'image')}"),
        ("loss", f"{number(_newest(line.loss), 4)}, learning rate {_newest(line.lr) or 0:.4g}"),
        ("accuracy", f"{percent(1 - last.top1_error, 2)} at epoch {last.epoch:.1f}" if last else "not validated yet"),
        ("staleness", f"{number(_newest(line.staleness), 2)} now, "
                      f"{number(summary.staleness and summary.staleness.max, 0)} at most"),
        ("server", f"busy {percent(_newest(line.server_busy), 0)}"),
    ]
    if summary.stragglers:
        rows.append(("stragglers", _ranks([worker.rank for worker in summary.stragglers])))
    silent = [rank.rank for rank in summary.present
              if rank.ended is None and rank.last_t is not None and now - rank.last_t > SILENT_S]
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
    return "rank " + ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")

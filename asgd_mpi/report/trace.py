"""A run as a trace in Chrome's JSON format, to open in Perfetto (ui.perfetto.dev) or chrome://tracing.

In: the metrics files and `pushes.log` of a run directory, whatever is there. Out: one JSON file. Each rank is a process with
up to three threads: `phases`, the stretches that `--record.spans` wrote; `intervals`, one slice for each line with the
seconds of every phase; on the server `pushes`, one mark for each applied push. Validations, checkpoints and notes are marks.
Counters are images/s and bytes/s of each rank, and staleness, loss and rate of the pushes. Where the stretches are there, an
arrow leads from a worker's push to the update that it is in, and on to the worker's next fetch (`arrows`).

Times are microseconds after the first Start, on the clock of rank 0: each rank's own, plus the offset that it measured when
it started, so they are right to `clock_error_s` and to what the clocks drifted since. The time between two starts is there.

The file is bounded: of more than MAX_EVENTS intervals or pushes, one of n is kept, and `otherData` says so. Spans are
bounded when they are written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from asgd_mpi.errors import one_line
from asgd_mpi.record.aggregate import COUNTERS, Lines
from asgd_mpi.record.disk import open_own, unwritable
from asgd_mpi.record.events import (
    PHASES,
    Checkpoint,
    End,
    Event,
    Interval,
    Note,
    Push,
    Span,
    Start,
    Validation,
    read_events,
    read_pushes,
)
from asgd_mpi.record.history import lineage
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.report.arrows import PHASES_THREAD, Arrows, push_facts
from asgd_mpi.untrusted import bounded

MAX_EVENTS = 200_000  # of intervals, and of pushes: a file of some 50 MB
SPANS, INTERVALS, PUSHES = PHASES_THREAD, 2, 3  # threads
THREADS = {SPANS: "phases", INTERVALS: "intervals", PUSHES: "pushes"}
MARKS = {Validation: "validation", Checkpoint: "checkpoint", Note: "note", End: "end"}


def write_trace(run: RunDir, path: Path) -> list[str]:
    """Write the trace of a run to `path`; returns what was left out or could not be read. Raises RunDirError."""
    lines, encode = Lines(run), msgspec.json.Encoder().encode
    files = {file: rank for rank, _, file in run.metrics_files}
    starts = [event for file in files for event in _starts(file)]
    zero = min((event.t + event.clock_offset_s for event in starts), default=None)
    server_offset = next((event.clock_offset_s for event in starts if event.rank == 0), 0.0)
    every = _stride(files), _stride([run.pushes_of(restart) for restart in run.restarts])
    try:
        with (open_own if run.holds(path) else open)(path, "wb") as out:
            out.write(b'{"displayTimeUnit":"ms","traceEvents":[\n')
            for event in _events(run, lines, files, zero, server_offset, *every):
                out.write(encode(event) + b",\n")
            thinned = {
                name: f"one of {stride} is kept"
                for name, stride in zip(("intervals", "pushes"), every)
                if stride > 1
            }
            worst = max((event.clock_error_s for event in starts), default=0.0)
            notes = {"run": one_line(run.path.resolve().name), "clock_error_s": worst, **thinned}
            out.write(
                b'{"name":"end of trace","ph":"M","pid":0,"args":{}}\n],"otherData":'
                + encode(notes)
                + b"}\n"
            )
    except OSError as error:
        raise unwritable(path, error) from error
    return [
        *lines.problems,
        *(f"{name}: {what}, so that the file stays small." for name, what in thinned.items()),
    ]


def _starts(file: Path) -> Iterator[Start]:
    """Yield the Start of a metrics file is its first line."""
    try:
        first = next(read_events(file), None)
    except (OSError, UnicodeError):
        return
    if isinstance(first, Start):
        yield first


def _stride(files) -> int:
    count = 0
    for file in files:
        try:
            count += sum(1 for _ in bounded.lines(file))
        except OSError:
            continue
    return max(1, -(-count // MAX_EVENTS))


def _events(
    run: RunDir,
    lines: Lines,
    files: dict[Path, int],
    zero: float | None,
    server_offset: float,
    every_interval: int,
    every_push: int,
) -> Iterator[dict]:
    pushes = [*_pushes(run, lines, every_push)]
    if zero is None and pushes:
        zero = pushes[0][0].t
    arrows = Arrows()
    for push, _ in pushes:
        arrows.add_push(push, push.t + server_offset - zero)
    roles: dict[int, list[Start]] = {}
    for file, rank in files.items():
        offset, number = 0.0, 0
        for event in lines.read(read_events, file):
            if zero is None:
                zero = event.t0 if isinstance(event, Interval) else event.t
            if isinstance(event, Start):
                offset = event.clock_offset_s
                roles.setdefault(rank, []).append(event)
            elif isinstance(event, Interval):
                number += 1
                if number % every_interval:
                    continue
            facts = None
            if isinstance(event, Span):
                facts = arrows.add_span(rank, event, event.t + offset - zero)
            yield from _laid(event, rank, lambda t: _us(t + offset - zero), facts)
    for rank, starts in roles.items():
        yield from _names(rank, starts)
    for push, facts in pushes:
        ts = _us(push.t + server_offset - zero)
        yield _mark("push", 0, PUSHES, ts, push_facts(push) | facts)
        counted = {"staleness": push.staleness, "loss": push.loss, "learning rate": push.lr}
        yield _counter("pushes", 0, ts, counted)
    yield from arrows.laid()


def _pushes(run: RunDir, lines: Lines, every: int) -> Iterator[tuple[Push, dict]]:
    """Yield one push of `every`, with the start of the run that it is of, and whether that was forgotten."""
    kept, number = {session.restart: session.kept for session in lineage(run)}, 0
    for restart in run.restarts or [0]:
        until = kept.get(restart, 0)
        for push in lines.read(read_pushes, run.pushes_of(restart)):
            number += 1
            if number % every == 0:
                facts = {"start": restart}
                if until is not None and push.version >= until:
                    facts["forgotten"] = True
                yield push, facts


def _us(seconds: float) -> float:
    return round(1e6 * seconds, 1)


def _names(rank: int, starts: Sequence[Start]) -> Iterator[dict]:
    """Yield what the rank was, in one start of the run after the other."""
    places = list(
        dict.fromkeys(
            one_line(f"{start.role} ({start.device} on {start.host})") for start in starts
        )
    )
    yield {
        "name": "process_name",
        "ph": "M",
        "pid": rank,
        "args": {"name": f"rank {rank}, {', then '.join(places)}"},
    }
    yield {"name": "process_sort_index", "ph": "M", "pid": rank, "args": {"sort_index": rank}}
    for thread, title in THREADS.items():
        if thread != PUSHES or rank == 0:
            yield {
                "name": "thread_name",
                "ph": "M",
                "pid": rank,
                "tid": thread,
                "args": {"name": title},
            }


def _laid(
    event: Event, rank: int, place: Callable[[float], float], facts: dict | None = None
) -> Iterator[dict]:
    """Yield one event on the axis; `facts`: what else is known of it."""
    match event:
        case Span():
            span = {
                "name": event.phase,
                "cat": "phase",
                "ph": "X",
                "pid": rank,
                "tid": SPANS,
                "ts": place(event.t),
                "dur": round(1e6 * event.seconds, 1),
            }
            if facts:
                span["args"] = facts
            yield span
        case Interval():
            phases = {
                phase: getattr(event, phase)
                for phase in (*PHASES, "hidden")
                if getattr(event, phase)
            }
            counts = {
                counter: getattr(event, counter) for counter in COUNTERS if getattr(event, counter)
            }
            longest = max(phases, key=phases.get, default="idle")
            yield {
                "name": f"mostly {longest}",
                "cat": "interval",
                "ph": "X",
                "pid": rank,
                "tid": INTERVALS,
                "ts": place(event.t0),
                "dur": round(1e6 * (event.t1 - event.t0), 1),
                "args": phases | counts,
            }
            if event.t1 > event.t0:
                rates = {
                    "images/s": event.images / (event.t1 - event.t0),
                    "MB/s": (event.bytes_pushed + event.bytes_fetched)
                    / (event.t1 - event.t0)
                    / 1e6,
                }
                shown = {name: rate for name, rate in rates.items() if rate or name == "images/s"}
                yield _counter("rates", rank, place(event.t0), shown)
        case Validation() | Checkpoint() | Note() | End():
            yield _mark(
                MARKS[type(event)], rank, INTERVALS, place(event.t), msgspec.to_builtins(event)
            )


def _counter(name: str, rank: int, ts: float, values: dict[str, float]) -> dict:
    return {"name": name, "ph": "C", "pid": rank, "ts": ts, "args": values}


def _mark(name: str, rank: int, thread: int, ts: float, facts: dict) -> dict:
    shown = {
        key: one_line(value) if isinstance(value, str) else value for key, value in facts.items()
    }
    return {"name": name, "ph": "i", "s": "t", "pid": rank, "tid": thread, "ts": ts, "args": shown}

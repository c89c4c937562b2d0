"""The report of a run, from its run directory alone: a page, Markdown and JSON. Imports neither MPI nor torch.

summary     -> record.summary: every number
answers     is it fast, is it right, what to change
brief       the short form, for a terminal
advice      what the numbers suggest, in sentences
audit       each epoch's samples: due, used, repeated, missing
trace       all ranks on one clock, for Perfetto (arrows: from a push to its update and the next fetch)
compare     several runs: speed-up, limit, time and cost to an accuracy (comparison: the same as a page)
markdown    the text
figures svg -> inline pictures (matplotlib, loaded when the first one is drawn)
page        the HTML page
command     python -m asgd_mpi.report
"""

from pathlib import Path

from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.summary import summarize
from asgd_mpi.report.command import main, write
from asgd_mpi.report.markdown import render

__all__ = ["main", "make", "render", "summarize", "write"]


def make(run: RunDir) -> Path:
    """Write the report of a run; returns where its page is. Raises UserError."""
    summary = summarize(run)
    write(run, summary, render(summary))
    return run.report / "report.html"

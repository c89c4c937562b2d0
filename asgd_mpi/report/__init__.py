"""The report of a run, from its run directory alone: a page, Markdown and JSON. Imports neither MPI nor torch.

    summary     -> record.summary: every number
    advice      what the numbers suggest, in sentences
    audit       each epoch's samples: due, used, repeated, missing
    trace       all ranks on one clock, for Perfetto
    compare     several runs: speed-up, limit, time and cost to an accuracy (comparison: the same as a page)
    markdown    the text
    figures svg -> inline pictures (matplotlib, loaded when the first one is drawn)
    page        the HTML page
    command     python -m asgd_mpi.report
"""

from asgd_mpi.record.summary import summarize
from asgd_mpi.report.command import main, write
from asgd_mpi.report.markdown import render

__all__ = ["main", "render", "summarize", "write"]

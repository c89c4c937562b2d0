"""The wait of rank 0 for other servers is no update: it is a phase of its own, and the advice does not ask for more of them."""

import pytest
from test_report import T0, make_pushes, make_run, write_log

from asgd_mpi.record.events import Interval, Start
from asgd_mpi.record.summary import summarize
from asgd_mpi.report.advice import advise


def make(path, apply, servers):
    run = make_run(path, make_pushes())
    write_log(
        run.metrics_of(0, 1),
        [
            Start(T0, 0, "server", "h", "cpu", 3, 2_000_000),
            Interval(
                T0, T0 + 92, apply=apply, servers=servers, idle=92 - apply - servers, pushes=60
            ),
        ],
    )
    return summarize(run)


def test_a_server_that_waits_for_others_is_told_so_and_not_to_take_more(tmp_path):
    summary = make(tmp_path / "run", apply=4, servers=80)
    assert summary.ranks[0].phases["servers"] == 80 and summary.server_busy == pytest.approx(
        10 / 100
    )
    found = " ".join(advise(summary))
    assert (
        "Rank 0 waits 80 % of its time for the other servers" in found
        and "More servers" not in found
    )


def test_a_server_that_is_busy_with_its_own_slice_is_not_told_that_it_waits(tmp_path):
    found = " ".join(advise(make(tmp_path / "run", apply=86, servers=2)))
    assert "Rank 0 waits" not in found and "More servers share the update out" in found

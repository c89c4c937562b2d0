"""Who has said goodbye is not waited for; nobody says so before it has been sent home."""

import pytest
import torch
from test_loops import Cluster, make_task

from asgd_mpi.comm.arrival import Arrival
from asgd_mpi.protocol.ledger import Ledger, LedgerError, Plan
from asgd_mpi.protocol.messages import Header, Kind, Orders

GOODBYE = Header(Kind.GOODBYE, 0, 1, 0, 0, 0, 0)


def make_ledger(num_validation=10):
    return Ledger(Plan(2, 100, num_validation, 100, 10, 1, 1.0), lambda samples, staleness: 0.1)


def test_a_goodbye_counts_when_the_run_is_left_and_not_before():
    ledger = make_ledger()
    with pytest.raises(
        LedgerError,
        match="a goodbye, though the run goes on; packet Header.kind=<Kind.GOODBYE.*worker 0",
    ):
        ledger.goodbye(GOODBYE)
    assert ledger.present == [0, 1]
    ledger.leave()
    ledger.goodbye(GOODBYE)
    assert ledger.present == [1]
    assert dict(ledger.take_news())[0].judged == 1


@pytest.mark.parametrize("retired", [False, True])
def test_a_worker_that_says_goodbye_and_goes_on_is_retired_and_still_waited_for(
    digits, tmp_path, retired
):
    server = Cluster(make_task(digits), 2, tmp_path).server
    held = server.ledger.in_debt
    if retired:
        server._retire(0, "it was slow", for_good=False)
    server._take_note(Arrival(0, GOODBYE, torch.zeros(0), torch.zeros(0)))
    assert server.ledger.members == [1] and server.ledger.present == [0, 1] and held == [0, 1]
    assert dict(server.ledger.take_news())[0].orders == Orders.REST
    assert (
        server.losses[-1].for_good
        and "a goodbye, though the run goes on" in server.losses[-1].reason
    )

"""What becomes of packets that are not applied, and of their senders; without a server."""

from dataclasses import replace

import pytest
from test_ledger import PLAN, Game

from asgd_mpi.protocol.ledger import LedgerError
from asgd_mpi.protocol.membership import GIVEN_UP, Membership, Refused
from asgd_mpi.protocol.messages import Kind, Verdict


def game(moves=False, **plan):
    played = Game(replace(PLAN, **plan))
    return played, Membership(played.ledger, moves)


def said(played, worker, **fields):
    """The next packet of a worker, with some fields replaced."""
    header = replace(played.header(worker), **fields)
    played.sent[worker] += 1
    played.at[worker] += header.count
    played.mail.update(played.ledger.take_news())
    return header


def test_a_finite_gradient_of_a_member_is_judged():
    played, membership = game()
    verdict = membership.gradient(said(played, 0))
    assert isinstance(verdict, Verdict) and played.ledger.version == 1


@pytest.mark.parametrize("kind", [Kind.GRADIENT, Kind.NONFINITE])
@pytest.mark.parametrize("moves", [False, True])
def test_a_gradient_that_is_not_finite_is_refused_and_a_worker_with_weights_of_its_own_begins_anew(
    kind, moves
):
    played, membership = game(moves)
    found = membership.gradient(said(played, 1, kind=kind, loss=float("nan")))
    assert found == Refused("not finite: loss nan", is_finite=False, begins_anew=moves)
    assert played.ledger.version == 0 and 1 in played.ledger.members


def test_so_many_of_them_in_a_row_retire_their_worker_for_good():
    played, membership = game(max_nonfinite=2)
    for attempt in (1, 2):
        header = said(played, 2, kind=Kind.NONFINITE, loss=float("inf"))
        found = membership.gradient(header)
        played.mail.update(played.ledger.take_news())
        assert bool(found.retires) == (attempt == 2)
    assert found.retires == "2 gradients in a row were not finite (the last loss: inf)"
    assert 2 not in played.ledger.members
    # what it had sent before it heard of that
    header = replace(header, packet=header.packet + 1, kind=Kind.GRADIENT, loss=1.0)
    found = membership.gradient(header)
    assert found == Refused("it came from a retired worker")
    assert 2 not in played.ledger.members


def test_a_worker_that_was_retired_until_it_is_heard_of_is_back_and_begins_anew():
    played, membership = game()
    header = said(played, 0)
    played.ledger.retire(0, for_good=False)
    found = membership.gradient(header)
    assert found == Refused("it came from a retired worker", is_back=True, begins_anew=True)
    assert 0 in played.ledger.members and played.ledger.version == 0


def test_what_can_still_count_is_not_left():
    played, membership = game()
    with pytest.raises(LedgerError, match="a gradient was left that could still count"):
        membership.left(said(played, 0, kind=Kind.GIVEN_UP))
    assert GIVEN_UP.startswith("left unfinished")

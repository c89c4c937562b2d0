"""The server of a slice waits for rank 0 as long as that says that it lives, and no longer than the limit without a word."""

from collections import deque
from types import SimpleNamespace

import pytest
from test_waits_by_order import Clock

from asgd_mpi.comm import server_group
from asgd_mpi.comm.arrival import Command
from asgd_mpi.comm.server_group import STAYS, CoordinatorLink, ServerGroup
from asgd_mpi.errors import DeadlineExceeded

LIMIT_S = 600.0
WORLD = SimpleNamespace(rank=3, host="n1", timeout_s=LIMIT_S)


@pytest.fixture
def coordinator(monkeypatch):
    clock = Clock(monkeypatch, server_group)
    coordinator = CoordinatorLink.__new__(CoordinatorLink)
    coordinator._world, coordinator._inbox, coordinator._commands, coordinator._heard_at = (
        WORLD,
        SimpleNamespace(longest_s=1.0),
        deque(),
        clock.now,
    )
    coordinator.poll = lambda: bool(coordinator._commands)
    return coordinator, clock


def test_a_server_of_a_slice_hears_for_a_week_that_rank_0_lives_and_ends_when_it_hears_no_more(
    coordinator,
):
    coordinator, clock = coordinator
    week = 7 * 24 * 3600.0
    while clock.now < week:
        clock.now += LIMIT_S / STAYS
        coordinator._commands.append(Command("stay"))
        assert coordinator.take(0.1).kind == "stay"
    with pytest.raises(
        DeadlineExceeded,
        match="rank 3 on n1, which serves a slice, waits for rank 0 .* within 600 s",
    ):
        while True:
            assert coordinator.take(10.0) is None
    assert LIMIT_S < clock.now - week < 1.2 * LIMIT_S


def test_rank_0_says_that_it_lives_when_it_has_nothing_else_to_say(monkeypatch):
    clock, told = Clock(monkeypatch, server_group), []
    rank_0 = ServerGroup.__new__(ServerGroup)
    rank_0._world, rank_0.ranks, rank_0._sent, rank_0._number, rank_0._told_at = (
        WORLD,
        [],
        [],
        0,
        clock.now,
    )
    tell = rank_0.tell
    monkeypatch.setattr(
        rank_0, "tell", lambda command: (told.append((clock.now, command.kind)), tell(command))
    )
    while clock.now < 3 * LIMIT_S:
        rank_0.poll()
        clock.now += 1.0
        if clock.now % 50 == 0 and clock.now < LIMIT_S:
            rank_0.tell(Command("read"))
    stays = [at for at, kind in told if kind == "stay"]
    assert min(stays) > LIMIT_S and 0.8 * 2 * STAYS < len(stays) <= 2 * STAYS

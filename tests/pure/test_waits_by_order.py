"""A wait that was ordered lasts as long as the one who is waited for lives; one for a dead or stuck rank has a limit."""

import time

import pytest
from test_window import make_pair

from asgd_mpi.comm import wait
from asgd_mpi.comm.worker_window import FAR_S
from asgd_mpi.errors import DeadlineExceeded
from asgd_mpi.protocol.messages import Lease, Mail, Orders, Work

LIMIT_S = 20.0
LEASE = Lease(1, Work.TRAIN, 0, 0, 16)
# What a worker waits for by order, the mail that it has meanwhile, and the mail that ends the wait.
ORDERED = {
    "rests, retired for good": (
        Mail(1, 0, Orders.REST),
        Mail(1, 0, Orders.STOP),
        lambda mail: mail.orders == Orders.STOP,
    ),
    "rests until the run is left": (
        Mail(1, 0, Orders.REST),
        Mail(1, 0, Orders.LEAVE),
        lambda mail: mail.orders == Orders.LEAVE,
    ),
    "waits out a warm start": (
        Mail(1, 0),
        Mail(1, 0, leases=(LEASE,)),
        lambda mail: bool(mail.leases),
    ),
    "is held by the others": (Mail(1, 0, hold=True), Mail(1, 1), lambda mail: not mail.hold),
    "waits for a checkpoint to save": (Mail(1, 0), Mail(1, 0, save=1), lambda mail: mail.save > 0),
    "has been told to report": (
        Mail(1, 0),
        Mail(1, 0, Orders.REPORT),
        lambda mail: mail.orders == Orders.REPORT,
    ),
}


class Clock:
    """Time that passes only while a wait sleeps; what others do meanwhile is `goes_on`.

    It stands for `time` in `wait`, and in `modules`, alone: a thread of a library may sleep, too (torch.compile's does, for ever).
    """

    def __init__(self, monkeypatch, *modules):
        self.now, self.goes_on = 0.0, lambda: None
        for module in (wait, *modules):
            monkeypatch.setattr(module, "time", self)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 0.01)  # a poll takes time, too
        self.goes_on()


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_a_wait_lasts_for_days_while_the_beat_changes_and_ends_within_the_limit_when_it_stops(
    clock,
):
    lives_s = 600.0 * 30
    with pytest.raises(
        DeadlineExceeded,
        match="worker 3 waits for rank 0 to end the run: no sign of life came within 600 s",
    ):
        wait.until(
            lambda: clock.now < 0,
            600.0,
            "worker 3 waits for rank 0 to end the run",
            longest_s=5.0,
            beat=lambda: int(min(clock.now, lives_s)),
        )
    assert lives_s + 600 <= clock.now < lives_s + 600 * (1 + 3 / wait.LOOKS)


def test_a_thread_that_sleeps_elsewhere_does_not_move_the_clock(clock):
    before = time.monotonic()
    time.sleep(0.01)
    assert clock.now == 0 and time.monotonic() - before >= 0.01


def test_a_wait_without_a_beat_ends_at_its_limit(clock):
    with pytest.raises(DeadlineExceeded, match="nothing came within 600 s"):
        wait.until(lambda: False, 600.0, "rank 1 waits", longest_s=5.0)
    assert 600 < clock.now < 606


class Server:
    """A server whose loop turns until `dies_at`; at `at` it posts some mail."""

    def __init__(self, window, clock, dies_at=float("inf"), at=float("inf"), mail=None):
        self.window, self.clock, self.dies_at = window, clock, dies_at
        self.at, self.mail = at, mail
        clock.goes_on = self.turn

    def turn(self):
        if self.clock.now < self.dies_at:
            self.window.answer()
        if self.mail and self.clock.now >= self.at:
            self.window.post(0, self.mail)
            self.mail = None


@pytest.fixture
def pair():
    server, worker = make_pair(1600)
    server._asked = {}
    worker.world.timeout_s = LIMIT_S
    server.post(0, Mail(0, 0))
    return server, worker


@pytest.mark.parametrize("what", ORDERED)
def test_what_a_worker_does_by_order_may_last_longer_than_the_limit(pair, clock, what):
    server, worker = pair
    meanwhile, at_last, until = ORDERED[what]
    server.post(0, meanwhile)
    Server(server, clock, at=5 * LIMIT_S, mail=at_last)
    assert worker.await_mail(1, until, "end it") == at_last
    assert clock.now >= 5 * LIMIT_S


@pytest.mark.parametrize("is_near, looks_a_second", [(True, 100), (False, 1 / FAR_S)])
def test_a_worker_of_another_host_that_waits_by_order_looks_50_times_a_second_at_most(
    pair, clock, monkeypatch, is_near, looks_a_second
):
    """A poll takes 0.01 s at least on this clock; twenty times within the limit the pauses begin with none, as it looks for a beat."""
    server, worker = pair
    worker.world.timeout_s, orders_at = 600.0, 300.0
    server.post(0, Mail(1, 0))
    Server(server, clock, at=orders_at, mail=Mail(1, 0, Orders.STOP))
    read, looks = worker.read_mail, []

    def look():
        looks.append(clock.now)
        worker.near = [True]  # its memory is here in truth
        found = read()
        worker.near = [is_near]
        return found

    worker.near = [is_near]
    monkeypatch.setattr(worker, "read_mail", look)
    monkeypatch.setattr(worker, "_beat", lambda: int(clock.now))
    assert worker.await_mail(1, lambda mail: mail.orders == Orders.STOP, "end it")
    assert len(looks) == pytest.approx(orders_at * looks_a_second, rel=0.07)


@pytest.mark.parametrize("what", ORDERED)
def test_a_server_that_stops_meanwhile_is_found_within_the_limit(pair, clock, what):
    server, worker = pair
    meanwhile, at_last, until = ORDERED[what]
    server.post(0, meanwhile)
    Server(server, clock, dies_at=2 * LIMIT_S, at=5 * LIMIT_S, mail=at_last)
    with pytest.raises(
        DeadlineExceeded, match=r"worker 0 on n1\) waits for rank 0 to end it: no sign of life"
    ):
        worker.await_mail(1, until, "end it")
    assert 3 * LIMIT_S < clock.now < LIMIT_S * (3 + 3 / wait.LOOKS)


def test_a_packet_that_is_never_judged_is_told_though_the_server_lives(pair, clock):
    server, worker = pair
    # a wait for as long as the server lives then ends with another word, and not never
    Server(server, clock, dies_at=20 * LIMIT_S)
    with pytest.raises(
        DeadlineExceeded, match="waits for rank 0 to judge its packet 1: nothing came"
    ):
        worker.await_mail(1)
    assert LIMIT_S < clock.now < 1.1 * LIMIT_S

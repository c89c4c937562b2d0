"""A worker's side of the protocol, driven without torch, MPI or a clock: which action follows on which answer."""

import random
from dataclasses import replace

import pytest

from asgd_mpi.protocol.client import (
    Await,
    BeginAnew,
    Client,
    Compute,
    Fetch,
    GiveUp,
    Habits,
    Leave,
    Push,
    Save,
    SaveBest,
    Say,
    Take,
    Taken,
    TakeWritten,
    Undo,
    Validate,
)
from asgd_mpi.protocol.messages import Kind, Lease, Mail, Orders, Work

BATCH = 10
SETS_OUT = Push, GiveUp, Fetch, Validate
PACKETS = Push, GiveUp, Validate, Say
PLAIN = Habits(n_push=1, n_fetch=1, overlap=False)


def lease(number, batches, work=Work.TRAIN):
    return Lease(number, work, 0, 100 * number, 100 * number + BATCH * batches)


class Server:
    """What a worker meets: `first` is its mail, `after[n]` that once n packets have come, `last` what ends a wait."""

    def __init__(self, first, after=None, last=Mail(0, 0, Orders.STOP), **more):
        self.mail, self.after, self.last = first, after or {}, last
        # batches whose gradient does not count, and pushes that are not finite, by number from 1
        self.overtaken, self.infinite = more.get("overtaken", ()), more.get("infinite", ())
        # batches that pass until a trip is back; reads that the server no longer holds
        self.trip_batches, self.torn = more.get("trip_batches", 0), more.get("torn", 0)
        # batches, once computed, after which this process is asked to leave
        self.signal_after = more.get("signal_after", 10**9)
        self.version = self.packets = self.batches = self.pushes = 0
        self.trip, self.back_at, self.written = None, 0, []
        self.actions = []

    def is_back(self):
        return self.trip is None or self.batches >= self.back_at

    def live(self, habits, act=lambda client: client.work()):
        """Let a worker live to its end; returns what it did, with nothing of what it is told each time."""
        self.client = Client(
            habits, self.cut, self.is_back, lambda: "SIGTERM" * (self.batches >= self.signal_after)
        )
        actions, answer = act(self.client), None
        try:
            while len(self.actions) < 2000:
                action = actions.send(answer)
                self.actions.append(action)
                answer = self.do(action)
        except StopIteration:
            assert self.actions[-1] == Leave() and self.trip is None
            return [one for one in self.actions if one not in (TakeWritten(), TakeWritten(True))]
        raise AssertionError("it does not end")

    @staticmethod
    def cut(lease):
        for start in range(lease.start, lease.stop, BATCH):
            yield lease.epoch, start, start + BATCH

    def do(self, action):
        if isinstance(action, PACKETS):
            self.packets += 1
            self.mail = self.after.get(self.packets, self.mail)
        if isinstance(action, (*SETS_OUT, Say)):
            assert self.trip is None, "two trips at a time"
        if isinstance(action, SETS_OUT):
            self.trip, self.back_at = action, self.batches + self.trip_batches
        match action:
            case Compute():
                self.batches += 1
                return self.batches not in self.overtaken
            case Push():
                self.pushes += 1
                # by another worker's push, if this one is not finite
                self.version += 1
                return action.moves and self.pushes in self.infinite
            case Take():
                trip, self.trip = self.trip, None
                is_finite = self.pushes not in self.infinite
                spoilt = isinstance(trip, Push) and trip.moves and not is_finite
                fetches = isinstance(trip, (Fetch, GiveUp)) or isinstance(trip, Push) and trip.fetch
                version = self.version if fetches or spoilt else None
                return Taken(self.told(), version, is_finite)
            case Say(Kind.READ, version):
                self.torn -= 1
                return self.told(read=-1 if self.torn >= 0 else version)
            case Say():
                return self.told()
            case Await(until):
                if not until(self.told()):
                    self.mail = self.last
                assert until(self.told()), "it waits for ever"
                return self.told()
            case Save(_, made):
                self.written.append((Kind.SAVED, made))
            case SaveBest(version):
                self.written.append((Kind.BEST, version))
            case TakeWritten():
                done, self.written = self.written, []
                return done
        return None

    def told(self, **more):
        return replace(self.mail, version=self.version, **more)


def kinds(actions):
    """Return what was done in short: c(ompute), p(ush), f(etch), t(ake), or the name of the action."""
    short = {Compute: "c", Push: "p", Fetch: "f", Take: "t"}
    return " ".join(short.get(type(one), type(one).__name__) for one in actions)


def pushes(actions):
    return [one for one in actions if isinstance(one, Push)]


def train(habits, batches, **more):
    """One lease of so many batches, then the end of the run."""
    server = Server(Mail(0, 0, leases=(lease(1, batches),)), **more)
    return server, server.live(habits)


def test_without_overlap_each_push_is_taken_before_the_next_batch_is_computed():
    _, did = train(PLAIN, 2)
    assert kinds(did) == "t f t c t p t c t p t t f t Await t Leave"
    assert [one.read_version for one in pushes(did)] == [0, 1]
    assert [(one.sum.lease, one.sum.start, one.sum.count) for one in pushes(did)] == [
        (1, 100, 10),
        (1, 110, 10),
    ]


def test_with_overlap_the_next_batch_is_computed_while_a_push_is_under_way():
    _, did = train(replace(PLAIN, overlap=True), 3)
    assert kinds(did).startswith("t f t c t p c t p c t p t f t")
    # the weights of the second batch were those of the first, as its push was under way
    assert [one.read_version for one in pushes(did)] == [0, 0, 1]


@pytest.mark.parametrize("n_push, n_fetch", [(1, 1), (1, 3), (2, 4), (3, 1), (4, 6)])
def test_every_n_push_batches_are_pushed_and_weights_fetched_once_n_fetch_have_been(
    n_push, n_fetch
):
    _, did = train(Habits(n_push, n_fetch, overlap=False), 12)
    fetched, since = [], 0
    for _ in range(12 // n_push):
        since += n_push
        fetched.append(since >= n_fetch)
        since = 0 if fetched[-1] else since
    assert [one.sum.batches for one in pushes(did)] == [n_push] * (12 // n_push)
    assert [one.fetch for one in pushes(did)] == fetched


def test_a_sum_goes_on_over_leases_and_what_is_left_is_pushed_before_the_end():
    two = (lease(1, 2), lease(2, 2))
    did = Server(Mail(0, 0, leases=two)).live(Habits(3, 3, overlap=False))
    assert [(one.sum.lease, one.sum.start, one.sum.count) for one in pushes(did)] == [
        (1, 100, 30),
        (2, 210, 10),
    ]


@pytest.mark.parametrize("trip_batches", [1, 2, 5])
def test_n_push_auto_sums_up_as_many_batches_as_are_computed_while_a_push_is_under_way(
    trip_batches,
):
    _, did = train(Habits("auto", 1, overlap=True), 11, trip_batches=trip_batches)
    sizes = [one.sum.batches for one in pushes(did)]
    assert sizes[0] == 1 and sum(sizes) == 11
    assert set(sizes[1:-1]) <= {trip_batches}


def test_an_elastic_worker_fetches_what_it_is_pulled_to_before_each_push_and_nothing_with_it():
    _, did = train(Habits(2, 1, overlap=False, moves="elastic"), 4)
    assert kinds(did).startswith("t f t c c f t p t c c f t p t")
    assert [one.read_version for one in pushes(did)] == [0, 1]
    assert not any(one.fetch for one in pushes(did)) and all(one.moves for one in pushes(did))


def test_a_gradient_that_cannot_count_is_given_back_with_the_batches_before_it():
    _, did = train(Habits(3, 3, overlap=False), 5, overtaken=(2,))
    [given] = [one for one in did if isinstance(one, GiveUp)]
    assert (given.sum.start, given.sum.count, given.read_version) == (100, 20, 0)
    assert [(one.sum.start, one.sum.count) for one in pushes(did)] == [(120, 30)]


def test_a_push_that_was_refused_is_undone_once():
    late = Mail(0, 0, refused=1, leases=(lease(1, 3),))
    _, did = train(PLAIN, 3, after={1: late}, last=replace(late, orders=Orders.STOP))
    assert sum(one == Undo() for one in did) == 1
    assert kinds(did).startswith("t f t c t p t Undo c")


def test_a_worker_whose_packet_was_dropped_forgets_its_sum_and_leaves_its_lease():
    back = Mail(0, 0, dropped=1, leases=(lease(5, 2),))
    server = Server(Mail(0, 0, leases=(lease(1, 3),)), {1: back}, replace(back, orders=Orders.STOP))
    did = server.live(Habits(1, 1, overlap=True))
    # with overlap it learns of the first push as it is about to make the second one
    assert kinds(did).startswith("t f t c t p c t BeginAnew t f t c")
    assert [one.sum.lease for one in pushes(did)] == [1, 5, 5]


@pytest.mark.parametrize("orders", [Orders.STOP, Orders.LEAVE, Orders.REST])
@pytest.mark.parametrize("overlap", [False, True])
def test_an_order_amid_a_lease_is_obeyed_after_the_batch_that_is_under_way(orders, overlap):
    server = Server(Mail(0, 0, leases=(lease(1, 6),)), {2: Mail(0, 0, orders)})
    did = server.live(replace(PLAIN, overlap=overlap))
    assert server.batches == 2 + overlap
    awaited = [one.for_what for one in did if isinstance(one, Await)]
    assert awaited == (["end the run"] if orders == Orders.REST else [])


def test_a_worker_that_is_retired_for_now_finishes_its_lease_and_says_that_it_is_here():
    back = Mail(0, 0, dropped=1, leases=(lease(2, 1),))
    server = Server(
        Mail(0, 0, leases=(lease(1, 3),)),
        {2: Mail(0, 0, Orders.REPORT), 4: back},
        replace(back, orders=Orders.STOP, leases=()),
    )
    did = server.live(PLAIN)
    assert [one.sum.lease for one in pushes(did)] == [1, 1, 1, 2]
    assert kinds(did).endswith("t f t Await Say BeginAnew t f t c t p t t f t Await t Leave")


@pytest.mark.parametrize("orders", [Orders.STOP, Orders.LEAVE])
def test_an_idle_worker_waits_for_a_lease_or_the_end_and_fetches_before_it_works_on_one(orders):
    server = Server(
        Mail(0, 0), last=Mail(0, 0, leases=(lease(1, 1),)), after={1: Mail(0, 0, orders)}
    )
    assert kinds(server.live(PLAIN)) == "t f t t f t Await t f t c t p t t f t t Leave"


@pytest.mark.parametrize("moves", ["", "local"])
def test_a_worker_that_leaves_saves_its_state_and_pushes_before_that_only_what_has_moved_it(moves):
    held = lease(1, 9), lease(2, 9)
    left = Mail(0, 0, Orders.LEAVE, save=1, leases=held)
    server = Server(Mail(0, 0, leases=held), {1: left}, signal_after=5)
    did = server.live(Habits(4, 4, overlap=True, moves=moves, saves=True))
    # 4 batches are pushed, the fifth is not when the signal comes
    assert Say(Kind.SIGNAL) in did and server.batches == 5
    assert [one.sum.batches for one in pushes(did)] == ([4, 1] if moves else [4])
    assert did[-3:] == [Save(1, server.version), Say(Kind.SAVED, server.version), Leave()]


def first_save(moves, infinite=()):
    """Of a worker that is asked for its state after its first push; also returns what it did before."""
    asked = Mail(0, 0, save=1, leases=(lease(1, 6),))
    _, did = train(
        Habits(2, 2, overlap=True, moves=moves, saves=True), 6, after={1: asked}, infinite=infinite
    )
    saved = next(place for place, one in enumerate(did) if isinstance(one, Save))
    return did[saved], kinds(did[:saved])


def test_a_state_is_saved_as_the_last_finite_push_left_it_and_not_amid_a_sum_that_moves_it():
    assert first_save("", infinite=(1,))[0] == Save(1, 0)
    assert first_save("", infinite=(2,))[0] == Save(1, 1)
    save, did = first_save("local")
    assert save == Save(1, 2) and did.endswith("c c t p t")  # the sum was pushed first


def test_a_worker_whose_own_weights_are_spoilt_waits_for_others_and_has_nothing_to_save():
    """With overlap, too: what it began meanwhile would be of weights that are no numbers."""
    save, did = first_save("local", infinite=(2,))
    assert save == Save(1, 0) and did.endswith("c c t p t")
    _, did = train(Habits(1, 1, overlap=True, moves="local"), 3, infinite=(1,))
    assert kinds(did).startswith("t f t c t p t c t p c")


def test_without_saving_nothing_is_saved():
    _, did = train(PLAIN, 2, after={1: Mail(0, 0, save=1, leases=(lease(1, 2),))})
    assert not any(isinstance(one, Save) for one in did)


@pytest.mark.parametrize("saves", [False, True])
def test_it_looks_what_has_been_written_only_while_something_is_being_written(saves):
    asked = Mail(0, 0, save=1, leases=(lease(1, 6),))
    server, _ = train(replace(PLAIN, saves=saves), 6, after={3: asked})
    looks = [place for place, one in enumerate(server.actions) if one == TakeWritten()]
    began = [place for place, one in enumerate(server.actions) if isinstance(one, Save)]
    # told of at the first look, and that was the last one
    assert looks == [place + 1 for place in began] and len(began) == saves


@pytest.mark.parametrize("torn", [0, 1, 3])
def test_a_worker_tells_what_it_reads_and_reads_again_until_the_server_keeps_it(torn):
    server = Server(Mail(0, 0, leases=(lease(1, 1),)), torn=torn)
    did = server.live(replace(PLAIN, tells_reads=True))
    assert kinds(did).startswith("t f t " + "Say f t " * torn + "Say c t p t Say")
    assert sum(one == Fetch(is_torn=True) for one in did) == torn


@pytest.mark.parametrize("best", [0, 7])
@pytest.mark.parametrize("work", [Work.VALIDATE, Work.FINAL])
def test_a_validation_is_of_whole_weights_and_the_best_on_the_way_are_saved(work, best):
    told = Mail(0, 0, best=best)
    did = Server(replace(told, leases=(lease(1, 4, work),))).live(PLAIN)
    validated = next(place for place, one in enumerate(did) if isinstance(one, Validate))
    assert did[validated - 2 : validated + 2] == [
        Fetch(whole=True),
        Take(),
        Validate(lease(1, 4, work)),
        Take(),
    ]
    is_saved = best == 0 and work == Work.VALIDATE
    assert (SaveBest(0) in did, Say(Kind.BEST, 0) in did) == (is_saved, is_saved)


def test_the_best_is_told_of_as_soon_as_it_is_written_and_not_at_the_end():
    did = Server(Mail(0, 0, best=0, leases=(lease(1, 4, Work.VALIDATE), lease(2, 2)))).live(PLAIN)
    first = next(place for place, one in enumerate(did) if isinstance(one, Compute))
    assert did.index(SaveBest(0)) < did.index(Say(Kind.BEST, 0)) < first


@pytest.mark.parametrize("can_save", [True, False])
def test_after_a_failure_it_says_so_rests_and_saves_at_the_end_if_it_can(can_save):
    server = Server(Mail(0, 0, leases=(lease(1, 3),)), last=Mail(0, 0, Orders.LEAVE, save=1))
    habits = replace(PLAIN, saves=True)
    did = server.live(habits, lambda client: client.rest(saves=can_save))
    assert kinds(did) == "Say Await t " + "Save Say " * can_save + "Leave"
    assert did[0] == Say(Kind.FAILED)


@pytest.mark.parametrize("seed", range(60))
def test_whatever_it_is_told_one_trip_is_under_way_at_a_time_and_it_comes_to_its_end(seed):
    """Every set of habits, and mail that changes at random: `Server` asserts what holds of every life."""
    chance = random.Random(seed)
    moves = chance.choice(["", "", "descends", "local", "elastic"])
    # the others that move their own weights wait for each push
    overlap = moves in ("", "local") and chance.random() < 0.5
    n_push = chance.choice([1, 2, 3, *["auto"] * (overlap and not moves)])
    habits = Habits(
        n_push,
        chance.choice([1, 2, 6]),
        overlap,
        moves,
        saves=chance.random() < 0.5,
        tells_reads=chance.random() < 0.3,
    )
    mail, after = Mail(0, 0, leases=(lease(1, 3), lease(2, 2))), {}
    for packet in range(1, 60):
        number = packet // 2 + 1
        mail = replace(
            mail,
            leases=tuple(lease(at, at % 4 + 1) for at in (number, number + 1)),
            save=mail.save + (chance.random() < 0.1),
            dropped=mail.dropped + (chance.random() < 0.1),
            refused=mail.refused + (chance.random() < 0.1),
            orders=chance.choice([Orders.GO_ON] * 30 + [Orders.REPORT, Orders.REST]),
        )
        after[packet] = mail
    after[60] = replace(mail, orders=chance.choice([Orders.STOP, Orders.LEAVE]), leases=())
    server = Server(
        Mail(0, 0, leases=(lease(1, 3), lease(2, 2))),
        after,
        replace(mail, orders=chance.choice([Orders.STOP, Orders.LEAVE]), leases=()),
        # with overlap nobody looks whether a gradient still counts
        overtaken={chance.randrange(40) for _ in range(0 if overlap else 3)},
        infinite={chance.randrange(20) for _ in range(3)},
        trip_batches=chance.randrange(4),
        signal_after=chance.choice([10**9, 25]),
    )
    did = server.live(habits)
    for one in pushes(did):
        assert one.sum.count == BATCH * one.sum.batches > 0
        assert n_push == "auto" or one.sum.batches <= n_push
    assert did[-1] == Leave() and sum(one == Leave() for one in did) == 1


@pytest.mark.parametrize("orders", [Orders.GO_ON, Orders.LEAVE])
def test_what_is_saved_holds_nothing_of_a_push_that_was_dropped_since_its_worker_was_retired(
    orders,
):
    """It is asked for its state by the same mail that tells of the drop."""
    told = Mail(0, 0, orders, dropped=1, save=1, leases=(lease(2, 1),))
    server = Server(Mail(0, 0, leases=(lease(1, 2),)), {2: told})
    did = server.live(replace(PLAIN, saves=True))
    kept = [one for one in did if isinstance(one, (BeginAnew, Save))]
    assert kept[:2] == [BeginAnew(), Save(1, 0)] and kept.count(Save(1, 0)) == 1

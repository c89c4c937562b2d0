"""A worker's side of the protocol: when it pushes, fetches, validates, saves, gives up, rests and leaves.

Pure: no torch, no clock, no MPI. `Client.work` yields actions, one at a time, and is sent what came of each. Who drives it
does them: `runtime.worker` over MPI, `offline.simulation` on a virtual clock.

    refresh -> [lease: compute ... compute -> push -> compute ... | validate] ... -> leave
               (push: take the last trip, set out with the sum; without overlap take this one at once, too)

A trip goes to the server and back. Push, GiveUp, Fetch and Validate set out on one, Take waits for it: there is never more
than one under way.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, Union

from asgd_mpi.protocol.messages import Kind, Lease, Mail, Orders, Work

# ---- what a worker does


@dataclass
class Sum:
    """The batches whose gradients make the next push."""

    lease: int  # number of the first lease
    start: int  # position in it
    count: int = 0  # positions
    batches: int = 0


@dataclass(frozen=True)
class Compute:
    """Add the gradient of positions [start, stop) of a lease to the sum.

    Answer: whether it counts; False if the step was made without it, so that it was not finished.
    """

    lease: Lease
    start: int
    stop: int


@dataclass(frozen=True)
class Push:
    """Set out with a sum that was computed on `read_version`, and bring newer weights if `fetch`. Answer: whether the own are spoilt."""

    sum: Sum
    read_version: int
    fetch: bool
    # if the sum is not finite, neither are the worker's own weights: forget them, and fetch
    moves: bool


@dataclass(frozen=True)
class GiveUp:
    """Set out to give the range of a sum back, which was computed on `read_version`, and bring newer weights."""

    sum: Sum
    read_version: int


@dataclass(frozen=True)
class Fetch:
    """Set out for newer weights alone; `whole`: in float32, whatever travels otherwise."""

    whole: bool = False
    # the server did not hold any more what the last fetch brought
    is_torn: bool = False


@dataclass(frozen=True)
class Validate:
    """Validate a lease on the weights that were fetched, and set out with what was measured."""

    lease: Lease


@dataclass(frozen=True)
class Take:
    """Wait for the trip, if there is one, and take what it brings. Answer: Taken."""


class Taken(NamedTuple):
    """The mail, and perhaps newer weights, that a trip has brought."""

    mail: Mail
    version: int | None = None  # of newer weights
    is_finite: bool = True  # the sum that was pushed


@dataclass(frozen=True)
class Undo:
    """Go back to before the last push, which was refused."""


@dataclass(frozen=True)
class BeginAnew:
    """Forget the sum, and all that was kept beside the weights."""


@dataclass(frozen=True)
class Say:
    """Send a packet without a range, and wait until the server has taken note of it. Answer: Mail."""

    kind: Kind
    read_version: int = 0


@dataclass(frozen=True)
class Await:
    """Wait for mail of which `until` holds, as long as the server lives. Answer: Mail."""

    until: Callable[[Mail], bool]
    for_what: str


@dataclass(frozen=True)
class Save:
    """Begin to write the worker's own state, as its push that made version `made` left it, for checkpoint `number`."""

    number: int
    made: int


@dataclass(frozen=True)
class SaveBest:
    """Begin to write the network that was validated, as the best so far."""

    version: int


@dataclass(frozen=True)
class TakeWritten:
    """Look what has been written since (`wait`: all of it). Answer: a list of (kind of packet, version)."""

    wait: bool = False


@dataclass(frozen=True)
class Leave:
    """Say goodbye, and end."""


Action: TypeAlias = Union[
    Compute,
    Push,
    GiveUp,
    Fetch,
    Validate,
    Take,
    Undo,
    BeginAnew,
    Say,
    Await,
    Save,
    SaveBest,
    TakeWritten,
    Leave,
]
# ends when all is done that it says
Actions: TypeAlias = Generator[Action, Any, None]

# with these a worker goes on with its lease
AT_WORK = (Orders.GO_ON, Orders.REPORT)


# ---- when


@dataclass
class Cadence:
    """When a push is due, and when newer weights are: counted in batches."""

    n_push: int | Literal["auto"]
    n_fetch: int
    since_fetch: int = 0  # batches pushed

    def is_due(self, batches: int, is_back: bool, asked: int = 0) -> bool:
        """Return whether a sum of `batches` is to be pushed; n_push auto sums on until the last trip is back.

        asked: what the server has asked for in place of n_push; 0: nothing.
        """
        if asked:
            return batches >= asked
        return is_back if self.n_push == "auto" else batches == self.n_push

    def push(self, batches: int) -> bool:
        """Count a push of `batches`; returns whether newer weights are due."""
        self.since_fetch += batches
        return self.since_fetch >= self.n_fetch

    def fetched(self) -> None:
        """Take note that newer weights have come."""
        self.since_fetch = 0


@dataclass(frozen=True)
class Habits:
    """A worker's part of the options, as far as its protocol depends on them."""

    n_push: int | Literal["auto"]  # batches
    n_fetch: int  # batches
    overlap: bool  # it computes while a push is under way
    moves: str = ""  # how it moves its own weights, see config.rulebook
    saves: bool = False  # it keeps what a checkpoint holds
    tells_reads: bool = False  # the server keeps the snapshot that it computes on


class Client:
    """See the module. `mail` is the last that came, `version` that of the weights that were fetched last.

    cut: the batches of a lease, (epoch, start, stop) each. is_back: whether Take would not wait. asked_to_leave: the signal
    that asked this process to end; "" if there was none.
    """

    def __init__(
        self,
        habits: Habits,
        cut: Callable[[Lease], Iterable[tuple[int, int, int]]],
        is_back: Callable[[], bool],
        asked_to_leave: Callable[[], str] = lambda: "",
    ):
        self.mail, self.version = Mail(judged=0, version=0), 0
        self._habits, self._cut, self._is_back = habits, cut, is_back
        self._asked_to_leave = asked_to_leave
        self._cadence = Cadence(habits.n_push, habits.n_fetch)
        self._is_elastic = habits.moves == "elastic"
        self._saves = habits.saves
        self._sum: Sum | None = None
        self._has_moved = False  # batches were computed since the last push set out
        self._has_pushed = False  # a gradient is under way,
        # ... the version that the last one made, or that the run goes on from (known with the first mail); 0: nothing is kept of any
        self._made = -1
        self._done = 0  # the last lease that was worked on
        self._saved = 0  # the last checkpoint that the state was saved for
        self._unwritten = 0  # files that it has begun to write, and not heard of since
        # packets, as far as this worker knows
        self._dropped = self._refused = 0
        self._has_told_of_signal = False

    def work(self) -> Actions:
        """Work until the run is finished or left."""
        yield from self._refresh()
        while (lease := (yield from self._next_lease())) is not None:
            if lease.work == Work.TRAIN:
                yield from self._train(lease)
            else:
                yield from self._validate(lease)
            self._done = lease.number
        yield from self._leave()

    def rest(self, saves: bool) -> Actions:
        """After a failure: give all work back, wait for the end of the run, and take part in that; `saves`: it still can."""
        self._saves = self._saves and saves
        yield from self._say(Kind.FAILED)
        yield from self._await_end()
        yield from self._leave()

    def _next_lease(self) -> Generator[Action, Any, Lease | None]:
        """Return the next lease, once it is granted; None when the run is over."""
        while True:
            if self._granted is None:
                yield from self._refresh()  # the answer to the last push may bring it
            if self._granted is None and not (yield from self._is_interrupted()):
                # idle: all is lent, and others still work on theirs
                yield from self._tell_of_written(wait=True)
                self.mail = yield Await(self._is_news, "grant it a lease")
                if self._is_asked_to_save:
                    yield from self._save()
                if self._granted:
                    # others have moved the weights in the meantime
                    yield from self._refresh()
            if self.mail.orders == Orders.REST:
                yield from self._await_end()
            if self.mail.orders == Orders.REPORT and self._granted is None:
                yield from self._say(Kind.HERE)
                if self.mail.dropped != self._dropped:
                    yield from self._begin_anew()
                continue
            if self.mail.orders != Orders.GO_ON:
                return None
            if self._granted:
                return self._granted

    def _train(self, lease: Lease) -> Actions:
        membership = self._dropped
        for _, start, stop in self._cut(lease):
            counts = yield Compute(lease, start, stop)
            done = self._sum = self._sum or Sum(lease.number, start)
            done.count += stop - start
            done.batches += 1
            self._has_moved = True
            if not counts:
                yield from self._give_up(done)
            elif self._cadence.is_due(done.batches, self._is_back(), self.mail.batches):
                yield from self._push(done)
            if (yield from self._is_interrupted()) or self._dropped != membership:
                return

    def _validate(self, lease: Lease) -> Actions:
        membership = self._dropped
        # what a checkpoint of this version holds
        yield from self._refresh(whole=True)
        if self._dropped != membership:
            return  # the lease is lent to others
        yield Validate(lease)
        yield from self._take()
        if lease.work == Work.VALIDATE and self.mail.best == self.version:
            self._unwritten += 1
            yield SaveBest(self.version)
        if self.mail.dropped != self._dropped:
            yield from self._begin_anew()
        yield from self._refresh()

    def _push(self, done: Sum) -> Actions:
        """Set out with the sum; go on with the weights that the last trip brought, or this one without overlap."""
        read_version, self._sum = self.version, None
        if self._is_elastic:
            # what its own weights are pulled to
            yield Fetch()
        yield from self._take()
        if self.mail.dropped != self._dropped:
            yield from self._begin_anew()
            return
        if self._is_elastic:
            read_version = self.version
        # every push that the server has set the length of brings newer weights
        is_due = self._cadence.push(done.batches) or self.mail.batches > 0
        fetch = is_due and not self._is_elastic
        self._has_moved = False
        is_spoilt = yield Push(done, read_version, fetch, moves=bool(self._habits.moves))
        self._has_pushed = True
        waits = is_spoilt or self._habits.moves and self._is_asked_to_save
        if not self._habits.overlap or waits:
            yield from self._take()
            if self.mail.dropped != self._dropped:
                yield from self._begin_anew()

    def _give_up(self, done: Sum) -> Actions:
        """Give back what was to be pushed, and begin the next step."""
        self._sum, self._has_moved = None, False
        yield GiveUp(done, self.version)
        yield from self._take()
        if self.mail.dropped != self._dropped:
            yield from self._begin_anew()

    def _refresh(self, whole: bool = False) -> Actions:
        """Deliver what there is, and fetch the latest weights."""
        if self._sum:
            yield from self._push(self._sum)
        yield from self._take()
        yield Fetch(whole)
        yield from self._take()
        # before a lease of the new member is begun: it would count as done when it is broken off
        if self.mail.dropped != self._dropped:
            yield from self._begin_anew()

    def _take(self) -> Actions:
        """Wait for the trip; new weights, new leases."""
        taken: Taken = yield Take()
        is_fresh = self._see(taken)
        if self.mail.refused != self._refused:
            self._refused = self.mail.refused
            yield Undo()
        elif self._has_pushed and taken.is_finite and self.mail.dropped == self._dropped:
            self._made = self.mail.version
        elif self._has_pushed and self._habits.moves and not taken.is_finite:
            self._made = 0
        self._has_pushed = False
        # who has nothing to compute any more reads nothing, and would be told that this was dropped, again and again
        if is_fresh and self._habits.tells_reads and self.mail.orders in AT_WORK:
            yield from self._tell_of_read()
        # to leave, all pushes are waited for first; what was dropped is forgotten first
        is_whole = self.mail.dropped == self._dropped and self.mail.orders != Orders.LEAVE
        if self._is_asked_to_save and is_whole:
            yield from self._save()
        if self._unwritten:
            yield from self._tell_of_written()

    def _see(self, taken: Taken) -> bool:
        """Take note of what came; whether there were weights."""
        self.mail = taken.mail
        if taken.version is None:
            return False
        self.version = taken.version
        if self._made < 0:
            self._made = taken.mail.version
        self._cadence.fetched()
        return True

    def _tell_of_read(self) -> Actions:
        """Have the server keep the snapshot that was fetched; while it holds that no longer, fetch another: a torn read."""
        while True:
            yield from self._say(Kind.READ, self.version)
            if self.mail.read == self.version or self.mail.orders not in AT_WORK:
                return
            yield Fetch(is_torn=True)
            self._see((yield Take()))

    def _save(self) -> Actions:
        """Begin to write the state for the checkpoint that waits for it, unless batches have moved it since the last push."""
        if not (self._habits.moves and self._has_moved):
            self._saved = self.mail.save
            self._unwritten += 1
            yield Save(self._saved, self._made)

    def _tell_of_written(self, wait: bool = False) -> Actions:
        for kind, version in (yield TakeWritten(wait)):
            self._unwritten -= 1
            yield from self._say(kind, version)

    def _is_interrupted(self) -> Generator[Action, Any, bool]:
        """Return whether to leave the lease as it is: the run is left, or this worker has lost it."""
        if self._asked_to_leave() and not self._has_told_of_signal:
            self._has_told_of_signal = True
            yield from self._take()
            yield from self._say(Kind.SIGNAL)
            # what is summed up is trained again
            yield from self._await_end()
        if self.mail.orders not in AT_WORK:
            return True
        if self.mail.dropped != self._dropped:
            yield from self._begin_anew()
            return True
        return False

    def _begin_anew(self) -> Actions:
        """Begin again as a new worker, since a packet was dropped that had come after it was retired."""
        yield from self._forget()
        yield from self._refresh()

    def _forget(self) -> Actions:
        self._dropped = self.mail.dropped
        self._sum, self._has_moved = None, False
        yield BeginAnew()
        self._made = 0

    def _leave(self) -> Actions:
        """Save what the next start needs, and say goodbye."""
        yield from self._take()
        if self.mail.dropped != self._dropped:
            yield from self._forget()
        if self.mail.orders == Orders.LEAVE:
            if self._sum and self._saves and self._habits.moves:
                # what is saved must not hold batches that will be trained again
                yield from self._push(self._sum)
                yield from self._take()
            if self._is_asked_to_save:
                yield from self._save()
        yield from self._tell_of_written(wait=True)
        yield Leave()

    def _say(self, kind: Kind, read_version: int = 0) -> Actions:
        self.mail = yield Say(kind, read_version)

    def _await_end(self) -> Actions:
        self.mail = yield Await(
            lambda mail: mail.orders in (Orders.STOP, Orders.LEAVE), "end the run"
        )

    def _is_news(self, mail: Mail) -> bool:
        """Return whether mail is worth an idle worker's time."""
        return (
            mail.orders != Orders.GO_ON
            or self._first_of(mail) is not None
            or self._saves
            and mail.save > self._saved
            or not self._has_told_of_signal
            and self._asked_to_leave() != ""
        )

    @property
    def _granted(self) -> Lease | None:
        """The next lease of the mail, if there is one."""
        return self._first_of(self.mail)

    def _first_of(self, mail: Mail) -> Lease | None:
        return next((lease for lease in mail.leases if lease.number > self._done), None)

    @property
    def _is_asked_to_save(self) -> bool:
        return self._saves and self.mail.save > self._saved

"""Several servers act as one: what rank 0 tells the servers of further slices, its other servers, and what they tell rank 0.

    rank 0 -> slice server    Command, JSON: numbers go there and back to the bit. They are obeyed in the order in which they are sent
    slice server -> rank 0    3 words of int64 (Word, and two numbers): a slice of a gradient has come, a command is done, ...
    slice server -> rank 0    slices of vectors, float32, in the order of `Command.names`

Rank 0 hands a gradient out when every server has its slice of it (`ShardedInbox`), tells all what to apply, and publishes
after all others have: so no version is seen before it is whole. Every wait polls the inbox, has a deadline and names whom it
waits for; a slice server whose process has ended raises ServerLost.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import IntEnum

import msgspec
import numpy as np
import torch

from asgd_mpi.comm import wait
from asgd_mpi.comm.arrival import Arrival, Command
from asgd_mpi.comm.mpi import MPI
from asgd_mpi.comm.packets import Inbox
from asgd_mpi.comm.server_window import ServerWindow
from asgd_mpi.comm.world import PROCESS_FAILED, World, cut
from asgd_mpi.config.topology import SERVER
from asgd_mpi.errors import DeadlineExceeded, ServerLost
from asgd_mpi.protocol.messages import Kind
from asgd_mpi.vector.codec import Vector

COMMAND, WORD, SLICE = 5, 6, 8  # tags
# words that rank 0 lives, within the time that a slice server waits for one
STAYS = 10
# the name of the latest snapshot among `Command.names`; others are those of the rule's state


class Notice(IntEnum):
    """What a slice server tells rank 0, and its two numbers."""

    GOT = 1  # its slice of a gradient: worker, packet
    GONE = 2  # a worker's process has ended: worker, 0
    DONE = 3  # a command: its number, 0
    SIGNAL = 4  # it was asked to end by a signal: 0, 0
    DAMAGED = 5  # what came in place of its slice of a gradient: worker, 0


class ServerGroup:
    """Rank 0's side. `hosts`: of every rank, for messages."""

    def __init__(self, world: World, window: ServerWindow, hosts: Sequence[str]):
        self._world, self._slices, self._hosts = (
            world,
            dict(zip(window.servers, window.whole.slices)),
            hosts,
        )
        self.ranks = window.servers[1:]
        self._number = 0  # commands so far
        self._told_at = time.monotonic()  # the last one
        # ... as far as a slice server has come
        self._done = dict.fromkeys(self.ranks, 0)
        # worker -> the last packet that has come there
        self._got: dict[int, dict[int, int]] = {rank: {} for rank in self.ranks}
        self.lost_workers: set[int] = set()
        # worker -> the slice server that its slice came to damaged
        self.damaged: dict[int, int] = {}
        self.left_because = ""
        self._words = {rank: np.zeros(3, np.int64) for rank in self.ranks}
        self._heard = {rank: self._listen(rank) for rank in self.ranks}
        self._sent: list[tuple[MPI.Request, bytes]] = []

    def poll(self) -> None:
        """Hear what there is. Raises ServerLost."""
        for rank in self.ranks:
            try:
                while self._heard[rank].Test():
                    self._take_note(rank, *self._words[rank].tolist())
                    self._heard[rank] = self._listen(rank)
            except MPI.Exception as error:  # under mpirun --with-ft ulfm
                self._raise_lost(error, rank)
        self._sent = [sent for sent in self._sent if not sent[0].Test()]
        if time.monotonic() - self._told_at > self._world.timeout_s / STAYS:
            self.tell(Command("stay"))

    def lacking(self, worker: int, packet: int) -> list[int]:
        """Return the other servers that have not got their slice of this packet."""
        return [rank for rank in self.ranks if self._got[rank].get(worker, 0) < packet]

    def tell(self, command: Command) -> None:
        """Send a command to all of them; they may still be busy with others."""
        data = msgspec.json.encode(command)
        self._number += 1
        self._told_at = time.monotonic()
        for rank in self.ranks:
            try:
                self._sent.append(
                    (self._world.comm.Isend([data, MPI.BYTE], dest=rank, tag=COMMAND), data)
                )
            except MPI.Exception as error:
                self._raise_lost(error, rank)

    def await_done(self, poll: Callable[[], object], what: str) -> None:
        """Wait until all commands have been obeyed. Raises ServerLost, DeadlineExceeded."""
        for rank in self.ranks:
            wait.until(
                lambda: self._done[rank] >= self._number,
                self._world.timeout_s,
                f"rank 0 waits for {self._who(rank)} to {what}",
                wait.BUSY_S,
                meanwhile=poll,
            )

    def gather_(self, into: dict[str, torch.Tensor], poll: Callable[[], object]) -> None:
        """Write their slices of vectors, (P,) float32 each, by name. Raises ServerLost, DeadlineExceeded."""
        receives: dict[int, list[MPI.Request]] = {rank: [] for rank in self.ranks}
        for rank in self.ranks:
            for vector in into.values():
                receives[rank] += [
                    self._world.comm.Irecv([part, MPI.BYTE], source=rank, tag=SLICE)
                    for _, part in cut(vector[self._slices[rank]].numpy())
                ]
        self.tell(Command("give", names=list(into)))
        for rank, requests in receives.items():
            try:
                wait.until(
                    lambda: all(request.Test() for request in requests),
                    self._world.timeout_s,
                    f"rank 0 waits for {self._who(rank)} to give its {', '.join(into)}",
                    wait.BUSY_S,
                    meanwhile=poll,
                )
            except MPI.Exception as error:
                self._raise_lost(error, rank)
        self.await_done(poll, "go on")

    def end(self) -> None:
        """Let them go, and hear of them no more: first of each other, so that none is missed by the others."""
        self.tell(Command("end"))
        self.await_done(self.poll, "end")
        for request in self._heard.values():
            request.Cancel()
            request.Free()
        self.tell(Command("leave"))
        wait.until(
            lambda: all(request.Test() for request, _ in self._sent),
            self._world.timeout_s,
            f"rank 0 waits for {', '.join(map(self._who, self.ranks))} to leave",
        )

    def _listen(self, rank: int) -> MPI.Request:
        return self._world.comm.Irecv(self._words[rank], source=rank, tag=WORD)

    def _take_note(self, rank: int, word: int, one: int, other: int) -> None:
        match Notice(word):
            case Notice.GOT:
                self._got[rank][one] = other
            case Notice.GONE:
                self.lost_workers.add(one)
            case Notice.DAMAGED:
                self.damaged[one] = rank
            case Notice.DONE:
                self._done[rank] = one
            case Notice.SIGNAL:
                self.left_because = self.left_because or f"rank {rank} was asked to end by a signal"

    def _who(self, rank: int) -> str:
        number = self.ranks.index(rank) + 1
        return f"rank {rank} on {self._hosts[rank]} (server of slice {number} of {len(self.ranks) + 1})"

    def _raise_lost(self, error: MPI.Exception, rank: int) -> None:
        if error.Get_error_class() not in PROCESS_FAILED:
            raise error
        self._world.has_lost_ranks = True
        raise ServerLost(
            f"the process of {self._who(rank)} has ended. What came after the last checkpoint is lost; go on from "
            "there with --resume RUN_DIR, if need be with fewer --servers."
        ) from None


class ShardedInbox(Inbox):
    """Rank 0's inbox where there are further servers: a gradient waits in it until all servers have their slices."""

    def __init__(self, world: World, window: ServerWindow, group: ServerGroup):
        super().__init__(world, window)
        self._group = group
        self._waiting: dict[int, Arrival] = {}  # by worker

    def poll(self) -> bool:
        super().poll()
        self._group.poll()
        self.dead |= self._group.lost_workers
        for arrival in [
            arrival
            for arrival in self._arrived
            if arrival.header and arrival.header.kind == Kind.GRADIENT
        ]:
            self._arrived.remove(arrival)
            self._waiting[arrival.worker] = arrival
        for worker, arrival in list(self._waiting.items()):
            assert arrival.header is not None  # a gradient that could be read
            if worker in self._group.damaged:
                fault = f"its slice came damaged to rank {self._group.damaged.pop(worker)}: {arrival.header}"
                self._arrived.append(replace(self._waiting.pop(worker), header=None, fault=fault))
            elif not self._group.lacking(worker, arrival.header.packet):
                self._arrived.append(self._waiting.pop(worker))
        return bool(self._arrived)


class CoordinatorLink:
    """A slice server's side: the slices of gradients that have come, and the commands of rank 0."""

    def __init__(
        self, world: World, window: ServerWindow, asked_to_leave: Callable[[], str] = lambda: ""
    ):
        self._world, self._asked_to_leave = world, asked_to_leave
        self._inbox, self._servers = Inbox(world, window), window.servers
        self._held: dict[int, Arrival] = {}  # by worker
        self._commands: deque[Command] = deque()
        self._coming: tuple[MPI.Request, np.ndarray] | None = None
        self._sent: list[tuple[MPI.Request, np.ndarray]] = []
        self._gone: set[int] = set()
        self._number, self._told_of_signal = 0, False
        self._heard_at = time.monotonic()  # rank 0

    def take(self, seconds: float) -> Command | None:
        """Return the next command, if one comes within so many seconds. Raises ServerLost, DeadlineExceeded."""
        wait.for_a_while(self.poll, seconds, self._inbox.longest_s)
        if self._commands:
            self._heard_at = time.monotonic()
            return self._commands.popleft()
        if time.monotonic() - self._heard_at > self._world.timeout_s:
            raise DeadlineExceeded(
                f"rank {self._world.rank} on {self._world.host}, which serves a slice, waits for rank 0 to say what to do: no "
                f"sign of life came within {self._world.timeout_s:g} s (--run.timeout_s). Rank 0 may be stuck or dead: "
                "see its last words."
            )
        return None

    def poll(self) -> bool:
        """Let MPI make progress, and other hosts read; whether a command is there."""
        with self._world.as_loss_of_server():
            if self._inbox.poll():
                for arrival in self._inbox.take(0):
                    self._held[arrival.worker] = arrival
                    if arrival.header:
                        self._say(Notice.GOT, arrival.worker, arrival.header.packet)
                    else:
                        self._say(Notice.DAMAGED, arrival.worker)
            for worker in self._inbox.dead - self._gone:
                self._gone.add(worker)
                self._say(Notice.GONE, worker)
            if self._asked_to_leave() and not self._told_of_signal:
                self._told_of_signal = True
                self._say(Notice.SIGNAL)
            self._hear()
            self._sent = [sent for sent in self._sent if not sent[0].Test()]
        if not self._commands:
            self._world.demand_server()
        return bool(self._commands)

    def gradient(self, worker: int, packet: int) -> Vector:
        """This slice of a gradient that has come."""
        arrival = self._held[worker]
        if arrival.header is None or arrival.header.packet != packet:
            raise RuntimeError(
                f"packet {packet} of worker {worker} is to be applied, and here is {arrival.header}"
            )
        return arrival.gradient

    def release(self, worker: int) -> None:
        """Its slice has been used, or is not to be: the next one may come."""
        if worker in self._held:
            self._inbox.release(self._held.pop(worker))

    def give(self, vectors: list[torch.Tensor]) -> None:
        """Send slices to rank 0, and wait until they have left. Raises ServerLost, DeadlineExceeded."""
        with self._world.as_loss_of_server():
            requests = [
                self._world.comm.Isend([part, MPI.BYTE], dest=SERVER, tag=SLICE)
                for vector in vectors
                for _, part in cut(vector.numpy())
            ]
            wait.until(
                lambda: all(request.Test() for request in requests),
                self._world.timeout_s,
                f"rank {self._world.rank} waits for rank 0 to take its slices",
                wait.BUSY_S,
                meanwhile=self.poll,
            )

    def done(self) -> None:
        """Tell that the command that was taken last has been obeyed."""
        self._number += 1
        self._say(Notice.DONE, self._number)

    def let_go(self) -> None:
        """Let the other servers leave from now on, but for rank 0."""
        self._world.let_go_of(set(self._servers) - {SERVER})

    def close(self) -> None:
        """Return when rank 0 knows all that was said."""
        with self._world.as_loss_of_server():
            wait.until(
                lambda: all(request.Test() for request, _ in self._sent),
                self._world.timeout_s,
                f"rank {self._world.rank} waits for rank 0 to hear that it ends",
            )
        self._inbox.close()

    def _say(self, word: Notice, one: int = 0, other: int = 0) -> None:
        words = np.array([word, one, other], np.int64)
        self._sent.append((self._world.comm.Isend(words, dest=SERVER, tag=WORD), words))

    def _hear(self) -> None:
        while True:
            if self._coming is None:
                status = MPI.Status()
                probed = self._world.comm.Improbe(source=SERVER, tag=COMMAND, status=status)
                if probed is None:
                    return
                data = np.empty(status.Get_count(MPI.BYTE), np.uint8)
                self._coming = probed.Irecv([data, MPI.BYTE]), data
            if not self._coming[0].Test():
                return
            self._commands.append(msgspec.json.decode(self._coming[1].tobytes(), type=Command))
            self._coming = None

"""The one RMA window: numbered, whole snapshots of the weights, and the mail of every worker.

Rank 0 owns the memory, in bytes:

    control   16 words of int64: latest version, one version word for each slot of the ring
    mail      N x 16 words: see wire.pack_mail
    ring      K slots of P float32, each on a page of its own: version v lies in slot v % K

The server writes version v + 1 beside version v, and only then moves the latest version on. A slot's version word is
taken away before the slot is written and set again after: a worker reads the word after the weights, and knows that
it holds exactly one version; if the word has changed the read is torn, counted, and done again. With K = 3 a read is
torn only if two newer versions appear while it lasts.

Passive target: nobody asks, and the server is not in the way. Requests of a worker end by polling, with a deadline.
Source of the calls: MPI 4.1, chapter 12 (Win_allocate, Rget, Win_sync).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from mpi4py import MPI

from asgd_mpi.errors import ConfigError
from asgd_mpi.exchange import wait, wire
from asgd_mpi.exchange.world import World
from asgd_mpi.server.ledger import Mail
from asgd_mpi.topology import SERVER

PAGE = 4096
CONTROL_WORDS = 16
LATEST, FIRST_SLOT = 0, 1     # positions of the control words
ABSENT = -1                   # the version word of a slot that is being written
WORD = 8                      # bytes


@dataclass(frozen=True)
class Layout:
    """Where things lie in the window, in bytes. Raises ConfigError if the ring is too long for its words."""

    num_parameters: int       # P
    ring: int                 # K
    num_workers: int          # N

    def __post_init__(self):
        if self.ring > CONTROL_WORDS - FIRST_SLOT:
            raise ConfigError(f"--exchange.ring {self.ring}: the window has room for {CONTROL_WORDS - FIRST_SLOT} slots.")

    def mail(self, worker: int) -> int:
        return WORD * (CONTROL_WORDS + wire.MAIL_WORDS * worker)

    def slot(self, index: int) -> int:
        slot_bytes = _to_page(4 * self.num_parameters)
        return _to_page(self.mail(self.num_workers)) + index * slot_bytes

    @property
    def num_bytes(self) -> int:
        return self.slot(self.ring)


def _to_page(num_bytes: int) -> int:
    return -(-num_bytes // PAGE) * PAGE


class _Window:
    """What both sides share: the collective beginning and end."""

    def __init__(self, world: World, layout: Layout):
        self.world = world
        self.layout = layout
        self.win: MPI.Win | None = None

    def open(self) -> None:
        """Allocate the window; all ranks call this together."""
        size = self.layout.num_bytes if self.world.is_server else 0
        self.win = MPI.Win.Allocate(size, disp_unit=1, comm=self.world.comm)
        self._attach()
        self.win.Lock_all(MPI.MODE_NOCHECK)
        self.world.barrier("all ranks to open the window")  # the first access needs the server inside MPI once

    def close(self) -> None:
        self.world.barrier("all ranks to leave the window")
        self._detach()
        self.win.Unlock_all()
        self.win.Free()

    def _attach(self) -> None: ...

    def _detach(self) -> None: ...


class ServerWindow(_Window):
    """Rank 0's side: writes snapshots and mail into its own memory."""

    def _attach(self) -> None:
        memory = np.frombuffer(self.win.tomemory(), np.uint8)
        words = memory[:self.layout.slot(0)].view(np.int64)
        self._control = words[:CONTROL_WORDS]
        self._control[:] = ABSENT
        self._mail = words[CONTROL_WORDS:][:wire.MAIL_WORDS * self.layout.num_workers].reshape(-1, wire.MAIL_WORDS)
        self._ring = [
            torch.from_numpy(memory[self.layout.slot(k):][:4 * self.layout.num_parameters].view(np.float32))
            for k in range(self.layout.ring)]

    def _detach(self) -> None:
        del self._control, self._mail, self._ring  # the memory goes away with the window

    @property
    def version(self) -> int:
        return int(self._control[LATEST])

    @property
    def latest(self) -> torch.Tensor:
        """The latest snapshot, (P,) float32: read it, do not write it."""
        return self._ring[self.version % self.layout.ring]

    @contextmanager
    def next_snapshot(self) -> Iterator[torch.Tensor]:
        """The slot of the next version, (P,) float32, to be written whole; published on exit."""
        version = self.version + 1
        slot = version % self.layout.ring
        self._set(FIRST_SLOT + slot, ABSENT)
        yield self._ring[slot]
        self.win.Sync()                       # the weights are there before their version word,
        self._set(FIRST_SLOT + slot, version)
        self._set(LATEST, version)            # ... and that before anybody is sent to the slot

    def post(self, worker: int, mail: Mail) -> None:
        self._mail[worker] = wire.pack_mail(mail)
        self.win.Sync()

    def _set(self, word: int, value: int) -> None:
        self._control[word] = value
        self.win.Sync()


@dataclass(frozen=True)
class Snapshot:
    """What a fetch brought beside the weights."""

    version: int
    torn_reads: int


class WorkerWindow(_Window):
    """A worker's side: reads with request-based one-sided calls, and asks nobody."""

    def _attach(self) -> None:
        self._words = np.empty(CONTROL_WORDS, np.int64)
        self._mail_words = np.empty(wire.MAIL_WORDS, np.int64)

    def read_mail(self) -> Mail | None:
        """This worker's mail; None if it was being written."""
        self._get(self._mail_words, self.layout.mail(self.world.worker), "its mail")
        return wire.unpack_mail(self._mail_words.tolist())

    def await_mail(self, packets: int, with_lease: int | None = None) -> Mail:
        """The first mail that knows of `packets` judged packets (and holds lease `with_lease`, or the word to stop)."""
        def poll() -> Mail | None:
            mail = self.read_mail()
            if mail is None or mail.judged < packets:
                return None
            granted = with_lease is None or mail.stop or with_lease in [lease.number for lease in mail.leases]
            return mail if granted else None

        what = f"judge its packet {packets}" + (f" and to grant lease {with_lease}" if with_lease else "")
        return wait.until(poll, self.world.timeout_s, self._waits(what))

    def fetch(self, into: torch.Tensor, at_least: int) -> Snapshot:
        """Read the latest snapshot into `into`, (P,) float32 on the host: one whole version, `at_least` or newer."""
        torn_reads = 0
        weights = into.numpy()
        while True:
            version = wait.until(lambda: self._latest(at_least), self.world.timeout_s,
                                 self._waits(f"publish version {at_least}"))[0]
            slot = version % self.layout.ring
            self._get(weights, self.layout.slot(slot), f"version {version}")
            if self._control()[FIRST_SLOT + slot] == version:
                return Snapshot(version, torn_reads)
            torn_reads += 1

    def _latest(self, at_least: int) -> tuple[int] | None:
        version = int(self._control()[LATEST])
        return (version,) if version >= at_least else None

    def _control(self) -> np.ndarray:
        self._get(self._words, 0, "the control words")
        return self._words

    def _get(self, into: np.ndarray, offset: int, what: str) -> None:
        request = self.win.Rget(into, SERVER, target=(offset, into.nbytes, MPI.BYTE))
        wait.until(request.Test, self.world.timeout_s, self._waits(f"let it read {what}"))

    def _waits(self, what: str) -> str:
        return f"rank {self.world.rank} (worker {self.world.worker} on {self.world.host}) waits for rank 0 to {what}"

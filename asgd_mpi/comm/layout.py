"""Where things lie in the memory that a server shows.

Rank 0, and every further server, for its slice of the weights (P is then the length of the slice), owns, in bytes:

    control   127 words of int64: latest version, its slot; and for each slot of the ring its version, its sample clock, the
              version that is or was written last, and how many of its numbers are there; the last word is the server's beat
    promises  N x 2 words: the packet of a worker that is being applied, and the slot whose next version will hold it
    mail      N x 24 words: see messages.pack_mail
    ring      K slots of P float32, each on a page of its own; in a narrower wire format (see codec) followed by what workers
              read of them
    statistics  2 words: how often a write of them has begun, and ended; then batch-norm statistics, float32 (rank 0)

Pure: numbers in, places out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from asgd_mpi.config.limits import MOST_SLOTS
from asgd_mpi.protocol import messages
from asgd_mpi.vector import partition
from asgd_mpi.vector.vector_format import VectorFormat

PAGE = 4096
PROMISE_WORDS = 2
PACKET, PROMISED_SLOT = range(PROMISE_WORDS)
LATEST, SLOT, FIRST_WORD = 0, 1, 2  # positions of the control words
WORDS_OF_SLOT = 4
BEAT = FIRST_WORD + WORDS_OF_SLOT * MOST_SLOTS  # counts up for as long as the server's loop turns
CONTROL_WORDS = BEAT + 1
VERSION, SAMPLES, COMING, WRITTEN = range(WORDS_OF_SLOT)
WORD = 8  # bytes
STATISTICS_FROM = 2 * WORD  # behind their words


@dataclass(frozen=True)
class Layout:
    """Where things lie in a server's memory, in bytes. Raises ConfigError if the vector is too short for so many servers.

    With several servers this is the layout of the whole; `of` gives that of one server's memory.
    """

    num_parameters: int  # P
    ring: int  # K
    num_workers: int  # N
    num_statistics: int = 0  # batch-norm statistics of the network, floats
    fetch: VectorFormat | None = None  # of what workers read; None: float32
    num_servers: int = 1  # S
    push: VectorFormat | None = None  # of what they push; None: the same

    def __post_init__(self):
        assert self.ring <= MOST_SLOTS  # config.limits refuses more
        _ = self.slices

    @cached_property
    def slices(self) -> list[slice]:
        """The numbers that each server serves."""
        coded = ""
        if self.pushed.wire != "float32":
            coded = f"--exchange.wire {self.pushed.wire}"
        elif self.fetched.wire != "float32":
            coded = f"--exchange.fetch_wire {self.fetched.wire}"
        return partition.cut(self.num_parameters, self.num_servers, coded)

    @cached_property
    def fetched(self) -> VectorFormat:
        """The format of what workers read."""
        return self.fetch or VectorFormat(self.num_parameters)

    @property
    def pushed(self) -> VectorFormat:
        """The format of what is pushed."""
        return self.push or self.fetched

    def of(self, number: int) -> Layout:
        """Return the layout of the memory of the server of a slice. Statistics go to the first one."""
        own = self.slices[number]
        return replace(
            self,
            num_parameters=own.stop - own.start,
            num_servers=1,
            num_statistics=0 if number else self.num_statistics,
            fetch=self.fetched.part(own),
            push=self.pushed.part(own),
        )

    def read_at(self, number: int) -> slice:
        """The bytes of a slice, within a vector as workers read it."""
        return self.fetched.place(self.slices[number])

    def pushed_at(self, number: int, kept: int) -> slice:
        """The bytes of a slice, within a vector as it is pushed, with so many numbers of a chunk (see VectorFormat)."""
        return self.pushed.place(self.slices[number], kept)

    def promise(self, worker: int) -> int:
        return WORD * (CONTROL_WORDS + PROMISE_WORDS * worker)

    def mail(self, worker: int) -> int:
        return self.promise(self.num_workers) + WORD * messages.MAIL_WORDS * worker

    @cached_property
    def _ring(self) -> int:
        return _to_page(self.mail(self.num_workers))

    def slot(self, index: int) -> int:
        """Return the weights, (P,) float32."""
        return self._ring + index * (self._whole + self._shown)

    def shown(self, index: int) -> int:
        """Return the weights as they travel."""
        if not self._shown:
            return self.slot(index)
        return self.slot(index) + self._whole

    @property
    def statistics(self) -> int:
        return self.slot(self.ring)

    @property
    def server_bytes(self) -> int:
        if not self.num_statistics:
            return self.statistics
        return self.statistics + _to_page(STATISTICS_FROM + 4 * self.num_statistics)

    @property
    def vector_bytes(self) -> int:
        """A vector as workers read it."""
        return self.fetched.num_bytes()

    @property
    def payload_bytes(self) -> int:
        """The longest payload of a packet."""
        return max(self.pushed.longest, 4 * self.num_statistics)

    @property
    def worker_bytes(self) -> int:
        """A worker on a server's host: its gradient."""
        return _to_page(self.payload_bytes)

    @cached_property
    def _whole(self) -> int:
        return _to_page(4 * self.num_parameters)

    @cached_property
    def _shown(self) -> int:
        return 0 if self.fetched.wire == "float32" else _to_page(self.vector_bytes)


def words_of_slot(slot: int) -> slice:
    first = FIRST_WORD + WORDS_OF_SLOT * slot
    return slice(first, first + WORDS_OF_SLOT)


def _to_page(num_bytes: int) -> int:
    return -(-num_bytes // PAGE) * PAGE

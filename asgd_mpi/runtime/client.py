"""Trips to the server and back: a gradient goes out, the server judges it, a newer snapshot comes in.

Without overlap a trip is made on the spot. With overlap it is made by one thread, to which all of the worker's MPI
calls then belong, while the next gradient is computed: on weights that do not hold the push that is under way. Two
buffers each of weights and gradient are then swapped, never copied. An MPI library moves nothing on its own while
nobody is inside it; the thread is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from asgd_mpi.comm.packets import Outbox
from asgd_mpi.comm.worker_window import Snapshot, WorkerWindow
from asgd_mpi.protocol.messages import Header, Kind, Mail, Orders
from asgd_mpi.record.meter import Meter
from asgd_mpi.vector import codec
from asgd_mpi.vector.flat import FlatModel
from asgd_mpi.vector.vector_format import VectorFormat

if TYPE_CHECKING:
    from asgd_mpi.runtime.stages import LeadStage


@dataclass
class RoundTrip:
    """What a trip brought, and the seconds it took."""

    mail: Mail
    snapshot: Snapshot | None = None
    num_bytes: int = 0  # of it
    push_s: float = 0.0
    fetch_s: float = 0.0


class Formats(NamedTuple):
    """In which formats vectors travel."""

    fetched: VectorFormat | None = None  # None: float32
    pushed: VectorFormat | None = None  # None: as what is fetched


class ServerClient:
    """Owns the worker's MPI calls. `version` is that of the fetched weights; `mail` came with the last trip.

    What is fetched is in flat.weights, or, with `fetches_aside`, in flat.spare_weights. lead: of the stages, if the network
    is cut: each fetches its own part, and they put the gradient together.
    """

    def __init__(
        self,
        window: WorkerWindow,
        outbox: Outbox,
        flat: FlatModel,
        meter: Meter,
        overlap: bool,
        fetches_aside: bool = False,
        formats: Formats = Formats(),
        lead: LeadStage | None = None,
    ):
        self._window, self._outbox, self._flat, self._meter = window, outbox, flat, meter
        self._leader = lead
        self._plain = VectorFormat((lead or flat).num_floats)
        self.format = formats.fetched or self._plain  # of what is fetched
        self._push = formats.pushed or self.format
        if overlap:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="client")
        else:
            self._thread = None
        self._trip: Future[RoundTrip] | None = None
        on_gpu = flat.device.type == "cuda"
        num_bytes = (self._plain if on_gpu else self.format).num_bytes()
        is_staged = (on_gpu or self.format.wire != "float32") and not lead
        if is_staged:
            self._staging = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        else:
            self._staging = None
        self._stream = torch.cuda.Stream(flat.device) if on_gpu and overlap else None
        self._aside = fetches_aside
        self.version = self.samples = 0
        self.mail = Mail(judged=0, version=0)

    @property
    def sent(self) -> int:
        """Packets that have been given to the client."""
        return self._outbox.sent

    def is_back(self) -> bool:
        """Return whether `wait` would return at once."""
        return self._trip is None or self._trip.done()

    def start(
        self,
        header: Header | None,
        fill: Callable[[torch.Tensor], int],
        fetch: bool = True,
        whole: bool = False,
    ) -> None:
        """Set out, with a packet unless `header` is None; the last trip must have been waited for.

        `fill` writes the payload, uint8, and returns its bytes; it is called on the way, by whoever makes the trip. `whole`:
        fetch the weights as the server holds them, not in the format that travels.
        """
        if self._stream:
            # which may still fill the gradient
            self._stream.wait_stream(torch.cuda.current_stream(self._flat.device))
        self._trip = self._run(self._go, header, fill, fetch, whole)
        if not self._thread:
            # now, not in `wait`: an interval of the meter may end in between, and must hold no time from before it began
            trip = self._trip.result()
            self._meter.add(push=trip.push_s, fetch=trip.fetch_s)

    def push_gradient(self, header: Header, fetch: bool, code: torch.Tensor | None = None) -> int:
        """Set out with the gradient of `flat`, or the bytes of a compressed one; returns how many bytes travel.

        With overlap, `flat` gets another gradient to fill; the code must stay until the trip has been waited for.
        """
        if self._thread:
            self._flat.swap_gradients_()
        flat = self._leader or self._flat
        gradient = flat.spare_gradient if self._thread else flat.gradient

        num_bytes = self._push.longest if code is None else len(code)

        def fill(payload: torch.Tensor) -> int:
            if code is not None:
                payload[: len(code)].copy_(code)
            elif payload.data_ptr() != gradient.data_ptr():
                codec.copy_(self._push.vector_in(payload), gradient)
            return num_bytes

        self.start(header, fill, fetch)
        return num_bytes

    @property
    def fetched(self) -> torch.Tensor:
        """The weights that the last fetch brought, (P,) float32 on the device of `flat`; of a leader its own part."""
        return self._flat.spare_weights if self._aside else self._flat.weights

    def wait(self) -> bool:
        """Wait for the trip to end, and take what it brought; whether the weights are new."""
        if self._trip is None:
            return False
        started = time.perf_counter()
        trip, self._trip = self._trip.result(), None
        if self._thread:
            waited = time.perf_counter() - started
            self._meter.add(push=waited, hidden=max(0.0, trip.push_s + trip.fetch_s - waited))
        self.mail = trip.mail
        if trip.snapshot is None:
            return False
        self.version, self.samples = trip.snapshot.version, trip.snapshot.samples
        self._meter.add(
            fetches=1,
            followed=int(trip.snapshot.followed),
            torn_reads=trip.snapshot.torn_reads,
            bytes_fetched=trip.num_bytes,
        )
        if self._thread:
            self._flat.swap_weights_()
        return True

    def say(self, header: Header) -> None:
        """Send a packet without a payload, and wait until the server has taken note of it."""
        self.start(header, lambda payload: 0, fetch=False)
        self.wait()

    def await_mail(self, until: Callable[[Mail], bool], for_what: str) -> None:
        """Wait for mail of which `until` holds, for as long as the server lives."""

        def look(mail: Mail) -> bool:
            self._meter.add()  # a wait that the server has ordered is no stall
            return until(mail)

        self.mail = self._run(self._window.await_mail, self.sent, look, for_what).result()

    def is_overtaken(self) -> bool:
        """Return whether a gradient on the weights that were fetched last cannot count any more. Not with overlap."""
        mail = self._window.read_mail()
        return mail is not None and self.version < mail.oldest

    def read_statistics(self) -> torch.Tensor:
        """Return the batch-norm statistics that the server keeps, float32."""
        return self._run(self._window.read_statistics).result()

    def close(self) -> None:
        if self._thread:
            self._thread.shutdown()

    def _run(self, work: Callable, *arguments: object) -> Future:
        if self._thread:
            return self._thread.submit(work, *arguments)
        done: Future = Future()
        done.set_result(work(*arguments))
        return done

    def _go(
        self, header: Header | None, fill: Callable[[torch.Tensor], int], fetch: bool, whole: bool
    ) -> RoundTrip:
        started = time.perf_counter()
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            weights, memory = (None, None) if self._leader else self._room(whole)
            followed, until = None, _at_once
            if header is not None:
                self._outbox.send(header, fill(self._outbox.payload))
                if fetch and memory is not None:
                    # the snapshot that will hold this packet, while it is written, if that can be
                    followed = self._window.follow(self._outbox.sent, memory, whole)
                if header.kind in (Kind.GRADIENT, Kind.NONFINITE):
                    until = self._may_go_on
            trip = RoundTrip(
                self._window.await_mail(self._outbox.sent, until, "let it go on"),
                push_s=time.perf_counter() - started,
            )
            if fetch and self._leader:
                trip.snapshot, trip.num_bytes = self._leader.fetch(trip.mail.version, whole)
            elif fetch:
                trip.snapshot = self._fetch(weights, memory, trip.mail.version, whole, followed)
                trip.num_bytes = len(memory)
        if self._stream:
            self._stream.synchronize()
        trip.fetch_s = time.perf_counter() - started - trip.push_s
        return trip

    def _may_go_on(self, mail: Mail) -> bool:
        """Return whether the server does not hold this worker, after a push, until others have made theirs."""
        self._meter.add()  # by order: no stall
        return not mail.hold or mail.orders != Orders.GO_ON

    def _fetch(
        self,
        weights: torch.Tensor,
        memory: torch.Tensor,
        at_least: int,
        whole: bool,
        followed: Snapshot | None,
    ) -> Snapshot:
        """Read a snapshot into `memory`, unless the one that was `followed` is still the latest, and from there into `weights`."""
        if followed and self._window.is_latest(followed.version):
            snapshot = followed
        else:
            snapshot = self._window.fetch(memory, at_least, whole)
        if memory.data_ptr() != weights.data_ptr():
            codec.copy_(weights, self._format(whole).vector_in(memory))
        return snapshot

    def _room(self, whole: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where the next weights are to be, (P,) float32, and where they arrive, uint8 on the host."""
        is_spare = self._thread or self._aside
        weights = self._flat.spare_weights if is_spare else self._flat.weights
        if self._staging is None or (whole and self._flat.device.type == "cpu"):
            return weights, weights.view(torch.uint8)
        return weights, self._staging[: self._format(whole).num_bytes()]

    def _format(self, whole: bool) -> VectorFormat:
        return self._plain if whole else self.format


def _at_once(mail: Mail) -> bool:
    return True

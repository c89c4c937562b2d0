"""Packets from the workers to the server: nonblocking sends and receives.

On the server's host the payload lies in the worker's slot of the shared window, and only its header is sent: the
server reads the gradient in place. From other hosts header and payload travel as one message, or as several if they are
too long for one: every packet then has as many, of which the last ones may be empty, since the server expects them before
it knows what comes. A payload belongs to the worker until it is sent, and to the server until the packet is judged.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from mpi4py import MPI

from asgd_mpi.exchange import codec, wait, wire
from asgd_mpi.exchange.codec import Vector
from asgd_mpi.exchange.window import ServerWindow, WorkerWindow
from asgd_mpi.exchange.wire import HEADER_BYTES, Header
from asgd_mpi.exchange.world import PROCESS_FAILED, World, cut
from asgd_mpi.topology import SERVER

TAG = 1


class _Packet:
    """A header's bytes and its payload, uint8: `shared` memory, or behind the header in the message."""

    def __init__(self, num_bytes: int, shared: torch.Tensor | None):
        self.is_shared = shared is not None
        self.bytes = np.zeros(HEADER_BYTES + (0 if self.is_shared else num_bytes), np.uint8)
        self.payload = shared if self.is_shared else torch.from_numpy(self.bytes[HEADER_BYTES:])

    def messages(self, num_bytes: int | None = None) -> list[np.ndarray]:
        """What is sent for a payload of `num_bytes`, or received, of any length."""
        left = len(self.bytes) if num_bytes is None else HEADER_BYTES + (0 if self.is_shared else num_bytes)
        return [part[:max(0, left - start)] for start, part in cut(self.bytes)]


class Outbox:
    """A worker's side: fill `payload`, then `send`."""

    def __init__(self, world: World, window: WorkerWindow):
        self.world = world
        self.sent = 0                         # packets so far
        self._packet = _Packet(window.layout.payload_bytes, window.payload)
        self._requests: list[MPI.Request] = []

    @property
    def payload(self) -> torch.Tensor:
        """(payload_bytes,) uint8 on the host; to be written only when the last packet has been judged."""
        return self._packet.payload

    def send(self, header: Header, num_bytes: int) -> None:
        """Start to send the header and the first `num_bytes` of the payload."""
        self.sent += 1
        self._packet.bytes[:HEADER_BYTES] = np.frombuffer(wire.pack_header(header), np.uint8)
        self._requests = [self.world.comm.Isend([message, MPI.BYTE], dest=SERVER, tag=TAG)
                          for message in self._packet.messages(num_bytes)]

    def wait(self) -> None:
        """Return when the packet has left."""
        wait.until(lambda: _are_done(self._requests) or self.world.demand_server(), self.world.timeout_s,
                   f"rank {self.world.rank} waits for rank 0 to take its packet {self.sent}", wait.BUSY_S)


@dataclass(frozen=True)
class Arrival:
    """A received packet. Its payload is valid until the arrival is released, and one of the two."""

    worker: int
    header: Header | None                 # None if it could not be read: then `fault` says why
    gradient: Vector                      # (P,)
    statistics: torch.Tensor              # float32
    fault: str = ""


class Inbox:
    """The server's side: the receives of one packet are open for each worker at any time."""

    def __init__(self, world: World, window: ServerWindow):
        self.world, self._window = world, window
        self._layout = layout = window.layout
        workers = range(layout.num_workers)
        self._packets = [_Packet(layout.payload_bytes, window.payloads.get(worker)) for worker in workers]
        self._requests = {worker: self._receive(worker) for worker in workers}
        self._arrived: deque[Arrival] = deque()
        self.dead: set[int] = set()           # workers whose process the MPI library reports as failed
        serves_other_hosts = len(window.payloads) < layout.num_workers
        self._longest_s = wait.BUSY_S if serves_other_hosts else wait.LONGEST_S  # their reads need us inside MPI

    def take(self, seconds: float) -> list[Arrival]:
        """All packets that wait, at most one of a worker; waits so long for the first."""
        wait.for_a_while(self.poll, seconds, self._longest_s)
        arrived = list(self._arrived)
        self._arrived.clear()
        return arrived

    def poll(self) -> bool:
        """Let MPI make progress, and other hosts read; whether a packet is there."""
        self._window.answer()
        for worker, requests in list(self._requests.items()):
            try:
                if not _are_done(requests):
                    continue
                self._arrived.append(self._open(worker))
            except MPI.Exception as error:    # under mpirun --with-ft ulfm
                if error.Get_error_class() not in PROCESS_FAILED:
                    raise
                self.dead.add(worker)
                self.world.has_lost_ranks = True
            del self._requests[worker]
        return bool(self._arrived)

    def release(self, arrival: Arrival) -> None:
        """The payload has been used: the worker's next packet may overwrite it."""
        if arrival.worker not in self.dead:
            self._requests[arrival.worker] = self._receive(arrival.worker)

    def close(self) -> None:
        for requests in self._requests.values():
            for request in requests:
                request.Cancel()
                request.Free()

    def _open(self, worker: int) -> Arrival:
        packet, layout = self._packets[worker], self._layout
        payload = (codec.vector_in(packet.payload, layout.num_parameters, layout.wire),
                   codec.vector_in(packet.payload, layout.num_statistics, "float32"))
        try:
            header = wire.unpack_header(packet.bytes[:HEADER_BYTES].tobytes())
            if header.worker != worker:
                raise ValueError(f"rank {worker + 1} sent a packet in the name of worker {header.worker}: {header}")
        except ValueError as error:
            return Arrival(worker, None, *payload, str(error))
        return Arrival(worker, header, *payload)

    def _receive(self, worker: int) -> list[MPI.Request]:
        return [self.world.comm.Irecv([message, MPI.BYTE], source=worker + 1, tag=TAG)
                for message in self._packets[worker].messages()]


def _are_done(requests: list[MPI.Request]) -> bool:
    """Whether all of them are; one by one, so that an error is that of a request and not of its list."""
    return all(request.Test() for request in requests)

"""Packets from the workers to the server: nonblocking sends and receives of a header and its payload in one message.

A buffer in flight is owned by its request: neither side touches it before the request is complete.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from mpi4py import MPI

from asgd_mpi.exchange import wait, wire
from asgd_mpi.exchange.wire import HEADER_BYTES, Header
from asgd_mpi.exchange.world import World
from asgd_mpi.topology import SERVER

TAG = 1


class _Packet:
    """One message: HEADER_BYTES of header, then the payload, (capacity,) float32."""

    def __init__(self, capacity: int):
        self.bytes = np.zeros(HEADER_BYTES + 4 * capacity, np.uint8)
        self.payload = torch.from_numpy(self.bytes[HEADER_BYTES:].view(np.float32))


class Outbox:
    """A worker's side: fill `payload`, then `send`."""

    def __init__(self, world: World, capacity: int):
        self.world = world
        self.sent = 0                         # packets so far
        self._packet = _Packet(capacity)
        self._request = MPI.REQUEST_NULL

    @property
    def payload(self) -> torch.Tensor:
        """(capacity,) float32 on the host; write it only after `wait`."""
        return self._packet.payload

    def send(self, header: Header, num_floats: int) -> None:
        """Start to send the header and the first `num_floats` of the payload."""
        self.sent += 1
        self._packet.bytes[:HEADER_BYTES] = np.frombuffer(wire.pack_header(header), np.uint8)
        message = self._packet.bytes[:HEADER_BYTES + 4 * num_floats]
        self._request = self.world.comm.Isend([message, MPI.BYTE], dest=SERVER, tag=TAG)

    def wait(self) -> None:
        """Return when the payload may be written again."""
        wait.until(self._request.Test, self.world.timeout_s,
                   f"rank {self.world.rank} waits for rank 0 to take its packet {self.sent}")


@dataclass(frozen=True)
class Arrival:
    """A received packet; `payload` is (capacity,) float32, valid until the arrival is released."""

    header: Header
    payload: torch.Tensor
    num_bytes: int


class Inbox:
    """The server's side: one receive is open for each worker at any time."""

    def __init__(self, world: World, capacity: int, num_workers: int):
        self.world = world
        self._packets = [_Packet(capacity) for _ in range(num_workers)]
        self._requests = [self._receive(worker) for worker in range(num_workers)]
        self._arrived: deque[Arrival] = deque()
        self._statuses = [MPI.Status() for _ in range(num_workers)]

    def next(self, timeout_s: float, who_is_due: str) -> Arrival:
        """The packet that waited longest. Raises DeadlineExceeded."""
        if not self._arrived:
            wait.until(self.poll, timeout_s, f"rank 0 waits for a packet from one of: {who_is_due}")
        return self._arrived.popleft()

    def poll(self) -> bool:
        """Let MPI make progress; whether a packet is there."""
        for position, worker in enumerate(MPI.Request.Testsome(self._requests, self._statuses) or []):
            packet = self._packets[worker]
            header = wire.unpack_header(packet.bytes[:HEADER_BYTES].tobytes())
            if header.worker != worker:
                raise ValueError(f"rank {worker + 1} sent a packet in the name of worker {header.worker}: {header}")
            self._arrived.append(Arrival(header, packet.payload, self._statuses[position].Get_count(MPI.BYTE)))
        return bool(self._arrived)

    def release(self, arrival: Arrival) -> None:
        """The payload has been used: the worker's next packet may overwrite it."""
        worker = arrival.header.worker
        self._requests[worker] = self._receive(worker)

    def close(self) -> None:
        for request in self._requests:
            request.Cancel()
            request.Free()

    def _receive(self, worker: int) -> MPI.Request:
        return self.world.comm.Irecv([self._packets[worker].bytes, MPI.BYTE], source=worker + 1, tag=TAG)

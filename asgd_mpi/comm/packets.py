"""Packets from the workers to the server: nonblocking sends and receives.

On the server's host the payload lies in the worker's slot of the shared window, and only its header is sent: the
server reads the gradient in place. From other hosts header and payload travel as one message, or as several if they are
too long for one: every packet then has as many, of which the last ones may be empty, since the server expects them before
it knows what comes. A payload belongs to the worker until it is sent, and to the server until the packet is judged.

From other hosts a server looks at the length of a message before it receives it: one that is longer than its room is received
aside and its packet refused, as one that is shorter than what belongs to its kind. So MPI never has to cut a payload off, which
went wrong over TCP. From its own host only headers come. A server receives them without a look, which is quicker.

Of several servers each gets the header of a gradient, with its slice of it where it is on another host than the worker, as
a message of its own behind the header; all other packets go to rank 0 alone.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import torch

from asgd_mpi.comm import wait
from asgd_mpi.comm.arrival import Arrival
from asgd_mpi.comm.mpi import MPI
from asgd_mpi.comm.server_window import ServerWindow
from asgd_mpi.comm.worker_window import WorkerWindow
from asgd_mpi.comm.world import PROCESS_FAILED, World, cut
from asgd_mpi.protocol import messages
from asgd_mpi.protocol.messages import HEADER_BYTES, Header, Kind
from asgd_mpi.vector import codec
from asgd_mpi.vector.codec import Vector

TAG = 1


class _Packet:
    """A header's bytes and its payload, uint8: `shared` memory, or behind the header in the message.

    apart: the payload is a message of its own, of up to num_bytes, from or into the memory given.
    """

    def __init__(
        self, num_bytes: int, shared: torch.Tensor | None, apart: torch.Tensor | None = None
    ):
        self.is_shared = shared is not None
        elsewhere = apart if shared is None else shared
        behind = num_bytes if elsewhere is None else 0
        self.bytes = np.zeros(HEADER_BYTES + behind, np.uint8)
        self._parts = cut(self.bytes)
        if elsewhere is None:
            elsewhere = torch.from_numpy(self.bytes[HEADER_BYTES:])
        self.payload: torch.Tensor = elsewhere
        self._num_bytes = num_bytes
        self._apart: np.ndarray | None = None
        if shared is None and apart is not None:
            self._apart = apart.numpy()

    def messages(self, num_bytes: int | None = None, begin: int = 0) -> list[np.ndarray]:
        """Return what is sent for a payload of `num_bytes` from `begin` on (apart), or received, of any length."""
        if num_bytes is None:
            num_bytes = len(self.payload)
        if self._apart is not None:
            payload, room = self._apart[begin : begin + num_bytes], self._apart[: self._num_bytes]
            return [
                self.bytes,
                *(payload[start : start + len(part)] for start, part in cut(room)),
            ]
        left = HEADER_BYTES
        if not self.is_shared:
            left += num_bytes
        return [part[: max(0, left - start)] for start, part in self._parts]


class Outbox:
    """A worker's side: fill `payload`, then `send`."""

    def __init__(self, world: World, window: WorkerWindow):
        self.world, self._servers = world, window.servers
        self.sent = 0  # packets so far
        layout = window.whole
        if layout.num_servers == 1:
            self._packets = [_Packet(layout.payload_bytes, window.payload)]
            # (payload_bytes,) uint8 on the host; to be written only when the last
            self.payload = self._packets[0].payload
        else:  # ... packet has been judged
            if window.payload is None:
                self.payload = torch.zeros(layout.payload_bytes, dtype=torch.uint8)
            else:
                self.payload = window.payload
            self._packets = [
                self._packet_of_slice(window, number) for number in range(layout.num_servers)
            ]
        self._layout = layout

    def _packet_of_slice(self, window: WorkerWindow, number: int) -> _Packet:
        num_bytes = window.whole.of(number).payload_bytes
        if window.near[number]:
            return _Packet(num_bytes, self.payload)
        return _Packet(num_bytes, None, apart=self.payload)

    def send(self, header: Header, num_bytes: int) -> None:
        """Send the header and the first `num_bytes` of the payload, which hold all of it; returns when they have left. Raises ServerLost."""
        self.sent += 1
        if header.kind == Kind.GOODBYE:
            self.world.let_go_of(self._servers[1:])
        with self.world.as_loss_of_server():
            requests: list[MPI.Request] = []
            is_shared_out = header.kind == Kind.GRADIENT and len(self._servers) > 1
            packets = self._packets if is_shared_out else self._packets[:1]
            own = slice(0, num_bytes)
            for number, packet in enumerate(packets):
                packet.bytes[:HEADER_BYTES] = np.frombuffer(messages.pack_header(header), np.uint8)
                if is_shared_out:
                    own = self._layout.pushed_at(number, header.kept)
                requests += [
                    self.world.comm.Isend([message, MPI.BYTE], dest=self._servers[number], tag=TAG)
                    for message in packet.messages(own.stop - own.start, own.start)
                ]
            wait.until(
                # one by one, so that an error is that of a request and not of their list
                lambda: all(request.Test() for request in requests),
                self.world.timeout_s,
                f"rank {self.world.rank} waits for rank {', '.join(map(str, self._servers))} to take its packet "
                f"{self.sent}",
                wait.BUSY_S,
                meanwhile=self.world.demand_server,
            )


class _HeaderReceipt:
    """The header of the next packet of a worker on this host, whose payload lies in the shared window.

    Its receive is open before it comes. A probe would find it later: with one worker and 1000 parameters that
    took a third of the exchanges (`python -m benchmarks.exchange --peers ours --workers 1 --parameters 1000`).
    """

    def __init__(self, world: World, worker: int, packet: _Packet):
        self._request = world.comm.Irecv([packet.bytes, MPI.BYTE], source=worker + 1, tag=TAG)
        self.num_bytes = 0  # that have come
        self.fits = True  # the message, in a header; else MPI has cut it off

    def is_whole(self) -> bool:
        """Return whether the message is here."""
        status = MPI.Status()
        try:
            if not self._request.Test(status):
                return False
            self.num_bytes = status.Get_count(MPI.BYTE)
        except MPI.Exception as error:
            if error.Get_error_class() != MPI.ERR_TRUNCATE:
                raise
            self.num_bytes, self.fits = HEADER_BYTES, False
        return True

    def cancel(self) -> None:
        self._request.Cancel()
        self._request.Free()


class _Receipt:
    """The messages of a worker's next packet, as they come into the memory of `packet`, each after a look at its length."""

    def __init__(self, world: World, worker: int, packet: _Packet):
        self._comm, self._source = world.comm, worker + 1
        self._rooms = deque(packet.messages())
        self._under_way: tuple[MPI.Request, np.ndarray] | None = None
        self.num_bytes = 0  # that have come
        self.fits = True  # ... each where it belongs

    def is_whole(self) -> bool:
        """Go on; whether all messages are here."""
        while self._under_way or self._rooms:
            self._under_way = self._under_way or self._begin()
            if self._under_way is None or not self._under_way[0].Test():
                return False
            self._under_way = None
        return True

    def _begin(self) -> tuple[MPI.Request, np.ndarray] | None:
        """Begin to receive the next message, if it is there: the request, and the memory that it fills."""
        status = MPI.Status()
        message = self._comm.Improbe(source=self._source, tag=TAG, status=status)
        if message is None:
            return None
        room, length = self._rooms.popleft(), status.Get_count(MPI.BYTE)
        self.fits = self.fits and length <= len(room)
        into = room[:length] if length <= len(room) else np.empty(length, np.uint8)
        self.num_bytes += length
        return message.Irecv([into, MPI.BYTE]), into

    def cancel(self) -> None:
        """Do nothing: no message is received before it is there."""


class Inbox:
    """A server's side: one packet of each worker is waited for at any time.

    A process has one at most. It receives from the moment on that it is made, and would take another one's packets.
    """

    def __init__(self, world: World, window: ServerWindow):
        self.world, self._window = world, window
        self._layout = layout = window.layout
        workers = range(layout.num_workers)
        is_apart, size = window.whole.num_servers > 1, layout.payload_bytes
        self._packets: list[_Packet] = []
        for worker in workers:
            shared, apart = window.payloads.get(worker), None
            if is_apart and shared is None:
                apart = torch.zeros(size, dtype=torch.uint8)
            self._packets.append(_Packet(size, shared, apart))
        # under way
        self._receipts = {worker: self._receive(worker) for worker in workers}
        self._arrived: deque[Arrival] = deque()
        # workers whose process the MPI library reports as failed
        self.dead: set[int] = set()
        serves_other_hosts = len(window.payloads) < layout.num_workers
        # their reads need us inside MPI
        self.longest_s = wait.BUSY_S if serves_other_hosts else wait.LONGEST_S

    def take(self, seconds: float) -> list[Arrival]:
        """All packets that wait, at most one of a worker; waits so long for the first."""
        if wait.for_a_while(self.poll, seconds, self.longest_s):
            # A look that finds nothing lets MPI make progress: what came in with it, of workers that were looked at before, is found now.
            self.poll()
        arrived = list(self._arrived)
        self._arrived.clear()
        return arrived

    def poll(self) -> bool:
        """Let MPI make progress, and other hosts read; whether a packet is there."""
        self._window.answer()
        for worker, receipt in list(self._receipts.items()):
            try:
                if not receipt.is_whole():
                    continue
                self._arrived.append(self._open(worker, receipt))
            except MPI.Exception as error:  # under mpirun --with-ft ulfm
                if error.Get_error_class() not in PROCESS_FAILED:
                    raise
                self.dead.add(worker)
                self.world.has_lost_ranks = True
            del self._receipts[worker]
        return bool(self._arrived)

    def release(self, arrival: Arrival) -> None:
        """Give back a payload that has been used: the worker's next packet may overwrite it."""
        if arrival.worker not in self.dead:
            self._receipts[arrival.worker] = self._receive(arrival.worker)

    def close(self) -> None:
        for receipt in self._receipts.values():
            receipt.cancel()
        self._receipts.clear()

    def _receive(self, worker: int) -> _HeaderReceipt | _Receipt:
        packet = self._packets[worker]
        kind = _HeaderReceipt if packet.is_shared else _Receipt
        return kind(self.world, worker, packet)

    def _open(self, worker: int, receipt: _HeaderReceipt | _Receipt) -> Arrival:
        packet, layout = self._packets[worker], self._layout
        statistics = codec.vector_in(packet.payload, layout.num_statistics, "float32")
        try:
            if receipt.num_bytes < HEADER_BYTES:
                raise ValueError(
                    f"a packet of {receipt.num_bytes} bytes, where its header alone has {HEADER_BYTES}"
                )
            if packet.is_shared and not receipt.fits:
                raise ValueError(
                    f"a packet of more than {HEADER_BYTES} bytes, where its header is all that travels"
                )
            header = messages.unpack_header(packet.bytes[:HEADER_BYTES].tobytes())
            if header.worker != worker:
                raise ValueError(
                    f"rank {worker + 1} sent a packet in the name of worker {header.worker}: {header}"
                )
            if header.kind == Kind.GRADIENT and not layout.pushed.may_keep(header.kept):
                raise ValueError(
                    f"{header.kept} numbers of every chunk, where wire {layout.pushed.wire} sends {layout.pushed.most} at most: {header}"
                )
            found = receipt.num_bytes - HEADER_BYTES
            due = 0 if packet.is_shared else self._due_bytes(header)
            if found != due or not receipt.fits:
                raise ValueError(f"a payload of {found} bytes, where {due} were due: {header}")
        except ValueError as error:
            return Arrival(worker, None, torch.empty(0), statistics, str(error))
        return Arrival(worker, header, self._gradient(packet, header), statistics)

    def _gradient(self, packet: _Packet, header: Header) -> Vector:
        """Return what a packet brings of a gradient; a packet of another kind is not looked at."""
        if header.kind != Kind.GRADIENT:
            return torch.empty(0)
        payload, kept = packet.payload, header.kept
        if packet.is_shared:
            payload = self._window.slice_of(payload, kept)
        return self._layout.pushed.vector_in(payload, kept)

    def _due_bytes(self, header: Header) -> int:
        """Return the bytes that the payload of a packet in a message must have."""
        match header.kind:
            case Kind.GRADIENT:
                return self._layout.pushed.num_bytes(header.kept)
            case Kind.VALIDATION | Kind.STATISTICS:
                return 4 * self._layout.num_statistics
        return 0

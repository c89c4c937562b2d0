"""How a packet is cut into messages."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from asgd_mpi.comm import packets, world
from asgd_mpi.comm.layout import Layout
from asgd_mpi.protocol.messages import HEADER_BYTES, Header, Kind, pack_header


@pytest.mark.parametrize("size, parts", [(0, 0), (1, 1), (999, 1), (1000, 1), (1001, 2), (5000, 5)])
def test_memory_is_cut_into_parts_that_one_call_carries(monkeypatch, size, parts):
    monkeypatch.setattr(world, "MAX_BYTES", 1000)
    memory = np.arange(size, dtype=np.uint8)
    found = world.cut(memory)
    assert len(found) == parts and all(0 < len(part) <= 1000 for _, part in found)
    assert b"".join(part.tobytes() for _, part in found) == memory.tobytes()
    assert all(
        np.shares_memory(part, memory[start:]) and part[0] == memory[start] for start, part in found
    )
    assert sum(part.nbytes for _, part in world.cut(np.zeros(size, np.int64))) == 8 * size


@pytest.mark.parametrize("num_bytes", [0, 1, 871, 872, 873, 1872, 1873, 2000])
def test_a_packet_has_as_many_messages_whatever_its_payload(monkeypatch, num_bytes):
    """MPI keeps their order, so that each is received where it belongs."""
    monkeypatch.setattr(world, "MAX_BYTES", 1000)
    sent, received = packets._Packet(2000, None), packets._Packet(2000, None)
    sent.bytes[:] = np.random.default_rng(0).integers(1, 255, len(sent.bytes))
    messages = sent.messages(num_bytes)
    assert (
        sum(map(len, messages)) == HEADER_BYTES + num_bytes
        and len(messages) == len(received.messages()) == 3
    )
    for message, room in zip(messages, received.messages()):
        room[: len(message)] = message
    assert np.array_equal(
        received.bytes[: HEADER_BYTES + num_bytes], sent.bytes[: HEADER_BYTES + num_bytes]
    )
    assert not received.bytes[HEADER_BYTES + num_bytes :].any()


class Comm:
    """MPI as Open MPI does it: a look that finds nothing takes in what has come, and does not look again."""

    def __init__(self, on_the_way: dict[int, bytes]):
        self.on_the_way, self.there = on_the_way, {}
        self.cancelled = []

    def is_there(self, source):
        if source not in self.there:
            self.there |= self.on_the_way
            self.on_the_way = {}
            return False
        return True

    def Improbe(self, source, tag, status):
        if not self.is_there(source):
            return None
        content = self.there.pop(source)
        status.Set_elements(packets.MPI.BYTE, len(content))

        def receive(where):
            where[0][:] = np.frombuffer(content, np.uint8)
            return SimpleNamespace(Test=lambda: True)

        return SimpleNamespace(Irecv=receive)

    def Irecv(self, where, source, tag):
        def test(status):
            if not self.is_there(source):
                return False
            content = self.there.pop(source)
            if len(content) > len(where[0]):
                raise packets.MPI.Exception(packets.MPI.ERR_TRUNCATE)
            where[0][: len(content)] = np.frombuffer(content, np.uint8)
            status.Set_elements(packets.MPI.BYTE, len(content))
            return True

        return SimpleNamespace(
            Test=test, Cancel=lambda: self.cancelled.append(source), Free=lambda: None
        )


def header_of(worker):
    return pack_header(Header(Kind.HERE, worker, 1, 0, 0, 0, 0))


def make_inbox(on_the_way, on_this_host):
    layout = Layout(16, 3, 4)
    payloads = {worker: torch.zeros(64) for worker in on_this_host}
    window = SimpleNamespace(layout=layout, whole=layout, payloads=payloads, answer=int)
    return packets.Inbox(SimpleNamespace(comm=Comm(on_the_way)), window)


@pytest.mark.parametrize("on_this_host", [range(4), range(0), [1, 3]])
def test_a_server_takes_all_packets_that_have_come_and_not_all_but_the_first_workers(on_this_host):
    """One that is left would wait for a whole pass, and the pass would serve fewer workers than it could."""
    inbox = make_inbox({worker + 1: header_of(worker) for worker in range(3)}, on_this_host)
    arrivals = inbox.take(1.0)
    assert sorted(arrival.header.worker for arrival in arrivals) == [0, 1, 2]
    # the fourth is waited for, and these again
    assert inbox.take(0.0) == []
    for arrival in arrivals[:2]:
        inbox.release(arrival)
    assert inbox.take(0.0) == []
    waited_for = {arrival.worker for arrival in arrivals[:2]} | {3}
    inbox.close()
    # what is received ahead is called off, and nothing else
    assert sorted(inbox.world.comm.cancelled) == sorted(
        worker + 1 for worker in waited_for & set(on_this_host)
    )


@pytest.mark.parametrize(
    "more, fault",
    [
        (1, f"a packet of more than {HEADER_BYTES} bytes"),
        (1000, f"a packet of more than {HEADER_BYTES} bytes"),
        (-1, "where its header alone has"),
    ],
)
def test_a_header_of_another_length_is_refused_also_if_mpi_cuts_it_off(more, fault):
    content = (header_of(2) + bytes(1000))[: HEADER_BYTES + more]
    (arrival,) = make_inbox({3: content}, range(4)).take(1.0)
    assert arrival.worker == 2 and arrival.header is None and fault in arrival.fault

"""Where things lie in the server's memory, and how much of it there must be."""

import shutil
from types import SimpleNamespace

import pytest

from asgd_mpi.errors import ConfigError
from asgd_mpi.exchange.codec import BLOCK
from asgd_mpi.exchange.layout import PAGE, Layout
from asgd_mpi.exchange.window import ServerWindow

WIRES = ["float32", "bfloat16", "float16"]


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("num_parameters", [16, 1600, 3 * BLOCK + 16, 3 << 30])
def test_nothing_in_the_memory_overlaps(wire, num_parameters):
    layout = Layout(num_parameters, 3, 5, 0, wire)
    parts = [(layout.mail(worker), layout.mail(worker + 1)) for worker in range(5)]
    for slot in range(3):
        parts.append((layout.slot(slot), layout.slot(slot) + 4 * num_parameters))
        if wire != "float32":
            parts.append((layout.shown(slot), layout.shown(slot) + layout.vector_bytes))
    assert all(end <= begin for (_, end), (begin, _) in zip(parts, parts[1:])) and parts[-1][1] <= layout.server_bytes
    assert all(begin % PAGE == 0 for begin, _ in parts[5:]) and layout.worker_bytes >= layout.vector_bytes


@pytest.mark.parametrize("wire, size", [("float32", "3 snapshots and the gradients of 4 workers of that host need 2670 MiB"),
                                        ("bfloat16", "need 2480 MiB")])
def test_too_little_shared_memory_is_told_with_the_size_that_is_needed(wire, size, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64 << 20))
    window = ServerWindow(SimpleNamespace(host="n1", size=5), Layout(100_000_000, 3, 4, 0, wire))
    with pytest.raises(ConfigError, match=f"n1 has 64 MiB of shared memory left in .*{size}.*size=.*--exchange.ring"):
        window._check_shared_memory(4, window.layout.server_bytes)

"""int8, int4 and topk: what arrives of a push, and that what does not is kept for the next one."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loops import Cluster, make_task
from torch import nn

from asgd_mpi.config import options, rulebook
from asgd_mpi.config.options import ExchangeConfig
from asgd_mpi.config import exchange_choice, limits, parse
from asgd_mpi.config.resolved import ResolvedExchange
from asgd_mpi.errors import ConfigError
from asgd_mpi.offline.simulation import Times, simulate
from asgd_mpi.optim.error_feedback import ErrorFeedback
from asgd_mpi.optim.formats import kept_at, kept_of
from asgd_mpi.record import checkpoint
from asgd_mpi.record.events import (
    Fetch,
    Interval,
    Publish,
    Push,
    Resume,
    read_events,
    read_log,
)
from asgd_mpi.replay import replay
from asgd_mpi.runtime import prepare
from asgd_mpi.vector import codec, integers, largest
from asgd_mpi.vector.flat import FlatModel, ranges_below
from asgd_mpi.vector.largest import CHUNK
from asgd_mpi.vector.partition import PIECE, cut
from asgd_mpi.vector.vector_format import VectorFormat

SMALL = ((16, 48), (PIECE - 32, PIECE + 16), (PIECE + 5000, PIECE + 5064))
FORMATS = [
    (VectorFormat(PIECE + 6000, "int8", SMALL), 0),
    (VectorFormat(PIECE + 6000, "int4", SMALL), 0),
    (VectorFormat(PIECE + 6000, "topk", SMALL, most=CHUNK), 41),
    (VectorFormat(PIECE + 6000, "topk", SMALL, most=CHUNK), 1),
    (VectorFormat(PIECE + 6000, "topk", SMALL, most=CHUNK), 1001),
    (VectorFormat(PIECE + 6000, "topk", SMALL, most=CHUNK), CHUNK),
]
formats = pytest.mark.parametrize(
    "form, kept", FORMATS, ids=lambda one: getattr(one, "wire", str(one))
)


def arrived(form, kept, vector):
    """Through the bytes of a packet and back."""
    memory = torch.full((form.num_bytes(kept),), 255, dtype=torch.uint8)
    codec.copy_(form.vector_in(memory, kept), vector)
    back = torch.empty_like(vector)
    codec.copy_(back, form.vector_in(memory.clone(), kept))
    return back, memory


def random_vector(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-12, 12, size)[torch.randperm(size, generator=generator)]
    return torch.randn(size, generator=generator) * scale


def test_the_formats_are_those_that_can_be_configured():
    assert (
        rulebook.COMPRESSED
        == codec.COMPRESSED
        == tuple(dict.fromkeys(form.wire for form, _ in FORMATS))
    )
    assert not set(codec.COMPRESSED) & set(options.WIRES)


@pytest.mark.parametrize("wire, most", [("int8", 127), ("int4", 7)])
def test_on_its_grid_a_number_arrives_as_it_is_and_beside_it_with_half_a_unit_of_error(wire, most):
    bits = integers.BITS[wire]
    grid = torch.arange(integers.GROUP * 40).remainder(2 * most + 1).sub(most).float()
    powers = torch.arange(-120.0, 120, 6).exp2()  # one for each group
    grid = (grid.view(40, -1) * powers[:, None]).flatten()
    vector = random_vector(40 * integers.GROUP)
    memory, back = (
        torch.zeros(integers.num_bytes(len(grid), bits), dtype=torch.uint8),
        vector.clone(),
    )
    integers.encode_(memory, grid, bits)
    integers.decode_(back, memory, bits)
    assert torch.equal(back, grid)
    integers.encode_(memory, vector, bits)
    integers.decode_(back, memory, bits)
    largest_ = vector.view(40, -1).abs().amax(1)
    # the least power of two of which `most` and a half are more than the largest
    unit = (largest_ / (most + 0.5)).log2().floor().add(1).exp2()
    assert ((back - vector).view(40, -1).abs() <= unit[:, None] / 2).all()
    assert (back.view(40, -1) / unit[:, None]).frac().eq(0).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_no_number_arrives_as_none(bits, value):
    vector = torch.ones(2 * integers.GROUP)
    vector[3] = value
    memory = torch.zeros(integers.num_bytes(len(vector), bits), dtype=torch.uint8)
    integers.encode_(memory, vector, bits)
    integers.decode_(vector, memory, bits)
    assert not vector[3].isfinite() and vector[integers.GROUP :].eq(1).all()


def kept_by_sorting(chunk, kept):
    """The definition: by size, of one size the first; no zeros."""
    order = sorted(range(len(chunk)), key=lambda place: (-abs(chunk[place]), place))
    return {place for place in order[:kept] if chunk[place]}


@pytest.mark.parametrize("kept", [1, 2, 41, 1000, CHUNK - 1])
@pytest.mark.parametrize("kind", ["any", "ties", "few", "none", "infinite"])
def test_the_largest_of_a_chunk_are_sent_of_one_size_the_first_ones(kind, kept):
    chunks = torch.randn(3, CHUNK, generator=torch.Generator().manual_seed(kept))
    if kind == "ties":
        chunks = chunks.mul(2).round()
    elif kind == "few":
        chunks *= torch.rand(3, CHUNK, generator=torch.Generator().manual_seed(1)) < 0.003
    elif kind == "none":
        chunks[1] = 0
    elif kind == "infinite":
        chunks[2, 7::400] = float("inf")
    chunks = chunks.bfloat16().float()
    keys = largest.keys_of(chunks.flatten()).view(3, CHUNK)
    # both ways to find them
    assert torch.equal(largest._places(keys, kept), largest._places_on_host(keys.numpy(), kept))
    memory = torch.zeros(largest.num_bytes(3 * CHUNK, kept), dtype=torch.uint8)
    back = torch.full((3 * CHUNK,), 9.0)
    largest.encode_(memory, chunks.flatten(), keys.flatten(), kept)
    largest.decode_(back, memory, kept)
    for chunk, found in zip(chunks.tolist(), back.view(3, CHUNK).tolist()):
        sent = kept_by_sorting(chunk, kept)
        assert found == [chunk[place] if place in sent else 0.0 for place in range(CHUNK)]


@formats
def test_what_arrives_arrives_as_it_is_when_it_is_sent_again_and_small_parameters_always(
    form, kept
):
    vector = random_vector(form.num_floats)
    back, _ = arrived(form, kept, vector)
    again, _ = arrived(form, kept, back)
    assert torch.equal(back, again)
    for start, stop in SMALL:
        assert torch.equal(back[start:stop], vector[start:stop])
    assert torch.equal(back, vector) == (kept == CHUNK)


@pytest.mark.parametrize("wire", [*options.WIRES, "int8"])
def test_what_is_fetched_is_rounded_off_alike_by_servers_workers_and_replays(wire):
    form = VectorFormat(PIECE + 6000, wire, SMALL if wire == "int8" else ())
    vector = random_vector(form.num_floats)
    back, memory = arrived(form, 0, vector)
    rounded = form.rounded(vector)
    assert torch.equal(rounded, back) and torch.equal(form.rounded(rounded), rounded)
    assert torch.equal(vector, random_vector(form.num_floats))
    assert torch.equal(rounded, vector) == (wire == "float32")
    # a worker that follows copies whole pieces, as soon as they are there
    first = form.part(slice(0, PIECE))
    assert form.bytes_to(0) == 0 and form.bytes_to(form.num_floats) == len(memory)
    found = torch.empty(PIECE)
    codec.copy_(found, first.vector_in(memory[: form.bytes_to(PIECE)].clone()))
    assert torch.equal(found, back[:PIECE])


@formats
def test_a_slice_of_a_push_is_a_range_of_its_bytes(form, kept):
    vector = random_vector(form.num_floats)
    back, memory = arrived(form, kept, vector)
    end = 0
    for own in cut(form.num_floats, 2, f"--exchange.wire {form.wire}"):
        part = form.part(own)
        start, end = end, end + part.num_bytes(kept)
        assert start == form.part(slice(0, own.start)).num_bytes(kept)
        assert form.place(own, kept) == slice(start, end)
        found = torch.empty(own.stop - own.start)
        codec.copy_(found, part.vector_in(memory[start:end], kept))
        assert torch.equal(found, back[own])
    assert end == len(memory) == form.num_bytes(kept) <= form.longest


def test_the_bytes_of_a_push_are_a_fraction_of_those_in_float32():
    def share(wire, kept=0):
        return VectorFormat(100 * PIECE, wire, most=kept).num_bytes(kept) / (400 * PIECE)

    assert share("int8") == pytest.approx(1 / 4 + 1 / 1024)
    assert share("int4") == pytest.approx(1 / 8 + 1 / 1024)
    assert share("int8") * 4 == pytest.approx(exchange_choice.WIRES["int8"])
    assert share("int4") * 4 == pytest.approx(exchange_choice.WIRES["int4"])
    # 2 bytes for a number, 12 bits for its place
    assert share("topk", kept_of(0.01)) == pytest.approx(41 / 4096 * 3.5 / 4, rel=1e-3)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_what_was_sent_and_the_residual_add_up_to_what_was_to_be_pushed_over_drops_and_resumes(
    data,
):
    """To the bit: the numbers are whole, so that no sum is rounded."""
    form, kept = data.draw(st.sampled_from(FORMATS[:-1]))
    form = dataclasses.replace(form, num_floats=2 * CHUNK + 100, small=((16, 48),))
    seed = data.draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    feedback = ErrorFeedback(form, torch.zeros(form.num_floats), keeps_last=True)
    due, sent = (torch.zeros(form.num_floats) for _ in range(2))
    for event in data.draw(
        st.lists(st.sampled_from(["applied", "dropped", "resumed"]), max_size=8)
    ):
        pushed = torch.randn(form.num_floats, generator=generator).mul_(1e4).round_()
        wanted, before = pushed.clone(), feedback.state["residual"].clone()
        feedback.push_(pushed, kept)
        memory = feedback.code.clone()
        back = torch.empty_like(pushed)
        codec.copy_(back, form.vector_in(memory, kept))
        assert torch.equal(back, pushed)
        if event == "dropped":
            feedback.undo_()
            assert torch.equal(feedback.state["residual"], before)
            continue
        due += wanted
        sent += pushed
        if event == "resumed":
            state = {"residual": feedback.state["residual"].clone()}
            feedback = ErrorFeedback(form, torch.zeros(form.num_floats), keeps_last=True)
            feedback.load_(state)
    assert torch.equal(sent + feedback.state["residual"], due)
    feedback.load_({})
    assert not feedback.state["residual"].any()


def test_the_density_falls_by_quarters_while_it_warms_up():
    exchange = ExchangeConfig(wire="topk", density=0.001, density_warmup_epochs=4)
    assert [kept_at(exchange, samples, 100) for samples in (0, 99, 100, 200, 399, 400, 10**9)] == [
        1024,
        1024,
        256,
        64,
        16,
        5,
        5,
    ]
    assert kept_of(1.0) == CHUNK and kept_of(0.01) == 41 and kept_of(1e-9) == 1
    assert kept_at(dataclasses.replace(exchange, density=0.5), 0, 100) == 2048
    assert kept_at(dataclasses.replace(exchange, wire="int4"), 0, 100) == 0


def test_parameters_of_less_than_a_chunk_are_found_where_they_lie():
    module = nn.Sequential(nn.Linear(100, 100), nn.BatchNorm1d(100), nn.Linear(100, 41))
    # 10,000 weights; bias and batch norm, neighbours; 4,100 weights; bias
    assert ranges_below(module, CHUNK) == ((10_000, 10_336), (14_448, 14_496))
    flat = FlatModel(module, torch.device("cpu"))
    assert flat.num_floats == 14_496


BROAD = ["--model", "networks_for_tests:broad"]
RUNS = {
    "int8": ["--rule.momentum_at", "server"],
    "int4": ["--rule", "sync_backup", "--rule.backup", "1"],
    "topk": ["--rule", "ringmaster", "--rule.max_staleness", "2", "--exchange.density", "0.02"]
    + ["--exchange.density_warmup_epochs", "0.5"],
}


def test_a_run_that_fetches_int8_replays_to_the_bit_and_reads_less_than_half_of_the_bytes(
    digits, tmp_path
):
    arguments = [*BROAD, "--exchange.wire", "int4", "--exchange.fetch_wire", "int8"]
    local = ["--rule", "diloco", "--n-sync", "3", "--exchange.overlap", "true"]
    task = make_task(digits, *arguments, *local)
    cluster = Cluster(task, 3, tmp_path)
    cluster.train()
    log = list(read_log(cluster.run.pushes))
    assert torch.equal(replay(task, log, 3)[0].weights, cluster.server.window.latest)
    events = [list(read_events(cluster.run.metrics_of(rank))) for rank in (0, 1, 2, 3)]
    published = {one.version: one.hash for one in events[0] if isinstance(one, Publish)}
    fetches = [one for of_rank in events for one in of_rank if isinstance(one, Fetch)]
    assert fetches and all(published[fetch.version] == fetch.hash for fetch in fetches)
    intervals = [one for of_rank in events for one in of_rank if isinstance(one, Interval)]
    read, number = (
        sum(getattr(one, name) for one in intervals) for name in ("bytes_fetched", "fetches")
    )
    # the small parameters, 15 % of this network, travel as they are; and who validates reads all of it so
    assert number > 20 and read < 0.5 * 4 * len(cluster.first_weights) * number


@pytest.mark.parametrize("wire", RUNS)
def test_a_run_whose_pushes_are_dropped_replays_to_the_bit_and_its_bytes_are_those_told(
    digits, tmp_path, wire
):
    arguments = [*BROAD, "--exchange.wire", wire]
    task = make_task(digits, *arguments, *RUNS[wire])
    cluster = Cluster(task, 3, tmp_path)
    cluster.train()
    log = list(read_log(cluster.run.pushes))
    assert torch.equal(replay(task, log, 3)[0].weights, cluster.server.window.latest)
    assert cluster.server.final_score.loss < 2.25
    intervals = [
        event
        for rank in (1, 2, 3)
        for event in read_events(cluster.run.metrics_of(rank))
        if isinstance(event, Interval)
    ]
    told = sum(interval.bytes_pushed for interval in intervals)
    assert told == sum(cluster.sent_bytes)
    assert told < 0.45 * 4 * len(cluster.first_weights) * sum(one.pushes for one in intervals)


def test_what_a_worker_of_downpour_saves_amid_a_run_is_what_a_replay_has_kept_by_then(
    digits, tmp_path
):
    """Its velocity and its residual, with which a resume goes on."""
    arguments = ["--rule", "downpour", "--n-sync", "2", "--rule.momentum_at", "worker"]
    saves = ["--rule.momentum", "0.5", "--lr", "0.005", "--checkpoint.every_samples", "900"]
    task = make_task(digits, *BROAD, *arguments, *saves, *TOPK, epochs=1.5)
    cluster = Cluster(task, 2, tmp_path)
    cluster.train()
    directory, manifest = next(
        (directory, manifest)
        for directory, manifest in checkpoint.resumable(cluster.run)
        if manifest and len(manifest.momenta) == 2
    )
    made = [manifest.momenta[str(worker)] for worker in range(2)]
    successor = Resume(0.0, 1, 0, manifest.version, manifest.samples, 2, made)
    point = replay(task, list(read_log(cluster.run.pushes)), 2, successor=successor)[1]
    for worker, kept in enumerate(point.momenta):
        saved = checkpoint.read_tensors(directory / checkpoint.worker_file(worker))
        assert saved.keys() == kept.keys() == {"velocity", "residual"}
        assert all(torch.equal(kept[name], saved[name]) and saved[name].any() for name in saved)


def test_at_density_1_a_run_is_the_uncompressed_one_to_the_bit(digits):
    def weights(*arguments):
        game = simulate(
            make_task(digits, *BROAD, *arguments, epochs=0.5), 3, Times(0.1, 0.01, 0.01, 0.01)
        )
        return game.latest.weights

    compressed = ["--exchange.wire", "topk", "--exchange.fetch_wire", "float32"]
    one = weights(*compressed, "--exchange.density", "1")
    assert torch.equal(one, weights())
    assert not torch.equal(one, weights(*compressed, "--exchange.density", "0.5"))


def test_a_dropped_push_leaves_the_residual_as_it_was(digits):
    """Of pushes that come too late every image is trained again."""
    task = make_task(
        digits, "--rule", "ringmaster", "--rule.max_staleness", "1", *BROAD, *TOPK, epochs=0.3
    )
    game = simulate(task, 3, Times(0.1, 0.01, 0.01, 0.01, spread=0.5))
    assert game.num_dropped
    pushes = [push for push in game.pushes if isinstance(push, Push)]
    assert torch.equal(replay(task, pushes, 3)[0].weights, game.latest.weights)


TOPK = ["--exchange.wire", "topk", "--exchange.density", "0.05"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@formats
def test_a_gpu_pushes_the_same_bytes(form, kept):
    host, device = (
        ErrorFeedback(form, torch.zeros(form.num_floats, device=device))
        for device in ("cpu", "cuda")
    )
    for seed in range(3):
        one, other = (
            random_vector(form.num_floats, seed),
            random_vector(form.num_floats, seed).cuda(),
        )
        host.push_(one, kept)
        device.push_(other, kept)
        assert torch.equal(one, other.cpu()) and torch.equal(host.code, device.code.cpu())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("wire", [*options.WIRES, "int8"])
def test_a_gpu_rounds_what_is_fetched_to_the_same_bits(wire):
    form = VectorFormat(PIECE + 6000, wire, SMALL if wire == "int8" else ())
    vector = random_vector(form.num_floats)
    back, memory = arrived(form, 0, vector)
    assert torch.equal(form.rounded(vector.cuda()).cpu(), back)
    on_device = torch.empty(form.num_floats, device="cuda")
    codec.copy_(on_device, form.vector_in(memory))
    assert torch.equal(on_device.cpu(), back)


def test_what_the_formats_come_to_is_said_before_a_run_and_stages_refuse_int8_fetches():
    module = nn.Linear(256, 64)  # 16,384 numbers, and 64 of a bias
    exchange = ResolvedExchange(
        n_push=1, n_fetch=1, overlap=False, wire="float32", fetch_wire="float32"
    )

    def told(**formats):
        return prepare._wire(dataclasses.replace(exchange, **formats), module)

    assert told() == "" and told(wire="bfloat16", fetch_wire="bfloat16") == "; bfloat16 on the wire"
    # of 65,792 bytes 16,964: 256 of the bias, 68 of 65 units, and one for each of 65 groups of 256
    assert told(fetch_wire="int8") == (
        "; pushes in float32, 100.0% of the bytes of float32, weights in int8, 25.8%"
    )
    assert told(wire="int8", fetch_wire="int8").count("25.8%") == 2
    with pytest.raises(ConfigError, match="stages.number 2: exchange.fetch_wire int8 is read by"):
        limits.check(parse.parse(["--stages", "2", "--exchange.fetch_wire", "int8"]))

"""How the weights are shared out among servers, and that it changes no bit of them."""

import pytest
import torch

from asgd_mpi.comm.layout import Layout
from asgd_mpi.config import options as configuration, parse
from asgd_mpi.errors import ConfigError
from asgd_mpi.optim.rules import make_rule
from asgd_mpi.protocol.messages import Verdict
from asgd_mpi.vector import codec
from asgd_mpi.vector.partition import PIECE, STEP, cut, pieces
from asgd_mpi.vector.vector_format import VectorFormat

SETTINGS = {
    "asgd": (),
    "heavy ball": ("--rule.momentum_at", "server"),
    "nesterov": ("--rule.momentum_at", "server_nag"),
    "softsync": (),
    "adagrad": (),
    "adamw": (),
    "adam": (),
    "nadamw": (),
    "a running mean": ("--rule.ema_samples", "40"),
    "dc_asgd_c": (),
    "dc_asgd_a": ("--rule.momentum_at", "server"),
    "easgd": (),
    "diloco": (
        *("--rule.outer_pushes", "1"),
        *("--rule.outer_rate", "0.7"),
        *("--rule.outer_momentum", "0.9"),
    ),
}


@pytest.mark.parametrize("num_servers", [1, 2, 3, 7])
@pytest.mark.parametrize("num_floats", [7 * STEP + 16, 2 * PIECE + 16, 7 * PIECE, 61_100_848])
def test_the_slices_are_about_equal_and_follow_each_other_from_piece_to_piece(
    num_floats, num_servers
):
    parts = cut(num_floats, num_servers)
    assert (
        parts[0].start == 0
        and parts[-1].stop == num_floats
        and all(one.stop == other.start for one, other in zip(parts, parts[1:]))
    )
    step = PIECE if -(-num_floats // PIECE) >= num_servers else STEP
    assert all(part.start % step == 0 and part.stop > part.start for part in parts)
    assert max(part.stop - part.start for part in parts) <= num_floats / num_servers + step


def test_more_servers_than_there_is_to_share_out_are_refused_with_a_number_that_fits():
    with pytest.raises(
        ConfigError, match="multiples of 1024 numbers, and the network has 2976, enough for 3"
    ):
        cut(2976, 4)
    with pytest.raises(
        ConfigError,
        match=f"fetch_wire int8: {PIECE} numbers are coded together.*, enough for 2. .*or float32",
    ):
        whole, narrow = (VectorFormat(PIECE + 16, wire) for wire in ("float32", "int8"))
        Layout(PIECE + 16, 3, 2, 0, narrow, num_servers=3, push=whole)


@pytest.mark.parametrize("wire", ["bfloat16", "float16"])
def test_a_slice_of_what_travels_is_a_range_of_its_bytes(wire):
    whole = torch.randn(3 * PIECE + 160)
    memory = torch.zeros(codec.num_bytes(len(whole), wire), dtype=torch.uint8)
    codec.copy_(codec.vector_in(memory, len(whole), wire), whole)
    for part in cut(len(whole), 3, f"--exchange.wire {wire}"):
        arrived = torch.empty(part.stop - part.start)
        codec.copy_(
            arrived,
            codec.vector_in(memory[codec.num_bytes(part.start, wire) :], len(arrived), wire),
        )
        assert torch.equal(arrived, codec.rounded(whole, wire)[part])


@pytest.mark.parametrize(
    "threads, num_floats, num_servers",
    [(1, 2 * STEP + 928, 3), (1, PIECE - 48, 2), (3, 3 * PIECE + 48, 3)],
)
@pytest.mark.parametrize("setting", SETTINGS)
def test_slices_that_are_moved_apart_are_those_of_the_whole_to_the_bit(
    setting, threads, num_floats, num_servers
):
    name = setting if setting in configuration.RULES else "asgd"
    options = [
        "--rule",
        name,
        "--rule.momentum",
        "0.9",
        "--rule.weight_decay",
        "0.01",
        "--rule.dc_lambda",
        "2",
    ]
    rule = parse.parse([*options, *SETTINGS[setting]]).rule
    before, generator = torch.get_num_threads(), torch.Generator().manual_seed(1)
    whole = torch.randn(num_floats, generator=generator)
    apart = [whole[part].clone() for part in cut(num_floats, num_servers)]
    rules = [make_rule(len(weights), rule, 2) for weights in (whole, *apart)]
    torch.set_num_threads(threads)
    for worker in (0, 1, 0):
        pushed = torch.randn(num_floats, generator=generator)
        verdict = Verdict(0.1 / 3, worker=worker, rate=0.1, mean_of=2, samples=64, count=16)
        gradients = [pushed, *(pushed[part] for part in cut(num_floats, num_servers))]
        for one, weights, gradient in zip(rules, (whole, *apart), gradients):
            for piece in pieces(len(weights)):
                one.apply_(weights, gradient, verdict, piece)
    torch.set_num_threads(before)
    assert torch.equal(whole, torch.cat(apart))
    for kept in rules[0].state:
        assert torch.equal(rules[0].state[kept], torch.cat([one.state[kept] for one in rules[1:]]))

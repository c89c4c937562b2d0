"""What the bits of a run depend on, and what old runs and other hosts rely on: none of it moves by accident."""

import torch

from asgd_mpi.comm.layout import Layout
from asgd_mpi.data.augment import sample_rng
from asgd_mpi.data.order import Order
from asgd_mpi.protocol import messages
from asgd_mpi.protocol.messages import Header, Kind, Orders, Work
from asgd_mpi.vector import codec, flat, partition


def test_a_vector_is_divided_as_ever():
    assert (partition.PIECE, codec.BLOCK, partition.STEP, flat.ALIGNMENT) == (
        262_144,
        262_144,
        1_024,
        16,
    )
    assert list(partition.pieces(600_000)) == [
        slice(0, 262_144),
        slice(262_144, 524_288),
        slice(524_288, 600_000),
    ]
    assert partition.cut(1_000_000, 2) == [slice(0, 524_288), slice(524_288, 1_000_000)]


def test_an_epoch_has_the_order_that_it_had():
    assert Order(10, 7).indices(0, 0, 10).tolist() == [8, 2, 4, 1, 3, 7, 9, 0, 6, 5]
    assert Order(10, 7).indices(1, 2, 5).tolist() == [1, 0, 6]


def test_a_sample_is_augmented_by_the_numbers_that_it_was():
    assert sample_rng(7, 2, 5).integers(0, 1 << 30, 3).tolist() == [688053107, 589654498, 584916924]


def test_the_words_on_the_wire_have_the_numbers_that_they_had():
    assert {kind.name: int(kind) for kind in Kind} == {
        "GRADIENT": 1,
        "VALIDATION": 2,
        "NONFINITE": 3,
        "SAVED": 4,
        "SIGNAL": 5,
        "FAILED": 6,
        "GOODBYE": 7,
        "BEST": 8,
        "HERE": 9,
        "STATISTICS": 10,
        "GIVEN_UP": 11,
        "READ": 12,
    }
    assert {order.name: int(order) for order in Orders} == {
        "GO_ON": 0,
        "STOP": 1,
        "LEAVE": 2,
        "REST": 3,
        "REPORT": 4,
    }
    assert {work.name: int(work) for work in Work} == {"TRAIN": 1, "VALIDATE": 2, "FINAL": 3}
    assert (messages.HEADER_BYTES, messages.MAIL_WORDS, messages.MAGIC) == (
        320,
        24,
        0x41534744_4D504931,
    )
    header = Header(Kind.GRADIENT, 3, 17, 40, 5, 640, 32, 1, 0.5, scale=0.25)
    assert messages.pack_header(header)[:24] == bytes.fromhex(
        "3149504d4447534101000000000000000300000000000000"
    )
    assert messages.unpack_header(messages.pack_header(header)) == header


def test_a_wire_format_rounds_as_it_did():
    values = torch.tensor([1.0, 1 / 3, -1e-3, 3e-8], dtype=torch.float32)
    assert [
        codec.rounded(values, "bfloat16").tolist(),
        codec.rounded(values, "float16").tolist(),
    ] == [
        [1.0, 0.333984375, -0.00099945068359375, 3.003515303134918e-08],
        [1.0, 0.333251953125, -0.0010004043579101562, 3.000604920089245e-08],
    ]


def test_the_layout_of_a_window_is_what_other_hosts_expect():
    layout = Layout(1_000, 3, 2, 8, num_servers=1)
    assert (
        layout.server_bytes,
        layout.slot(0),
        layout.slot(1),
        layout.mail(1),
        layout.statistics,
    ) == (20480, 4096, 8192, 1240, 16384)

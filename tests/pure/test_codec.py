"""Wire formats: what arrives of a vector, for any numbers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asgd_mpi.config import options
from asgd_mpi.config import exchange_choice
from asgd_mpi.vector import codec
from asgd_mpi.vector.codec import BLOCK

# relative error of rounding, at most
PRECISION = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}
# ... and beside that, of a block's largest
LEAST = {"float32": 0.0, "bfloat16": 2.0**-147, "float16": 2.0**-38}
WIRES = list(PRECISION)
LOSSY = WIRES[1:]

numbers = st.floats(-(2.0**127), 2.0**127, width=32)


def test_the_formats_are_those_that_can_be_configured_and_planned():
    assert set(codec.DTYPES) == set(options.WIRES) == set(PRECISION) == set(exchange_choice.DENSE)
    assert all(
        exchange_choice.WIRES[wire] == dtype.itemsize for wire, dtype in codec.DTYPES.items()
    )


def sent(vector, wire):
    """Through the bytes of a packet and back."""
    memory = torch.zeros(codec.num_bytes(len(vector), wire), dtype=torch.uint8)
    codec.copy_(codec.vector_in(memory, len(vector), wire), vector)
    arrived = torch.empty_like(vector)
    codec.copy_(arrived, codec.vector_in(memory.clone(), len(vector), wire))
    return arrived


def of(values):
    return torch.tensor(np.array(values, np.float32))


@pytest.mark.parametrize("wire", WIRES)
@given(values=st.lists(numbers, min_size=1, max_size=70))
def test_what_is_rounded_is_what_arrives_and_rounding_twice_is_rounding_once(wire, values):
    vector = of(values)
    arrived = sent(vector, wire)
    rounded = codec.rounded(vector, wire)
    assert torch.equal(arrived, rounded) and torch.equal(sent(rounded, wire), rounded)
    assert torch.equal(codec.rounded(rounded, wire), rounded)
    assert torch.equal(vector, of(values))


@pytest.mark.parametrize("wire", WIRES)
@given(values=st.lists(numbers, min_size=1, max_size=70))
def test_the_error_is_that_of_the_format_whatever_the_size_of_the_numbers(wire, values):
    vector = of(values).double()
    arrived = sent(vector.float(), wire).double()
    least = LEAST[wire] * vector.abs().max() + 2.0**-149
    assert arrived.isfinite().all()
    assert ((arrived - vector).abs() <= PRECISION[wire] * vector.abs() + least).all()


@settings(max_examples=20, deadline=None)
@pytest.mark.parametrize("wire", LOSSY)
@given(power=st.integers(-60, 60), seed=st.integers(0, 2**32 - 1))
def test_a_power_of_two_goes_through(wire, power, seed):
    """The unit takes it up: a rate or a loss that is scaled by a power of two rounds the same numbers."""
    vector = torch.randn(100, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(
        codec.rounded(vector * 2.0**power, wire), codec.rounded(vector, wire) * 2.0**power
    )


@pytest.mark.parametrize("wire", LOSSY)
@pytest.mark.parametrize("size", [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 48])
def test_every_block_has_a_unit_of_its_own(wire, size):
    vector = torch.randn(size)
    vector[:BLOCK] *= 1e-30
    # float16 ends at 65504 and begins at 6e-8
    vector[BLOCK : 2 * BLOCK] *= 1e30
    arrived = sent(vector, wire)
    assert torch.equal(arrived, codec.rounded(vector, wire))
    assert (
        (arrived - vector).abs()
        <= PRECISION[wire] * vector.abs() + vector.abs().max() * LEAST[wire]
    ).all()
    assert codec.num_bytes(size, wire) == -(-2 * size // 4) * 4 + 4 * math.ceil(size / BLOCK)


@pytest.mark.parametrize("wire", LOSSY)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_no_number_arrives_as_none(wire, value):
    assert not sent(torch.tensor([1.0, value, 2.0]), wire)[1].isfinite()


def test_numbers_that_the_formats_have_arrive_as_they_are():
    vector = torch.tensor([0.0, -0.0, 1.0, -1.5, 2.0**15, 0.0078125])
    assert all(torch.equal(sent(vector, wire), vector) for wire in WIRES)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("wire", WIRES)
def test_a_gpu_rounds_to_the_same_bits(wire):
    vector = torch.randn(BLOCK + 100) * torch.logspace(-40, 30, BLOCK + 100)
    assert torch.equal(codec.rounded(vector.cuda(), wire).cpu(), codec.rounded(vector, wire))

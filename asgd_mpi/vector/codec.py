"""Wire formats: how the numbers of a (P,) float32 vector lie in a packet, and in what workers read of a snapshot.

float32    the vector as it is
bfloat16   2 bytes a number, 8 bits of precision
float16    2 bytes a number, 11 bits of precision

In 2 bytes, every BLOCK numbers share a power of two, their unit, by which they are divided first, so that the largest of
them lies between 2^14 and 2^15: nothing overflows, and what is small everywhere does not vanish in float16 (block floating
point; the scaled loss of Micikevicius et al. 2018, arXiv:1710.03740, does that once for all numbers).

    memory, (num_bytes,) uint8:    of each block its numbers, then its unit in float32

So a range of whole blocks is a range of bytes, which is a vector of its own: what a server of a slice gets.

Rounding is a pure function of the vector, the same on every device, and rounding twice is rounding once: what a worker has
rounded arrives as it is. Pure: no MPI. Legend: P parameters.
"""

from __future__ import annotations

from typing import Literal, Protocol, Union, overload

import torch

from asgd_mpi.vector.partition import PIECE, pieces

# numbers that share a unit: the server applies and publishes them together
BLOCK = PIECE
COMPRESSED = ("int8", "int4", "topk")  # see vector_format
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BLOCK_BYTES = 2 * BLOCK + 4  # in 2 bytes a number
# of the last bit that is kept of a float32's bits
_HALF = {torch.bfloat16: 1 << 15, torch.float16: 1 << 12}


class Packed:
    """A (P,) vector in 2 bytes a number, in `memory`; `packed[piece]`, float32, is read and written in whole blocks."""

    def __init__(self, memory: torch.Tensor, num_floats: int, dtype: torch.dtype):
        self._memory, self._num_floats, self._dtype = (
            memory[: num_bytes(num_floats, "bfloat16")],
            num_floats,
            dtype,
        )

    def to(self, device: torch.device) -> Packed:
        """Return the same on another device; itself if it is there."""
        return Packed(self._memory.to(device), self._num_floats, self._dtype)

    def __len__(self) -> int:
        return self._num_floats

    def __getitem__(self, piece: slice) -> torch.Tensor:
        numbers, unit = self._block(piece)
        return numbers.float().mul_(unit)

    def __setitem__(self, piece: slice, values: torch.Tensor) -> None:
        numbers, unit = self._block(piece)
        unit.copy_(_unit(values, self._dtype))
        numbers.copy_(values / unit)

    def _block(self, piece: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of its numbers and of its unit, ()."""
        start, size = piece.start // BLOCK * BLOCK_BYTES, 2 * (piece.stop - piece.start)
        unit = start + _aligned(size)
        return self._memory[start : start + size].view(self._dtype), self._memory[
            unit : unit + 4
        ].view(torch.float32)[0]


class Coded(Protocol):
    """A (P,) vector in some format; `coded[piece]`, float32, is read and written by pieces (see partition)."""

    def to(self, device: torch.device) -> Coded: ...

    def __len__(self) -> int: ...

    def __getitem__(self, piece: slice) -> torch.Tensor: ...

    def __setitem__(self, piece: slice, values: torch.Tensor) -> None: ...


Vector = Union[torch.Tensor, Coded]


def num_bytes(num_floats: int, wire: str) -> int:
    """Return the size of a vector of `num_floats` as it travels; a multiple of 4."""
    if wire == "float32":
        return 4 * num_floats
    return _aligned(2 * num_floats) + 4 * -(-num_floats // BLOCK)


@overload
def vector_in(memory: torch.Tensor, num_floats: int, wire: Literal["float32"]) -> torch.Tensor: ...


@overload
def vector_in(memory: torch.Tensor, num_floats: int, wire: str) -> Vector: ...


def vector_in(memory: torch.Tensor, num_floats: int, wire: str) -> Vector:
    """Return the vector at the beginning of `memory`, uint8, read and written in place."""
    if wire == "float32":
        return memory[: 4 * num_floats].view(torch.float32)
    return Packed(memory, num_floats, DTYPES[wire])


def span(num_floats: int, piece: slice) -> range:
    """Return the bytes of a vector in 2 bytes a number that tell a piece of it: from its first number to the unit of its last one."""
    last = (piece.stop - 1) // BLOCK
    return range(
        piece.start // BLOCK * BLOCK_BYTES + 2 * (piece.start % BLOCK),
        _unit_at(num_floats, last) + 4,
    )


def unpack_(
    into: torch.Tensor, start: int, memory: torch.Tensor, num_floats: int, wire: str
) -> None:
    """Set (p,) float32 from the `span` of a piece, uint8, of a vector of `num_floats`; the piece begins at `start`."""
    stop, begin = start + len(into), span(num_floats, slice(start, start + len(into))).start
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        first, last = max(start, block * BLOCK), min(stop, (block + 1) * BLOCK)
        at, unit = (
            block * BLOCK_BYTES + 2 * (first - block * BLOCK) - begin,
            _unit_at(num_floats, block) - begin,
        )
        torch.mul(
            memory[at : at + 2 * (last - first)].view(DTYPES[wire]).float(),
            memory[unit : unit + 4].clone().view(torch.float32),
            out=into[first - start : last - start],
        )


def _unit_at(num_floats: int, block: int) -> int:
    """Return the first byte of a block's unit."""
    return block * BLOCK_BYTES + _aligned(2 * min(BLOCK, num_floats - block * BLOCK))


def copy_(into: Vector, source: Vector) -> None:
    """Copy a vector, from and to any format and device."""
    if isinstance(into, torch.Tensor) and isinstance(source, torch.Tensor):
        into.copy_(source)
        return
    if isinstance(into, torch.Tensor):
        source = source.to(into.device)  # where it is wider
    for piece in pieces(len(into)):
        into[piece] = source[piece]


def round_(vector: torch.Tensor, wire: str) -> None:
    """Replace the numbers of a float32 vector by those that arrive when it is sent; finite up to 2^127."""
    if wire != "float32":
        for piece in pieces(len(vector)):
            unit = _unit(vector[piece], DTYPES[wire])
            vector[piece].copy_(vector[piece].div_(unit).to(DTYPES[wire])).mul_(unit)


def rounded(vector: torch.Tensor, wire: str) -> torch.Tensor:
    """Return what arrives of a float32 vector: itself, or a new one."""
    if wire == "float32":
        return vector
    vector = vector.clone()
    round_(vector, wire)
    return vector


def _unit(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """() float32: the power of two that the values are divided by. Made of bits, so that it is exact everywhere."""
    largest = values.abs().amax().view(torch.int32)
    # biased, of the largest when it has been rounded
    exponent = (largest + _HALF[dtype]) >> 23
    return ((exponent - 14).clamp(min=1) << 23).view(torch.float32)


def _aligned(count: int) -> int:
    return -(-count // 4) * 4

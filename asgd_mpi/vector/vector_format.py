"""The formats that the vectors of a network travel in: those of `codec`, and those that send less.

int8   a byte a number (see `integers`)
int4   half a byte a number
topk   the largest numbers of each chunk (see `largest`), `kept` of them, which the header of the packet tells; where all of
       them are, float32

What these three leave out of a push a worker keeps (see optim.error_feedback). Weights may be fetched in int8, too: what is rounded
off there is not kept, since each fetch is of the weights themselves. Parameters of less than a chunk, such as biases
and the numbers of norms, are sent in float32. What is coded is a PIECE of the vector:

    memory, (num_bytes,) uint8:    of each piece its small parameters, then its numbers, 0 in the place of these

So a slice of whole pieces is a range of bytes. Pure: no MPI. Legend: P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from asgd_mpi.vector import codec, integers, largest
from asgd_mpi.vector.codec import Vector
from asgd_mpi.vector.largest import CHUNK
from asgd_mpi.vector.partition import PIECE, pieces

Ranges = tuple[tuple[int, int], ...]  # (start, stop) of parameters in a vector


@dataclass(frozen=True)
class VectorFormat:
    """The format of a (P,) vector. `kept`: numbers of a chunk that are sent, of topk; 0 of the others."""

    num_floats: int
    wire: str = "float32"
    small: Ranges = ()  # in order; of a compressed wire
    most: int = 0  # that are ever kept

    @cached_property
    def is_compressed(self) -> bool:
        return self.wire in codec.COMPRESSED

    @cached_property
    def longest(self) -> int:
        """Return the most bytes that a vector takes."""
        return self.num_bytes(self.most)

    def rounded(self, vector: torch.Tensor) -> torch.Tensor:
        """Return what arrives of a float32 vector: itself, or a new one."""
        if not self.is_compressed:
            return codec.rounded(vector, self.wire)
        arrived = torch.empty_like(vector)
        coded = self.vector_in(
            torch.empty(self.num_bytes(), dtype=torch.uint8, device=vector.device)
        )
        codec.copy_(coded, vector)
        codec.copy_(arrived, coded)
        return arrived

    def may_keep(self, kept: int) -> bool:
        """Return whether a vector may come with so many numbers of a chunk."""
        return 0 < kept <= self.most if self.wire == "topk" else kept == 0

    def num_bytes(self, kept: int = 0) -> int:
        """Return the bytes of a vector; a multiple of 4."""
        return self.bytes_to(self.num_floats, kept)

    def bytes_to(self, stop: int, kept: int = 0) -> int:
        """Return the bytes of the first `stop` numbers, which are whole pieces, or all."""
        if not self.is_compressed or kept == CHUNK:
            return codec.num_bytes(stop, self._plain)
        return self._starts(kept)[-(-stop // PIECE)]

    def place(self, own: slice, kept: int = 0) -> slice:
        """Return the bytes of a slice of whole pieces."""
        return slice(self.bytes_to(own.start, kept), self.bytes_to(own.stop, kept))

    def vector_in(self, memory: torch.Tensor, kept: int = 0) -> Vector:
        """Return the vector at the beginning of `memory`, uint8, read and written in place, by pieces."""
        if not self.is_compressed or kept == CHUNK:
            return codec.vector_in(memory, self.num_floats, self._plain)
        return Compressed(self, memory, kept)

    def part(self, own: slice) -> VectorFormat:
        """Return the format of a slice of whole pieces."""
        small = tuple(
            (start - own.start, stop - own.start)
            for start, stop in _within(self.small, own.start, own.stop)
        )
        return replace(self, num_floats=own.stop - own.start, small=small)

    @cached_property
    def _plain(self) -> str:
        """The format of a vector of which nothing is left out."""
        return "float32" if self.is_compressed else self.wire

    @cached_property
    def small_of(self) -> list[Ranges]:
        """The small parameters of each piece, counted from its start."""
        return [
            tuple(
                (start - piece.start, stop - piece.start)
                for start, stop in _within(self.small, piece.start, piece.stop)
            )
            for piece in pieces(self.num_floats)
        ]

    def _starts(self, kept: int) -> list[int]:
        """Return where each piece begins, and the end."""
        if kept not in self._known_starts:
            starts = [0]
            for piece, small in zip(pieces(self.num_floats), self.small_of):
                size = piece.stop - piece.start
                starts.append(starts[-1] + 4 * _count(small) + _coded_bytes(self.wire, size, kept))
            self._known_starts[kept] = starts
        return self._known_starts[kept]

    @cached_property
    def _known_starts(self) -> dict[int, list[int]]:
        return {}


class Compressed:
    """A (P,) vector in `memory`; `vector[piece]`, float32, is read and written by whole pieces."""

    def __init__(self, form: VectorFormat, memory: torch.Tensor, kept: int):
        self._form, self._kept, self._starts = form, kept, form._starts(kept)
        self._memory = memory[: self._starts[-1]]

    def to(self, device: torch.device) -> Compressed:
        """Return the same on another device; itself if it is there."""
        return Compressed(self._form, self._memory.to(device), self._kept)

    def __len__(self) -> int:
        return self._form.num_floats

    def __getitem__(self, piece: slice) -> torch.Tensor:
        plain, coded, small = self._at(piece)
        size = piece.stop - piece.start
        values = torch.empty(_padded(self._form.wire, size), device=coded.device)
        if self._form.wire == "topk":
            largest.decode_(values, coded, self._kept)
        else:
            integers.decode_(values, coded, integers.BITS[self._form.wire])
        _each(small, lambda here, there: values[here].copy_(plain[there]))
        return values[:size]

    def __setitem__(self, piece: slice, values: torch.Tensor) -> None:
        plain, coded, small = self._at(piece)
        _each(small, lambda here, there: plain[there].copy_(values[here]))
        rest = _padded(self._form.wire, len(values)) - len(values)
        values = torch.nn.functional.pad(values, (0, rest)) if rest else values
        if self._form.wire == "topk":
            keys = largest.keys_of(values)
            _each(small, lambda here, there: keys[here].zero_())
            largest.encode_(coded, values, keys, self._kept)
        else:
            if small and not rest:
                values = values.clone()
            _each(small, lambda here, there: values[here].zero_())
            integers.encode_(coded, values, integers.BITS[self._form.wire])

    def _at(self, piece: slice) -> tuple[torch.Tensor, torch.Tensor, Ranges]:
        """Return views of a piece's small parameters, float32, and of what is coded, and where the former belong."""
        number = piece.start // PIECE
        small = self._form.small_of[number]
        start, stop = self._starts[number], self._starts[number + 1]
        coded = start + 4 * _count(small)
        return self._memory[start:coded].view(torch.float32), self._memory[coded:stop], small


def _each(small: Ranges, act: Callable[[slice, slice], object]) -> None:
    """Call `act` with where each range lies in a piece, and where among the small parameters."""
    done = 0
    for start, stop in small:
        act(slice(start, stop), slice(done, done + stop - start))
        done += stop - start


def _within(ranges: Iterable[tuple[int, int]], start: int, stop: int) -> Iterable[tuple[int, int]]:
    """Cut ranges to what lies in [start, stop)."""
    cut = ((max(start, first), min(stop, last)) for first, last in ranges)
    return ((first, last) for first, last in cut if first < last)


def _count(ranges: Ranges) -> int:
    return sum(stop - start for start, stop in ranges)


def _coded_bytes(wire: str, num_floats: int, kept: int) -> int:
    padded = _padded(wire, num_floats)
    if wire == "topk":
        return largest.num_bytes(padded, kept)
    return integers.num_bytes(padded, integers.BITS[wire])


def _padded(wire: str, num_floats: int) -> int:
    unit = CHUNK if wire == "topk" else integers.GROUP
    return -(-num_floats // unit) * unit

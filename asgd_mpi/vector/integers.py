"""int8 and int4: every GROUP numbers share a power of two, their unit, and each is sent as a whole number of units.

    memory, (num_bytes,) uint8:    the units, one byte each: the exponent of a float32; then the numbers
    int4:                          a byte holds a number of the first half of its group (low bits) and one of the second

A group's unit is the smallest with which all of its numbers fit, so what arrives differs by half a unit at most, and what is
on the grid already arrives as it is. A group that holds what is no number arrives as none. Pure functions, the same bits on
every device.
"""

from __future__ import annotations

import torch

GROUP = 256  # numbers that share a unit
BITS = {"int8": 8, "int4": 4}
_NONE = 255  # the exponent of a group that is not finite


def num_bytes(num_floats: int, bits: int) -> int:
    """Return the bytes of so many numbers, a multiple of GROUP; a multiple of 4."""
    groups = num_floats // GROUP
    return _units_end(groups) + num_floats * bits // 8


def encode_(memory: torch.Tensor, values: torch.Tensor, bits: int) -> None:
    """Write (n,) float32, n a multiple of GROUP, into (num_bytes,) uint8."""
    groups = values.view(-1, GROUP)
    exponents, numbers = _parts(memory, len(groups))
    largest = groups.abs().amax(1).view(torch.int32)
    # of the largest when it has been rounded: 127.5 and 7.5 units are one too many
    exponent = (largest + (1 << (24 - bits))) >> 23
    exponent = exponent.sub_(bits - 2).clamp_(min=1)
    exponent[largest >= 0xFF << 23] = _NONE
    exponents.copy_(exponent)
    inverse = ((254 - exponent).clamp_(min=0) << 23).view(torch.float32)
    whole = (groups * inverse[:, None]).round_().to(torch.int8)
    if bits == 8:
        numbers.view(torch.int8).view(-1, GROUP).copy_(whole)
    else:
        low, high = whole.view(torch.uint8).split(GROUP // 2, dim=1)
        torch.bitwise_or(low & 15, high << 4, out=numbers.view(-1, GROUP // 2))


def decode_(values: torch.Tensor, memory: torch.Tensor, bits: int) -> None:
    """Set (n,) float32 to what (num_bytes,) uint8 holds."""
    groups = values.view(-1, GROUP)
    exponents, numbers = _parts(memory, len(groups))
    if bits == 8:
        groups.copy_(numbers.view(torch.int8).view(-1, GROUP))
    else:
        low, high = groups.split(GROUP // 2, dim=1)
        packed = numbers.view(-1, GROUP // 2)
        low.copy_((packed << 4).view(torch.int8) >> 4)
        high.copy_(packed.view(torch.int8) >> 4)
    groups.mul_((exponents.int() << 23).view(torch.float32)[:, None])


def _parts(memory: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return views of the exponents, (groups,), and of the numbers."""
    return memory[:groups], memory[_units_end(groups) :]


def _units_end(groups: int) -> int:
    return -(-groups // 4) * 4

"""How a (P,) vector is divided: into pieces that fit the cache, and into the slices of several servers, which follow each other.

Update rules are element-wise, but vectorised kernels round the tail of a tensor differently from its body (vectors of the
processor, then single numbers; threads share a call out). So a slice begins where a piece of the
whole begins (PIECE): then a server of a slice makes the calls that one server, and the replay, make on these pieces.
A vector of fewer pieces than servers is cut at every STEP instead; that is exact so long as a server has one thread
(`is_fine`): no call is then shared out, and only the end of the whole has a rest. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator

from asgd_mpi.errors import ConfigError

# floats: 1 MB each of weights, velocity and gradient; smaller ones cost more in calls than they save
PIECE = 262_144
STEP = 1024  # floats: more than a kernel takes at a time, and a multiple of it


def pieces(num_floats: int) -> Iterator[slice]:
    """Cut [0, num_floats) into pieces."""
    return (slice(start, min(start + PIECE, num_floats)) for start in range(0, num_floats, PIECE))


def is_fine(num_floats: int, num_servers: int) -> bool:
    """Return whether a vector is so short that it is cut within pieces: then its servers must not have more than one thread."""
    return num_servers > 1 and num_floats <= (num_servers - 1) * PIECE


def cut(num_floats: int, num_servers: int, coded: str = "") -> list[slice]:
    """Return the slice of each server, about equal. Raises ConfigError if there is too little for so many.

    coded: the option of a format in which a PIECE is coded together, such as `--exchange.wire int8`; "" if there is none.
    """
    is_short = is_fine(num_floats, num_servers)
    step = STEP if is_short else PIECE
    units = -(-num_floats // step)
    if units < num_servers:
        raise ConfigError(
            f"--exchange.servers {num_servers}: a slice is cut at multiples of {step} numbers, and the network has "
            f"{num_floats}, enough for {units}. Take one server, which is fast enough for it."
        )
    if is_short and coded:
        raise ConfigError(
            f"--exchange.servers {num_servers} with {coded}: {PIECE} numbers are coded together, and the network has "
            f"{num_floats}, enough for {-(-num_floats // PIECE)}. Take fewer servers, or float32."
        )
    ends = [number * units // num_servers * step for number in range(num_servers)] + [num_floats]
    return [slice(start, stop) for start, stop in zip(ends, ends[1:])]

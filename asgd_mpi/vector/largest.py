"""topk: of every CHUNK numbers the largest are sent, with their places in it.

    memory, (num_bytes,) uint8:    the values in bfloat16, chunk by chunk, the largest first; then the places, 12 bits each

Of numbers of one size the first ones are taken. A chunk with fewer numbers that are not zero repeats its last one, so that the
length is known beforehand. Pure functions, the same bits on every device (Lin et al. 2018, arXiv:1712.01887, sends the largest
of a layer; chunks find theirs in the cache, and places take 12 bits).
"""

from __future__ import annotations

import numpy as np
import torch

CHUNK = 4096
_MAGNITUDE = 0x7FFFFFFF  # a float32's bits without its sign: in the order of its size
PLACE_BITS = 12
_CHUNK_AT = PLACE_BITS + 31  # the first bit of a chunk's number, above a place and a key


def num_bytes(num_floats: int, kept: int) -> int:
    """Return the bytes of so many numbers, a multiple of CHUNK, of which `kept` of a chunk are sent; a multiple of 4."""
    count = num_floats // CHUNK * kept
    return _values_end(count) + -(-3 * -(-count // 2) // 4) * 4


def encode_(memory: torch.Tensor, values: torch.Tensor, keys: torch.Tensor, kept: int) -> None:
    """Write the largest of (n,) float32, n a multiple of CHUNK, into (num_bytes,) uint8.

    keys: `keys_of(values)`; what is 0 there is not sent.
    """
    chunks = keys.view(-1, CHUNK)
    # (chunks, kept) int64
    places = _places_on_host(chunks.numpy(), kept) if keys.is_cpu else _places(chunks, kept)
    count = places.numel()
    sent, packed = _parts(memory, count)
    sent.copy_(values.view(-1, CHUNK).gather(1, places).flatten())
    pairs = torch.zeros(-(-count // 2), 2, dtype=torch.int32, device=values.device)
    pairs.view(-1)[:count] = places.flatten()
    first, second = pairs.unbind(1)
    packed.view(-1, 3).copy_((first | second << PLACE_BITS).view(torch.uint8).view(-1, 4)[:, :3])


def decode_(values: torch.Tensor, memory: torch.Tensor, kept: int) -> None:
    """Set (n,) float32 to what (num_bytes,) uint8 holds: 0 where nothing was sent."""
    chunks = values.zero_().view(-1, CHUNK)
    count = len(chunks) * kept
    sent, packed = _parts(memory, count)
    pairs = torch.zeros(-(-count // 2), 4, dtype=torch.uint8, device=values.device)
    pairs[:, :3] = packed.view(-1, 3)
    pairs = pairs.view(torch.int32)
    places = torch.cat((pairs & (CHUNK - 1), pairs >> PLACE_BITS), dim=1).view(-1)[:count]
    chunks.scatter_(1, places.long().view(-1, kept), sent.float().view(-1, kept))


def keys_of(values: torch.Tensor) -> torch.Tensor:
    """Return what numbers are compared by, (n,) int32: larger for a larger one, 0 for 0."""
    return values.view(torch.int32) & _MAGNITUDE


def _places(keys: torch.Tensor, kept: int) -> torch.Tensor:
    """Return the places of the largest of each row of (chunks, CHUNK) int32, (chunks, kept) int64."""
    order = torch.arange(CHUNK - 1, -1, -1, device=keys.device)
    best = (keys.long() << PLACE_BITS | order).topk(kept, dim=1).values
    last = (best >> PLACE_BITS).count_nonzero(1).sub_(1)
    ranks = torch.arange(kept, device=keys.device).minimum(last[:, None]).clamp_(min=0)
    places = CHUNK - 1 - (best.gather(1, ranks) & (CHUNK - 1))
    return places.masked_fill_(last[:, None] < 0, 0)


def _places_on_host(keys: np.ndarray, kept: int) -> torch.Tensor:
    """Return the same, by looking at few of the numbers.

    A chunk is divided into groups, at least four for each number that is kept. That many groups reach the bound, the kept-th
    largest of their maxima, so the numbers that are sent do; few others do. These are sorted, by chunk, size and place.
    """
    chunks, size = len(keys), 1 << max(1, CHUNK // (4 * kept)).bit_length() - 1
    maxima = torch.from_numpy(keys).view(chunks, size, -1).amax(1).numpy()
    bound = np.partition(maxima, -kept, axis=1)[:, -kept]
    found = np.flatnonzero(keys >= np.maximum(bound, 1)[:, None])
    # a word for each: its chunk, what it lacks to the largest of all keys, and its place
    words = keys.reshape(-1)[found].astype(np.int64)
    np.subtract(_MAGNITUDE, words, out=words)
    words <<= PLACE_BITS
    words |= found & (CHUNK - 1)
    words |= found >> PLACE_BITS << _CHUNK_AT
    words.sort()
    ends = np.searchsorted(words, np.arange(1, chunks + 1) << _CHUNK_AT)
    starts = np.concatenate(([0], ends[:-1]))
    ranks = np.minimum(starts[:, None] + np.arange(kept), ends[:, None] - 1)
    places = np.append(words, 0)[ranks] & (CHUNK - 1)
    places[starts == ends] = 0
    return torch.from_numpy(places)


def _parts(memory: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return views of the values, (count,) bfloat16, and of the bytes of the places."""
    values, end = memory[: 2 * count].view(torch.bfloat16), _values_end(count)
    return values, memory[end : end + 3 * -(-count // 2)]


def _values_end(count: int) -> int:
    return -(-2 * count // 4) * 4

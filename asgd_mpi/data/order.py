"""Which sample stands at which position of an epoch; pure arithmetic, no I/O.

In: (epoch, start, stop). Out: int64 (stop - start,) sample indices. Invariant: an epoch is a permutation of
0..num_samples-1 that depends on (seed, epoch) alone, so any rank can work out any range, and cutting an epoch into
ranges differently gives the same sequence.

`Order` permutes blocks of consecutive samples and then the samples inside groups of blocks, so that a reader that
follows it touches the disk in large pieces. The shards are shuffled when they are written; block order then gives
batches that are as mixed as a full shuffle. This is the block shuffle of Corgi2 (arXiv:2309.01640).
"""

import threading
from functools import lru_cache

import numpy as np


class Order:
    """A seeded permutation per epoch, for training."""

    def __init__(self, num_samples: int, seed: int, block: int = 32, blocks_per_group: int = 64):
        self.num_samples = num_samples
        self.seed = seed
        self.block = block
        self.blocks_per_group = blocks_per_group
        self._lock = threading.Lock()  # two threads that ask for a new epoch compute it once
        # this epoch and the next: 8 bytes a sample each
        self._epoch = lru_cache(maxsize=2)(self._permute)

    def indices(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return the samples at positions start..stop-1 of an epoch, int64."""
        _check_range(self.num_samples, start, stop)
        with self._lock:
            order = self._epoch(epoch)
        return order[start:stop].copy()

    def _permute(self, epoch: int) -> np.ndarray:
        num_blocks = -(-self.num_samples // self.block)
        blocks = np.random.default_rng([self.seed, epoch]).permutation(num_blocks)
        within = np.arange(self.block)
        order = []
        for group, first in enumerate(range(0, num_blocks, self.blocks_per_group)):
            members = (
                blocks[first : first + self.blocks_per_group, None] * self.block + within
            ).ravel()
            members = members[members < self.num_samples]  # the last block may be short
            # Groups count from 1: numpy pads a seed with zeros, so [seed, epoch, 0] is the stream [seed, epoch].
            order.append(np.random.default_rng([self.seed, epoch, 1 + group]).permutation(members))
        return np.concatenate(order)


class Sequential:
    """Every sample in stored order, the same in each epoch, for evaluation."""

    def __init__(self, num_samples: int):
        self.num_samples = num_samples

    def indices(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return start..stop-1, int64."""
        _check_range(self.num_samples, start, stop)
        return np.arange(start, stop, dtype=np.int64)


def _check_range(num_samples: int, start: int, stop: int) -> None:
    if not 0 <= start <= stop <= num_samples:
        raise ValueError(f"positions {start}..{stop} of an epoch of {num_samples} samples")

"""Samples of a map-style dataset of the user's, anything with len() and [index], in batches by positions of an epoch.

One thread reads ahead: few datasets can be read by several at a time. A dataset that draws random numbers (augmentation by
torch's, numpy's or Python's own generator) is read by the thread that trains, with all three seeded by (seed, epoch, index):
else neither a resumed run nor a replay could draw them again. Which of the two a dataset is, `Samples` finds out by reading
its first sample twice.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch.utils import _pytree as pytree
from torch.utils.data import IterableDataset, default_collate

from asgd_mpi.data.loader import Range, in_order
from asgd_mpi.data.order import Order, Sequential
from asgd_mpi.errors import DataError

AHEAD = 4  # batches that are read before they are needed
Collate = Callable[[list], Any]


@dataclass(frozen=True)
class SampleBatch:
    """What `collate` made of the samples at positions start..stop-1 of an epoch."""

    data: Any
    size: int
    epoch: int
    start: int
    stop: int
    skipped: int = 0


class Samples:
    """A dataset and what is to be known of it. `whose`: what the user calls it. Raises DataError."""

    num_classes = 0
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __init__(self, dataset: Any, whose: str):
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise DataError(
                f"{whose} is {_kind(dataset)}, which has no samples by number: every sample of an epoch is lent to one worker, "
                "and lent again if that fails, so they must be found by their positions. Give a dataset with len() and [index]."
            )
        if not hasattr(dataset, "__len__"):
            raise DataError(
                f"{whose} is {_kind(dataset)}, without len(): give it a __len__ that returns the samples of an epoch."
            )
        self.dataset, self.root, self.num_samples = dataset, whose, len(dataset)
        if not self.num_samples:
            raise DataError(
                f"{whose} is empty: there is nothing to train on, or to validate. See what it was made of."
            )
        with _own_draws():
            first, again = self.sample(0, 0, 0), self.sample(1, 0, 0)
        self.draws = _digest(first) != _digest(again)
        self.fingerprint = f"{self.num_samples}-{_digest(first)}"

    def sample(self, seed: int, epoch: int, index: int) -> Any:
        """Return a sample, with the generators that it may draw from seeded by what it is."""
        seed_all_(seed, epoch, index)
        return self.dataset[index]


class DatasetLoader:
    """Make batches of one dataset in one order."""

    def __init__(
        self, samples: Samples, order: Order | Sequential, seed: int, collate: Collate | None = None
    ):
        self.samples, self.order, self._seed = samples, order, seed
        self._collate = collate or default_collate
        if samples.draws:
            self._pool = None
        else:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="loader")

    def batch(self, epoch: int, start: int, stop: int) -> SampleBatch:
        """Return the samples at positions start..stop-1 of an epoch."""
        indices = self.order.indices(epoch, start, stop).tolist()
        if self.samples.draws:
            items = [self.samples.sample(self._seed, epoch, index) for index in indices]
        else:
            items = [self.samples.dataset[index] for index in indices]
        return SampleBatch(self._collate(items), len(items), epoch, start, stop)

    def submit(self, epoch: int, start: int, stop: int) -> Future[SampleBatch] | _Later:
        """Begin to make a batch; its errors come out of result()."""
        if self._pool is None:
            return _Later(self, (epoch, start, stop))
        return self._pool.submit(self.batch, epoch, start, stop)

    def batches(self, wanted: Iterable[Range]) -> Iterator[SampleBatch]:
        """Return the batches in order, read a few ahead."""
        return in_order(self, wanted, AHEAD)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


@dataclass
class _Later:
    """A batch that is made by whoever asks for it."""

    loader: DatasetLoader
    which: Range

    def result(self) -> SampleBatch:
        return self.loader.batch(*self.which)

    def cancel(self) -> bool:
        return True


def seed_all_(*of: int) -> None:
    """Seed the generators of torch (of the CPU), numpy and Python that everybody shares, by whole numbers."""
    words = np.random.SeedSequence(of).generate_state(3)
    torch.default_generator.manual_seed(int(words[0]))
    np.random.seed(int(words[1]))
    random.seed(int(words[2]))


@contextmanager
def _own_draws() -> Iterator[None]:
    """Within, what is drawn leaves no trace in the generators that everybody shares."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def _digest(sample: Any) -> str:
    """Return a hash of all that a sample holds: tensors and arrays by their bytes, the rest as it is written."""
    digest = xxhash.xxh3_64()
    for leaf in pytree.tree_leaves(sample):
        if isinstance(leaf, torch.Tensor):
            leaf = leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        if isinstance(leaf, np.ndarray):
            digest.update(leaf.tobytes())
        elif not _shows_its_address(leaf):
            digest.update(repr(leaf).encode(errors="backslashreplace"))
    return digest.hexdigest()


def _shows_its_address(leaf: Any) -> bool:
    return type(leaf).__repr__ is object.__repr__


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"

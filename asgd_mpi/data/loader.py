"""Batches from shards: read, decode, augment, stack; with threads when asked ahead of time.

In: (epoch, start, stop), positions of an epoch. Out: `Batch`. Invariants: a batch is a pure function of these three,
the seed and the data, so pixels depend neither on the number of threads nor on where an epoch is cut; and
len(images) + skipped == stop - start. Threads only, never processes: a fork after MPI has started is not safe, and
reading, checking and decoding all release the interpreter's lock.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from asgd_mpi.data.augment import Policy, Touches, sample_rng
from asgd_mpi.data.decode import decode
from asgd_mpi.data.order import Order, Sequential
from asgd_mpi.data.shards import DamagedSample, ShardSet

Range = tuple[int, int, int]  # of one batch: epoch, start, stop


def ranges(epoch: int, start: int, stop: int, batch_size: int, smallest: int = 1) -> list[Range]:
    """Cut positions start..stop-1 of an epoch into batches; a rest of fewer than `smallest` goes with the batch before."""
    found, at = [], start
    while at < stop:
        end = min(at + batch_size, stop)
        if stop - end < smallest:
            end = stop
        found.append((epoch, at, end))
        at = end
    return found


@dataclass(frozen=True)
class Batch:
    images: torch.Tensor  # uint8 (B, C, S, S), contiguous; `on` finishes them
    labels: torch.Tensor  # int64 (B,)
    indices: np.ndarray  # int64 (B,), the samples in the ShardSet
    epoch: int
    start: int  # positions of the epoch, start..stop-1
    stop: int
    skipped: int  # samples left out: B == stop - start - skipped; B may be 0
    touches: Touches | None = None  # mirrors and colours that are left to the device

    @property
    def size(self) -> int:
        """B."""
        return len(self.labels)

    def on(self, device: torch.device) -> torch.Tensor:
        """Return the finished images, uint8 (B, C, S, S), on a device."""
        images = self.images.to(device, non_blocking=True)
        return images if self.touches is None else self.touches(images)


class Loader:
    """Make batches of one split in one order.

    on_skip: leave damaged images out, and call this with a message, once a sample, from any thread; None: they are an error.
    smallest: images of a batch; if damaged ones leave fewer, all are left out. touch_on_device: leave mirrors and colours to
    `Batch.on`.
    """

    def __init__(
        self,
        shards: ShardSet,
        order: Order | Sequential,
        policy: Policy,
        seed: int,
        threads: int,
        on_skip: Callable[[str], None] | None = None,
        touch_on_device: bool = False,
        smallest: int = 1,
    ):
        self.shards = shards
        self.order = order
        self.policy = policy
        self.seed = seed
        self.smallest = smallest
        self.touch_on_device = touch_on_device
        self._on_skip = on_skip
        if shards.image_shape is None:
            self._num_channels = 3
        else:
            self._num_channels = shards.image_shape[2]
        self._reported: set[int] = set()
        self._reported_lock = threading.Lock()
        self._num_threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")

    def batch(self, epoch: int, start: int, stop: int) -> Batch:
        """Return the samples at positions start..stop-1 of an epoch; raise DataError."""
        indices = self.order.indices(epoch, start, stop)
        self.shards.expect(indices)
        images = np.empty(
            (len(indices), self._num_channels, self.policy.size, self.policy.size), dtype=np.uint8
        )
        good, touches = np.ones(len(indices), dtype=bool), []
        for row, index in enumerate(indices.tolist()):
            try:
                image, touch = self.policy.crop(
                    self._image(index), sample_rng(self.seed, epoch, index)
                )
                images[row] = (image if self.touch_on_device else touch(image)).transpose(2, 0, 1)
                touches.append(touch)
            except DamagedSample as error:
                if self._on_skip is None:
                    raise
                good[row] = False
                self._report(index, error, self._on_skip)
        if self._on_skip and good.sum() < self.smallest:
            if good.any():
                self._on_skip(
                    f"left out: the {good.sum()} whole images at positions {start}..{stop - 1} of epoch {epoch}: the network "
                    f"is trained on {self.smallest} at a time or more (data.min_batch)"
                )
            good[:] = False
        if not good.all():
            images, indices = images[good], indices[good]
        labels = torch.from_numpy(self.shards.labels(indices))
        return Batch(
            torch.from_numpy(images),
            labels,
            indices,
            epoch,
            start,
            stop,
            int((~good).sum()),
            Touches(touches) if self.touch_on_device and good.any() else None,
        )

    def submit(self, epoch: int, start: int, stop: int) -> Future[Batch]:
        """Start making a batch in a thread; its errors come out of the future's result()."""
        return self._pool.submit(self.batch, epoch, start, stop)

    def batches(self, wanted: Iterable[Range]) -> Iterator[Batch]:
        """Return the batches in order, made by all threads, a few ahead; raise DataError."""
        return in_order(self, wanted, self._num_threads + 2)

    def close(self) -> None:
        """Drop the batches not yet started and wait for the others."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _image(self, index: int) -> np.ndarray:
        """Return one decoded image, uint8 (H, W, C)."""
        image = self.shards.read(index)
        if self.shards.encoding == "jpeg":
            try:
                image = decode(image)
            except ValueError as error:
                raise DamagedSample(
                    f"{self.shards.source(index)} in {self.shards.root} does not decode: {error}; prepare the "
                    f"data set again without it, or leave such samples out (on_bad_image: skip)"
                ) from error
        return image

    def _report(self, index: int, error: DamagedSample, say: Callable[[str], None]) -> None:
        with self._reported_lock:
            if index in self._reported:
                return
            self._reported.add(index)
        say(f"left out: {error}")


def in_order(loader: Any, wanted: Iterable[Range], num_batches: int) -> Iterator[Any]:
    """Return the batches that a loader makes, in order, so many of them ahead of time."""
    ahead = ReadAhead(loader, num_batches)
    ahead.ask(0, wanted)
    return ahead.take(0)


class ReadAhead:
    """What a worker will need, in order; a few batches of it are made ahead of time.

    Only so many: a batch of 256 images of 224 x 224 pixels has 38 MB, and a lease may have hundreds.
    """

    def __init__(self, loader: Loader, num_batches: int):
        self._loader = loader
        self._num_batches = num_batches
        self._asked: deque[tuple[int, Range]] = deque()  # (lease, range), not begun yet
        self._under_way: deque[tuple[int, Future[Batch]]] = deque()

    def ask(self, lease: int, wanted: Iterable[Range]) -> None:
        """Ask for the batches of a lease, behind all that was asked for before."""
        self._asked.extend((lease, one) for one in wanted)
        self._begin()

    def take(self, lease: int) -> Iterator[Batch]:
        """Yield the batches of a lease, which was asked for; what was asked for before it is dropped. Raise DataError."""
        while self._under_way and self._under_way[0][0] != lease:
            self._under_way.popleft()[1].cancel()
            self._begin()
        while self._under_way and self._under_way[0][0] == lease:
            batch = self._under_way.popleft()[1].result()
            self._begin()
            yield batch

    def _begin(self) -> None:
        while self._asked and len(self._under_way) < self._num_batches:
            lease, one = self._asked.popleft()
            self._under_way.append((lease, self._loader.submit(*one)))

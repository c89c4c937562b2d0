"""`python -m asgd_mpi.evaluate CHECKPOINT --data DIR`: top-1 and top-5 error of exactly the saved version."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from asgd_mpi import command_line, ending, limits, trust
from asgd_mpi.data.augment import Normalise, make_policy
from asgd_mpi.data.loader import Loader, ranges
from asgd_mpi.data.order import Sequential
from asgd_mpi.data.shards import ShardSet
from asgd_mpi.data.trials import FolderSet
from asgd_mpi.errors import ConfigError, DataError
from asgd_mpi.model import networks
from asgd_mpi.model.flat import FlatModel
from asgd_mpi.record import checkpoint
from asgd_mpi.task import open_split
from asgd_mpi.worker.step import Errors, validate


RANGES = {
    "batch-size": (limits.at_least(1, 2**20), "images that are evaluated at a time, 1 or more; 2^20 at most"),
    "threads": limits.RANGES["data.threads"],
}


def make_parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog="python -m asgd_mpi.evaluate", description="Measure the error of a checkpoint on a data set.", ranges=RANGES,
        short={"--data": "--data.path"})
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="A directory under checkpoints/ of a run directory.")
    parser.add_argument("--data.path", required=True, metavar="DIR", help="Directory of shards made by data_prep, or a tree "
                        "of <split>/<class>/*.JPEG. --data is short for it.")
    parser.add_argument("--data.source", default="shards", type=Literal["shards", "folder"], help="What lies there.")
    parser.add_argument("--data.on_bad_image", default="fail", type=Literal["fail", "skip"],
                        help="Stop at a damaged image, or leave it out and count it.")
    parser.add_argument("--model", default="", metavar="NAME", help="The network, by its name or as package.module:function, in "
                        "place of the one that the checkpoint names: code of your own is run only if you name it, or have "
                        "trained this run here with it.")
    parser.add_argument("--split", default="val", help="Split of the data set.")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="A torch device.")
    parser.add_argument("--threads", type=int, default=2, help="Threads that read images.")
    return parser


@ending.of_command
def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().read(arguments)
    device = _device(options.device)
    data = options.data
    state, manifest = checkpoint.load(options.checkpoint)
    if options.model:
        manifest.model = options.model
    trust.demand(manifest.model, options.model, _run_of(options.checkpoint))
    images = open_split(data.source, data.path, options.split)
    if manifest.data and data.source == "shards" and images.fingerprint != manifest.data:
        print(f"note: {data.path} is another data set than the checkpoint was trained on (fingerprint {images.fingerprint}, "
              f"trained on {manifest.data})", file=sys.stderr)
    for note in images.notes:
        print(note, file=sys.stderr)
    errors = measure(state, manifest, images, options.batch_size, device, options.threads,
                     data.on_bad_image)
    if not errors.num_images:
        raise DataError(f"all {errors.skipped} images of {data.path} ({options.split}) are damaged: there is nothing to measure.")
    left_out = f", and {errors.skipped} damaged ones left out" if errors.skipped else ""
    print(f"version {manifest.version} of {manifest.model}, {errors.num_images} images of {data.path} "
          f"({options.split}){left_out}: top-1 error {1 - errors.top1 / errors.num_images:.4f}, top-5 error "
          f"{1 - errors.top5 / errors.num_images:.4f}, loss {errors.loss / errors.num_images:.4f}")
    return 0


def _device(name: str) -> torch.device:
    """Return the device of a name, once it has held a number. Raises ConfigError."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:      # torch raises RuntimeError, AssertionError, NotImplementedError, ...
        raise ConfigError(f"--device {name}: it cannot be used here ({str(error).splitlines()[0][:150]}); give cpu, or cuda:0 for "
                          "the first GPU.") from error
    return device


def _run_of(path: str) -> Path:
    """The run directory that a checkpoint, or its model.pt, lies in: RUN/checkpoints/NAME."""
    directory = Path(os.path.realpath(path))
    return (directory.parent if directory.name == checkpoint.MODEL else directory).parent.parent


def measure(state: dict[str, torch.Tensor], manifest: checkpoint.Manifest, shards: ShardSet | FolderSet, batch_size: int,
            device: torch.device, threads: int, on_bad_image: str = "fail") -> Errors:
    """The errors of a checkpoint on one split. Raises DataError if the data set does not fit the network."""
    channels = shards.image_shape[2] if shards.image_shape else 3
    if shards.num_classes != manifest.num_classes:
        raise DataError(f"the checkpoint was trained on {manifest.num_classes} classes, but {shards.root} has "
                        f"{shards.num_classes}: its scores would mean other things. Give the data set it was trained on.")
    _demand_same_classes(manifest.class_names, shards)
    if channels != manifest.channels:
        raise DataError(f"the checkpoint takes images of {manifest.channels} channels, but {shards.root} has {channels}. "
                        "Give the data set it was trained on.")
    module = networks.build(manifest.model, manifest.num_classes, channels, manifest.image_size)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(f"the checkpoint does not fit the network {manifest.model}: "
                          f"{' '.join(str(error).split())[:300]}. Give the network that it was trained with: --model.") from error
    policy = make_policy("none", manifest.image_size, shards.image_shape)
    loader = Loader(shards, Sequential(shards.num_samples), policy, seed=0, threads=threads, on_bad_image=on_bad_image,
                    on_skip=lambda text: tqdm.write(text, file=sys.stderr))
    whole = list(ranges(0, 0, shards.num_samples, batch_size))
    try:
        return validate(FlatModel(module, device), Normalise(manifest.mean, manifest.std),
                        tqdm(loader.batches(whole), total=len(whole), unit=" batches"))
    finally:
        loader.close()


def _demand_same_classes(trained_on: Sequence[str], shards: ShardSet | FolderSet) -> None:
    """Raise DataError, with names beside names, unless class i is the same in both; older checkpoints do not know theirs.

    One name may be written in two ways, as file systems do: composed characters, or letters and accents apart.
    """
    pairs = list(zip(trained_on, shards.class_names))
    others = [(label, one, other) for label, (one, other) in enumerate(pairs)
              if unicodedata.normalize("NFC", one) != unicodedata.normalize("NFC", other)]
    if others:
        beside = "; ".join(f"class {label} was {one!r}, is {other!r}" for label, one, other in others[:3])
        again = ": the same names, in another order" if set(trained_on) == set(shards.class_names) else ""
        raise DataError(f"{len(others)} of the {len(pairs)} classes of {shards.root} are not those that the checkpoint was trained "
                        f"on{again}: {beside}{'; ...' * (len(others) > 3)}. Its scores would be compared with the labels of other "
                        "things. Give the data set it was trained on, or name the classes as there.")


if __name__ == "__main__":
    sys.exit(main())

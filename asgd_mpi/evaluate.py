"""`python -m asgd_mpi.evaluate CHECKPOINT --data DIR`: top-1 and top-5 accuracy of exactly the saved version."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Optional

import torch
from tqdm import tqdm

from asgd_mpi.config import command_line, limits
from asgd_mpi.config.options import Config, DataConfig
from asgd_mpi.data import images as preparing
from asgd_mpi.data.augment import Normalise, make_policy
from asgd_mpi.data.folder import FolderSet
from asgd_mpi.data.loader import Loader, ranges
from asgd_mpi.data.order import Sequential
from asgd_mpi.data.shards import ShardSet
from asgd_mpi.errors import ConfigError, DataError, tell
from asgd_mpi.model import networks, pretrained
from asgd_mpi.model.weights import load_weights_
from asgd_mpi.optim.step import Errors, validate
from asgd_mpi.process import ending
from asgd_mpi.record import checkpoint
from asgd_mpi.report.units import percent
from asgd_mpi.runtime import trust
from asgd_mpi.task import open_split
from asgd_mpi.vector.flat import FlatModel

RANGES = {
    "batch-size": (limits.at_least(1, 2**20), "images that are evaluated at a time, 1 or more; 2^20 at most"),
    "threads": limits.RANGES["data.threads"],
    "data.image_size": limits.RANGES["data.image_size"],
    "data.resize": limits.RANGES["data.resize"],
}


def make_parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog="python -m asgd_mpi.evaluate", description="Measure the error of a checkpoint on a data set.", ranges=RANGES,
        short={"--data": "--data.path"})
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="A directory under checkpoints/ of a run directory; or, with "
                        "--model, a state_dict file of any trainer, or torchvision's name for weights that torch has downloaded.")
    parser.add_argument("--data.path", required=True, metavar="DIR", help="Directory of shards made by data_prep, or a tree "
                        "of <split>/<class>/*.JPEG. --data is short for it.")
    parser.add_argument("--data.source", default="shards", type=Literal["shards", "folder"], help="What lies there.")
    parser.add_argument("--data.on_bad_image", default="fail", type=Literal["fail", "skip"],
                        help="Stop at a damaged image, or leave it out and count it.")
    for name, kind, what in (("image_size", int, "side of the square that the network sees"), ("resize", int, "short side before the centre crop"),
                             ("mean", str, "of each channel, with commas between them"), ("std", str, "of each channel")):
        parser.add_argument(f"--data.{name}", type=Optional[kind], metavar=name.upper(), help=f"{what} (default: what the checkpoint says, "
                            "or what is known of torchvision's weights, or what fits the images)")
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
    given = {name: data[name] for name in ("image_size", "resize", "mean", "std") if data[name] is not None}
    limits.check(replace(Config(), data=DataConfig(**given)))
    if _is_plain(options.checkpoint):
        images = open_split(data.source, data.path, options.split)
        state, manifest = _of_others(options.checkpoint, options.model, images, given)
    else:
        state, manifest = checkpoint.load(options.checkpoint)
        manifest.model = options.model or manifest.model
        trust.demand(manifest.model, options.model, _run_of(options.checkpoint))
        images = open_split(data.source, data.path, options.split)
        _replace_(manifest, given)
    if manifest.data and data.source == "shards" and images.fingerprint != manifest.data:
        print(f"note: {data.path} is another data set than the checkpoint was trained on (fingerprint {images.fingerprint}, "
              f"trained on {manifest.data})", file=sys.stderr)
    for note in images.notes:
        tell(note, file=sys.stderr)
    errors = measure(state, manifest, images, options.batch_size, device, options.threads,
                     data.on_bad_image)
    if not errors.num_images:
        raise DataError(f"all {errors.skipped} images of {data.path} ({options.split}) are damaged: there is nothing to measure.")
    left_out = f", and {errors.skipped} damaged ones left out" if errors.skipped else ""
    what = f"version {manifest.version}" if manifest.files else options.checkpoint
    tell(f"{what} of {manifest.model}, {errors.num_images} images of {data.path} "
         f"({options.split}){left_out}: top-1 accuracy {percent(errors.top1 / errors.num_images, 2)}, top-5 accuracy "
         f"{percent(errors.top5 / errors.num_images, 2)}, loss {errors.loss / errors.num_images:.4f}")
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


def _is_plain(path: str) -> bool:
    """Return whether these are weights that no run of this package has saved."""
    where = Path(path)
    of_a_run = where.name == checkpoint.MODEL and (where.parent / checkpoint.MANIFEST).exists()
    return os.path.isfile(where) and not of_a_run or bool(pretrained.OF_TORCHVISION.fullmatch(path))


def _of_others(path: str, model: str, images: ShardSet | FolderSet, given: dict) -> tuple[dict[str, torch.Tensor], checkpoint.Manifest]:
    """Return the network in a state_dict file, and what is known of it. Raises ConfigError, RunDirError."""
    expected, file = pretrained.expected(path), pretrained.file_of(path)
    if not model:
        raise ConfigError(f"{path} is a state_dict, which does not name its network: give --model NAME.")
    data = preparing.fitted(DataConfig(**given), images, expected)
    for line in preparing.told(data, images, path, expected):
        print(line, file=sys.stderr)
    channels = images.image_shape[2] if images.image_shape else 3
    module = networks.build(model, images.num_classes, channels, data.image_size)
    load_weights_(module, file, note=lambda text: print(text, file=sys.stderr), option="CHECKPOINT")
    return module.state_dict(), checkpoint.Manifest(
        0, 0, model, images.num_classes, channels, data.image_size, "", limits.numbers(data.mean), limits.numbers(data.std), resize=data.resize)


def _replace_(manifest: checkpoint.Manifest, given: dict) -> None:
    """Take what the user gives in place of what the checkpoint says, and say so."""
    for name, value in given.items():
        before, value = getattr(manifest, name), limits.numbers(value) if name in ("mean", "std") else value
        if value != before:
            print(f"note: {name} {value} as given; the checkpoint was trained with {before or 'none recorded'}", file=sys.stderr)
        setattr(manifest, name, value)


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
    policy = make_policy("none", manifest.image_size, shards.image_shape, manifest.resize)
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

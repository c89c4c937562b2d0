"""`python -m asgd_mpi.evaluate CHECKPOINT --data DIR`: top-1 and top-5 accuracy of exactly the saved version.

`python -m asgd_mpi.evaluate CHECKPOINT --task package.module:Class`: of a task of a user's own, its own metrics on its val_set,
in the batches and with the seed of the run. Whose code may be run: see runtime.trust.
"""

from __future__ import annotations

from asgd_mpi.process import interpreter

if __name__ == "__main__":  # before anything heavy is imported
    interpreter.begin()

import math
import os
import sys
import unicodedata
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Literal, Optional

import jsonargparse
import torch

from asgd_mpi.config import command_line, limits
from asgd_mpi.config import written
from asgd_mpi.config.options import Config, DataConfig
from asgd_mpi.data import images as preparing
from asgd_mpi.data.augment import Normalise, make_policy
from asgd_mpi.data.folder import FolderSet
from asgd_mpi.data.dataset import DatasetLoader
from asgd_mpi.data.loader import Loader, ranges
from asgd_mpi.data.order import Sequential
from asgd_mpi.data.shards import ShardSet
from asgd_mpi.errors import ConfigError, DataError, tell
from asgd_mpi.model import batchnorm, networks, pretrained
from asgd_mpi.model.blame import blamed
from asgd_mpi.model.weights import load_weights_
from asgd_mpi.optim.classification import Classification
from asgd_mpi.optim.objective import Objective, Tally, passes
from asgd_mpi.optim.step import validate
from asgd_mpi.process import ending
from asgd_mpi.record import checkpoint, progress
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.report.units import percent
from asgd_mpi.runtime import trust
from asgd_mpi.runtime.prepare import configured
from asgd_mpi.task import complete, open_split, open_task
from asgd_mpi.task.own import OwnTask
from asgd_mpi.vector.flat import FlatModel

BATCH = 128  # images at a time
ROUNDING = 1e-3  # relative: what another device makes of a metric
# options that a task of a user's own leaves nothing to say for
OF_IMAGES = (
    "data.path",
    "data.source",
    "data.on_bad_image",
    "data.image_size",
    "data.resize",
    "data.mean",
    "data.std",
    "split",
    "threads",
)
RANGES = {
    "batch-size": (
        limits.at_least(1, 2**20),
        "samples that are evaluated at a time, 1 or more; 2^20 at most",
    ),
    "threads": limits.RANGES["data.threads"],
    "data.image_size": limits.RANGES["data.image_size"],
    "data.resize": limits.RANGES["data.resize"],
}


def make_parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog="python -m asgd_mpi.evaluate",
        description="Measure a checkpoint: its error on a data set of images, or the metrics of a task of your own.",
        ranges=RANGES,
        short={"--data": "--data.path", "--task": "--model"},
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="A run directory (its best version, else its last one), a directory under its checkpoints/, or the ema.pt in one (the "
        "running mean of the weights); or, with --model, a state_dict file of any trainer, or torchvision's name for weights that torch has downloaded.",
    )
    parser.add_argument(
        "--data.path",
        default="",
        metavar="DIR",
        help="Of images: directory of shards made by data_prep, or a tree "
        "of <split>/<class>/*.JPEG. --data is short for it.",
    )
    parser.add_argument(
        "--data.source", default="shards", type=Literal["shards", "folder"], help="What lies there."
    )
    parser.add_argument(
        "--data.on_bad_image",
        default="fail",
        type=Literal["fail", "skip"],
        help="Stop at a damaged image, or leave it out and count it.",
    )
    for name, kind, what in (
        ("image_size", int, "side of the square that the network sees"),
        ("resize", int, "short side before the centre crop"),
        ("mean", str, "of each channel, with commas between them"),
        ("std", str, "of each channel"),
    ):
        parser.add_argument(
            f"--data.{name}",
            type=Optional[kind],
            metavar=name.upper(),
            help=f"{what} (default: what the checkpoint says, "
            "or what is known of torchvision's weights, or what fits the images)",
        )
    parser.add_argument(
        "--model",
        default="",
        metavar="NAME",
        help="The network, by its name or as package.module:function, or the task as package.module:Class (--task is the same), in "
        "place of what the checkpoint names: code of your own is run only if you name it, or have "
        "trained this run here with it.",
    )
    parser.add_argument("--split", default="val", help="Split of the data set.")
    parser.add_argument(
        "--batch-size",
        type=Optional[int],
        help=f"Samples at a time (default: {BATCH}, or those of the run, if the task is your own).",
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="A torch device."
    )
    parser.add_argument("--threads", type=int, default=2, help="Threads that read images.")
    return parser


@ending.of_command
def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().read(arguments)
    device = _device(options.device)
    data = options.data
    given = {
        name: data[name]
        for name in ("image_size", "resize", "mean", "std")
        if data[name] is not None
    }
    limits.check(replace(Config(), data=DataConfig(**given)))
    path, why = options.checkpoint, ""
    if trust.is_run(Path(path)):
        found, which = checkpoint.of_choice(RunDir.open(path))
        path, why = str(found), f", the {which} of {path}"
    if _is_plain(path):
        _demand_data(data.path)
        images = open_split(data.source, data.path, options.split)
        state, manifest = _of_others(path, options.model, images, given)
    else:
        checkpoint.tell_of_writers(path)
        state, manifest = checkpoint.load(path)
        if manifest.is_own:
            _evaluate_own(options, path, why, state, manifest, device)
            return 0
        manifest.model = options.model or manifest.model
        trust.demand(manifest.model, options.model, checkpoint.run_of(path))
        _demand_data(data.path)
        images = open_split(data.source, data.path, options.split)
        _replace_(manifest, given)
    if manifest.data and data.source == "shards" and images.fingerprint != manifest.data:
        tell(
            f"note: {data.path} is another data set than the checkpoint was trained on (fingerprint {images.fingerprint}, "
            f"trained on {manifest.data})",
            file=sys.stderr,
        )
    for note in images.notes:
        tell(note, file=sys.stderr)
    is_mean = checkpoint.is_of_mean(path)
    tally = measure(
        state,
        manifest,
        images,
        options.batch_size or BATCH,
        device,
        options.threads,
        data.on_bad_image,
        open_split(data.source, data.path, "train") if is_mean else None,
    )
    if not tally.num_samples:
        raise DataError(
            f"all {tally.skipped} images of {data.path} ({options.split}) are damaged: there is nothing to measure. Prepare the data set again."
        )
    left_out = f", and {tally.skipped} damaged ones left out" if tally.skipped else ""
    what = f"version {manifest.version}" if manifest.files else path
    what = f"the running mean of the weights at {what}" if is_mean else what
    tell(
        f"{what} of {manifest.model}{why}, {tally.num_samples} images of {data.path} "
        f"({options.split}){left_out}: top-1 accuracy {percent(tally.mean('top1'), 2)}, top-5 accuracy "
        f"{percent(tally.mean('top5'), 2)}, loss {tally.mean('loss'):.4f}"
    )
    return 0


def _demand_data(path: str) -> None:
    if not path:
        raise ConfigError(
            "--data DIR is missing: images are measured on a data set. Give the directory of shards, such as data/digits."
        )


def _device(name: str) -> torch.device:
    """Return the device of a name, once it has held a number. Raises ConfigError."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (
        Exception
    ) as error:  # torch raises RuntimeError, AssertionError, NotImplementedError, ...
        raise ConfigError(
            f"--device {name}: it cannot be used here ({str(error).splitlines()[0][:150]}); give cpu, or cuda:0 for "
            "the first GPU."
        ) from error
    return device


def _is_plain(path: str) -> bool:
    """Return whether these are weights that no run of this package has saved."""
    where = Path(path)
    of_a_run = checkpoint.is_of_mean(where) or (
        where.name == checkpoint.MODEL and (where.parent / checkpoint.MANIFEST).exists()
    )
    return os.path.isfile(where) and not of_a_run or bool(pretrained.OF_TORCHVISION.fullmatch(path))


def _of_others(
    path: str, model: str, images: ShardSet | FolderSet, given: dict
) -> tuple[dict[str, torch.Tensor], checkpoint.Manifest]:
    """Return the network in a state_dict file, and what is known of it. Raises ConfigError, RunDirError."""
    expected, file = pretrained.expected(path), pretrained.file_of(path)
    if not model:
        raise ConfigError(
            f"{path} is a state_dict, which does not name its network: give --model NAME."
        )
    data = preparing.fitted(DataConfig(**given), images, expected)
    for line in preparing.told(data, images, path, expected):
        tell(line, file=sys.stderr)
    channels = images.image_shape[2] if images.image_shape else 3
    module = networks.build(model, images.num_classes, channels, data.image_size)
    load_weights_(module, file, note=lambda text: tell(text, file=sys.stderr), option="CHECKPOINT")
    return module.state_dict(), checkpoint.Manifest(
        0,
        0,
        model,
        images.num_classes,
        channels,
        data.image_size,
        "",
        limits.numbers(data.mean),
        limits.numbers(data.std),
        resize=data.resize,
    )


def _replace_(manifest: checkpoint.Manifest, given: dict) -> None:
    """Take what the user gives in place of what the checkpoint says, and say so."""
    for name, value in given.items():
        before, value = (
            getattr(manifest, name),
            limits.numbers(value) if name in ("mean", "std") else value,
        )
        if value != before:
            tell(
                f"note: {name} {value} as given; the checkpoint was trained with {before or 'none recorded'}",
                file=sys.stderr,
            )
        setattr(manifest, name, value)


def measure(
    state: dict[str, torch.Tensor],
    manifest: checkpoint.Manifest,
    shards: ShardSet | FolderSet,
    batch_size: int,
    device: torch.device,
    threads: int,
    on_bad_image: str = "fail",
    train: ShardSet | FolderSet | None = None,
) -> Tally:
    """Return what a checkpoint scores on one split. Raises DataError if the data set does not fit the network.

    train: to measure batch norm's statistics on, of weights that have none of their own (a running mean).
    """
    channels = shards.image_shape[2] if shards.image_shape else 3
    if shards.num_classes != manifest.num_classes:
        raise DataError(
            f"the checkpoint was trained on {manifest.num_classes} classes, but {shards.root} has "
            f"{shards.num_classes}: its scores would mean other things. Give the data set it was trained on."
        )
    _demand_same_classes(manifest.class_names, shards)
    if channels != manifest.channels:
        raise DataError(
            f"the checkpoint takes images of {manifest.channels} channels, but {shards.root} has {channels}. "
            "Give the data set it was trained on."
        )
    module = networks.build(manifest.model, manifest.num_classes, channels, manifest.image_size)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(
            f"the checkpoint does not fit the network {manifest.model}: "
            f"{' '.join(str(error).split())[:300]}. Give the network that it was trained with: --model."
        ) from error
    policy = make_policy("none", manifest.image_size, shards.image_shape, manifest.resize)
    whole = ranges(0, 0, shards.num_samples, batch_size)
    counter = progress.Counter(len(whole), "batches", "validation")

    def loader_of(images: ShardSet | FolderSet) -> Loader:
        return Loader(
            images,
            Sequential(images.num_samples),
            policy,
            seed=0,
            threads=threads,
            on_skip=counter.say if on_bad_image == "skip" else None,
        )

    flat, objective = (
        FlatModel(module, device),
        Classification(Normalise(manifest.mean, manifest.std)),
    )
    if train:
        with closing(loader_of(train)) as loader:
            _recalibrate_(flat, objective, loader, batch_size)
    with closing(loader_of(shards)) as loader:
        return validate(flat, objective, counter.over(loader.batches(whole)))


def _recalibrate_(
    flat: FlatModel,
    objective: Objective,
    loader: Loader | DatasetLoader,
    batch_size: int,
    smallest: int = 1,
) -> None:
    """Measure batch norm's statistics, if there are any, on the first of the training data."""
    if flat.measured:
        stop = batchnorm.positions(loader.order.num_samples, batch_size)
        batches = loader.batches(ranges(0, 0, stop, batch_size, smallest))
        batchnorm.recalibrate_(flat.module, passes(objective, batches, flat.device), flat.measured)


def _demand_same_classes(trained_on: Sequence[str], shards: ShardSet | FolderSet) -> None:
    """Raise DataError, with names beside names, unless class i is the same in both; older checkpoints do not know theirs.

    One name may be written in two ways, as file systems do: composed characters, or letters and accents apart.
    """
    pairs = list(zip(trained_on, shards.class_names))
    others = [
        (label, one, other)
        for label, (one, other) in enumerate(pairs)
        if unicodedata.normalize("NFC", one) != unicodedata.normalize("NFC", other)
    ]
    if others:
        beside = "; ".join(
            f"class {label} was {one!r}, is {other!r}" for label, one, other in others[:3]
        )
        again = ""
        if set(trained_on) == set(shards.class_names):
            again = ": the same names, in another order"
        raise DataError(
            f"{len(others)} of the {len(pairs)} classes of {shards.root} are not those that the checkpoint was trained "
            f"on{again}: {beside}{'; ...' * (len(others) > 3)}. Its scores would be compared with the labels of other "
            "things. Give the data set it was trained on, or name the classes as there."
        )


# ---- a task of the user's own


def _evaluate_own(
    options: jsonargparse.Namespace,
    path: str,
    why: str,
    state: dict[str, torch.Tensor],
    manifest: checkpoint.Manifest,
    device: torch.device,
) -> None:
    """Say what a checkpoint scores by its own task. Raises ConfigError, DataError."""
    name, run = options.model or manifest.model, RunDir(checkpoint.run_of(path))
    if name.endswith(".py"):
        raise ConfigError(
            f"{path} was made by a training loop in {name}, and only that holds its network and what it measures. Read what its "
            f"validations came to: python -m asgd_mpi.report {run.path}. To measure it again, load model.pt into the model of your "
            "script: model.load_state_dict(torch.load(FILE, weights_only=True))."
        )
    defaults = make_parser().get_defaults()
    if given := [option for option in OF_IMAGES if options[option] != defaults[option]]:
        raise ConfigError(
            f"--{given[0]} {options[given[0]]}: {path} is of {name}, a task of its own, which is measured by its `score` on its "
            f"val_set. Leave --{given[0]} out."
        )
    trust.demand(name, options.model, run.path, "--task")
    task = _own_task(name, run, manifest)
    is_mean = checkpoint.is_of_mean(path)
    tally = measure_own(state, task, options.batch_size, device, is_mean)
    shown = {metric: f"{tally.mean(metric):.6g}" for metric in tally.sums}
    recorded = {} if is_mean else manifest.metrics
    others = [
        f"{metric} {value:.6g}"
        for metric, value in recorded.items()
        if not math.isclose(value, tally.mean(metric), rel_tol=ROUNDING)
    ]
    if others:
        tell(
            f"note: the run recorded {', '.join(others)} for this version: the task or its data are others than then",
            file=sys.stderr,
        )
    first, *rest = (f"{metric} {value}" for metric, value in shown.items())
    better = "higher" if task.maximize else "lower"
    tell(
        f"{'the running mean of the weights at ' * is_mean}version {manifest.version} of {name}{why}, {tally.num_samples} "
        f"{task.unit} of its val_set: {', '.join([f'{first} ({better} is better)', *rest])}"
    )


def _own_task(name: str, run: RunDir, manifest: checkpoint.Manifest) -> OwnTask:
    """Open the task of a checkpoint, with the seed and the batches of the run that it lies in. Raises ConfigError, DataError."""
    file = run.config_of(manifest.restart)
    if file.exists():
        config = written.as_before(written.read(file))
        data, model = (
            replace(config.data, source="task"),
            replace(config.model, name=name),
        )
        config = replace(config, data=data, model=model)
        limits.check(config)
    else:
        tell(
            f"note: {file} is not there: the seed and the size of batches are those that {name} has by itself",
            file=sys.stderr,
        )
        config = configured([f"--task={name}"])
    task = open_task(complete(config))
    assert isinstance(task, OwnTask)
    if not task.val.num_samples:
        raise ConfigError(
            f"{task.name} has no val_set: there is nothing to measure on. Let val_set() return a dataset."
        )
    return task


def measure_own(
    state: dict[str, torch.Tensor],
    task: OwnTask,
    batch_size: int | None,
    device: torch.device,
    is_mean: bool,
) -> Tally:
    """Return what weights score on the validation split of a task of the user's own. Raises ConfigError.

    batch_size: None for that of the run; is_mean: the weights have no statistics of batch norm of their own.
    """
    size, module = batch_size or task.config.data.batch_size, task.build_module()
    with blamed(
        f"the checkpoint does not fit {task.name}", "Name the task that it was trained with"
    ):
        module.load_state_dict(state)
    flat = FlatModel(module, device)
    if is_mean:
        with closing(task.train_loader()) as loader:
            _recalibrate_(flat, task.objective, loader, size, task.smallest)
    whole = ranges(0, 0, task.val.num_samples, size, task.smallest)
    counter = progress.Counter(len(whole), "batches", "validation")
    with (
        closing(task.val_loader()) as loader,
        blamed(f"{task.name} cannot be measured on its val_set", "Mend that"),
    ):
        return validate(flat, task.objective, counter.over(loader.batches(whole)))


if __name__ == "__main__":
    interpreter.loaded()
    interpreter.end(main())

"""The configuration of a run: nested dataclasses, read from the command line and YAML files by jsonargparse.

Pure: no MPI, no torch. `parse` turns an argument list into a `Config` or raises ConfigError; `to_yaml` writes it back.
A field that is None stands for the recipe of the chosen network (`Recipe`), and is filled in by `resolved.with_recipe`, so that
the configuration that a run writes down is complete.
"""

from __future__ import annotations

import dataclasses
import datetime
import io
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional, Union

import jsonargparse
import yaml

from asgd_mpi.config import command_line, help_text, limits, rulebook
from asgd_mpi.errors import ConfigError, one_line
from asgd_mpi.untrusted import bounded

RULES = tuple(rulebook.RULEBOOK)
OPTIMIZERS = tuple(rulebook.OPTIMIZERS)
WIRES = ("float32", "bfloat16", "float16")
# first line of a record
BY_WORKERS = "# of this number of workers, others would have another one: "


def free(default):
    """A field that changes neither the weights that come out nor what they mean: it may differ when a run is resumed.

    Every other field defines the run: it may differ only where the user says so, and runs that differ in it are told.
    """
    return field(default=default, metadata={"free": True})


def fixed(default, why: str):
    """A field that a resumed run cannot change, for this reason."""
    return field(default=default, metadata={"fixed": why})


@dataclass
class RunConfig:
    """The run as a whole.

    Args:
        dir: run directory; empty for a new one under runs/
        seed: of the weights, the order, the augmentation and the dropout
        epochs: passes over the training split (default: the network's recipe)
        validate_every: epochs between two validations
        timeout_s: the longest that any rank waits for another one, in seconds
        progress: a bar, whole lines every few seconds, nothing, or auto (a bar if rank 0 has a terminal itself; it has none under mpirun)
        resume: run directory to go on with; auto for that of --run.dir, if it holds a run, and a new run otherwise
        override: settings that may differ from those of the resumed run, such as schedule.lr,run.epochs
        accept_gaps: go on from a checkpoint though its pushes are no longer all on record; audit and replay then fail for good
        dry_run: say what would be done, or restored and lost by --resume, and end
        inject: failures to rehearse, such as slow:3x@rank4,raise@step200:rank2,kill@t=30s:rank1 (docs/reliability.md)
    """

    dir: str = free("")
    seed: int = 0
    epochs: Optional[float] = None
    validate_every: float = 1.0
    timeout_s: float = free(600.0)
    progress: Literal["auto", "bar", "lines", "none"] = free("auto")
    resume: str = free("")
    override: str = free("")
    accept_gaps: bool = free(False)
    dry_run: bool = free(False)
    inject: str = free("")


@dataclass
class DataConfig:
    """The images.

    Args:
        path: directory of shards made by data_prep; `digits` is the embedded set, made on first use in data/digits
        source: shards; folder reads a tree of train/<class>/*.JPEG and val/<class>/*.JPEG, to try; synthetic needs no path;
            task takes what the class in model.name brings (--task is short for both), script what a loop of your own gives
        batch_size: images a gradient is averaged over, per worker (default: the network's recipe; with more than 8 workers in a
            short run a half, a quarter, ... of it, and of the rate, if both are left open: docs/rules.md)
        min_batch: images that a batch, or a part of one, has at least; a rest that is smaller goes with the batch before, and if
            damaged images leave fewer, all of a batch are left out and counted (default: what the network can be trained on, 2 if its
            batch norm refuses one image, 1 otherwise)
        image_size: side of the square that the network sees, in pixels (default: what the weights expect, or the size of the
            images if all have one, 224 at most)
        resize: short side that images get before the crops of validation and of the augmentations paper and pad_crop (default:
            what the weights expect; or 256/224 of image_size, as torchvision, but image_size if the images are no larger)
        mean: of each channel, of pixels in 0..1, with commas between them; an image is (pixel / 255 - mean) / std (default: what
            the weights expect, if they are torchvision's or a checkpoint, or the data set's)
        std: of each channel, likewise
        augment: none, shift, pad_crop (He 2016 for CIFAR), paper (crops, flips and colours of Krizhevsky 2012), reference
            (torchvision's) (default: recipe)
        threads: threads of each worker that read and decode
        lease_batches: batches lent to a worker at a time; more, if a push of its holds more
        on_bad_image: stop at a damaged image, or leave it out and count it
    """

    path: str = free("digits")
    source: Literal["shards", "folder", "synthetic", "task", "script"] = fixed(
        "shards", "the order of the images would be another one"
    )
    batch_size: Optional[int] = None
    min_batch: Optional[int] = None
    image_size: Optional[int] = None
    resize: Optional[int] = None
    mean: Optional[str] = None
    std: Optional[str] = None
    augment: Optional[Literal["none", "shift", "pad_crop", "paper", "reference"]] = None
    threads: int = free(2)
    lease_batches: int = 4
    on_bad_image: Literal["fail", "skip"] = free("fail")


@dataclass
class ModelConfig:
    """The network.

    Args:
        name: digits_cnn, alexnet, alexnet2, resnet18, resnet50, torchvision:NAME, or package.module:function (a class of your own: --task package.module:Class)
        recipe: settings for what is left open: small_images (32 pixels), small_transformer, imagenet_resnet, imagenet_alexnet,
            imagenet_transformer, digits; auto takes a transformer's, with AdamW, for torchvision's vit, swin, maxvit and convnext,
            small ones for images of up to 64 pixels, or what the network came with
        weights: state_dict file (torchvision's or your own), checkpoint, or torchvision's name for weights that torch has
            downloaded (ResNet18_Weights.IMAGENET1K_V1) to begin with, in place of random weights
        partial_weights: take what fits of it, such as all but a head for other classes
        batchnorm: statistics to validate with; recalibrate measures them anew on the validated version, server_ema takes the
            server's running mean of those of every push, which costs one more packet a push, local the running ones of the
            worker that validates
    """

    name: str = fixed(
        "digits_cnn",
        "its weights do not fit another network. Begin a new run with --model.weights for what fits",
    )
    recipe: Literal[
        "auto",
        "small_images",
        "small_transformer",
        "imagenet_resnet",
        "imagenet_alexnet",
        "imagenet_transformer",
        "digits",
    ] = "auto"
    weights: str = ""
    partial_weights: bool = False
    batchnorm: Literal["recalibrate", "server_ema", "local"] = "recalibrate"


@dataclass
class RuleConfig:
    """How the server applies a gradient.

    Args:
        name: asgd applies every gradient on arrival; docs/rules.md tells of all of them
        own: package.module:Class, a class of your own that inherits from asgd_mpi.Rule and moves the weights in place of asgd, sasgd,
            ssp or ringmaster; --rule package.module:Class is short for it
        own_options: of a rule of your own; its settings, such as beta=0.9,steps=3
        optimizer: whose step a gradient makes, with the rules asgd, sasgd, softsync, ringmaster, ssp, sync, sync_backup and
            diloco (the inner step): sgd, adagrad, adamw, adam or nadamw. --rule adamw is asgd with adamw (default: the rule's
            own, or the network's recipe)
        momentum: 0 for plain SGD (default: the network's recipe, if the rule is to have momentum)
        momentum_at: who keeps the velocity; dana (each worker, looking ahead), worker, server or server_nag (the least
            stable ones), none (default: the rule's own, dana for asgd). With adamw: dana and worker let each worker keep Adam's
            means of its own gradients, none lets the server
        staleness: weight of a gradient by its staleness; delay_adaptive, inverse or constant (default: delay_adaptive)
        weight_decay: L2 penalty; so many times the weights is added to each gradient, as by torch.optim.SGD, wherever the
            momentum is (default: the network's recipe). With adamw and nadamw a step shrinks the weights by that times the rate
            (default: 0.01), as by torch.optim.AdamW
        no_decay: parameters without weight decay: bias, norm (those of normalisation, and other weights of one dimension) and
            position (class tokens, embeddings of positions), with commas between them (default: the network's recipe, or none)
        groups: parameters with a rate, a weight decay or betas of their own, as the optimizer of a loop of your own has them: written
            down, so that a resume and a replay with others are refused, and not to be given
        beta1: of adamw, adam and nadamw; decay of the mean of gradients
        beta2: of adamw, adam and nadamw; decay of the mean of their squares; 0.95 is usual for language
        eps: of adamw, adam and nadamw; added to the root of that mean
        max_drift: gradients are scaled down, on the worker, so that one push of each worker moves the weights by this share
            of their norm at most; 0 for no limit, by default what suits the rule and the number of workers
        clip_norm: the gradient of a batch is scaled down to this norm, on the worker (default: no limit)
        ema_samples: samples over which a running mean of the weights forgets, which the server keeps beside them and saves as
            ema.pt; 0 for none. A fiftieth of the run is a good value
        warm_start_epochs: one worker alone trains so many epochs before the others join
        splits: of softsync; a step is the mean of workers / splits gradients
        max_staleness: of ringmaster; gradients as stale as this are dropped; 0 for twice the number of workers
        slack: of ssp; steps that a worker may be ahead of the slowest one
        backup: of sync_backup; workers that a step does not wait for
        alpha: of easgd and eamsgd; the pull between worker and centre at an exchange; 0 for 0.9 / workers
        dc_lambda: of dc_asgd_c and dc_asgd_a; strength of the compensation (default: 0.04 and 2)
        dc_decay: of dc_asgd_a; decay of the mean square
        outer_rate: of diloco; share of the way that its workers went, in the mean, that the server goes
        outer_momentum: of diloco; Nesterov's at the server
        outer_pushes: of diloco; pushes that make a step of that momentum; 0 for as many as there are workers
    """

    # mypy takes no Literal that is computed
    name: Literal[RULES] = "asgd"  # type: ignore[valid-type]
    own: str = ""
    own_options: str = ""
    optimizer: Optional[Literal[OPTIMIZERS]] = None  # type: ignore[valid-type]
    momentum: Optional[float] = None
    momentum_at: Optional[Literal["dana", "worker", "server", "server_nag", "none"]] = None
    staleness: Optional[Literal["delay_adaptive", "inverse", "constant"]] = None
    weight_decay: Optional[float] = None
    no_decay: Optional[str] = None
    groups: Optional[str] = None
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_drift: Optional[float] = None
    clip_norm: Optional[float] = None
    ema_samples: int = 0
    warm_start_epochs: float = 0.0
    splits: int = 1
    max_staleness: int = 0
    slack: int = 3
    backup: int = 1
    alpha: float = 0.0
    dc_lambda: Optional[float] = None
    dc_decay: float = 0.95
    outer_rate: float = 0.7
    outer_momentum: float = 0.9
    outer_pushes: int = 0


@dataclass
class ScheduleConfig:
    """The learning rate, a function of the samples applied at the server.

    Args:
        name: constant, step (times gamma every step_epochs), cosine or poly (both to 0 at the end) (default: recipe)
        lr: learning rate of one gradient (default: the network's recipe, with data.batch_size); a step of sync and sync_backup takes so many times
            that as it is the mean of gradients
        warmup_epochs: epochs over which the rate rises linearly from lr / workers (default: the network's recipe,
            a tenth of the run at most)
        step_epochs: epochs between two steps of `step`
        gamma: factor of a step of `step`
        power: of `poly`, (1 - the part of the run that is done) ** power
    """

    name: Optional[Literal["constant", "step", "cosine", "poly"]] = None
    lr: Optional[float] = None
    warmup_epochs: Optional[float] = None
    step_epochs: float = 30.0
    gamma: float = 0.1
    power: float = 1.0


@dataclass
class ExchangeConfig:
    """How weights and gradients travel.

    Args:
        ring: snapshots kept in the window; a fetch is torn only if ring - 1 newer ones appear while it is read
        n_push: batches whose gradients are summed up in one push; auto never waits for the server, and sums on instead. Of
            diloco auto is the number of batches, 50 or more, behind which a push and a fetch travel, measured at the start
            (default: 1, or the rule's own)
        n_fetch: batches between two fetches, a multiple of n_push (default: n_push, so that n_push is the paper's n_sync)
        overlap: push and fetch while the next gradient is computed, which makes it staler (default: with n_push auto)
        wire: format of the numbers on their way; in bfloat16 and float16 half of the bytes of float32. Gradients and fetched
            weights are then rounded to 8 or 11 bits; what the server keeps, validates and saves stays float32. int8 and int4
            round what is pushed to whole multiples of a power of two, topk pushes the largest numbers alone; what they leave
            out a worker adds to its next push. auto measures the links and a step first, and takes the first of float32,
            bfloat16, int8, int4 and topk that leaves 95 % of the time for steps
        fetch_wire: format of fetched weights; float32, bfloat16 or float16 (default: wire, bfloat16 if that is for pushes alone)
        density: of topk; share of the numbers that is pushed
        density_warmup_epochs: of topk; epochs in which the density falls from 25 % by quarters
        servers: ranks that share the weights out among them, on other hosts than rank 0 if there are any; each applies its
            slice of every gradient, in the order that rank 0 decides. Rank 0 and the last ranks serve, the others compute
    """

    ring: int = free(3)
    n_push: Union[int, Literal["auto"], None] = None
    n_fetch: Optional[int] = None
    overlap: Optional[bool] = None
    wire: Literal[WIRES + rulebook.COMPRESSED + ("auto",)] = "float32"  # type: ignore[valid-type]
    fetch_wire: Optional[Literal[WIRES]] = None  # type: ignore[valid-type]
    density: float = 0.01
    density_warmup_epochs: float = 0.0
    servers: int = free(1)


@dataclass
class ComputeConfig:
    """Where a worker computes.

    Args:
        device: auto takes the GPU at the worker's position among the workers of its node, or the CPU if it has none
        threads: torch threads of each rank; 0 shares the cores of a node among its ranks
        workers_per_gpu: how many workers may share a GPU; more than that are refused before the run
        precision: of forward and backward; bfloat16 and float16 (with a scaled loss) under autocast, weights stay float32
        micro_batches: compute a batch in so many parts, one after the other, for networks that need much memory
        channels_last: lay images and convolutions out by pixels, as fast GPU kernels want it
        compile: let torch.compile compile the network
    """

    device: Literal["auto", "cpu", "cuda"] = free("auto")
    threads: int = free(0)
    workers_per_gpu: int = free(1)
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    micro_batches: int = 1
    channels_last: bool = fixed(False, "the momentum that was saved is laid out in the other way")
    compile: bool = False


@dataclass
class StagesConfig:
    """A replica of several ranks, each with a part of the network; for networks too large for one GPU.

    Args:
        number: ranks of a replica, all on one host; the ranks beside the server must be a multiple of it
        cut: into a chain (a pipeline), as the next three say, or into the two columns of a network that is drawn so, such as
            alexnet2, which work on the same images at the same time
        balance: cut the network so that the stages take the same time, which is measured, or the same memory
        at: names of the modules that the second and each further stage begin with, such as layer2,layer4; empty for balance
        schedule: 1f1b computes backward as soon as possible, and holds fewer activations; gpipe all forward passes first.
            The parts of a batch are those of compute.micro_batches; 4 for each stage keep them busy
    """

    number: int = free(1)
    cut: Literal["chain", "columns"] = free("chain")
    balance: Literal["time", "memory"] = free("time")
    at: str = free("")
    schedule: Literal["1f1b", "gpipe"] = free("1f1b")

    @property
    def names(self) -> list[str]:
        return [name.strip() for name in self.at.split(",") if name.strip()]


@dataclass
class RecordConfig:
    """What the run directory keeps.

    Args:
        interval_s: seconds that one line of a metrics file covers
        spans: stretches of time of each rank to write one by one, for a trace (report --trace); 0 for none, 90 bytes each
        tensorboard: write the server's numbers for TensorBoard, too, into tensorboard/ of the run directory
        hash_snapshots: write a hash of every published and fetched snapshot (a check of the exchange; slow)
    """

    interval_s: float = free(1.0)
    spans: int = free(0)
    tensorboard: bool = free(False)
    hash_snapshots: bool = free(False)


@dataclass
class CheckpointConfig:
    """When the run is saved, beside at the end and on a signal.

    Args:
        every_s: seconds between two checkpoints; 0 for none by time
        every_samples: images trained between two checkpoints; 0 for none by images
        keep: checkpoints that are kept beside the best version
    """

    every_s: float = free(600.0)
    every_samples: int = free(0)
    keep: int = free(3)


@dataclass
class FailureConfig:
    """What becomes of a rank that fails or falls behind.

    Args:
        retire_after_s: a worker that holds work and is not heard of for so long is retired, until it is heard of again
        max_nonfinite: gradients in a row that are not finite, until their worker is retired for good
        grace_s: how long the server waits for the workers to finish their step when the run ends or is left
        stall_s: without progress for so long, the stacks of all ranks are written to stalls/ of the run directory
    """

    retire_after_s: float = free(300.0)
    max_nonfinite: int = free(3)
    grace_s: float = free(30.0)
    stall_s: float = free(120.0)


@dataclass
class Config:
    """All sections; `--section.key value` on the command line, the same nesting in YAML."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    rule: RuleConfig = field(default_factory=RuleConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    stages: StagesConfig = field(default_factory=StagesConfig)
    record: RecordConfig = field(default_factory=RecordConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    failure: FailureConfig = field(default_factory=FailureConfig)


@dataclass(frozen=True)
class Recipe:
    """The settings that a network is known to train with; the configuration overrides each of them."""

    epochs: float
    batch_size: int
    augment: str
    momentum: float
    weight_decay: float
    schedule: str
    lr: float
    warmup_epochs: float = 0.0
    source: str = ""  # who trained with it
    # a name of rulebook.OPTIMIZERS; the rate and the decay are for that
    optimizer: str = "sgd"
    no_decay: str = ""
    # share of the run that its warm-up takes at most, however few epochs are asked for
    most_warmup: float = 0.1


SHORTHANDS = {
    "--data": "--data.path",
    "--model": "--model.name",
    "--rule": "--rule.name",
    "--seed": "--run.seed",
    "--epochs": "--run.epochs",
    "--lr": "--schedule.lr",
    "--batch-size": "--data.batch_size",
    "--n-sync": "--exchange.n_push",
    "--resume": "--run.resume",
    "--override": "--run.override",
    "--dry-run": "--run.dry_run",
    "--stages": "--stages.number",
    "--servers": "--exchange.servers",
    "--inject": "--run.inject",
    "--weights": "--model.weights",
    "--print-config": "--print_config",
}
# words of other trainers, and what they are here
FAMILIAR = {
    "--workers": "the launcher decides: `mpirun -np 5` starts 1 server and 4 workers",
    "--num-workers": "threads that read and decode images are --data.threads",
    "--gpus": "every worker takes a GPU: `mpirun -np 5` uses 4",
    "--gpu": "each worker takes its own; --compute.device cpu takes none",
    "--bs": "that is --batch-size",
    "--out": "that is --run.dir",
    "--output-dir": "that is --run.dir",
    "--optimizer": "that is --rule, with --rule.momentum",
    "--amp": "that is --compute.precision bfloat16",
}
# what `--help` lists at first: what people set, in the order in which they meet it
ESSENTIALS = (
    "--config",
    "--data",
    "--model",
    "--weights",
    "--epochs",
    "--batch-size",
    "--lr",
    "--rule",
    "--n-sync",
    "--seed",
    "--run.dir",
    "--resume",
    "--override",
    "--dry-run",
    "--data.augment",
    "--data.threads",
    "--compute.device",
    "--compute.workers_per_gpu",
    "--compute.precision",
    "--stages",
    "--servers",
    "--checkpoint.every_s",
)


def make_parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog="python -m asgd_mpi.train",
        exit_on_error=False,
        default_env=False,
        description="Train a network by asynchronous SGD: rank 0 serves the weights, every other rank is a worker. Start it "
        "with mpirun or srun; without any option it trains on handwritten digits.",
    )
    parser.add_argument(
        "--config",
        action="config",
        metavar="FILE",
        help="YAML file with the same nesting as the options.",
    )
    parser.add_class_arguments(Config, as_group=False)
    return parser


def parse(arguments: list[str], base: Config | None = None) -> Config:
    """Read a command line (with `--config FILE` anywhere in it); what it does not give is taken from `base`.

    Raises ConfigError; SystemExit(0) for --help.
    """
    parser = make_parser()
    wanted = help_text.asked(arguments)
    if wanted is not None:
        print(help_text.text(parser, SHORTHANDS, ESSENTIALS, whole=wanted == "all"))
        raise SystemExit(0)
    for path in config_files(arguments):
        _check_file(path)
    try:
        with redirect_stderr(io.StringIO()):
            if base:
                parser.set_defaults(
                    {
                        f"{section}.{name}": value
                        for section, values in dataclasses.asdict(base).items()
                        for name, value in values.items()
                    }
                )
            namespace = parser.parse_args(_long_forms(arguments))
    except jsonargparse.ArgumentError as error:
        raise ConfigError(_explain(str(error), parser)) from None
    except OSError as error:
        raise ConfigError(
            f"--config {error.filename}: it cannot be read ({error.strerror}); give a file that you may read."
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--config: the file is not UTF-8 ({error.reason} at byte {error.start}); save it as that."
        ) from None
    config = _expanded(_made(parser, namespace))
    limits.check(config)
    return config


def of_this_start(config: Config, start: Config) -> Config:
    """Return the configuration of a run with what `start` says of one start only: it is never taken from an earlier one."""
    once = {
        name: getattr(start.run, name)
        for name in ("resume", "override", "accept_gaps", "dry_run", "inject")
    }
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **once))


def ours(arguments: Sequence[str]) -> list[str]:
    """Return those words of a script's command line that are options of ours, with their values; others are left alone.

    Raises ConfigError for a name that only one of ours can have, such as --exchange.npush.
    """
    parser = make_parser()
    sections = tuple(f"--{section.name}." for section in dataclasses.fields(Config))
    names = {*parser._option_string_actions, *SHORTHANDS} - {"-h", "--help"}
    found, takes_value = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if name.startswith(sections):
            name = _long_form(name)
        if takes_value or name in names:
            found.append(argument)
        elif name.startswith(sections):
            raise ConfigError(_explain(f"unrecognized arguments: {argument}", parser))
        takes_value = name in names and not equals and name != "--dry-run" and not takes_value
    return found


def long_names(short: Mapping[str, object]) -> dict[str, object]:
    """Return keyword arguments such as `lr` by the dotted names of their options. Raises ConfigError."""
    names = {name[2:].replace("-", "_"): long[2:] for name, long in SHORTHANDS.items()}
    for name in short:
        if name not in names:
            raise ConfigError(
                f"{name}=...: there is no such option; short names are {', '.join(sorted(names))}; give others as "
                'options={"section.key": value}.'
            )
    given = {names[name]: value for name, value in short.items()}
    if ":" in str(given.get("rule.name", "")):
        given["rule.own"] = given.pop("rule.name")
    return given


def settings(config: Config) -> dict[str, object]:
    """All settings by their dotted names."""
    return {
        f"{section}.{name}": value
        for section, values in dataclasses.asdict(config).items()
        for name, value in values.items()
    }


def options(kind: str) -> dict[str, str]:
    """Return the dotted names of the options of a kind, `free` or `fixed` (with the reason) or `defines` (any that is not free)."""
    every = {
        f"{section}.{one.name}": one.metadata
        for section, kind_of_section in typing.get_type_hints(Config).items()
        for one in dataclasses.fields(kind_of_section)
    }
    return {
        name: metadata.get("fixed", "")
        for name, metadata in every.items()
        if (kind == "defines" and "free" not in metadata) or kind in metadata
    }


def in_force(config: Config, num_workers: int) -> Config:
    """With the values that a run of so many workers has where a complete configuration leaves them open: no field is None."""
    rule = dataclasses.replace(
        config.rule,
        max_drift=rulebook.max_drift(config.rule, num_workers),
        clip_norm=config.rule.clip_norm or 0.0,
        groups=config.rule.groups or "",
    )
    data = dataclasses.replace(
        config.data,
        min_batch=config.data.min_batch or 1,
        resize=config.data.resize or 0,
        mean=config.data.mean or "",
        std=config.data.std or "",
    )
    return dataclasses.replace(config, rule=rule, data=data)


def record(config: Config, num_workers: int) -> str:
    """Return what a run writes down: the values in force, and which of them follow from the number of workers. See `asked`."""
    text = to_yaml(in_force(config, num_workers))
    if config.rule.max_drift is None:
        text = f"{BY_WORKERS}rule.max_drift\n{text}"
    return text


def asked(text: str) -> Config:
    """Read what `record` wrote, with what followed from the number of workers left open. Raises ConfigError."""
    config = from_yaml(text)
    if text.startswith(BY_WORKERS):
        config = dataclasses.replace(config, rule=dataclasses.replace(config.rule, max_drift=None))
    return as_before(config)


def as_before(config: Config) -> Config:
    """Return the configuration of a run, where its record is older than an option with what was in force then.

    Without resize, mean and std: 0 and "", the rule of then (data.augment) and the data set's. Without an optimizer: the rule's; no_decay: none.
    Without groups: none, but those of a loop are not known.
    Without fetch_wire: wire.
    """
    data = config.data
    exchange = config.exchange
    if exchange.fetch_wire is None:
        exchange = dataclasses.replace(exchange, fetch_wire=fetch_wire(exchange))
    resize = 0 if data.resize is None else data.resize
    return dataclasses.replace(
        config,
        data=dataclasses.replace(data, resize=resize, mean=data.mean or "", std=data.std or ""),
        rule=dataclasses.replace(
            config.rule,
            optimizer=rulebook.optimizer_of(config.rule),
            no_decay=config.rule.no_decay or "",
            groups=config.rule.groups if data.source == "script" else "",
        ),
        exchange=exchange,
    )


def fetch_wire(exchange: ExchangeConfig) -> str:
    """Return the format of fetched weights where the user names none."""
    if exchange.wire == "auto":
        # until it has been chosen
        return "float32"
    return rulebook.fetch_wire(exchange.wire)


def as_text(numbers: Sequence[float]) -> str:
    """Return what `limits.numbers` reads, to the bit."""
    return ",".join(repr(float(number)) for number in numbers)


def to_yaml(config: Config) -> str:
    parser = make_parser()
    return parser.dump(jsonargparse.Namespace(**dataclasses.asdict(config)), skip_unset=False)


def from_yaml(text: str) -> Config:
    """Read what `to_yaml` wrote. Raises ConfigError."""
    parser = make_parser()
    try:
        sections(text)
        namespace = parser.instantiate(parser.parse_string(text))
        config = Config(
            **{section.name: namespace[section.name] for section in dataclasses.fields(Config)}
        )
        for name, value, kinds in limits.values(config):
            if value is None and type(None) not in kinds:
                raise ValueError(f"{name} is empty, and is {limits.in_words(kinds)}")
        return config
    except (
        Exception
    ) as error:  # what the parser raises on a text that is none of ours is its own affair
        raise ConfigError(
            f"the configuration cannot be read: {type(error).__name__}: {one_line(str(error))}"
        ) from None


def read(path: Path, reader: Callable[[str], Config] = from_yaml) -> Config:
    """Read the configuration of a run directory with `from_yaml` or `asked`. Raises ConfigError, which names the file."""
    try:
        return reader(bounded.read(path, bounded.LARGEST_YAML).decode())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from None


def config_files(arguments: Sequence[str]) -> list[str]:
    """Return the files that `--config` names in a command line."""
    files = [
        value
        for name, equals, value in (argument.partition("=") for argument in arguments)
        if name == "--config" and equals
    ]
    return files + [value for name, value in zip(arguments, arguments[1:]) if name == "--config"]


def _check_file(path: str) -> None:
    """Raise ConfigError if a file asks for more than settings; what cannot be read the parser tells."""
    try:
        sections(bounded.read(Path(path).expanduser(), bounded.LARGEST_YAML).decode())
    except bounded.OutOfBounds as error:
        raise ConfigError(f"--config {path}: {error.strerror}; it is no configuration.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        pass
    except ValueError as error:
        raise ConfigError(f"--config {path}: {error}.") from None


def sections(text: str) -> dict:
    """Return the sections of a YAML text. Raises ValueError, yaml.YAMLError unless it holds nothing but plain values in sections.

    The parser would import what a `class_path` names, and read the file that a `config` names, before it refuses them; and a
    file may come from somebody else.
    """
    found = bounded.load_yaml(text)
    if not isinstance(found, dict):
        return {}
    for name, values in found.items():
        if name == "config":
            raise ValueError(
                "it names another file to read (config); give that one with --config, too"
            )
        if isinstance(values, str) and "." not in str(name):
            raise ValueError(f"{name} is text where settings are needed, one a line below it")
        if not isinstance(values, dict):
            values = {name: values}
        for key, value in values.items():
            if (
                {"class_path", "init_args"} & set(str(key).split("."))
                or isinstance(value, dict)
                or str(value).lstrip().startswith("{")
            ):
                raise ValueError(
                    f"{name} holds more than settings and their values ({key}); nothing of it is loaded"
                )
            if isinstance(value, list) and any(isinstance(one, (list, dict)) for one in value):
                raise ValueError(
                    f"{name} holds lists within lists ({key}); nothing of it is loaded"
                )
            parts = value if isinstance(value, list) else [value]
            if not all(_is_plain(one) for one in parts):
                raise ValueError(
                    f"{name} holds what is no number of 64 bits, no text and no date ({key}); nothing of it is loaded"
                )
    return found


def of_other_kinds(found: dict[str, object]) -> list[str]:
    """Return the options, by dotted names, whose values are of another kind than theirs; names that are no options are left out."""
    kinds = {
        f"{section}.{name}": of
        for section, kind in typing.get_type_hints(Config).items()
        for name, of in limits.kinds_of(kind).items()
    }
    return [
        option
        for option, value in found.items()
        if option in kinds and not any(_is_of(kind, value) for kind in kinds[option])
    ]


def _is_of(kind: object, value: object) -> bool:
    """Return whether a value is of a kind."""
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    if isinstance(kind, type):
        return isinstance(value, kind)
    return value in typing.get_args(kind)


def _is_plain(value: object) -> bool:
    """Return whether a value can be one of a setting: YAML has tags for others."""
    if isinstance(value, str):
        # halves of characters, which cannot be written down
        return not re.search("[\ud800-\udfff]", value)
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return value is None or isinstance(value, (float, datetime.date))


def _long_forms(arguments: Sequence[str]) -> list[str]:
    """Return a command line without short forms; --task stands for two options, and --rule for one of two."""
    found = [_long_form(argument) for argument in arguments]
    following = [*found[1:], ""]
    for number, argument in enumerate(found):
        name, equals, value = argument.partition("=")
        if name == "--rule.name" and ":" in (value if equals else following[number]):
            found[number] = f"--rule.own{equals}{value}"
    tasks = [n for n, argument in enumerate(found) if argument.partition("=")[0] == "--task"]
    for number in tasks:
        found[number] = f"--model.name{found[number].removeprefix('--task')}"
    if tasks:
        found.insert(0, "--data.source=task")
    return found


def _long_form(argument: str) -> str:
    name, equals, value = argument.partition("=")
    if argument == "--dry-run":
        return "--run.dry_run=true"
    if name.startswith("--") and "." in name:
        name = "--" + name[2:].replace("-", "_")
    return SHORTHANDS.get(name, name) + equals + value


def _explain(message: str, parser: jsonargparse.ArgumentParser) -> str:
    """Say in one line what is wrong with a file, or with an option (`command_line.explain`)."""
    text = " ".join(message.split())
    if text.startswith("Unexpected config:"):
        return (
            "--config: the file holds no settings, or a section with nothing below it, such as `data:` alone; give values as "
            f"in `data: {{batch_size: 32}}`, or leave the section out ({text[19:79]})."
        )
    if text.startswith(("Problems parsing config", "Key must be")):
        return f"--config: {text.rstrip('.')}."
    unknown = text.removeprefix("unrecognized arguments: ").partition("=")[0].partition(" ")[0]
    if unknown in FAMILIAR and unknown != text:
        return f"unknown option {unknown}: {FAMILIAR[unknown]}."
    return command_line.explain(text, parser, {**SHORTHANDS, "--task": "--model.name"})


def _made(parser: jsonargparse.ArgumentParser, namespace: jsonargparse.Namespace) -> Config:
    """Return the configuration that was read. Raises ConfigError if something else than a section stands for one."""
    for section in dataclasses.fields(Config):
        if not isinstance(namespace[section.name], jsonargparse.Namespace):
            raise ConfigError(
                f"--config: {section.name} is {namespace[section.name]!r}; it is a section; put its values below it, indented."
            )
    whole = parser.instantiate(namespace)
    return Config(**{section.name: whole[section.name] for section in dataclasses.fields(Config)})


def _expanded(config: Config) -> Config:
    """With ~ and $VARIABLES of paths replaced, as a shell would: it does not see those of a file. Raises ConfigError."""
    for option in limits.PATHS:
        section, name = option.split(".")
        before = getattr(config, section)
        if isinstance(path := getattr(before, name), str):
            changed = dataclasses.replace(before, **{name: limits.expand(path, option)})
            config = dataclasses.replace(config, **{section: changed})
    return config

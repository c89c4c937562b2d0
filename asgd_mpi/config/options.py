"""Every option of a run: nested dataclasses.

Pure: no MPI, no torch. `config.parse` makes a `Config` of an argument list; `config.written` writes it down, and reads it back.
A field that is None stands for the recipe of the chosen network (`Recipe`), and is filled in by `resolved.with_recipe`, so that
the configuration that a run writes down is complete.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Optional, Union


from asgd_mpi.config import rulebook

RULES = tuple(rulebook.RULEBOOK)
OPTIMIZERS = tuple(rulebook.OPTIMIZERS)
WIRES = ("float32", "bfloat16", "float16")
FETCHED = (*WIRES, "int8")  # of weights


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
        batch_size: images a gradient is averaged over, per worker (default: the network's recipe; with 8 workers or more in a
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
        outer_rate: of diloco; share of the way that its workers went, in the mean, that the server goes (default: 1; with
            outer_momentum 0.7, and 0.5 with exchange.overlap)
        outer_ahead: of diloco with exchange.overlap; a worker goes on from what it fetched and this share of the way that it has just
            pushed, since what all have pushed meanwhile is missing there; its own part of it is the least (default: 0.5)
        outer_momentum: of diloco; Nesterov's at the server, 0.9 in the papers, whose workers wait for each other
        outer_pushes: of diloco; pushes that make a step of that momentum; 0 for as many as there are workers
        steps_by_speed: of diloco; n_push batches are those of the fastest worker, and a slower one makes fewer, by its speed from
            push to push, so that all push at about one pace
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
    outer_rate: Optional[float] = None
    outer_ahead: Optional[float] = None
    outer_momentum: float = 0.0
    outer_pushes: int = 0
    steps_by_speed: bool = False


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
        ring: snapshots kept in the window; a fetch is torn, and done again, only if ring - 1 newer ones appear while it is read.
            Behind slow links, where a fetch takes as long as the others' pushes, give workers + 2
        n_push: batches whose gradients are summed up in one push; auto never waits for the server, and sums on instead. Of
            diloco auto is the number of batches, 10 or more, behind which a push and a fetch travel, measured at the start
            (default: 1, or the rule's own)
        n_fetch: batches between two fetches, a multiple of n_push (default: n_push, so that n_push is the paper's n_sync)
        overlap: push and fetch while the next gradient is computed, which makes it staler (default: with n_push auto)
        wire: format of the numbers on their way; in bfloat16 and float16 half of the bytes of float32. Gradients and fetched
            weights are then rounded to 8 or 11 bits; what the server keeps, validates and saves stays float32. int8 and int4
            round what is pushed to whole multiples of a power of two, topk pushes the largest numbers alone; what they leave
            out a worker adds to its next push. auto measures the links and a step first, and takes the first of float32,
            bfloat16, int8, int4 and topk that leaves 95 % of the time for steps
        fetch_wire: format of fetched weights; float32, bfloat16, float16 or int8, whose rounding is not kept, since each fetch is of
            the weights themselves (default: wire, bfloat16 if that is for pushes alone)
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
    fetch_wire: Optional[Literal[FETCHED]] = None  # type: ignore[valid-type]
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


def as_text(numbers: Sequence[float]) -> str:
    """Return what `limits.numbers` reads, to the bit."""
    return ",".join(repr(float(number)) for number in numbers)

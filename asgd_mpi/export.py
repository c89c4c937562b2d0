"""`python -m asgd_mpi.export RUN --format safetensors|onnx|torch`: the network of a checkpoint, as other programs read it.

    safetensors   the state dict of the plain module, under its names; what is known of it as metadata
    onnx          the network as a graph, in evaluation mode; the same metadata. The number of samples is left open if the network bears it
    torch         the state dict alone, as torch.save writes it

Only onnx needs the network's code: that of this package and of torchvision is free, for the user's own see runtime.trust. The
file is written beside its place, and has its name once it is whole.
"""

from __future__ import annotations

from asgd_mpi.process import interpreter

if __name__ == "__main__":  # before anything heavy is imported
    interpreter.begin()

import importlib.util
import inspect
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from asgd_mpi.config import command_line
from asgd_mpi.errors import ConfigError, tell
from asgd_mpi.model import networks
from asgd_mpi.model.blame import blamed
from asgd_mpi.process import ending
from asgd_mpi.record import checkpoint
from asgd_mpi.record.checkpoint import Manifest
from asgd_mpi.record.disk import unwritable
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.runtime import trust
from asgd_mpi.runtime.prepare import configured
from asgd_mpi.task import complete, open_task
from asgd_mpi.task.own import OwnTask

State = dict[str, torch.Tensor]
Inputs = tuple[tuple[Any, ...], dict[str, Any]]  # what a network is called with
SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch": ".pt"}
NEEDS: Mapping[str, tuple[str, ...]] = {
    "safetensors": ("safetensors",),
    "onnx": ("onnx", "onnxscript"),
    "torch": (),
}  # packages that write a format
BATCH = 2  # samples that a network is traced with: one alone would be taken for a constant


def make_parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog="python -m asgd_mpi.export",
        description="Write the network of a checkpoint as other programs read it.",
        short={"--task": "--model"},
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="A run directory (its best version, else its last one), a directory under its checkpoints/, or the ema.pt in one.",
    )
    parser.add_argument(
        "--format",
        default="safetensors",
        type=Literal["safetensors", "onnx", "torch"],
        help="safetensors or torch: the state dict of the plain module; onnx: the network.",
    )
    parser.add_argument(
        "--out",
        default="",
        metavar="FILE",
        help="Where it is written, and nothing may be yet (default: NETWORK-vVERSION.FORMAT, here).",
    )
    parser.add_argument(
        "--mean",
        default=False,
        type=bool,
        help="The running mean of the weights, of a run that keeps one (rule.ema_samples).",
    )
    parser.add_argument(
        "--model",
        default="",
        metavar="NAME",
        help="Of onnx: the network, by its name or as package.module:function, or the task as package.module:Class (--task is "
        "the same), in place of what the checkpoint names: code of your own is run only if you name it, or have trained this "
        "run here with it.",
    )
    return parser


@ending.of_command
def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().read(arguments)
    _demand_installed(options.format)
    path, why = _found(options.checkpoint, options.mean)
    checkpoint.tell_of_writers(path)
    state, manifest = checkpoint.load(path)
    is_mean = checkpoint.is_of_mean(path)
    out = Path(options.out or _name_of(manifest, is_mean, options.format))
    about, seen = _about(manifest, is_mean), ""
    with _staged(out) as file:
        if options.format == "onnx":
            module, inputs = _network(manifest, options.model, path)
            whose = f"{path} does not fit {options.model or manifest.model}"
            with blamed(whose, "Name the network that it was trained with: --model"):
                module.load_state_dict(state)
            seen = _write_onnx(file, module, inputs, about)
        elif options.format == "safetensors":
            _write_safetensors(file, state, about)
        else:
            checkpoint.write_tensors(file, state)
    if is_mean and any(name.endswith("running_mean") for name in state):
        tell(
            "note: the batch-norm statistics beside the running mean of the weights are those of the latest weights: measure them "
            "anew on training data (torch.optim.swa_utils.update_bn), as evaluate does",
            file=sys.stderr,
        )
    what = "the running mean of the weights at version" if is_mean else "version"
    scores = "".join(f", {name} {value:.4g}" for name, value in _scores(manifest, is_mean).items())
    tell(f"{what} {manifest.version} of {manifest.model}{why}{scores}: {out}{seen}")
    return 0


def _demand_installed(kind: str) -> None:
    """Raise ConfigError if a package that writes this format is missing."""
    missing = [name for name in NEEDS[kind] if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--format {kind} needs {' and '.join(missing)}, not installed here: pip install 'asgd_mpi[export]', or take --format torch."
        )


# ---- what is exported


def _found(given: str, is_mean: bool) -> tuple[Path, str]:
    """Return the checkpoint that is meant, or its ema.pt, and what to say of how it was found. Raises RunDirError, ConfigError."""
    path, why = Path(given), ""
    if trust.is_run(path):
        path, which = checkpoint.of_choice(RunDir.open(path), takes_best=not is_mean)
        why = f", the {which} of {given}"
    if is_mean and not checkpoint.is_of_mean(path):
        path = path.parent if path.name == checkpoint.MODEL else path
        if checkpoint.EMA_MODEL not in checkpoint.read_manifest(path).files:
            raise ConfigError(
                f"--mean true: {path} holds no running mean of the weights. Leave it out, or train with --rule.ema_samples."
            )
        path = path / checkpoint.EMA_MODEL
    return path, why


def _about(manifest: Manifest, is_mean: bool) -> dict[str, str]:
    """Return what is known of the weights, as formats take it: text by name, lists as JSON."""
    known: dict[str, Any] = {
        "network": manifest.model,
        "version": manifest.version,
        "samples": manifest.samples,
        "weights": "running mean" if is_mean else "latest",
        "software": manifest.software or checkpoint.software(),
    }
    if not manifest.is_own:
        names = ("image_size", "resize", "mean", "std", "class_names")
        known |= {name: getattr(manifest, name) for name in names}
    if scores := _scores(manifest, is_mean):
        known["scores"] = scores
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in known.items()
    }


def _scores(manifest: Manifest, is_mean: bool) -> dict[str, float]:
    """Return what exactly these weights came to, if they were validated."""
    if is_mean or manifest.top1_error is None:
        return {} if is_mean else manifest.metrics
    return {"accuracy": 1 - manifest.top1_error}


def _network(manifest: Manifest, named: str, path: Path) -> tuple[nn.Module, Inputs]:
    """Return the network of a checkpoint, without its weights, and what it takes for a few samples. Raises ConfigError."""
    name, run = named or manifest.model, checkpoint.run_of(path)
    if not manifest.is_own:
        trust.demand(name, named, run)
        size = manifest.image_size
        module = networks.build(name, manifest.num_classes, manifest.channels, size)
        return module.eval(), ((torch.randn(BATCH, manifest.channels, size, size),), {})
    if name.endswith(".py"):
        raise ConfigError(
            f"{path} was made by a training loop in {name}, and only that makes its network: take --format safetensors or torch, or "
            "call torch.onnx.export in the script, where the model holds its final weights once the loop has ended."
        )
    trust.demand(name, named, run, "--task")
    task = open_task(complete(configured([f"--task={name}"])))
    assert isinstance(task, OwnTask)
    module = task.build_module().eval()
    split = task.val if task.val.num_samples else task.train
    batch = task.trial(min(BATCH, split.num_samples), of_validation=split is task.val)
    return module, _inputs(module, task, batch)


def _inputs(module: nn.Module, task: OwnTask, batch: Any) -> Inputs:
    """Return what a task's `score` calls its network with. Raises ConfigError."""
    seen: list[Inputs] = []
    with (
        torch.no_grad(),
        blamed(f"{task.name} fails in `score`", "Mend that"),
        module.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
        ),
    ):
        task.own.score(module, batch)
    if not seen:
        raise ConfigError(
            f"{task.name}: `score` does not call its network as module(...), which is what onnx holds. Take --format safetensors."
        )
    return seen[0]


# ---- how it is written


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """Yield a file to write, which becomes `out` if nothing fails, with what lies beside it. Raises ConfigError, DiskRefuses."""
    if os.path.lexists(out):
        raise ConfigError(
            f"{out} is there already, and would be lost: remove it, or give another --out FILE."
        )
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent) as directory:
            yield Path(directory) / out.name
            # a network beyond 2 GB has its weights in files beside it, which come first
            for file in sorted(Path(directory).iterdir(), key=lambda one: one.name == out.name):
                os.replace(file, out.with_name(file.name))
    except OSError as error:
        raise unwritable(out, error) from error


def _write_safetensors(file: Path, state: State, about: dict[str, str]) -> None:
    from safetensors.torch import save_file

    # a copy of each: the format refuses tensors that share memory, as tied weights do
    copies = {name: one.clone(memory_format=torch.contiguous_format) for name, one in state.items()}
    file.touch()
    mode = file.stat().st_mode
    save_file(copies, file, {"format": "pt", **about})
    file.chmod(mode)  # it makes files that nobody else may read


def _write_onnx(file: Path, module: nn.Module, inputs: Inputs, about: Mapping[str, str]) -> str:
    """Write a network as it computes in evaluation mode; returns what it takes. Raises ConfigError."""
    args, kwargs = inputs
    bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    free = {0: torch.export.Dim.AUTO}
    shapes = pytree.tree_map(lambda leaf: free if _is_of_samples(leaf) else None, dict(bound))
    with blamed("the network cannot be written as onnx", "Take --format safetensors"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module, args, kwargs=kwargs, dynamo=True, dynamic_shapes=shapes, verbose=False
            )
        program.model.metadata_props.update(about)
        program.save(file)
    told = [
        f"{one.name} ({', '.join(str(size) if isinstance(size, int) else 'N' for size in one.shape)})"
        for one in program.model.graph.inputs
    ]
    return f", which takes {', '.join(told)}"


def _is_of_samples(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == BATCH


def _name_of(manifest: Manifest, is_mean: bool, kind: str) -> str:
    """Return the name of a file in the current directory."""
    network = re.sub(r"\W+", "_", manifest.model.removesuffix(".py"))
    return f"{network}-v{manifest.version}{'-mean' * is_mean}{SUFFIXES[kind]}"


if __name__ == "__main__":
    interpreter.loaded()
    interpreter.end(main())

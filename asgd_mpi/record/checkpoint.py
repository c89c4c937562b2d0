"""A checkpoint: one version of the network, in a directory of its own, readable without this package.

    model.pt        the state_dict of the plain module: torch.load(..., weights_only=True)
    manifest.json   what it is of: version, network, classes, images, errors, sha256 of model.pt

The manifest is written last; a directory without one is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import msgspec
import torch

from asgd_mpi.errors import RunDirError
from asgd_mpi.record.rundir import write_whole


class Manifest(msgspec.Struct):
    version: int
    samples: int
    model: str
    num_classes: int
    channels: int
    image_size: int
    data: str                 # fingerprint of the data set it was trained on
    mean: list[float]         # per channel: an image is (pixel / 255 - mean) / std
    std: list[float]
    top1_error: float
    top5_error: float
    sha256: str = ""          # of model.pt
    format: int = 1


def save(directory: Path, state: dict[str, torch.Tensor], manifest: Manifest) -> int:
    """Write a checkpoint; returns its size in bytes. Raises RunDirError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirError(f"cannot make the checkpoint directory {directory}: {error.strerror}. The trained weights "
                          "would be lost: free some space or permit writing there.") from error
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    manifest.sha256 = hashlib.sha256(content).hexdigest()
    write_whole(directory / "model.pt", content)
    write_whole(directory / "manifest.json", msgspec.json.format(msgspec.json.encode(manifest)))
    return len(content)


def load(path: str | Path) -> tuple[dict[str, torch.Tensor], Manifest]:
    """Read the checkpoint in directory `path` (or its model.pt). Raises RunDirError if it is missing or damaged."""
    path = Path(path)
    directory = path.parent if path.name == "model.pt" else path
    try:
        manifest = msgspec.json.decode((directory / "manifest.json").read_bytes(), type=Manifest)
        content = (directory / "model.pt").read_bytes()
    except OSError as error:
        raise RunDirError(f"{directory} is not a checkpoint: {error.strerror}: {error.filename}. Give a directory "
                          "under checkpoints/ of a run directory.") from error
    except msgspec.MsgspecError as error:
        raise RunDirError(f"the manifest of checkpoint {directory} is damaged: {error}. Take another checkpoint.") from error
    found = hashlib.sha256(content).hexdigest()
    if found != manifest.sha256:
        raise RunDirError(f"{directory / 'model.pt'} is damaged: its sha256 is {found[:16]}..., but {manifest.sha256[:16]}"
                          "... was written. Take another checkpoint.")
    return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu"), manifest

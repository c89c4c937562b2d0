"""Tensors from a file that somebody else may have written: nothing in it is run, and it holds what it claims to hold.

torch.load(weights_only=True) runs nothing, but believes what a file says of sizes: entries of a zip archive may be compressed
a thousandfold, and a tensor of 4 bytes may claim a shape of 2**40 numbers (a stride of 0), which allocates nothing until it
is copied. torch.save writes neither compressed entries nor more numbers than the file has bytes for; what does is refused
before it is read, or before it is copied.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from asgd_mpi.errors import RunDirError, one_line
from asgd_mpi.untrusted import bounded


def read_tensors(path: Path, is_mapped: bool = False) -> dict[str, torch.Tensor]:
    """Return a dict of tensors as `write_tensors` or torch.save wrote it; nothing in the file is run. Raises RunDirError.

    is_mapped: read what of them is looked at.
    """
    try:
        with bounded.open_plain(path) as file:
            num_bytes = os.fstat(file.fileno()).st_size
            _demand_stored(file, num_bytes)
        tensors = torch.load(path, weights_only=True, map_location="cpu", mmap=is_mapped)
    except bounded.OutOfBounds as error:
        raise RunDirError(
            f"{path} cannot be read as tensors: {error.strerror}. Take another file."
        ) from error
    except Exception as error:  # what torch raises on a damaged file is its own affair
        raise RunDirError(
            f"{path} cannot be read as tensors: {type(error).__name__} "
            f"{one_line(str(error).partition(chr(10))[0])}".rstrip()
            + ". Take another file."
        ) from error
    if not isinstance(tensors, dict):
        raise RunDirError(
            f"{path} holds a {type(tensors).__name__} in place of a state_dict (name -> tensor)."
        )
    for tensor in _tensors(tensors):
        _demand_held(path, tensor, num_bytes)
    return tensors


def _demand_stored(file, num_bytes: int) -> None:
    """Raise ValueError if a zip archive unpacks to more than it has bytes; torch.save writes its entries as they are."""
    if not zipfile.is_zipfile(file):
        # of an older torch: its sizes are compared with the file by torch
        return
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > num_bytes:
        raise ValueError(
            f"its entries unpack to {unpacked} bytes, and the file has {num_bytes}: torch.save does not compress"
        )


def _demand_held(path: Path, tensor: torch.Tensor, num_bytes: int) -> None:
    """Raise RunDirError if a tensor claims more than a file of so many bytes can hold."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise RunDirError(
            f"{path} holds a tensor of layout {tensor.layout} on {tensor.device}, and weights are dense and on the CPU. "
            "Take another file."
        )
    claimed = tensor.numel() * tensor.element_size()
    if claimed > num_bytes:
        raise RunDirError(
            f"{path} claims a tensor of {tensor.numel()} numbers, {claimed} bytes, and has {num_bytes} bytes in all. "
            "Take another file."
        )


def _tensors(held: object) -> Iterator[torch.Tensor]:
    """Yield every tensor within dicts, lists and tuples, each container once: one may be in many others."""
    seen, waiting = set(), [held]
    while waiting:
        one = waiting.pop()
        if isinstance(one, torch.Tensor):
            yield one
        elif isinstance(one, (Mapping, list, tuple)) and id(one) not in seen:
            seen.add(id(one))
            if isinstance(one, Mapping):
                one = list(one.values())
            waiting.extend(one)

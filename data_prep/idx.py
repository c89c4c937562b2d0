"""IDX files, the format of MNIST and its like: 0, 0, 8, number of dimensions, their lengths (big-endian), then the bytes."""

import gzip
import os
from pathlib import Path

import numpy as np

from asgd_mpi.errors import UserError


def read_idx(source: Path, name: str) -> np.ndarray:
    """Return what an IDX file of unsigned bytes holds, compressed by gzip (NAME.gz) or not; raise UserError."""
    path = next(
        (path for path in (source / name, source / f"{name}.gz") if os.path.exists(path)), None
    )
    if path is None:
        raise UserError(
            f"there is no {name} (or {name}.gz) in {source}: give --source DIR with the four IDX files of the set "
            "(Debian has those of Fashion-MNIST in dataset-fashion-mnist)."
        )
    try:
        data = (gzip.decompress if path.suffix == ".gz" else bytes)(path.read_bytes())
        dimensions = data[3]
        shape = np.frombuffer(data, ">u4", dimensions, offset=4)
        if data[:3] != b"\0\0\x08":
            raise ValueError("it does not begin as an IDX file of bytes does")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (ValueError, IndexError, EOFError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): fetch it again.") from error

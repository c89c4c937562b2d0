"""An error in a network's own code, told in one line with the user's last frame."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from asgd_mpi.errors import ConfigError, UserError

OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TORCH = os.path.dirname(os.path.abspath(torch.__file__))
LONGEST = 300  # characters of what the error says


@contextmanager
def blamed(whom: str, remedy: str = "Mend that, or take another network") -> Iterator[None]:
    """Turn what code of the user's raises into a ConfigError that begins with `whom`."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split())[:LONGEST]
        raise ConfigError(
            f"{whom}: {type(error).__name__}: {said}{_where(error)}. {remedy}."
        ) from error


def _where(error: BaseException) -> str:
    """Return the last line of the user's, or of torchvision's, that was running."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((OURS + os.sep, TORCH + os.sep, "<frozen"))
    ]
    if frames:
        return f" ({frames[-1].filename}, line {frames[-1].lineno}, in {frames[-1].name}: {frames[-1].line})"
    return ""

"""The modules of data_prep that are installed with this package: another package of that name may come first on the path."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from asgd_mpi.errors import ConfigError

PLACE = Path(__file__).resolve().parents[2]  # what asgd_mpi and data_prep lie in


def demand_ours() -> None:
    """Raise ConfigError if another package hides data_prep."""
    found = importlib.util.find_spec("data_prep")
    if found is None or found.origin is None or Path(found.origin).resolve().parents[1] != PLACE:
        raise ConfigError(
            f"another package is called data_prep ({found and found.origin}), and hides the one of {PLACE}: call this from "
            "another directory, or take that one off PYTHONPATH."
        )


def packer(name: str) -> ModuleType:
    """Import a module of data_prep, ours. Raises ConfigError if another package hides it."""
    demand_ours()
    return importlib.import_module(f"data_prep.{name}")

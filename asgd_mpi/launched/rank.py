"""A rank that `asgd_mpi.launch` has started: it calls a function by its name, and writes its error down for the caller.

python -m asgd_mpi.launched.rank ERRORS DIRECTORY MODULE FUNCTION WORDS...
"""

from __future__ import annotations

import importlib
import json
import operator
import sys
import time
import traceback
from pathlib import Path

from asgd_mpi.process.launchers import rank_by_launcher


def main(errors: str, directory: str, module: str, function: str, *words: str) -> None:
    """Call the function of a module that lies in `directory`, or on the path; `words`: its command line."""
    if directory:
        sys.path.insert(0, directory)
    try:
        home = importlib.import_module(module)
        sys.argv[:] = [home.__file__ or module, *words]
        operator.attrgetter(function)(home)()
    except Exception as error:
        rank, file = rank_by_launcher(), Path(errors)
        said = {
            "when": time.time(),
            "rank": rank,
            "kind": type(error).__name__,
            "message": str(error),
            "traceback": traceback.format_exc(),
        }
        (file / f"{rank}.json").write_text(json.dumps(said), encoding="utf-8")
        raise

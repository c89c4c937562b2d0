"""pytest-xdist hands out whole units of tests (tiers.py), in their order: a process knows the unit of each test, the one that hands out asks.

Not by the marks of `--dist loadgroup`: pytest-xdist 3.8 writes those into node ids, which pytest 9 does not let it change.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

try:
    from xdist.scheduler import LoadScopeScheduling
except ImportError:  # without it, tests run one after the other
    LoadScopeScheduling = object

# of a worker's input: the directory in which it writes down the unit of each test
PLACE = "units"


def tell(units: dict[str, str], workerinput: dict) -> None:
    """Write down the unit of each node id, in a process that runs tests."""
    (Path(workerinput[PLACE]) / f"{workerinput['workerid']}.json").write_text(json.dumps(units))


class UnitScheduling(LoadScopeScheduling):
    """One unit at a time to each process."""

    def __init__(self, config, log, place: Path):
        super().__init__(config, log)
        self.place = place
        self.units: dict[str, str] = {}

    def schedule(self) -> None:
        """Hand out the first units; all processes have collected, and so told."""
        if not self.units:
            for file in self.place.iterdir():
                self.units |= json.loads(file.read_text())
            shutil.rmtree(self.place)
        super().schedule()

    def _split_scope(self, nodeid: str) -> str:
        return self.units[nodeid]

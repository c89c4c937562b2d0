"""Which tests run when: marks by what a test uses, and by how long it took; nobody marks a test by hand.

A unit is what must run in one process to be paid once: the tests that share a costly fixture, else one long test alone, else
the short tests of a file. Units are handed out the longest first (by_unit.py).

`times.tsv` holds the measured times: CPU seconds, those of the ranks included, since others use the machine too. A test that it
does not name counts as short; `pytest --write-times` writes the times of the tests that were run into it.
"""

from __future__ import annotations

import re
import resource
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

TIMES = Path(__file__).parent / "times.tsv"
HEADER = "# CPU seconds of each test that takes 0.5 or more, its processes included. Written by: pytest --write-times\n"
SHORT_S = 0.5  # below this, no line in the file
ALONE_S = 2.0  # from here on, a test is a unit of its own
SLOW_S = 6.0  # from here on, a unit is not part of the tests of every day
# ... but these are, whatever they take: what one change in two breaks shows here
TRAININGS = {
    "test_train_mpi.py::test_every_push_is_applied_exactly_once_and_every_sample_is_used_exactly_once[openmpi-asgd_mpi.train-1-server]",
    "test_train_mpi.py::test_every_push_is_applied_exactly_once_and_every_sample_is_used_exactly_once[openmpi-asgd_mpi.train-3]",
}
EVERY_DAY = "not slow and not slurm and not chaos"


@dataclass(frozen=True)
class Seen:
    """What is known of a test before it runs."""

    file: str  # its name, without the folder
    name: str  # with its parameters
    folder: str
    uses: frozenset[str]  # fixtures, and those that are named by a parameter
    shared: tuple[str, ...] = ()  # fixtures of the file's scope, with their parameters

    @property
    def key(self) -> str:
        return f"{self.file}::{self.name}"


def marks_of_use(test: Seen) -> set[str]:
    """Return the marks that follow from what a test uses."""
    found = {"mpi"} if test.uses & {"openmpi", "mpich"} else set()
    if "cluster" in test.uses:
        found.add("slurm")
    if test.folder == "chaos":
        found.add("chaos")
    return found


def unit_of(test: Seen, seconds: Mapping[str, float]) -> str:
    """Return the name of the unit that a test belongs to."""
    if "cluster" in test.uses:
        return "the Slurm cluster"  # one on a host
    if test.shared:
        return " ".join([test.file, *test.shared])
    return test.key if seconds.get(test.key, 0.0) >= ALONE_S else test.file


def costs(tests: Iterable[Seen], seconds: Mapping[str, float]) -> dict[str, float]:
    """Return the measured time of each unit."""
    found: dict[str, float] = defaultdict(float)
    for test in tests:
        found[unit_of(test, seconds)] += seconds.get(test.key, 0.0)
    return found


def slow_units(tests: Iterable[Seen], seconds: Mapping[str, float]) -> set[str]:
    """Return the units that are left to the second part of the gate; the short tests of a file never are, however many."""
    tests = list(tests)
    of_files = {test.file for test in tests}
    kept = {unit_of(test, seconds) for test in tests if test.key in TRAININGS}
    return (
        {unit for unit, cost in costs(tests, seconds).items() if cost >= SLOW_S} - of_files - kept
    )


def read(path: Path = TIMES) -> dict[str, float]:
    """Return the measured seconds of each test that took long."""
    if not path.exists():
        return {}
    rows = (line.split("\t") for line in path.read_text().splitlines() if not line.startswith("#"))
    return {key: float(seconds) for seconds, key in rows}


def write(measured: Mapping[str, float], path: Path = TIMES) -> None:
    """Put new times in the place of old ones; tests that were not run keep theirs."""
    times = {
        key: seconds for key, seconds in (read(path) | dict(measured)).items() if seconds >= SHORT_S
    }
    longest_first = sorted(times.items(), key=lambda row: (-row[1], row[0]))
    path.write_text(HEADER + "".join(f"{seconds:.1f}\t{key}\n" for key, seconds in longest_first))


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of the processes that it has started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def seen(item) -> Seen:
    """Return what is known of a test of pytest's."""
    call, definitions = getattr(item, "callspec", None), item._fixtureinfo.name2fixturedefs
    named = re.findall(r"\b(?:openmpi|mpich)\b", call.id) if call else []
    shared = [
        name
        for name in item.fixturenames
        if name in definitions and definitions[name][-1].scope in ("module", "class")
    ]
    with_parameters = [
        f"{name}{call.indices[name]}" if call and name in call.indices else name
        for name in sorted(shared)
    ]
    return Seen(
        item.path.name,
        item.name,
        item.path.parent.name,
        frozenset({*item.fixturenames, *named}),
        tuple(with_parameters),
    )


def arrange(items: list, mark: Callable[[str], object]) -> dict[str, str]:
    """Mark each test and put the longest units first, each together in the order of its file; return the unit of each node id."""
    seconds = read()
    tests = {item: seen(item) for item in items}
    units = {item: unit_of(test, seconds) for item, test in tests.items()}
    of_unit, slow = costs(tests.values(), seconds), slow_units(tests.values(), seconds)
    for item, test in tests.items():
        for name in sorted(marks_of_use(test) | ({"slow"} if units[item] in slow else set())):
            item.add_marker(mark(name))
    items.sort(key=lambda item: (-of_unit[units[item]], units[item]))
    return {item.nodeid: units[item] for item in items}

"""The errors that a user can act on.

A verb prints a `UserError` as its message alone, without a traceback; every other exception is ours and keeps its
traceback. A message says what is wrong with the numbers, why it matters, and what to do.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from itertools import islice
from pathlib import Path
from typing import TextIO

# what a terminal obeys, all but \\t and \\n
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"
    # changes of the direction of writing
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
    # ends of lines, and what is not seen
    "\u2028\u2029\ufeff\U000e0000-\U000e007f"
    # halves of characters: bytes of names that are no UTF-8
    "\ud800-\udfff]"
)
LONGEST = 2000  # characters of one value that are shown


def printable(text: str) -> str:
    """Return a text with its control characters written out: what is shown may be out of a file that somebody else wrote."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """Return a name, a reason or another value as it is shown on a line of its own or in a cell: printable, and not too long."""
    line = printable(" ".join(text[:LONGEST].splitlines()).replace("\t", " "))
    if len(text) > LONGEST:
        line += f"... ({len(text)} characters)"
    return line


def plural(number: float, one: str, many: str = "") -> str:
    """Return the word or words for a number of things; `many` is `one` with an s unless it is given."""
    if number == 1:
        return one
    return many or f"{one}s"


def few(names: Collection[object], most: int = 3) -> str:
    """Return the first of some names, and how many more there are: `a, b, c and 5 more`."""
    shown = ", ".join(str(name) for name in islice(names, most))
    if len(names) > most:
        shown += f" and {len(names) - most} more"
    return shown


def tell(*values: object, file: TextIO | None = None) -> None:
    """Print what may hold names out of files of somebody else's: `printable`, and at once."""
    print(*(printable(str(value)) for value in values), file=file, flush=True)


class UserError(Exception):
    """Something that the user can put right; the message is all that is shown."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(UserError):
    """An unknown key, a wrong type or value, a combination that makes no sense, an impossible world size."""


class DataError(UserError):
    """A data set that cannot be used: missing, truncated, damaged, or not what the configuration expects."""


class RunDirError(UserError):
    """A run directory that cannot be written or read: no permission, full disk, missing or damaged files."""


class DiskRefuses(RunDirError):
    """A file of the run cannot be written: a full disk, a read-only one, or one that fails. All ranks meet the same."""


class TrainingDiverged(UserError):
    """The loss or the weights are no longer finite."""


TOO_FAST = (
    "The learning rate is too high for this staleness: try --schedule.lr at a third of its value, --schedule.warmup_epochs, a "
    "lower --rule.momentum, or fewer workers. Momentum on the server is the first suspect: with 8 workers and momentum 0.9 the "
    "stable rate is 13 times lower than without."
)


class DeadlineExceeded(UserError):
    """A wait that took longer than its limit; the message says who waited for whom, for what."""


class ServerLost(UserError):
    """The server's process has ended; the workers cannot go on."""


class RanksLost(UserError):
    """Processes have ended while all ranks were still getting ready; there is nothing to go on with."""


class RankFailed(Exception):
    """An exception on a rank that asgd_mpi.launch has started; the message has its traceback. `directory`: of the run, if any."""

    def __init__(self, message: str, directory: Path | None = None):
        super().__init__(message)
        self.directory = directory


class StageLost(UserError):
    """Another stage of this replica has failed, or its process has ended; the replica cannot go on."""


class WorkersLost(UserError):
    """No worker is left; the message says what became of them."""

"""Reading what somebody else may have written: plain files only, so many bytes of them, so deep, and no more.

A run directory, a data set or a checkpoint may have been sent. What is read whole has a limit of bytes, which is far above
that of the largest runs (docs/reliability.md); logs are read line by line, and a line has one; the depth of JSON and YAML has
one, and so has the number of values that a YAML text unfolds to. Devices, pipes and directories are no files here: some never
end, some never begin. Too much is an OSError, like a file that cannot be read; what is nested too deeply is a ValueError, as
everything else is that does not decode.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import yaml

LONGEST_LINE = 1 << 20  # bytes of a log: the momenta of 65,536 workers are 600 kB
# bytes of a manifest or another file of facts: 22,000 classes are 1 MB
LARGEST_JSON = 1 << 25
LARGEST_YAML = 1 << 20  # bytes of settings, which are a few thousand
DEEPEST_YAML = 16  # settings are 3 deep
MOST_YAML = 10_000  # values, those that an alias stands for counted wherever it stands


class OutOfBounds(OSError):
    """A file is larger than what it holds can be, or no plain file."""


def open_plain(path: Path) -> BinaryIO:
    """Open a plain file to be read. Raises OSError; never waits, as the opening of a pipe does."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OutOfBounds(
            errno.EINVAL, "it is a directory, a device or a pipe, and no plain file", str(path)
        )
    return open(descriptor, "rb")


def read(path: Path, most: int = LARGEST_JSON) -> bytes:
    """Return all of a file of at most `most` bytes. Raises OSError."""
    with open_plain(path) as file:
        content = file.read(most + 1)
        if len(content) > most:
            num_bytes = os.fstat(file.fileno()).st_size
            raise OutOfBounds(
                errno.EFBIG,
                f"it has {num_bytes} bytes, and such a file has at most {most}",
                str(path),
            )
    return content


def read_start(path: Path, most: int) -> bytes:
    """Return the first `most` bytes of a file. Raises OSError."""
    with open_plain(path) as file:
        return file.read(most)


def read_end(path: Path, most: int) -> bytes:
    """Return the last `most` bytes of a file. Raises OSError."""
    with open_plain(path) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - most))
        return file.read(most)


def lines(path: Path, tail_bytes: int | None = None) -> Iterator[bytes | None]:
    """Yield the lines of a log with their ends; None for one longer than LONGEST_LINE, which is passed over. Raises OSError.

    tail_bytes: only the whole lines in the last so many bytes.
    """
    with open_plain(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if tail_bytes is not None and num_bytes > tail_bytes:
            file.seek(num_bytes - tail_bytes)
            # of a line that begins before
            while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                pass
        for line in iter(partial(file.readline, LONGEST_LINE), b""):
            if len(line) < LONGEST_LINE or line.endswith(b"\n"):
                yield line
                continue
            while line and not line.endswith(b"\n"):
                line = file.readline(LONGEST_LINE)
            yield None


def decode_json(content: bytes, decoder: msgspec.json.Decoder) -> Any:
    """Return what JSON says. Raises msgspec.DecodeError, a ValueError, for whatever it cannot be."""
    try:
        return decoder.decode(content)
    except RecursionError:
        raise msgspec.DecodeError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise msgspec.DecodeError(f"it is no UTF-8 ({error.reason})") from None


def load_yaml(text: str) -> Any:
    """Return what a YAML text says, by yaml.safe_load. Raises ValueError for too much of it, and yaml.YAMLError."""
    if len(text) > LARGEST_YAML:
        raise ValueError(
            f"it has {len(text)} characters, and settings have a few thousand; it is no configuration"
        )
    _demand_few(text)
    return yaml.safe_load(text)


def _demand_few(text: str) -> None:
    """Raise ValueError if a YAML text is nested too deeply or unfolds to too many values; nothing of it is built."""
    count = 0
    begun: list[tuple[str | None, int]] = []  # (anchor, count before) of what is open
    sizes: dict[str | None, int] = {}  # by anchor
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = begun.pop()
            sizes[anchor] = count - before
            continue
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in begun):
                raise ValueError(f"*{event.anchor} stands for something that it is a part of")
            count += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.NodeEvent):
            if isinstance(event, yaml.CollectionStartEvent):
                begun.append((event.anchor, count))
            else:
                sizes[event.anchor] = 1
            count += 1
        if len(begun) > DEEPEST_YAML:
            raise ValueError(f"it is nested more than {DEEPEST_YAML} deep, and settings are 3 deep")
        if count > MOST_YAML:
            raise ValueError(
                f"it unfolds to more than {MOST_YAML} values, and settings have about a hundred"
            )

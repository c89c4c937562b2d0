"""How every command ends: with a status that docs/reliability.md names, and one line on stderr where its user can act.

`of_command` stands before the `main` of every command. Standard output may be a pipe whose reader has what it wanted
(`| head -1`), or a disk that is full: the first ends the command quietly, the second with an error of one line. Results are
files, written before text about them is printed, so that neither loses any. What standard error refuses is dropped: there is
nobody left to tell. Only the standard library is used here, as everywhere in this room.
"""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TextIO

from asgd_mpi.errors import ConfigError, UserError

FAULT, WRONG, DEGRADED, RESUME_ME = 1, 2, 3, 75  # 75 is EX_TEMPFAIL of sysexits.h
# as a shell sees a program that SIGINT, SIGPIPE ended: 128 + signal
INTERRUPTED, READER_LEFT = 130, 141

Main = Callable[..., "int | None"]


class ReaderLeft(SystemExit):
    """Nobody reads standard output any more: the command ends, quietly."""

    def __init__(self) -> None:
        super().__init__(READER_LEFT)


class OutputRefused(UserError):
    """Standard output cannot be written, for another reason than that nobody reads it."""


def of_command(main: Main) -> Callable[..., int]:
    """Make a `main` return its status whatever becomes of it: that of a UserError is 2, after its line on stderr."""

    @functools.wraps(main)
    def guarded(*arguments: object, **options: object) -> int:
        with _streams():
            try:
                return _printed(main, *arguments, **options)
            except ReaderLeft:
                return READER_LEFT
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                return WRONG
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr)
                return INTERRUPTED

    return guarded


def _printed(main: Main, *arguments: object, **options: object) -> int:
    """Return the status of a command once all that it printed has left this process."""
    try:
        status = main(*arguments, **options)
    except ReaderLeft:
        raise
    except (SystemExit, UserError):
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return status or 0


def words(arguments: Sequence[str] | None) -> list[str]:
    """Return what a `main` is called with; None is the command line of this process."""
    if arguments is None:
        arguments = sys.argv[1:]
    return list(arguments)


def demand_no_options(arguments: Sequence[str], about: str) -> None:
    """Say what a command without options is if it is asked with --help; raise ConfigError for anything else."""
    if arguments[:1] in (["--help"], ["-h"]):
        print(about)
        raise SystemExit(0)
    if arguments:
        raise ConfigError(
            f"unknown option {arguments[0]}: this command takes no options but --help. Leave it out."
        )


@contextmanager
def _streams() -> Iterator[None]:
    """Within, standard output and error are streams that say what becomes of them, unless somebody has replaced them."""
    _take_closed_descriptors()
    before = sys.stdout, sys.stderr
    if sys.stdout is sys.__stdout__:
        sys.stdout = _Output.like(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _Errors.like(sys.stderr, 2)
    during = sys.stdout, sys.stderr
    try:
        yield
    finally:
        with suppress(ReaderLeft, OutputRefused):
            sys.stdout.flush()
        sys.stderr.flush()
        # else a rank keeps what it prints in a file of its own, to the last moment
        if (sys.stdout, sys.stderr) == during:
            sys.stdout, sys.stderr = before


def _take_closed_descriptors() -> None:
    """Open what the shell has closed (`>&-`): else the next file that is opened becomes standard output."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


class _Stream(io.TextIOWrapper):
    """Text to a descriptor. What its encoding lacks is written out in ASCII, as Python does on standard error."""

    @classmethod
    def like(cls, stream: TextIO | None, descriptor: int) -> TextIO:
        """Return one that writes lines as soon as `stream` does; None is one that was closed, whose number is another file's now."""
        if stream is None:
            return cls(io.FileIO(os.devnull, "wb"), encoding="utf-8", errors="backslashreplace")
        raw = io.BufferedWriter(io.FileIO(descriptor, "wb", closefd=False))
        return cls(
            raw,
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=bool(stream.line_buffering),
            write_through=isinstance(stream, io.TextIOWrapper) and stream.write_through,
        )

    def write(self, text: str) -> int:
        with self._explained():
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        with self._explained():
            super().flush()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())  # takes what is still in the buffer
            os.close(null)
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        """Raise what an error of the descriptor means, or let it pass."""


class _Errors(_Stream):
    """Standard error: what it refuses is dropped."""


class _Output(_Stream):
    """Standard output: what it refuses ends the command."""

    def _tell(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            raise ReaderLeft from None
        raise OutputRefused(
            f"standard output cannot be written ({error.strerror}), so what this command prints is lost; free some "
            "space, or send it elsewhere."
        ) from None

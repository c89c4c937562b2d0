"""Pack image data sets into HDF5 shards; one module per kind of source, each a command line of its own."""

import sys
from collections.abc import Callable
from typing import NoReturn

from jsonargparse import CLI, ArgumentParser

from asgd_mpi import ending


class _DashedParser(ArgumentParser):
    """Spells options --shard-size where the function says shard_size."""

    def add_argument(self, *names: str, **settings):
        names = tuple(name.replace("_", "-") if name.startswith("--") else name for name in names)
        return super().add_argument(*names, **settings)


def run(command: Callable[..., None], positional: bool = False) -> NoReturn:
    """Call `command` with the command line's options, and end the process with its status.

    With `positional`, what has no default is given without its name.
    """
    sys.exit(_called(command, positional))


@ending.of_command
def _called(command: Callable[..., None], positional: bool) -> None:
    CLI(command, as_positional=positional, parser_class=_DashedParser)

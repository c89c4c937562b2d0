"""Pack image data sets into HDF5 shards; one module per kind of source, each a command line of its own."""

import sys
from collections.abc import Callable

from jsonargparse import CLI, ArgumentParser

from asgd_mpi.errors import UserError


class _DashedParser(ArgumentParser):
    """Spells options --shard-size where the function says shard_size."""

    def add_argument(self, *names: str, **settings):
        names = tuple(name.replace("_", "-") if name.startswith("--") else name for name in names)
        return super().add_argument(*names, **settings)


def run(command: Callable[..., None], positional: bool = False) -> None:
    """Call `command` with the command line's options; a UserError is one line on stderr and exit status 2.

    With `positional`, what has no default is given without its name.
    """
    try:
        CLI(command, as_positional=positional, parser_class=_DashedParser)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

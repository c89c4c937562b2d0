"""Pack image data sets into HDF5 shards; one module per kind of source, each a command line of its own."""

import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NoReturn

from asgd_mpi.config import command_line, limits
from asgd_mpi.process import ending


class _DashedParser(command_line.Parser):
    """Spells options --shard-size where the function says shard_size; jsonargparse looks for its own, --print_..., as they are."""

    def add_argument(self, *names: str, **settings):
        names = tuple(
            name if name.startswith("--print_") or name[:2] != "--" else name.replace("_", "-")
            for name in names
        )
        return super().add_argument(*names, **settings)


def make_parser(
    command: Callable[..., None], ranges: Mapping[str, limits.Range], positional: bool = False
) -> command_line.Parser:
    """Return the parser of a function's options; with `positional`, what has no default is given without its name."""
    # of a program that runs by `python -m`: its module, too
    module = sys.modules[command.__module__]
    spec, about = module.__spec__, (module.__doc__ or "").partition("\n\n")[0]
    parser = _DashedParser(
        prog=f"python -m {spec.name}" if spec else None, ranges=ranges, description=about
    )
    parser.add_function_arguments(command, as_group=False, as_positional=positional)
    return parser


def run(
    command: Callable[..., None],
    ranges: Mapping[str, limits.Range] = MappingProxyType({}),
    positional: bool = False,
) -> NoReturn:
    """Call `command` with the command line's options, and end the process with its status. `ranges`: of its numbers."""
    sys.exit(_called(command, ranges, positional))


@ending.of_command
def _called(
    command: Callable[..., None], ranges: Mapping[str, limits.Range], positional: bool
) -> None:
    command(**make_parser(command, ranges, positional).read(None))

"""Write the Slurm scripts of this package into a directory of yours: `python -m asgd_mpi.slurm_scripts DIR`.

Call DIR `slurm`, beside which the jobs are submitted: `sbatch slurm/train.sh`. Files that are there already stay as they are.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from asgd_mpi.errors import ConfigError
from asgd_mpi.process import ending


def scripts() -> Path:
    """Return where the scripts are: in an installed package within it, in a clone beside it."""
    package = Path(__file__).parent
    return next(place for place in (package / "slurm", package.parent / "slurm") if place.is_dir())


def write(directory: Path) -> list[Path]:
    """Copy the scripts that are not there yet; return them. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for script in sorted(scripts().iterdir()):
        if not (directory / script.name).exists():
            written.append(Path(shutil.copy(script, directory / script.name)))
    return written


@ending.of_command
def main(arguments: list[str] | None = None) -> int:
    arguments = ending.words(arguments)
    if not arguments or arguments[0].startswith("-") or len(arguments) > 1 or not arguments[0]:
        ending.demand_no_options(arguments, __doc__)
        raise ConfigError(
            "there is no directory to write to: python -m asgd_mpi.slurm_scripts slurm"
        )
    directory = Path(arguments[0])
    try:
        written = write(directory)
    except OSError as error:
        raise ConfigError(
            f"{directory} cannot be written ({error.strerror}): give a directory of your own."
        ) from None
    print(
        f"{len(written)} files written to {directory}. Set your site's modules in {directory}/env.sh, then, from "
        f"{directory.absolute().parent}: sbatch {directory.name}/doctor.sh"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

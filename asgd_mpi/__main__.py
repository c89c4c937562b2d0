"""`python -m asgd_mpi` lists the commands of this package, each with a line; `--version` tells its version."""

from __future__ import annotations

import difflib
import sys

import asgd_mpi
from asgd_mpi.errors import ConfigError
from asgd_mpi.process import ending

VERBS = {
    "train": "train a network, under mpirun or srun; --dry-run checks everything before",
    "report": "what a run did and where its time went; several are compared; --audit, --follow, --trace",
    "evaluate": "top-1 and top-5 error of a checkpoint on a data set",
    "replay": "compute a recorded run again and compare the weights to the bit",
    "plan": "how many workers are worth it, from short runs or a probe",
    "poc": "is asynchronous training worth it here: one worker, synchronous, asynchronous",
    "simulate": "train on a virtual clock, with any number of workers, without MPI",
    "doctor": "what a training would meet here: MPI, shared memory, GPUs, HDF5",
    "local": "settings that let mpirun start on a laptop or in a container",
    "launch": "the launcher that works in this Slurm allocation",
    "segments": "remove shared memory that dead MPI jobs of yours have left on this host",
}
DATA = "python -m data_prep.{imagenet,small,digits,fashion_mnist,synthetic} pack data sets; data_prep.{verify,inspect} look at one"


def listing() -> str:
    """Return the commands, a line each."""
    rows = [f"  python -m asgd_mpi.{verb:9} {about}" for verb, about in VERBS.items()]
    return "\n".join([f"asgd_mpi {asgd_mpi.__version__}: asynchronous SGD over MPI", *rows, f"  {DATA}",
                      "Each has --help."])


@ending.of_command
def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        print(asgd_mpi.__version__)
        return 0
    if arguments and arguments[0] not in ("-h", "--help"):
        verb = arguments[0]
        near = [verb] if verb in VERBS else difflib.get_close_matches(verb, VERBS, n=1)
        hint = f" Did you mean `python -m asgd_mpi.{near[0]}`?" if near else ""
        raise ConfigError(f"{verb}: commands are modules.{hint} `python -m asgd_mpi` lists them.")
    print(listing())
    return 0


if __name__ == "__main__":
    sys.exit(main())

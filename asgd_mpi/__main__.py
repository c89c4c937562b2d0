"""`asgd-mpi VERB ...`, or `python -m asgd_mpi VERB ...`, is `python -m asgd_mpi.VERB ...`; without a verb it lists them."""

from __future__ import annotations

import difflib
import runpy
import sys

import asgd_mpi
from asgd_mpi.data import packers
from asgd_mpi.errors import ConfigError
from asgd_mpi.process import ending

VERBS = {
    "train": "train a network, under mpirun or srun; --dry-run checks everything before",
    "stop": "ask a run to save and leave, to be resumed later",
    "report": "what a run did and where its time went; several are compared; --audit, --follow, --trace",
    "evaluate": "top-1 and top-5 error of a checkpoint on a data set",
    "export": "the network of a checkpoint as safetensors, onnx or a state dict",
    "replay": "compute a recorded run again and compare the weights to the bit",
    "plan": "how many workers are worth it, from short runs or a probe",
    "poc": "is asynchronous training worth it here: one worker, synchronous, asynchronous",
    "simulate": "train on a virtual clock, with any number of workers, without MPI",
    "doctor": "what a training would meet here: MPI, shared memory, GPUs, HDF5",
    "local": "settings that let mpirun start on a laptop or in a container",
    "launch": "the launcher that works in this Slurm allocation",
    "slurm_scripts": "write the Slurm scripts into a directory of yours",
    "completion": "what completes asgd-mpi in bash or zsh, to be sourced",
    "segments": "remove shared memory that dead MPI jobs of yours have left on this host",
}
PREPARE = ("imagenet", "small", "digits", "fashion_mnist", "synthetic", "verify", "inspect")
DATA = (
    f"python -m data_prep.{{{','.join(PREPARE[:5])}}} pack data sets; "
    f"data_prep.{{{','.join(PREPARE[5:])}}} look at one"
)


def listing() -> str:
    """Return the commands, a line each."""
    rows = [f"  python -m asgd_mpi.{verb:13} {about}" for verb, about in VERBS.items()]
    return "\n".join(
        [
            f"asgd_mpi {asgd_mpi.__version__}: asynchronous SGD over MPI",
            *rows,
            f"  {DATA}",
            "Each has --help. `asgd-mpi VERB` is short for `python -m asgd_mpi.VERB`.",
        ]
    )


def module_of(verb: str) -> str:
    """Return the module that a verb runs. Raises ConfigError for one that there is not."""
    name = verb.replace("-", "_")
    if name in VERBS:
        return f"asgd_mpi.{name}"
    if name.partition(".")[0] == "data_prep" and name.partition(".")[2] in PREPARE:
        packers.demand_ours()
        return name
    known = [*VERBS, *(f"data_prep.{one}" for one in PREPARE)]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ConfigError(f"{verb} is no command.{hint} `python -m asgd_mpi` lists them.")


@ending.of_command
def main(arguments: list[str] | None = None) -> int:
    arguments = ending.words(arguments)
    if arguments == ["--version"]:
        print(asgd_mpi.__version__)
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print(listing())
        return 0
    module = module_of(arguments[0])
    sys.argv[1:] = arguments[1:]
    # as `python -m` does it; the module ends by sys.exit
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

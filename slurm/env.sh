# Where things are on this site: the only file under slurm/ to edit. Sourced by the jobs, in the directory of submission.

# module load openmpi            # the site's MPI; mpi4py must have been installed against it
. .venv/bin/activate             # the environment that asgd_mpi was installed into; conda: conda activate asgd

PYTHON="python"                  # in a container: PYTHON="apptainer exec --nv /images/asgd.sif python"

# How ranks are started, e.g. "srun --mpi=pmix"; empty tries what there is and takes the first that works (some seconds).
LAUNCH=""

# Where things are on this site: the only file under slurm/ to edit. Sourced by the jobs, in the directory of submission.

# module load openmpi            # the site's MPI; mpi4py must have been installed against it
. .venv/bin/activate             # the environment that asgd_mpi was installed into

# How ranks are started; empty tries `srun --mpi=pmix`, `srun --mpi=pmi2` and `mpirun` and takes the first that works.
LAUNCH=""

#!/usr/bin/env bash
# Train by asynchronous SGD on Slurm: sbatch slurm/train.sh --config slurm/imagenet_alexnet.yaml --data DIR
# Everything after the script's name goes to `python -m asgd_mpi.train`. Site paths are in slurm/env.sh.
#SBATCH --job-name=asgd
#SBATCH --nodes=2
#SBATCH --ntasks=9               # 1 server + 8 workers
#SBATCH --ntasks-per-node=5      # at most: 4 workers a node, and the server on the first one
#SBATCH --gpus-per-node=4        # one for each worker; the server takes none
#SBATCH --cpus-per-task=8        # a worker reads and decodes its own images
#SBATCH --time=24:00:00
#SBATCH --output=asgd-%j.log
#SBATCH --open-mode=append
set -euo pipefail
. "${SLURM_SUBMIT_DIR:-.}/slurm/env.sh"

# A launcher that does not match the MPI library gives SLURM_NTASKS worlds of one rank each, and no error.
sees_all="import sys; from mpi4py import MPI; sys.exit(MPI.COMM_WORLD.size != ${SLURM_NTASKS:?start with sbatch})"
works() { timeout 60 "$@" python -c "$sees_all" > /dev/null 2>&1; }

if [ -z "$LAUNCH" ]; then
  for LAUNCH in "srun --mpi=pmix" "srun --mpi=pmi2" "env SLURM_MPI_TYPE=none mpirun -n $SLURM_NTASKS" ""; do
    if [ -n "$LAUNCH" ] && works $LAUNCH; then break; fi
  done
fi
[ -n "$LAUNCH" ] || { echo "no launcher starts $SLURM_NTASKS ranks of one world: see LAUNCH in slurm/env.sh" >&2; exit 1; }
echo "launcher: $LAUNCH"
exec $LAUNCH python -m asgd_mpi.train --data.threads "${SLURM_CPUS_PER_TASK:-2}" "$@"

#!/usr/bin/env bash
# slurm/train.sh as a heterogeneous job: the server on a node without GPUs, the workers on the GPU nodes. Only srun can
# start it.
#SBATCH --job-name=asgd
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=asgd-%j.log
#SBATCH --partition=cpu          # the server
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8        # the same in both groups
#SBATCH hetjob
#SBATCH --partition=gpu          # the workers
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
. "${SLURM_SUBMIT_DIR:-.}/slurm/job.sh" || exit
train "$@"

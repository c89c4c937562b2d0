#!/usr/bin/env bash
# Train by asynchronous SGD on Slurm: sbatch slurm/train.sh --config slurm/imagenet_alexnet.yaml --data DIR
# Everything after the script's name goes to `python -m asgd_mpi.train`. Site paths are in slurm/env.sh.
# It checkpoints and goes back into the queue before its time is up, until the training is finished; docs/slurm.md.
#SBATCH --job-name=asgd
#SBATCH --nodes=2
#SBATCH --ntasks=9               # 1 server + 8 workers
#SBATCH --ntasks-per-node=5      # at most: 4 workers a node, and the server on the first one
#SBATCH --gpus-per-node=4        # one for each worker; the server takes none
#SBATCH --cpus-per-task=8        # a worker reads and decodes its own images
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR2@300      # seconds before the end of the time, for the checkpoint
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=asgd-%j.log
. "${SLURM_SUBMIT_DIR:-.}/slurm/job.sh" || exit
train "$@"

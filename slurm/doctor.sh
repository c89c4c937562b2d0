#!/usr/bin/env bash
# What a training would meet here, and which launcher to use: sbatch slurm/doctor.sh --model alexnet --data DIR
# Give it the nodes, tasks and GPUs of the training; options go to `python -m asgd_mpi.doctor`.
#SBATCH --job-name=asgd-doctor
#SBATCH --nodes=2
#SBATCH --ntasks=9
#SBATCH --ntasks-per-node=5
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=00:10:00
#SBATCH --output=asgd-doctor-%j.log
. "${SLURM_SUBMIT_DIR:-.}/slurm/job.sh" || exit
choose_launcher
$LAUNCH $PYTHON -m asgd_mpi.doctor "$@"
status=$?
echo "to start a training here: $LAUNCH $PYTHON -m asgd_mpi.train"
exit $status

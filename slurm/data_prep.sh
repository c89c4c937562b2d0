#!/usr/bin/env bash
# Pack ImageNet into shards on several nodes: sbatch slurm/data_prep.sh --source DIR --out DIR
# Options go to `python -m data_prep.imagenet`. Whenever it ends, the same command goes on; before its time is up it goes back
# into the queue itself.
#SBATCH --job-name=asgd-data
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16       # processes that read, check and write
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR2@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=asgd-data-%j.log
. "${SLURM_SUBMIT_DIR:-.}/slurm/job.sh" || exit
out=$(value_of --out "$@")
follow TERM srun --mpi=none $PYTHON -m data_prep.imagenet "$@"
[ -z "$ended" ] || exit 1
[ -z "$stopped" ] || again "time is up"
[ "$status" = 0 ] || exit "$status"
$PYTHON -m data_prep.verify "$out"

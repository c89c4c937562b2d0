#!/usr/bin/env bash
# Is it worth it here? Two ways to find out.
#
# 1. sbatch --ntasks=5 slurm/poc.sh slurm/imagenet_alexnet.yaml --workers 1,2,4 --minutes 20 -- --data DIR
#    One job, as large as the largest training: one worker, then synchronously and asynchronously with several, each for the
#    same time, and a verdict (python -m asgd_mpi.poc --help). Requeued before its time is up, it goes on where it was.
#
# 2. WORKERS="1 2 4 8" SEEDS=0-2 slurm/poc.sh --config slurm/imagenet_alexnet.yaml --data DIR --epochs 2
#    Run, not submitted: a job array for each number of workers, with a task for each seed, in runs/poc-DATE (or OUT), and a
#    report that compares them; options go to every training, everything else is as at the top of slurm/train.sh. SBATCH holds
#    more options of sbatch, e.g. SBATCH="--partition=gpu --time=02:00:00".
#SBATCH --job-name=asgd-poc
#SBATCH --nodes=1
#SBATCH --ntasks=5               # 1 server + 4 workers
#SBATCH --ntasks-per-node=5
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=asgd-poc-%j.log
if [ -n "${SLURM_JOB_ID:-}" ]; then
  . "${SLURM_SUBMIT_DIR:-.}/slurm/job.sh" || exit
  poc "$@"
fi
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-runs/poc-$(date +%Y%m%d-%H%M%S)}
per_node=$(sed -n 's/^#SBATCH --gpus-per-node=\([0-9]*\).*/\1/p' slurm/train.sh)
mkdir -p "$out"

jobs=""
for workers in ${WORKERS:-1 2 4}; do
  gpus=$((workers < per_node ? workers : per_node))
  job=$(sbatch --parsable ${SBATCH:-} --array="${SEEDS:-0-2}" --job-name="asgd-$workers" \
    --output="$out/workers$workers-%a.log" --nodes=$(((workers + gpus - 1) / gpus)) --ntasks=$((workers + 1)) \
    --ntasks-per-node=$((gpus + 1)) --gpus-per-node=$gpus \
    slurm/train.sh "$@" --run.dir "$out/workers$workers")
  echo "$workers workers, seeds ${SEEDS:-0-2}: job ${job%%;*}"
  jobs+=:${job%%;*}
done
report=$(sbatch --parsable ${SBATCH:-} --dependency="afterany$jobs" --output="$out/report.log" slurm/report.sh "$out")
echo "report: job ${report%%;*}, in $out/comparison"

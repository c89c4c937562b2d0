#!/usr/bin/env bash
# Worker counts x seeds, then one report that compares them. Run it, do not submit it; options go to every training:
#   WORKERS="1 2 4 8" SEEDS=0-2 slurm/poc.sh --config slurm/imagenet_alexnet.yaml --data DIR --epochs 2
# One job array for each number of workers, with a task for each seed, in runs/poc-DATE (or OUT); everything else is as at
# the top of slurm/train.sh. SBATCH holds more options of sbatch, e.g. SBATCH="--partition=gpu --time=02:00:00".
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

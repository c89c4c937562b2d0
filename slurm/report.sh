#!/usr/bin/env bash
# The comparison of all runs below a directory, in DIR/comparison: sbatch slurm/report.sh DIR. A finished training has
# written its own report; those that are not finished are named, and get theirs here.
# More options go to the comparison, e.g. --target-accuracy 57 --price-per-gpu-hour 2.5.
#SBATCH --job-name=asgd-report
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --time=00:30:00
#SBATCH --output=asgd-report-%j.log
. "${SLURM_SUBMIT_DIR:-.}/slurm/job.sh" || exit
directory=${1:?give the directory that holds the runs}
shift
mapfile -t runs < <(find "$directory" -name config.yaml -printf '%h\n' | sort)
[ ${#runs[@]} -gt 0 ] || { echo "there is no run below $directory" >&2; exit 1; }
for run in "${runs[@]}"; do
  [ -f "$run/finished.json" ] && continue
  echo "not finished: $run"
  $PYTHON -m asgd_mpi.report "$run" || exit
done
[ ${#runs[@]} = 1 ] || $PYTHON -m asgd_mpi.report "${runs[@]}" --out "$directory/comparison" "$@"

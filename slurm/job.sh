# Sourced by the job scripts: start the ranks, pass signals on to them, and know what their end means.

cd "${SLURM_SUBMIT_DIR:?start it with sbatch}" || exit
[ -f slurm/env.sh ] || { echo "there is no $PWD/slurm/env.sh: submit from the directory that holds slurm/" >&2; exit 1; }
. slurm/env.sh
stopped=""                                               # set when the time is almost up,
ended=""                                                 # ... and when Slurm ends the job
trap 'stopped=yes' USR2
unset SLURM_NTASKS_PER_NODE                              # srun takes the job's own layout, and would warn of it
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK   # srun forgets it since Slurm 22.05
started=$(date +%s)

# choose_launcher: set LAUNCH to what starts all ranks in one world, unless slurm/env.sh has set it.
choose_launcher() {
  [ -n "$LAUNCH" ] || LAUNCH=$(python3 -m asgd_mpi.launch -- $PYTHON) || exit 1
  echo "launcher: $LAUNCH"
}

# value_of NAME OPTION...: the value of an option, given as `NAME VALUE` or as NAME=VALUE; empty if it is not given.
value_of() {
  local name=$1 value=""
  while shift && [ $# -gt 0 ]; do
    case $1 in "$name") value=${2:-} ;; "$name"=*) value=${1#*=} ;; esac
  done
  echo "$value"
}

# follow SIGNAL COMMAND...: run a command to its end and set `status`. When the time is almost up it gets SIGNAL, not before
# it is ready for it. A TERM to this script is Slurm ending the job, which reaches the ranks too.
follow() {
  local signal=$1 process
  shift
  "$@" &
  process=$!
  pass_on() {
    stopped=yes
    until is_ready || ! kill -0 $process 2> /dev/null; do sleep 1; done
    kill -"$signal" $process 2> /dev/null
  }
  trap pass_on USR2
  trap 'ended=yes' TERM
  [ -z "$stopped" ] || pass_on
  while wait $process; status=$?; kill -0 $process 2> /dev/null; do :; done
}
is_ready() { :; }

# again WHY: have Slurm start this job anew, with the same command.
again() {
  remove_segments
  echo "$1: job $SLURM_JOB_ID goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID" && exit 0
  echo "Slurm does not requeue it: the same sbatch command goes on where this job stopped" >&2
  exit 75
}

# all_nodes_answer: whether every node of the job can still start something.
all_nodes_answer() {
  local group nodes
  for group in $(seq 0 $((${SLURM_HET_SIZE:-1} - 1))); do
    nodes=SLURM_JOB_NUM_NODES${SLURM_HET_SIZE:+_HET_GROUP_$group}
    timeout 30 srun ${SLURM_HET_SIZE:+--het-group=$group} --mpi=none --overlap --gpus-per-node=0 --cpus-per-task=1 \
      --nodes="${!nodes}" --ntasks="${!nodes}" --ntasks-per-node=1 true > /dev/null 2>&1 || return
  done
}

# remove_segments: what ranks that were killed have left in /dev/shm of the nodes; what living jobs use stays. Runs when this
# script ends, for at most half a minute, unless the training ended by itself.
remove_segments() {
  local group nodes
  trap - EXIT
  [ "${status:-1}" != 0 ] && [ "${status:-1}" != 75 ] || return 0
  for group in $(seq 0 $((${SLURM_HET_SIZE:-1} - 1))); do
    nodes=SLURM_JOB_NUM_NODES${SLURM_HET_SIZE:+_HET_GROUP_$group}
    timeout 30 srun ${SLURM_HET_SIZE:+--het-group=$group} --mpi=none --overlap --gpus-per-node=0 --cpus-per-task=1 \
      --nodes="${!nodes}" --ntasks="${!nodes}" --ntasks-per-node=1 $PYTHON -m asgd_mpi.segments 2> /dev/null || true
  done
}

changed_since_start() { [ -n "$(find "$@" -maxdepth 0 -newermt "@$started" 2> /dev/null)" ]; }

# saved_since_start: a checkpoint, not a copy of one under a name of the user's.
saved_since_start() {
  [ -n "$(find "$run/checkpoints" -maxdepth 1 -regextype posix-extended -regex '.*/v[0-9]{9,}(\.r[0-9]+)?' \
    -newermt "@$started" 2> /dev/null)" ]
}

# train OPTION...: start or resume a training in --run.dir (or runs/JOB; with an array the tasks are seeds, in DIR-seedN), and
# end the job as the training did. Success is DIR/finished.json, which rank 0 writes last; the launcher's status proves nothing.
train() {
  local run signal=USR2 threads=${SLURM_CPUS_PER_TASK_HET_GROUP_1:-${SLURM_CPUS_PER_TASK:-2}}
  run=$(value_of --run.dir "$@")
  run=${run:-runs/${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${SLURM_ARRAY_TASK_ID:+-seed$SLURM_ARRAY_TASK_ID}
  choose_launcher
  is_ready() { changed_since_start "$run/log/rank000.txt"; }         # a signal would end a rank that still starts
  case $($LAUNCH --version 2>&1) in *HYDRA*) signal=TERM ;; esac     # MPICH's mpirun dies of USR2, and passes TERM on

  trap remove_segments EXIT
  follow $signal $LAUNCH $PYTHON -m asgd_mpi.train --data.threads "$threads" \
    ${SLURM_ARRAY_TASK_ID:+--run.seed "$SLURM_ARRAY_TASK_ID"} "$@" --run.dir "$run" --resume auto

  [ -f "$run/finished.json" ] && { echo "finished: $run"; exit 0; }
  [ -z "$ended" ] || { echo "ended by Slurm before the training was finished: $run"; exit 1; }
  [ "$status" != 75 ] || again "checkpoint written"
  if [ -n "$stopped" ]; then
    saved_since_start && again "the time is up, and the last checkpoint is some minutes old"
    echo "the time was up before there was a checkpoint: --time has to be much longer than the seconds of --signal" >&2
    exit 1
  fi
  if ! all_nodes_answer; then
    echo "status $status, and not every node answers: Slurm will notice, and start the job again from the last checkpoint"
    sleep 900 & wait $!
    exit 1
  fi
  changed_since_start "$run"/error.rank*.txt && { echo "failed with status $status: $run/error.rank*.txt" >&2; exit 1; }
  saved_since_start && again "the launcher ended with status $status, after a checkpoint"
  echo "failed: the launcher ended with status $status, with neither a checkpoint nor an error in $run" >&2
  exit 1
}

# poc ARGUMENT...: asgd_mpi.poc in --out (or runs/poc-JOB), with this job's nodes.
poc() {
  local out
  out=$(value_of --out "$@")
  out=${out:-runs/poc-$SLURM_JOB_ID}
  is_ready() { [ -f "$out/settings.yaml" ]; }
  follow USR2 $PYTHON -m asgd_mpi.poc --out "$out" ${LAUNCH:+--launcher "$LAUNCH"} "$@"
  [ "$status" != 75 ] || again "the time is up"
  exit "$status"
}

#!/usr/bin/env bash
# GPUs under SLURM, one process per GPU: launch/slurm.sh [--dry-run] run SETTINGS | logs | delete --yes
# Environment: NAME NODES GPUS_PER_NODE TIME, and optionally CPUS_PER_GPU (default 8) PYTHON; sbatch reads SBATCH_ACCOUNT, SBATCH_PARTITION, ...
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/common.sh
source "$here/common.sh"
# shellcheck source=launch/xla_flags.sh
source "$here/xla_flags.sh"

need "NAME=flip NODES=8 GPUS_PER_NODE=8 TIME=24:00:00 $0 run --config=configs/flip_l16.py --workdir=/shared/l16" \
    NAME NODES GPUS_PER_NODE TIME
CPUS_PER_GPU=${CPUS_PER_GPU:-8}
need_count NODES GPUS_PER_NODE CPUS_PER_GPU
log=$REPO/slurm-$NAME.log

run() {
    # SLURM queues the job again after a preemption or a lost node, and sends SIGTERM before its time is up, which saves.
    execute env PYTHON="${PYTHON:-python}" XLA_FLAGS="${GPU_XLA_FLAGS[*]}" sbatch --job-name="$NAME" \
        --nodes="$NODES" --ntasks-per-node="$GPUS_PER_NODE" --gpus-per-node="$GPUS_PER_NODE" \
        --cpus-per-task="$CPUS_PER_GPU" --time="$TIME" \
        --requeue --signal=TERM@300 --export=ALL --chdir="$REPO" --output="$log" --open-mode=append \
        "$REPO/launch/slurm_job.sh" "$@"
}

command=${ARGS[0]:-}
settings=("${ARGS[@]:1}")
case $command in
    run)
        need_settings "${settings[@]}"
        run "${settings[@]}"
        ;;
    logs) execute tail -n +1 -F "$log" ;;
    delete)
        confirm "your jobs named $NAME from the queue"
        execute scancel --me --name="$NAME"
        ;;
    *) die "$0: ${command:-no command}: expected run, logs or delete" ;;
esac

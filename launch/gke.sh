#!/usr/bin/env bash
# One or more TPU slices as a JobSet on GKE: launch/gke.sh [--dry-run] run SETTINGS | logs | delete --yes
# Environment: NAME IMAGE ACCELERATOR TOPOLOGY, and optionally NFS SLICES CHIPS_PER_HOST; see docs/launch.md.
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/common.sh
source "$here/common.sh"
# shellcheck source=launch/xla_flags.sh
source "$here/xla_flags.sh"

need "NAME=flip IMAGE=REGISTRY/flip_jax ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=16x16 \
$0 run --config=configs/flip_l16.py --workdir=gs://my-bucket/l16" NAME IMAGE ACCELERATOR TOPOLOGY
NFS=${NFS:-} SLICES=${SLICES:-1} CHIPS_PER_HOST=${CHIPS_PER_HOST:-4}
need_count SLICES CHIPS_PER_HOST
[[ $TOPOLOGY =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] || die "TOPOLOGY=$TOPOLOGY is not a shape in chips, such as 16x16"
[[ -z $NFS || $NFS == *:/* ]] || die "NFS=$NFS is not SERVER:/PATH"

run() {
    local chips=$((${TOPOLOGY//x/*})) manifest
    ((chips % CHIPS_PER_HOST == 0)) || die "TOPOLOGY=$TOPOLOGY: $chips chips do not divide into hosts of $CHIPS_PER_HOST chips"
    manifest=$(
        export NAME IMAGE ACCELERATOR TOPOLOGY NFS SLICES CHIPS_PER_HOST LIBTPU_INIT_ARGS="${TPU_XLA_FLAGS[*]}"
        HOSTS=$((chips / CHIPS_PER_HOST)) python3 "$here/jobset.py" "$@"
    )
    if "$DRY_RUN"; then printf '%s\n' "$manifest"; fi
    execute kubectl apply -f - <<<"$manifest"
}

command=${ARGS[0]:-}
settings=("${ARGS[@]:1}")
case $command in
    run)
        need_settings "${settings[@]}"
        run "${settings[@]}"
        ;;
    logs)
        first="jobset.sigs.k8s.io/jobset-name=$NAME,jobset.sigs.k8s.io/job-index=0"
        execute kubectl logs --follow --tail=-1 --selector="$first,batch.kubernetes.io/job-completion-index=0"
        ;;
    delete)
        confirm "the JobSet $NAME, and its pods"
        execute kubectl delete jobset "$NAME"
        ;;
    *) die "$0: ${command:-no command}: expected run, logs or delete" ;;
esac

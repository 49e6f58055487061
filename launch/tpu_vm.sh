#!/usr/bin/env bash
# Cloud TPU VMs, one or more slices:
#   launch/tpu_vm.sh [--dry-run] create | install | run SETTINGS | logs | watch SETTINGS | delete --yes
# Environment: NAME ZONE PROJECT ACCELERATOR RUNTIME, and optionally NFS TIER SLICES POLL_SECONDS; see docs/launch.md.
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/common.sh
source "$here/common.sh"
# shellcheck source=launch/xla_flags.sh
source "$here/xla_flags.sh"

need "NAME=flip ZONE=us-central2-b PROJECT=my-project ACCELERATOR=v4-512 RUNTIME=tpu-ubuntu2204-base \
$0 create" NAME ZONE PROJECT ACCELERATOR RUNTIME
SLICES=${SLICES:-1} POLL_SECONDS=${POLL_SECONDS:-60}
need_count SLICES POLL_SECONDS
case ${TIER:=on-demand} in
    on-demand) tier=() ;;
    spot | reserved) tier=("--$TIER") ;;
    *) die "TIER=$TIER is not on-demand, spot or reserved" ;;
esac

queue=(gcloud compute tpus queued-resources)
place=(--zone="$ZONE" --project="$PROJECT")
all=(--node=all --worker=all)

state() {
    execute "${queue[@]}" describe "$NAME" "${place[@]}" --format='value(state.state)' || return
    if "$DRY_RUN"; then echo ACTIVE; fi
}

# remote WHERE... -- WORD...: run a command on machines. gcloud takes one string, which a shell on the machine reads.
remote() {
    local where=()
    while [[ $1 != -- ]]; do
        where+=("$1")
        shift
    done
    execute "${queue[@]}" ssh "$NAME" "${place[@]}" "${where[@]}" --command="$(quote "${@:2}")"
}

create() {
    local nodes=(--node-id="$NAME") found=none
    ((SLICES == 1)) || nodes=(--node-count="$SLICES" --node-prefix="$NAME")
    execute "${queue[@]}" create "$NAME" "${place[@]}" --accelerator-type="$ACCELERATOR" \
        --runtime-version="$RUNTIME" "${nodes[@]}" "${tier[@]}" || return
    while found=$(state) || found=unknown; [[ $found != ACTIVE ]]; do
        [[ $found != FAILED && $found != SUSPENDED ]] || die "$NAME is $found; delete it, then create it again"
        echo "$NAME is $found; checking again in $POLL_SECONDS s"
        sleep "$POLL_SECONDS"
    done
    # SSH answers a little after the state becomes ACTIVE.
    for _ in {1..10}; do
        remote "${all[@]}" -- true && return
        sleep "$POLL_SECONDS"
    done
    return 1
}

# Send the last commit to every machine and install its dependencies.
install() {
    local archive=${TMPDIR:-/tmp}/flip_jax-$NAME.tar.gz
    execute git -C "$REPO" archive --format=tar.gz --output="$archive" HEAD &&
        execute "${queue[@]}" scp "$archive" "$NAME:flip_jax.tar.gz" "${place[@]}" "${all[@]}" &&
        remote "${all[@]}" -- tar --one-top-level=flip_jax -xzf flip_jax.tar.gz &&
        remote "${all[@]}" -- flip_jax/launch/worker.sh install "${NFS:-}"
}

run() {
    remote "${all[@]}" -- flip_jax/launch/worker.sh run "${TPU_XLA_FLAGS[*]}" "$@"
}

result() {
    remote --node=0 --worker=0 -- flip_jax/launch/worker.sh result
}

delete() {
    execute "${queue[@]}" delete "$NAME" "${place[@]}" --force --quiet
}

restart() {
    delete && create && install && run "$@"
}

# Wait until the run ends. After a preemption, create everything again; the run resumes from its newest checkpoint.
watch() {
    local found ended failed=0
    if "$DRY_RUN"; then
        state >/dev/null
        result
        restart "$@"
        return
    fi
    while true; do
        found=$(state) || found=unknown
        ended=none
        [[ $found != ACTIVE ]] || ended=$(result) || ended=unreachable
        ended=${ended##*$'\n'} # gcloud may print lines of its own before the answer
        case $found/$ended in
            ACTIVE/0) echo "$NAME: the run has ended" && return ;;
            ACTIVE/running) failed=0 ;;
            # When one machine is preempted the run fails on the others before the state changes, so check twice.
            ACTIVE/gone | ACTIVE/[1-9]*)
                ((++failed < 2)) || die "$NAME: the run ended ($ended) although the machines are up; see logs, then run"
                ;;
            SUSPENDED/*)
                echo "$NAME was preempted; creating it again"
                restart "$@" || restart "$@" || die "$NAME could not be created again"
                failed=0
                ;;
            FAILED/*) die "$NAME is FAILED; delete it, then create it again" ;;
            *) echo "$NAME is $found, its first machine $ended; checking again in $POLL_SECONDS s" ;;
        esac
        sleep "$POLL_SECONDS"
    done
}

command=${ARGS[0]:-}
settings=("${ARGS[@]:1}")
case $command in
    create | install) "$command" ;;
    run | watch)
        need_settings "${settings[@]}"
        "$command" "${settings[@]}"
        ;;
    logs) remote --node=0 --worker=0 -- tail -n +1 -F flip_jax/run.log ;;
    delete)
        confirm "the TPU VMs of $NAME and everything on their disks"
        delete
        ;;
    *) die "$0: ${command:-no command}: expected create, install, run, logs, watch or delete" ;;
esac

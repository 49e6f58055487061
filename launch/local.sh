#!/usr/bin/env bash
# Several processes on this machine, to try a multi-process run: launch/local.sh [--dry-run] run SETTINGS
# Environment: PROCESSES, and optionally PORT PYTHON. Each line of output starts with its process's number.
# Ctrl-C makes all save and end; a second one ends them at once.
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/common.sh
source "$here/common.sh"

need "PROCESSES=2 $0 run --config=configs/flip_emoji.py --workdir=runs/two" PROCESSES
PORT=${PORT:-12355}
need_count PROCESSES PORT
[[ ${ARGS[0]:-} == run ]] || die "$0: ${ARGS[0]:-no command}: expected run"
need_settings "${ARGS[@]:1}"

execute cd "$REPO"
declare -A live=()
# Each process is in a group of its own, so that the terminal sends Ctrl-C to this script alone, which passes it on.
set -m
stopped=0 result=0
trap 'stopped=130; kill -INT "${!live[@]}" 2>/dev/null || true' INT
trap 'stopped=143; kill -TERM "${!live[@]}" 2>/dev/null || true' TERM
# After a failure the others wait in a collective, where only SIGKILL ends them.
trap 'kill -KILL "${!live[@]}" 2>/dev/null || true' EXIT
for ((i = 0; i < PROCESSES; i++)); do
    process=("${PYTHON:-python}" main.py --coordinator="127.0.0.1:$PORT" --num_processes="$PROCESSES"
        --process_id="$i" "${ARGS[@]:1}")
    if "$DRY_RUN"; then
        execute "${process[@]}"
    else
        "${process[@]}" > >(trap '' INT TERM && exec sed -u "s/^/[$i] /") 2>&1 &
        live[$!]=1
    fi
done
while ((${#live[@]} > 0)); do
    code=0
    wait -n -p ended "${!live[@]}" || code=$?
    [[ -n ${ended:-} ]] || continue # a signal came
    unset "live[$ended]"
    ((code == 0 || stopped)) || exit "$code"
    ((code == 0)) || result=$code
done
exit "$result"

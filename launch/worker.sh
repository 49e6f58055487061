#!/usr/bin/env bash
# Runs on every machine of a slice, called by tpu_vm.sh: install [SERVER:/PATH] | run LIBTPU_INIT_ARGS SETTINGS | result
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

running() {
    [[ ! -e run.exit && -e run.pid ]] && kill -0 "$(<run.pid)" 2>/dev/null
}

case $1 in
    install) # a separate Python, because the system's is too old for the package, and the shared folder, if any
        python3 -m pip install --quiet --user uv
        python3 -m uv venv --quiet --allow-existing --python 3.12
        python3 -m uv pip install --quiet --editable ".[tpu,remote]"
        [[ -n $2 ]] || exit 0
        if ! mountpoint --quiet /shared; then
            sudo apt-get install --quiet=2 --yes nfs-common
            sudo mkdir -p /shared
            sudo mount -t nfs "$2" /shared
        fi
        [[ -w /shared ]] || { echo "error: $(id -un) cannot write to /shared ($2)" >&2 && exit 1; }
        ;;
    run) # in the background, so that it outlives the connection
        if running; then
            echo "error: a run is already in progress (process $(<run.pid))" >&2
            exit 1
        fi
        rm -f run.exit
        export LIBTPU_INIT_ARGS=$2
        # shellcheck disable=SC2016 # the inner shell expands it
        nohup bash -c '"$@"; echo $? >run.exit' run .venv/bin/python main.py --distributed "${@:3}" \
            >>run.log 2>&1 </dev/null &
        echo $! >run.pid
        ;;
    result) # the run's exit code, "running" or "gone"
        if [[ -e run.exit ]]; then
            cat run.exit
        elif running; then
            echo running
        else
            echo gone
        fi
        ;;
esac

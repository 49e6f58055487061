# Sourced by the scripts next to it: --dry-run, --yes, errors, and what every way to run shares.
# shellcheck shell=bash disable=SC2034 # the sourcing scripts use the variables
set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DRY_RUN=false YES=false ARGS=()
for argument in "$@"; do
    case $argument in
        --dry-run) DRY_RUN=true ;; # print every command, run none
        --yes) YES=true ;;         # do delete
        *) ARGS+=("$argument") ;;
    esac
done
exec 3>&1 # where dry runs print, from within $(...) too

die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 501)) || die "Bash $BASH_VERSION is too old; 5.1 or newer is needed"

# need EXAMPLE NAME...: refuses with the names of all variables that are not set, and an example that sets all.
need() {
    local example=$1 variable missing=()
    shift
    for variable; do [[ -n ${!variable:-} ]] || missing+=("$variable"); done
    ((${#missing[@]} == 0)) || die "not set: ${missing[*]}. For example: $example"
}

# need_count NAME...: refuses values that are not whole numbers from 1.
need_count() {
    local variable
    for variable; do
        [[ ${!variable} =~ ^[1-9][0-9]*$ ]] || die "$variable=${!variable} is not a whole number from 1"
    done
}

need_settings() {
    (($# > 0)) || die "no settings for main.py. For example: $0 run --config=configs/flip_l16.py --workdir=DIR"
}

# confirm WHAT: deletes nothing without --yes.
confirm() {
    "$YES" || "$DRY_RUN" || die "delete removes $1; to do it, add --yes"
}

# Prints words such that a shell reads the same words.
quote() {
    local words
    printf -v words '%q ' "$@"
    printf '%s' "${words% }"
}

# Runs a command, or prints it in a dry run.
execute() {
    if "$DRY_RUN"; then
        printf '%s\n' "$(quote "$@")" >&3
    else
        "$@"
    fi
}

# Sourced by the scripts next to it: --help, --dry-run, --yes, errors and other shared functions.
# shellcheck shell=bash disable=SC2034 # the sourcing scripts use the variables
set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DRY_RUN=false YES=false ARGS=()
for argument in "$@"; do
    case $argument in
        -h | --help) # what the script says of itself at its head
            sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
            exit 0
            ;;
        --dry-run) DRY_RUN=true ;; # print every command, run none
        --yes) YES=true ;;         # really delete
        *) ARGS+=("$argument") ;;
    esac
done
exec 3>&1 # dry runs print here, so that $(...) does not swallow it

die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 501)) || die "Bash $BASH_VERSION is too old; 5.1 or newer is needed"

# need EXAMPLE NAME...: refuse unless all variables are set, naming the missing ones with an example that sets all.
need() {
    local example=$1 variable missing=()
    shift
    for variable; do [[ -n ${!variable:-} ]] || missing+=("$variable"); done
    ((${#missing[@]} == 0)) || die "not set: ${missing[*]}. For example: $example"
}

# need_count NAME...: refuse values that are not positive whole numbers.
need_count() {
    local variable
    for variable; do
        [[ ${!variable} =~ ^[1-9][0-9]*$ ]] || die "$variable=${!variable} is not a positive whole number"
    done
}

need_settings() {
    (($# > 0)) || die "no settings for main.py. For example: $0 run --config=configs/flip_l16.py --workdir=DIR"
}

# confirm THING: refuse to delete without --yes.
confirm() {
    "$YES" || "$DRY_RUN" || die "delete removes $1; add --yes to confirm"
}

# Print words, quoted so that a shell reads the same words.
quote() {
    local words
    printf -v words '%q ' "$@"
    printf '%s' "${words% }"
}

# Run a command, or print it in a dry run.
execute() {
    if "$DRY_RUN"; then
        printf '%s\n' "$(quote "$@")" >&3
    else
        "$@"
    fi
}

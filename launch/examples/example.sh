# shellcheck shell=bash disable=SC2034
# Sourced by videos.sh, cognition.sh and keep_demo.sh, after common.sh.

# Reads [--smollm2 FOLDER] [OUTPUT_DIR] and sets smollm2 (or ""), out, python and vico.
# $1: the default of OUTPUT_DIR, in demo/. $2: modules that must be there, $3: their extras.
begin_example() {
    local default=$root/demo/$1 modules=$2 extras=$3
    local usage="usage: bash $0 [--smollm2 FOLDER] [OUTPUT_DIR]"
    shift 3
    help_if_asked "$@"
    smollm2=
    if [[ ${1:-} == --smollm2 ]]; then
        [[ -n ${2:-} ]] || fail "--smollm2 names no folder; $usage"
        smollm2=$(readlink -m "$2")
        shift 2
    fi
    [[ $# -le 1 && ${1:-} != -* ]] || fail "$usage"
    out=$(readlink -m "${1:-$default}")
    find_python
    [[ $python != */* ]] || python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
    export PYTHON=$python PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
    cd "$root" # `python -m` imports from the current folder; the user's may hold anything
    "$python" -c "import $modules" 2>/dev/null ||
        fail "extras are missing; run '$python' -m pip install -e '$root[$extras]'"
    has_gpu || export VICO_RANKS=${VICO_RANKS:-2} DS_ACCELERATOR=cpu
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    vico=("$python" -m vico)
}

# Shows what a command prints, on stderr; its last line is the result.
last_line() { "$@" | tee >(cat >&2) | tail -n 1; }

# Starts a command beside the script, in a process group of its own: where the script ends first,
# because it failed or was interrupted, the command ends too, with all that it started.
beside() {
    set -m
    "$@" </dev/null &
    set +m
}

end_jobs() {
    local job
    for job in $(jobs -p); do kill -- "-$job" 2>/dev/null || true; done
    wait
}
trap end_jobs EXIT

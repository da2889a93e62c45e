# shellcheck shell=bash disable=SC2034
# Sourced by the scripts that make or use the checkout's own Python environment.

root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
venv=$root/.venv

say() { echo "vico: $*" >&2; }

fail() {
    echo "vico: error: $*" >&2
    exit 2
}

# Prints the comment at the head of the script, and ends, where -h or --help is among the words.
help_if_asked() {
    local word
    for word; do
        [[ $word == -h || $word == --help ]] || continue
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
        exit 0
    done
}

# Whether an NVIDIA driver shows a GPU. Torch may not be installed yet.
has_gpu() { [[ $(nvidia-smi -L 2>/dev/null) == "GPU "* ]]; }

# Sets python: $PYTHON, else that of the active environment, else the checkout's, else the system's.
find_python() {
    if [[ -n ${PYTHON:-} ]]; then python=$PYTHON
    elif [[ -n ${VIRTUAL_ENV:-} ]]; then python=$VIRTUAL_ENV/bin/python
    elif [[ -x $venv/bin/python ]]; then python=$venv/bin/python
    else python=python3; fi
    local remedy="run 'bash $root/launch/environment.sh', or set PYTHON to the one to use"
    command -v "$python" >/dev/null || fail "there is no Python at '$python'; $remedy"
    "$python" -IS -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "'$python' is no Python of version 3.10 or newer; $remedy"
}

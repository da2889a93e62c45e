# shellcheck shell=bash disable=SC2034
# Sourced by the scripts that make and use the checkout's own environment.

root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
venv=$root/.venv

say() { echo "vico: $*" >&2; }

fail() {
    echo "vico: error: $*" >&2
    exit 2
}

# Whether an NVIDIA driver shows a GPU here; asked before there is a torch to ask.
has_gpu() { [[ $(nvidia-smi -L 2>/dev/null) == "GPU "* ]]; }

# Sets python: $PYTHON, or that of an active environment, or the checkout's own, or the system's.
find_python() {
    if [[ -n ${PYTHON:-} ]]; then python=$PYTHON
    elif [[ -n ${VIRTUAL_ENV:-} ]]; then python=$VIRTUAL_ENV/bin/python
    elif [[ -x $venv/bin/python ]]; then python=$venv/bin/python
    else python=python3; fi
    command -v "$python" >/dev/null ||
        fail "there is no Python at '$python'; run 'bash $root/launch/environment.sh', or set PYTHON to the one to use"
}

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

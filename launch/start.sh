#!/usr/bin/env bash
# start.sh SCRIPT FLAGS: runs SCRIPT (train.sh, eval.sh) in Python on all devices of this node. Nothing here changes the directory:
# relative flags mean the user's. Every step is an exec, so that signals and the exit code belong to the Python process.
set -euo pipefail

script=$(readlink -f "$1")
here=$(dirname "$script")
shift

if [[ -n ${PYTHON:-} ]]; then python=$PYTHON
elif [[ -n ${VIRTUAL_ENV:-} ]]; then python=$VIRTUAL_ENV/bin/python
elif [[ -x $here/../.venv/bin/python ]]; then python=$here/../.venv/bin/python
else python=python3; fi
if ! command -v "$python" >/dev/null; then
    echo "vico: error: there is no Python at '$python'; run 'bash $here/environment.sh', or set PYTHON to the one to use" >&2
    exit 2
fi

for flag; do
    case $flag in -h | --help) exec "$python" "$script" "$@" ;; esac # once, without ranks
done
exec "$python" "$here/start.py" "$script" "$@"

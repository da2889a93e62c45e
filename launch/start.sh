#!/usr/bin/env bash
# start.sh SCRIPT FLAGS: runs SCRIPT (train.sh, eval.sh) in Python on all devices of this node. Nothing here changes the directory:
# relative flags mean the user's. Every step is an exec, so that signals and the exit code belong to the Python process.
set -euo pipefail

script=$(readlink -f "$1")
here=$(dirname "$script")
shift

source "$here/common.sh"
find_python

for flag; do
    case $flag in -h | --help) exec "$python" "$script" "$@" ;; esac # once, without ranks
done
exec "$python" "$here/start.py" "$script" "$@"

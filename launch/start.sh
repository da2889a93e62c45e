#!/usr/bin/env bash
# start.sh SCRIPT FLAGS: runs SCRIPT (train.sh, eval.sh) in Python on all devices of this node.
# It keeps the working directory, as paths in flags may be relative. Every step is an exec, so that
# signals and the exit code are those of the Python process.
set -euo pipefail

script=$(readlink -f "$1")
here=$(dirname "$script")
shift

source "$here/common.sh"
find_python

for flag; do
    case $flag in -h | --help | --help=* | --print_config) exec "$python" "$script" "$@" ;; esac # no ranks
done
exec "$python" "$here/start.py" "$script" "$@"

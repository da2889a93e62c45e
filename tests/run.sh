#!/usr/bin/env bash
# The tests. Makes the environment if needed. Arguments are pytest's, relative to the checkout:
# bash tests/run.sh tests/e2e/test_launch.py -x
# Without arguments two processes share the files; with -n N, N share tests and groups of tests.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/../launch/common.sh"

bash "$root/launch/environment.sh" --dev
export PYTHON=$venv/bin/python # for scripts that tests start
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
cd "$root"
(($#)) || set -- -n 2 --dist loadfile
[[ " $* " != *" -n "* || " $* " == *" --dist "* ]] || set -- "$@" --dist loadgroup
exec "$PYTHON" -m pytest -rs "$@" # with the reasons for skips: no GPU, no SLURM

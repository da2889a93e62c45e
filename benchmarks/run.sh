#!/usr/bin/env bash
# bash benchmarks/run.sh SUITE [flags]: runs a suite, writes its record to benchmarks/results/ and
# prints it as the last line (benchmarks/README.md).
set -euo pipefail
root=$(cd "$(dirname "$(readlink -f "$0")")/.." && pwd)
if [[ -n ${PYTHON:-} ]]; then python=$PYTHON
elif [[ -n ${VIRTUAL_ENV:-} ]]; then python=$VIRTUAL_ENV/bin/python
elif [[ -x $root/.venv/bin/python ]]; then python=$root/.venv/bin/python
else python=python3; fi
[[ ${1:-} == cpu ]] && export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m benchmarks.run "$@"

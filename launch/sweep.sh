#!/usr/bin/env bash
# One run per row of a table of flags, one after another on all devices of this machine:
#   bash launch/sweep.sh TABLE --dataset nextqa --output_dir runs/sweep
# The first line of TABLE (.tsv or .csv) names flags (blr, weight_decay, ...). Each further line is
# one run in OUTPUT_DIR/<row>; a column "name" names that folder. A row that fails does not stop the
# others. The end prints OUTPUT_DIR/results.tsv. The same command goes on after an interruption.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/common.sh"
help_if_asked "${1:-}" # behind the table they are flags of the training
find_python
export PYTHON=$python # for train.sh
exec "$python" "$root/launch/slurm/table.py" all "$@"

#!/usr/bin/env bash
# A real LLaMA on real questions, on a CPU: trains SmolLM2-135M on rows of NExT-QA, and evaluates it.
# Usage: bash launch/examples/smollm2_nextqa.sh NEXTQA OUTPUT_DIR [FEATURES]
# NEXTQA: a folder with val.csv and train.csv (or a labelled test.csv in its place). FEATURES: a file
# or folder of their features; by default those in NEXTQA, or else random stand-ins, which is said.
# VICO_ROWS: how many rows are drawn for training, and how many for evaluation (default: 200).
# VICO_SMOLLM2: the model's folder, which smollm2.sh makes first where it is missing.
# When it is run again, it skips what is done. The last line is JSON.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
source "$here/../common.sh"
help_if_asked "$@"

(($# == 2 || $# == 3)) || fail "usage: bash $0 NEXTQA OUTPUT_DIR [FEATURES]"
source=$(readlink -m "$1") out=$(readlink -m "$2") features=${3:+$(readlink -m "$3")}
rows=${VICO_ROWS:-200}
[[ $rows =~ ^[1-9][0-9]{0,6}$ ]] || fail "VICO_ROWS=$rows: must be a whole number of at least 1"
find_python
export PYTHON=$python
model=$(readlink -m "${VICO_SMOLLM2:-$root/pretrained/llama/SmolLM2-135M}")

say "1/3 the rows"
features=$(PYTHONPATH=$root "$python" "$here/smollm2_nextqa.py" \
    "$source" "$out/data/nextqa" "$rows" "$features")

say "2/3 the model"
bash "$here/smollm2.sh" "$model" >/dev/null

say "3/3 training, an epoch of 8 questions a step, and an evaluation"
bash "$root/launch/train.sh" --model "$model" --data_path "$out/data" --features "$features" \
    --output_dir "$out/run" --dataset nextqa --cap 0 --max_seq_len 192 --precision fp32 \
    --batch_size 8 --epochs 1 --warmup_epochs 0.2 --lr 3e-3

"$python" -I - "$out/run" "$features" "$SECONDS" <<'EOP'
import json
import sys
from pathlib import Path

run, features, seconds = sys.argv[1:]
*_, epoch = (Path(run) / "log.txt").read_text(encoding="utf-8").splitlines()
result = {key: value for key, value in json.loads(epoch).items() if key.startswith("val_")}
print(json.dumps({**result, "features": features, "seconds": int(seconds), "output_dir": run}))
EOP

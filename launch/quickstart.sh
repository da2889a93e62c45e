#!/usr/bin/env bash
# From a bare machine with Python to a trained model: makes the environment and a toy dataset,
# trains under DeepSpeed, evaluates. When it is run again, it skips what is done.
# VICO_DEMO_DIR: the folder of the toy dataset and the run (default: demo/ in the checkout).
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/common.sh"
help_if_asked "$@"
[[ $# == 0 ]] || fail "unknown word $1; usage: bash launch/quickstart.sh"

demo=$(readlink -m "${VICO_DEMO_DIR:-$root/demo}")
run=$demo/run
cd "$root" # `python -m` imports from the current folder; the user's may hold anything
if has_gpu; then where="all GPUs of this machine" size="some gigabytes"; else
    where="${VICO_RANKS:-2} rank(s) on the CPU, as there is no GPU" size="about 300 MB"
    export VICO_RANKS=${VICO_RANKS:-2}
fi
say "this takes about 5 minutes on two cores; it runs on $where"
[[ -e $venv/stamp ]] || say "the first start downloads $size of packages before that"

say "1/4 the environment"
bash "$root/launch/environment.sh"
export PYTHON=$venv/bin/python # even where another environment is active

say "2/4 a toy dataset in $demo: tokenizer, tiny LLaMA, videos, questions"
"$PYTHON" -m vico demo --output_dir "$demo"

say "3/4 training, ZeRO-2, bf16; follow it with: $venv/bin/tensorboard --logdir '$run/runs'"
llama=$demo/pretrained/llama
dataset=(--data_path "$demo/data" --llama_model_path "$llama")
bash "$root/launch/train.sh" --config "$root/launch/recipes/demo.yaml" "${dataset[@]}" \
    --output_dir "$run"

say "4/4 evaluation of the best epoch, on each video's own features and on another video's"
evaluate=(bash "$root/launch/eval.sh" --resume "$run/checkpoint_best" --split val)
swapped=(--data_path "$demo/data_swapped" --llama_model_path "$llama")
"${evaluate[@]}" "${dataset[@]}" --output_dir "$run"
"${evaluate[@]}" "${swapped[@]}" --output_dir "$demo/run_swapped"

"$PYTHON" - "$run" "$demo/run_swapped" "$venv/bin/tensorboard" <<'EOP'
import json
import sys
from collections import Counter
from pathlib import Path

run, run_swapped, tensorboard = sys.argv[1:]


def read_json_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def count_by_type(folder):
    """(number of questions, number of correct answers), each by question type and for "all"."""
    total, correct = Counter(), Counter()
    for line in read_json_lines(Path(folder) / "predictions_val.jsonl"):
        for group in (line["type"], "all"):
            total[group] += 1
            correct[group] += line["prediction"] == line["answer"]
    return total, correct


total, correct = count_by_type(run)
total_swapped, correct_swapped = count_by_type(run_swapped)
print("\nHeld-out accuracy (chance: 20 %)\n")
print("  type   questions   accuracy   with another video's features")
for group in [*sorted(set(total) - {"all"}), "all"]:
    accuracy = correct[group] / total[group]
    accuracy_swapped = correct_swapped[group] / total_swapped[group]
    print(f"  {group:<6}{total[group]:>10}{accuracy:>11.1%}{accuracy_swapped:>14.1%}")
print(f"\nCurves: {tensorboard} --logdir '{run}/runs'\n")
steps = read_json_lines(Path(run) / "steps.jsonl")
result = {
    "val_acc": correct["all"] / total["all"],
    "val_acc_swapped_video": correct_swapped["all"] / total_swapped["all"],
    "train_seconds": round(sum(step["step_seconds"] for step in steps), 1),
    "output_dir": run,
}
print(json.dumps(result))
EOP

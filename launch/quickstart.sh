#!/usr/bin/env bash
# From a bare machine with Python to a trained model: environment, a small world to learn, training under DeepSpeed, evaluation.
# Started again, it finds what is done. VICO_DEMO_DIR: where the world and the run go (default: demo/ in the checkout).
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/common.sh"

demo=$(readlink -m "${VICO_DEMO_DIR:-$root/demo}")
run=$demo/run
if has_gpu; then where="all GPUs of this machine" size="some gigabytes"; else
    where="${VICO_RANKS:-2} rank(s) on the CPU, as there is no GPU" size="about 300 MB"
    export VICO_RANKS=${VICO_RANKS:-2}
fi
say "this takes about 5 minutes on two cores; it runs on $where"
[[ -e $venv/stamp ]] || say "the first start downloads $size of packages before that"

say "1/4 the environment"
bash "$root/launch/environment.sh"
export PYTHON=$venv/bin/python # not another one that is active

say "2/4 a small world in $demo: tokenizer, tiny LLaMA, videos, questions"
"$PYTHON" -m vico demo --output_dir "$demo"

say "3/4 training, ZeRO-2, bf16; follow it with: $venv/bin/tensorboard --logdir '$run/runs'"
world=(--data_path "$demo/data" --llama_model_path "$demo/pretrained/llama")
bash "$root/launch/train.sh" --config "$root/launch/recipes/demo.yaml" "${world[@]}" --output_dir "$run"

say "4/4 evaluation of the best epoch: once as it is, once with each video's features swapped for another's"
bash "$root/launch/eval.sh" --resume "$run/checkpoint_best" "${world[@]}" --output_dir "$run" --split val
world[1]=$demo/data_swapped
bash "$root/launch/eval.sh" --resume "$run/checkpoint_best" "${world[@]}" --output_dir "$demo/run_swapped" --split val

"$PYTHON" - "$run" "$demo/run_swapped" "$venv/bin/tensorboard" <<'EOP'
import json
import sys
from collections import Counter
from pathlib import Path

run, swapped, tensorboard = sys.argv[1:]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_type(folder):
    """(questions, right answers) per type, and in all."""
    asked, right = Counter(), Counter()
    for line in lines(Path(folder) / "predictions_val.jsonl"):
        for group in (line["type"], "all"):
            asked[group] += 1
            right[group] += line["prediction"] == line["answer"]
    return asked, right


(asked, right), (asked_swapped, right_swapped) = by_type(run), by_type(swapped)
print("\nHeld-out accuracy (chance: 20 %)\n\n  type   questions   accuracy   with another video's features")
for group in [*sorted(set(asked) - {"all"}), "all"]:
    print(f"  {group:<6}{asked[group]:>10}{right[group] / asked[group]:>11.1%}{right_swapped[group] / asked_swapped[group]:>14.1%}")
print(f"\nCurves: {tensorboard} --logdir '{run}/runs'\n")
result = {
    "val_acc": right["all"] / asked["all"],
    "val_acc_swapped_video": right_swapped["all"] / asked_swapped["all"],
    "train_seconds": round(sum(step["step_seconds"] for step in lines(Path(run) / "steps.jsonl")), 1),
    "output_dir": run,
}
print(json.dumps(result))
EOP

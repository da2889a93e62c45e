#!/usr/bin/env bash
# What an adapter does to plain language, as a table: trains SmolLM2-135M on the videos of moving
# shapes in six ways, and measures accuracies and real text for each. On two cores: 50 minutes.
# Usage: bash launch/examples/cognition.sh [--smollm2 FOLDER] [OUTPUT_DIR]
#                                        (FOLDER: OUTPUT_DIR/SmolLM2, OUTPUT_DIR: demo/cognition)
# Where FOLDER is missing, smollm2.sh makes it first (and fetches 93 MB). VICO_EXAMPLE_STEPS: of
# each training (540). When it is run again, it skips what is done. The last line is the record.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
source "$here/../common.sh"
source "$here/example.sh"
begin_example cognition "av, transformers" "video" "$@"

smollm2=${smollm2:-$out/SmolLM2}
features=$out/data/shapes/features.pth
settings=(--dataset shapes --data_path "$out/data" --max_seq_len 96 --max_cap_len 96
    --model "$smollm2" --precision bf16 --batch_size 2 --warmup_epochs 0.1 --lr 5e-3
    --weight_decay 0.02 --bias 0 --num_workers 1 --no_eval
    --epochs 3 --max_steps "${VICO_EXAMPLE_STEPS:-540}")
keep=(--text "$out/texts/kept.txt" --keep)
measured=("$out"/texts/{manual,code,licence}.txt)

# Trains and measures a row of the table: its name, and the flags that it has of its own.
row() {
    local run=$out/runs/$1 began=$SECONDS
    [[ ! -e $run/texts.json ]] || return 0
    say "$1: a training and two measurements, 6 to 12 minutes"
    bash "$root/launch/train.sh" "${settings[@]}" "${@:2}" --output_dir "$run" >&2
    beside last_line "${vico[@]}" ablate --resume "$run" >"$run/ablate.json"
    local ablation=$!
    last_line "${vico[@]}" cognition --resume "$run" --text "${measured[@]}" >"$run/texts.tmp"
    wait $ablation
    "$python" "$here/row_facts.py" "$run" $((SECONDS - began))
    mv "$run/texts.tmp" "$run/texts.json" # last: its row is done
}

say "videos, questions and features of shapes, and texts, in $out; a minute"
[[ -e $smollm2/config.json ]] || bash "$here/smollm2.sh" "$smollm2" >/dev/null
"$python" "$here/videos.py" "$out" --no_llama >&2
[[ -e $features ]] ||
    "${vico[@]}" extract "$out/videos" --encoder "$out/clip" --output "$features" >&2
"$python" "$here/cognition.py" texts "$out/texts"

row trained
row keep-0.3 "${keep[@]}" 0.3
row keep-1 "${keep[@]}" 1
row keep-10 "${keep[@]}" 10
row 10-layers --adapter_layer 10
row no-captions --cap 0

"$python" "$here/cognition.py" table "$out/runs" "$out"

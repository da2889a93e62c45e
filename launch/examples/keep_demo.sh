#!/usr/bin/env bash
# What --keep costs and keeps on the demo, over several seeds: trains its recipe in fp32 with and
# without, answers 1,500 held-out questions, and measures texts that were kept and others.
# Usage: bash launch/examples/keep_demo.sh [OUTPUT_DIR]                (default: demo/keep_demo)
# VICO_EXAMPLE_SEEDS: "0 1 2 3 4". VICO_EXAMPLE_WEIGHTS: of --keep, "1 2". On two cores the 15 runs
# take 20 minutes, two at a time. When it is run again, it skips what is done. The last line is the
# record.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
source "$here/../common.sh"
source "$here/example.sh"
begin_example keep_demo "deepspeed, sentencepiece" "" "$@"
[[ -z $smollm2 ]] || fail "--smollm2: the demo has a LLaMA of its own; leave it out"

read -ra seeds <<<"${VICO_EXAMPLE_SEEDS:-0 1 2 3 4}"
read -ra weights <<<"${VICO_EXAMPLE_WEIGHTS:-1 2}"
settings=(--config "$root/launch/recipes/demo.yaml" --data_path "$out/demo/data"
    --llama_model_path "$out/demo/pretrained/llama" --precision fp32 --batch_size 32
    --num_workers 0 --no_eval --report_to none)
texts=("$out"/texts/{kept,other}.txt)

# Trains and measures one run: its seed, its name, and the flags that it has of its own.
row() {
    local run=$out/runs/$2-$1 began=$SECONDS
    [[ ! -e $run/texts.json ]] || return 0
    say "$2, seed $1: a training and two measurements, 2 minutes"
    "${vico[@]}" train "${settings[@]}" --seed "$1" "${@:3}" --output_dir "$run" >&2
    last_line "${vico[@]}" eval --resume "$run" --num_workers 0 >"$run/eval.json"
    last_line "${vico[@]}" cognition --resume "$run" --text "${texts[@]}" >"$run/texts.tmp"
    "$python" "$here/row_facts.py" "$run" $((SECONDS - began))
    mv "$run/texts.tmp" "$run/texts.json" # last: its row is done
}

# Runs a row beside another one.
row_beside() {
    [[ $(jobs -rp | wc -l) -lt 2 ]] || wait -n
    beside row "$@"
}

say "the demo with 300 videos to ask about, and texts, in $out; a minute"
"$python" "$here/keep_demo.py" make "$out"
for seed in "${seeds[@]}"; do
    row_beside "$seed" without
    for weight in "${weights[@]}"; do
        row_beside "$seed" "keep-$weight" --text "${texts[0]}" --keep "$weight"
    done
done
for job in $(jobs -p); do wait "$job"; done

"$python" "$here/keep_demo.py" table "$out" "${weights[*]}" "${seeds[*]}"

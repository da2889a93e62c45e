#!/usr/bin/env bash
# From video files to answers, captions and a report: makes mp4s of moving shapes and questions about
# them, extracts features, trains a tiny LLaMA that it pretrains first, asks, captions, reports.
# Usage: bash launch/examples/videos.sh [--smollm2 FOLDER] [OUTPUT_DIR]     (default: demo/videos)
# --smollm2: trains on SmolLM2-135M in FOLDER, which smollm2.sh makes first where it is missing.
# It is offline without --smollm2. When it is run again, it skips what is done. The last line is JSON.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
source "$here/../common.sh"
source "$here/example.sh"
begin_example videos "av, plotly, pycocoevalcap, transformers" "video,captions,report" "$@"

features=$out/data/shapes/features.pth
shapes=(--dataset shapes --data_path "$out/data" --max_seq_len 96 --max_cap_len 96 --cap 0.5)
if [[ -n $smollm2 ]]; then
    run=$out/run-smollm2 report=$out/report-smollm2.html make=--no_llama
    model=(--model "$smollm2")
    training=(--precision bf16 --batch_size 2 --epochs 3 --warmup_epochs 0.1 --lr 5e-3
        --weight_decay 0.02 --bias 0)
else
    run=$out/run report=$out/report.html make=
    model=(--llama_model_path "$out/pretrained/llama" --model tiny)
    training=(--precision bf16 --batch_size 16 --epochs 8 --warmup_epochs 1 --lr 1e-2
        --weight_decay 0.02 --bias 0)
fi
swapped=(--data_path "$out/data_swapped" --features "$features" --output_dir "$run-swapped")

say "1/7 the videos, questions, an image encoder and a LLaMA, in $out"
[[ -z $smollm2 ]] || bash "$here/smollm2.sh" "$smollm2" >/dev/null
"$python" "$here/videos.py" "$out" $make >&2

say "2/7 features of the videos"
[[ -e $features ]] ||
    "${vico[@]}" extract "$out/videos" --encoder "$out/clip" --output "$features" >&2

say "3/7 the check before training"
"${vico[@]}" check "${shapes[@]}" "${model[@]}" "${training[@]}" --output_dir "$run" >&2

say "4/7 training"
bash "$root/launch/train.sh" "${shapes[@]}" "${model[@]}" "${training[@]}" --num_workers 1 \
    --output_dir "$run" >&2

say "5/7 the held-out questions, about each video and about another one"
acc=$(last_line "${vico[@]}" eval --resume "$run")
acc_swapped=$(last_line "${vico[@]}" eval --resume "$run" "${swapped[@]}")
"${vico[@]}" ask --resume "$run" --encoder "$out/clip" --video "$out/videos/val-000.mp4" \
    "what shape is it" --options circle square triangle cross ring >&2

say "6/7 captions of the held-out videos, and of the same ones swapped"
captions=$(last_line "${vico[@]}" caption --resume "$run" --split val --metrics)
captions_swapped=$(last_line "${vico[@]}" caption --resume "$run" --split val --metrics "${swapped[@]}")

say "7/7 the report"
"${vico[@]}" report "$run" "$run-swapped" --videos "$out/videos" --output "$report" >&2

"$python" -I - "$acc" "$acc_swapped" "$captions" "$captions_swapped" "$report" "$SECONDS" <<'EOP'
import json
import sys

*results, report, seconds = sys.argv[1:]
acc, acc_swapped, captions, captions_swapped = (json.loads(result) for result in results)
result = {
    "val_acc": acc["acc"],
    "val_acc_swapped_video": acc_swapped["acc"],
    "cider": captions["cider"],
    "cider_swapped": captions_swapped["cider"],
    "report": report,
    "seconds": int(seconds),
}
print(json.dumps(result))
EOP

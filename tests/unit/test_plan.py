"""`vico plan`: what it answers, what is forced, what it refuses, and that its table fits."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.errors import refusal
from support.processes import ROOT
from vico.cli.plan import CASES, QUANTIZED_CASES, main, model_size, plan_case, table
from vico.errors import UserError
from vico.planner import plan as planner
from vico.planner.gpu_specs import GIB, GPUS, Hardware, detected_gpu, gpu_by_name, gpu_of_size
from vico.planner.plan import SIZES, PlanRequest, TokenLengths
from vico.train.ds_config import read_config

LENGTHS = TokenLengths(96, 194, 544, 34132)


def test_gpus_are_found_by_their_names() -> None:
    for gpu in GPUS.values():
        assert gpu_by_name(gpu.name.lower()) is gpu
        for full in gpu.torch_names:
            assert gpu_by_name(full) is gpu
            assert detected_gpu(full, 80 * GIB) == replace(gpu, memory_gib=80.0)
    assert detected_gpu("NVIDIA of tomorrow", GIB).tflops is None
    assert (
        GPUS["V100-16"].peak("bf16") is None
        and GPUS["H100"].peak("fp32") is None
        and GPUS["H100"].peak("fp16") == 989
    )


@pytest.mark.parametrize("case", [*CASES, *QUANTIZED_CASES], ids=str)
def test_each_case_of_the_table_fits(case: tuple[Any, ...]) -> None:
    plan = plan_case(*case)
    task, stage, layers = plan.task, plan.stage, plan.checkpointed
    assert plan.memory.spare >= 0 and plan.memory == planner.memory(
        task, stage, layers, plan.max_tokens
    )
    assert planner.memory(task, stage, layers, plan.largest_tokens + planner.TOKEN_STEP).spare < 0
    assert plan.max_tokens >= task.batch_tokens, "the published batch in one piece"
    categories = plan.memory
    parts = (
        categories.weights
        + categories.gathered
        + categories.activations
        + categories.trainables
        + categories.buckets
    )
    assert (
        categories.total == parts + max(categories.head, categories.backward) + categories.reserve
    )
    assert (stage == "zero2" and task.quantize is None) == (categories.gathered == 0)
    assert task.quantize is None or stage == "zero2"


def test_small_cards_hold_a_7b_at_the_published_batch() -> None:
    on_24, on_16 = plan_case("7B", 1, 1, 24), plan_case("7B", 1, 1, 16)
    assert on_24.checkpointed == 0 and on_24.stage == on_16.stage == "zero2"
    assert on_16.checkpointed > 0
    whole = planner.memory(on_16.task, "zero2", SIZES["7B"].n_layers, on_16.max_tokens)
    assert whole.activations < on_16.memory.activations and whole.spare > 0


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_guide_has_the_table() -> None:
    guide = ROOT / "vico" / "planner" / "README.md"
    assert table() in guide.read_text(encoding="utf-8"), (
        f"put the output of `vico plan --table` into {guide}"
    )


def test_readme_has_rows_of_the_table() -> None:
    """README.md shows some rows, without the parts of the memory and the token budget."""
    shown = []
    for row in map(cells, table().splitlines()[2:]):
        model, gpus, stage, recomputed, *_, memory, _, speed, epoch = row
        total, _, _ = memory.split()
        shown.append(f"| {model} | {gpus} | {stage} | {recomputed} | {total} | {speed} | {epoch} |")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = readme.split("| epoch |\n")[1].split("\n\n")[0].splitlines()[1:]
    assert len(rows) >= 5 and set(rows) <= set(shown), rows


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 0
    return capsys.readouterr().out


def test_what_is_forced_is_kept(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ("--model", "7B", "--gpu", "H100", "--gpus", "8")
    free = json.loads(run(capsys, *flags, "--json"))
    assert (free["stage"], free["checkpointed_layers"]) == ("zero2", 0)
    forced = (
        *flags,
        "--deepspeed",
        "zero3",
        "--checkpoint_activations",
        "7",
        "--max_tokens",
        "1000",
        "--write",
        str(tmp_path / "z.json"),
    )
    plan = json.loads(run(capsys, *forced, "--json"))
    assert (plan["stage"], plan["checkpointed_layers"], plan["max_tokens"]) == ("zero3", 7, 1000)
    assert json.loads((tmp_path / "z.json").read_text()) == plan["ds_config"]
    assert (
        read_config(str(tmp_path / "z.json"), "bf16", 8, 2, 8)["zero_optimization"]["stage"] == 3
    ), "training takes it"
    assert (
        plan["ds_config"]["zero_optimization"]["stage3_prefetch_bucket_size"] >= SIZES["7B"].block
    )
    full = json.loads(run(capsys, *flags, "--checkpoint_activations", "full", "--json"))
    assert full["speed"]["tokens_per_second"] == pytest.approx(
        free["speed"]["tokens_per_second"] * 2 / 3, rel=0.02
    )


def test_text_names_what_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert "n/a: not known is the rate of 24 GB" in run(capsys, "--gpu_memory", "24")
    assert "n/a: not known is the rate of V100-32 in bf16" in run(capsys, "--gpu", "V100-32")
    assert "the network of a node (--network)" in run(
        capsys, "--model", "65B", "--gpu", "H100", "--gpus", "8", "--nodes", "2"
    )
    assert "the link between the GPUs (--link)" in run(
        capsys, "--model", "65B", "--gpu", "L40S", "--gpus", "8"
    )
    assert "tokens/s" in run(
        capsys, "--model", "65B", "--gpu", "L40S", "--gpus", "8", "--link", "20"
    )


def test_speed_is_the_slower_of_products_and_gathers() -> None:
    task = PlanRequest(SIZES["7B"], Hardware(GPUS["H100"]), LENGTHS)
    alone, _ = planner.speed(task, "zero2", 0, 8192)
    assert alone is not None and alone.tokens_per_second == pytest.approx(
        989e12 / 2 / 26.2e9, rel=0.01
    )
    slow = replace(task, hardware=Hardware(GPUS["H100"], 8, 2, network_gbit=10.0))
    bound, _ = planner.speed(slow, "zero3", 0, 8192)
    assert bound is not None and bound.gather_seconds == pytest.approx(
        2 * 2 * SIZES["7B"].frozen * 15 / 16 / (1.25e9 * 0.8)
    )
    assert bound.tokens_per_second == pytest.approx(16 * slow.step_tokens / bound.gather_seconds)


def test_a_folder_is_planned_as_its_size(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """No weights lie there."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "params.json").write_text(
        json.dumps(
            {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "vocab_size": -1}
        )
    )
    assert model_size(str(folder)) == replace(SIZES["7B"], name="mine", kv_heads=32)
    hugging_face = tmp_path / "hf"
    hugging_face.mkdir()
    shape = {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 14336,
        "vocab_size": 128256,
    }
    (hugging_face / "config.json").write_text(
        json.dumps({"model_type": "llama", "num_key_value_heads": 8, **shape})
    )
    assert model_size(str(hugging_face)) == replace(SIZES["8B"], name="hf")
    assert "mine" in run(capsys, "--model", str(folder), "--gpu_memory", "24")


def test_mistakes_are_one_line() -> None:
    assert "did you mean 'H100'" in refusal(main, ["--gpu", "H1O0"])
    assert "--gpu or --gpu_memory is missing" in refusal(main, [])
    assert "a folder with params.json" in refusal(main, ["--model", "9B", "--gpu", "H100"])
    assert "from 1 to 32" in refusal(main, ["--gpu", "H100", "--checkpoint_activations", "33"])
    assert "whole number" in refusal(main, ["--gpu", "H100", "--gpus", "1.5"])
    nothing = refusal(main, ["--model", "65B", "--gpu_memory", "6"])
    assert (
        "65B on 1 x 6 GB: does not fit" in nothing
        and "GiB short" in nothing
        and "what would help: " in nothing
    )
    host = refusal(main, ["--model", "33B", "--gpu_memory", "24", "--host_memory", "32"])
    assert (
        "60.6 GiB of host memory per node and 32 are there; what would help: more host memory"
        in host
    )
    forced = refusal(main, ["--model", "65B", "--gpu_memory", "40", "--deepspeed", "zero2"])
    assert "leaving --deepspeed out" in forced


def test_what_helps_does_help() -> None:
    task = PlanRequest(SIZES["65B"], Hardware(gpu_of_size(6)), LENGTHS)
    with pytest.raises(UserError, match="1 x 16 GB"):
        planner.plan(task)
    assert planner.plan(replace(task, hardware=Hardware(gpu_of_size(16)))).memory.total < 16 * GIB


def test_answers_without_torch() -> None:
    code = "import sys; from vico.cli.main import main; code = main(['plan', '--model', '65B', '--gpu', 'H100', '--gpus', '8'])"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; sys.exit(code or 'torch' in sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "zero3" in done.stdout

"""`vico plan`: what it answers, what is forced, what it refuses, and that its table fits."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.errors import refusal
from support.planning import VICO_CONFIGS, plan_request
from support.processes import ROOT
from vico.cli.plan import main, named_config
from vico.cli.plan_text import CASES, QUANTIZED_CASES, TableCase, plan_case, table
from vico.errors import UserError
from vico.model.config import LLAMA_CONFIGS, LLAMA_VOCAB_SIZE, ViCoConfig, named_model
from vico.planner.estimate import _trainable_bytes, binary_search, estimate_memory
from vico.planner.gpu_specs import GIB, GPUS, Hardware, detected_gpu, gpu_by_name, gpu_of_size
from vico.planner.memory import FP32
from vico.planner.plan import plan
from vico.planner.request import TOKEN_STEP
from vico.planner.speed import estimate_speed
from vico.train.ds_config import read_config

SMALLEST = TableCase("7B", 1, 1, 16)


def run(capsys: pytest.CaptureFixture[str], flags: str) -> str:
    assert main(flags.split()) == 0
    return capsys.readouterr().out


def run_json(capsys: pytest.CaptureFixture[str], flags: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(run(capsys, f"{flags} --json"))
    return result


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir()
    path.write_text(json.dumps(content), encoding="utf-8")


def test_gpu_names() -> None:
    for gpu in GPUS.values():
        assert gpu_by_name(gpu.name.lower()) is gpu
        for full in gpu.torch_names:
            assert gpu_by_name(full) is gpu
            assert detected_gpu(full, 80 * GIB) == replace(gpu, memory_gib=80.0)
    assert detected_gpu("NVIDIA of tomorrow", GIB).tflops is None
    assert GPUS["V100-16"].peak("bf16") is None
    assert GPUS["H100"].peak("fp32") is None
    assert GPUS["H100"].peak("fp16") == 989


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("RTX A6000", "A6000"),
        ("a6000", "A6000"),
        ("nvidia l4", "L4"),
        ("l40s", "L40S"),
        ("Tesla T4", "T4"),
        ("V100", "V100-16"),
        ("Tesla V100", "V100-16"),
        ("A100", "A100-40"),
        ("b200", "B200"),
        ("RTX 5090", "RTX5090"),
        ("RTX-4090", "RTX4090"),
        ("3090", "RTX3090"),
        ("H100", "H100"),
        ("24GB", "24 GB"),
        ("80 GiB", "80 GB"),
    ],
)
def test_names_that_people_write(name: str, expected: str) -> None:
    assert gpu_by_name(name).name == expected


def test_rates_of_the_datasheets() -> None:
    """Dense products accumulated in fp32; fp16 alone where a GPU has no bf16."""
    rates = {"A6000": 154.8, "L4": 121, "L40S": 362, "B200": 2250, "RTX5090": 209.5}
    assert {name: GPUS[name].peak("bf16") for name in rates} == rates
    for name, rate in {"T4": 65, "V100-16": 125, "V100-32": 125}.items():
        assert (GPUS[name].peak("bf16"), GPUS[name].peak("fp16")) == (None, rate)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("7b", "7B"),
        ("llama-7b", "7B"),
        ("llama-2-7b", "7B"),
        ("Llama-2-7b-hf", "7B"),
        ("meta-llama/Llama-2-13b-chat-hf", "13B"),
        ("llama2-70b", "70B"),
        ("llama-30b", "33B"),
        ("Meta-Llama-3-8B-Instruct", "8B"),
        ("llama-3.1-8b", "8B"),
        ("llama-3-70b", None),
        ("llama-70b", None),
        ("llama-2-8b", None),
        ("llama-3.2-1b", None),
        ("mistral-7b", None),
        ("7", None),
        ("7bb", None),
    ],
)
def test_model_names(name: str, expected: str | None) -> None:
    """LLaMA-3 70B has another vocabulary than LLaMA-2 70B, which is the one known."""
    assert named_model(name) == expected
    if expected is not None:
        assert named_config(name) == (expected, LLAMA_CONFIGS[expected])


@pytest.mark.parametrize("largest", [1, 2, 3, 40, 41])
def test_binary_search(largest: int) -> None:
    """The bounds are not tried: `high` is the answer if nothing below it is enough."""
    for answer in range(1, largest + 1):
        tried: list[int] = []

        def is_enough(number: int, answer: int = answer, tried: list[int] = tried) -> bool:
            tried.append(number)
            return number >= answer

        assert binary_search(0, largest, is_enough) == answer
        assert all(0 < number < largest for number in tried)


@pytest.mark.parametrize("case", [*CASES, *QUANTIZED_CASES], ids=str)
def test_table_case_fits(case: TableCase) -> None:
    result = plan_case(case)
    request, stage, layers = result.request, result.stage, result.num_checkpointed
    memory = result.memory
    assert memory.total <= 0.94 * memory.available
    assert memory == estimate_memory(request, stage, layers, result.max_tokens)
    too_many = result.largest_tokens + TOKEN_STEP
    assert estimate_memory(request, stage, layers, too_many).spare < 0
    assert result.max_tokens >= request.batch_tokens, "the published batch in one piece"
    kept = memory.weights + memory.gathered + memory.activations
    kept += memory.trainables + memory.buckets
    assert memory.total == kept + max(memory.head, memory.backward) + memory.reserve
    assert (stage == "zero2" and request.quantize is None) == (memory.gathered == 0)
    assert request.quantize is None or stage == "zero2"


def test_the_table_shows_both_networks() -> None:
    """A node of eight H100 with eight ports of 400 Gbit/s, and with one."""
    (fast,) = [row for row in table().splitlines() if "3,200 Gbit/s" in row]
    (thin,) = [row for row in table().splitlines() if " 400 Gbit/s" in row]
    assert cells(fast)[2:] == cells(thin)[2:], "gathers stay within a node"


def test_small_gpus_hold_7b() -> None:
    """At the published batch; on 16 GB with recomputed layers."""
    on_24, on_16 = plan_case(TableCase("7B", 1, 1, 24)), plan_case(SMALLEST)
    assert on_24.num_checkpointed == 0 and on_24.stage == on_16.stage == "zero2"
    assert on_16.num_checkpointed > 0
    n_layers = LLAMA_CONFIGS["7B"].n_layers
    whole = estimate_memory(on_16.request, "zero2", n_layers, on_16.max_tokens)
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


def test_forced_choices_are_kept(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags, written = "--model 7B --gpu H100 --gpus 8", tmp_path / "z.json"
    free = run_json(capsys, flags)
    assert (free["stage"], free["checkpointed_layers"]) == ("zero2", 0)
    choices = f"--deepspeed zero3 --checkpoint_activations 7 --max_tokens 1000 --write {written}"
    forced = run_json(capsys, f"{flags} {choices}")
    assert forced["stage"] == "zero3"
    assert (forced["checkpointed_layers"], forced["max_tokens"]) == (7, 1000)
    assert json.loads(written.read_text()) == forced["ds_config"]
    ds_config = read_config(str(written), "bf16", 8, 2, 8)
    assert ds_config["zero_optimization"]["stage"] == 3, "training takes it"
    prefetch = forced["ds_config"]["zero_optimization"]["stage3_prefetch_bucket_size"]
    assert prefetch >= LLAMA_CONFIGS["7B"].num_block_parameters
    full = run_json(capsys, f"{flags} --checkpoint_activations full")
    expected = pytest.approx(free["speed"]["tokens_per_second"] * 2 / 3, rel=0.02)
    assert full["speed"]["tokens_per_second"] == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--gpu_memory 24", "n/a: the rate of 24 GB in bf16 is unknown"),
        ("--gpu V100-32", "n/a: the rate of V100-32 in bf16 is unknown"),
        ("--gpu T4", "T4 has no matrix units for bf16: plan and train with --precision fp16"),
        ("--gpu T4 --precision fp16", "% of 65 TFLOP/s"),
        ("--gpu_memory 24GB", "on 1 x 24 GB"),
        ("--gpu_memory 24GiB --model llama-2-7b", "7B (6.74 G frozen parameters, bf16) on"),
        ("--model 33B --gpu 24GB --host_memory 512GB", "host memory per node"),
        ("--gpu H100 --quantize nf4", "n/a: how fast H100 dequantizes weights is unknown"),
        ("--gpu H100 --quantize fp8", "n/a: how fast H100 trains in fp8 is unknown"),
        ("--model 65B --gpu H100 --gpus 8 --nodes 2", "zero3, frozen weights divided within each"),
        ("--model 65B --gpu H100 --nodes 16", "the network of a node (--network)"),
        ("--model 65B --gpu L40S --nodes 8 --link 1", "the network of a node (--network)"),
        ("--model 65B --gpu L40S --gpus 8", "the link between the GPUs (--link)"),
        ("--model 65B --gpu L40S --gpus 8 --link 20", "tokens/s"),
    ],
)
def test_unknown_rate(flags: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in run(capsys, flags)


def test_speed_is_the_slower_of_products_and_gathers() -> None:
    request = plan_request("7B", Hardware(GPUS["H100"]))
    alone, _ = estimate_speed(request, "zero2", 0, 8192)
    assert alone is not None
    assert alone.tokens_per_second == pytest.approx(989e12 / 2 / 26.2e9, rel=0.01)
    in_parts, _ = estimate_speed(
        replace(request, hardware=Hardware(GPUS["H100"], 8)), "zero3", 0, 8192
    )
    assert in_parts is not None and in_parts.gather_seconds < in_parts.compute_seconds
    assert in_parts.tokens_per_second == pytest.approx(8 / 1.12 * alone.tokens_per_second)
    slow = replace(request, hardware=Hardware(GPUS["H100"], 8, 2, network_gbit=10.0))
    bound, _ = estimate_speed(slow, "zero3", 0, 8192)
    num_bytes = 2 * 2 * LLAMA_CONFIGS["7B"].num_parameters
    assert bound is not None
    assert bound.gather_seconds == pytest.approx(num_bytes * 15 / 16 / (1.25e9 * 0.8))
    assert bound.tokens_per_second == pytest.approx(16 * slow.step_tokens / bound.gather_seconds)


def test_a_node_holds_the_frozen_weights_where_that_fits() -> None:
    """Its GPUs divide them, and no gather waits for the network."""
    machine = Hardware(GPUS["H100"], 8, 2, network_gbit=1.0)
    in_nodes = plan(plan_request("65B", machine))
    assert in_nodes.ds_config["frozen_shards"] == "node"
    over_all = plan(plan_request("65B", machine, node_shards=False))
    assert over_all.ds_config["frozen_shards"] == "all"
    num_bytes = 2 * VICO_CONFIGS["65B"].num_parameters
    assert in_nodes.memory.weights - over_all.memory.weights == num_bytes / 16
    assert in_nodes.speed is not None and over_all.speed is not None
    assert in_nodes.speed.gather_seconds == pytest.approx(2 * num_bytes * 7 / 8 / (450e9 * 0.8))
    assert over_all.speed.gather_seconds > 100 * in_nodes.speed.gather_seconds
    one_node = plan(plan_request("65B", Hardware(GPUS["H100"], 8)))
    assert "frozen_shards" not in one_node.ds_config
    small = plan(plan_request("65B", Hardware(gpu_of_size(24), 8, 4), max_tokens=64))
    assert small.ds_config["frozen_shards"] == "all", "20 GiB of weights per GPU would not fit"


def test_folder_of_weights(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Its params.json or config.json is enough: no weights lie there."""
    params = {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "vocab_size": -1}
    write_json(tmp_path / "mine" / "params.json", params)
    name, meta = named_config(str(tmp_path / "mine"))
    assert name == "mine"
    assert meta == replace(LLAMA_CONFIGS["7B"], vocab_size=-1, n_kv_heads=32)
    assert ViCoConfig.from_llama(meta).vocab_size == LLAMA_VOCAB_SIZE
    hugging_face_config = {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
    }
    write_json(tmp_path / "hf" / "config.json", hugging_face_config)
    name, hugging_face = named_config(str(tmp_path / "hf"))
    known = LLAMA_CONFIGS["8B"]
    assert name == "hf"
    assert replace(hugging_face, norm_eps=known.norm_eps) == known
    mine = run_json(capsys, f"--model {tmp_path / 'mine'} --gpu_memory 24")["model"]
    named = run_json(capsys, "--model 7B --gpu_memory 24")["model"]
    assert mine == {**named, "name": "mine", "kv_heads": 32}
    assert "mine" in run(capsys, f"--model {tmp_path / 'mine'} --gpu_memory 24")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--gpu H1O0", "did you mean 'H100'"),
        ("--gpu A100-80 --quantize fp8", "--quantize fp8: A100-80 has no fp8 units; those that"),
        ("--gpu_memory 24TB", "--gpu_memory: '24TB' is not a number"),
        ("--gpu_memory 0GB", "--gpu_memory: 0.0 must be 0.001 to"),
        ("--model llama-3-70b --gpu H100", "--model llama-3-70b: must be 7B, "),
        ("", "--gpu or --gpu_memory is missing"),
        ("--model 9B --gpu H100", "a folder with params.json"),
        ("--gpu H100 --checkpoint_activations 33", "from 1 to 32"),
        ("--gpu H100 --gpus 1.5", "--gpus: 1.5 must be a whole number (see vico plan --help)"),
        ("--gpu H100 --efficiency 2", "--efficiency: 2 must be 0.001 to 1"),
        ("--gpu H100 --caption_tokens x", "--caption_tokens: 'x' is not a number"),
        ("--gpu H100 --gpuss 2", "unrecognized arguments: --gpuss 2 (see vico plan --help)"),
        ("--gpu H100 --dataset a/b", "'a/b' is no plain name of a folder"),
        ("--gpu H100 8", "unrecognized arguments: 8"),
        ("--model 65B --gpu_memory 6", "65B on 1 x 6 GB: does not fit"),
        ("--model 65B --gpu_memory 6", "GiB short; what would help: "),
        (
            "--model 33B --gpu_memory 24 --host_memory 32",
            "60.6 GiB of host memory per node, 32 available; what would help: more host memory",
        ),
        ("--model 65B --gpu_memory 40 --deepspeed zero2", "leaving out --deepspeed"),
    ],
)
def test_refusals_are_one_line(flags: str, expected: str) -> None:
    assert expected in refusal(main, flags.split())


def test_suggestions_help() -> None:
    request = plan_request("65B", Hardware(gpu_of_size(6)))
    with pytest.raises(UserError, match="1 x 16 GB"):
        plan(request)
    larger = replace(request, hardware=Hardware(gpu_of_size(16)))
    assert plan(larger).memory.total < 16 * GIB


def test_answers_without_torch() -> None:
    command = ["plan", *"--model 65B --gpu H100 --gpus 8".split()]
    code = f"import sys; from vico.cli.main import main; code = main({command})"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; sys.exit(code or 'torch' in sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert "zero3" in done.stdout


@pytest.mark.parametrize("model", sorted(VICO_CONFIGS))
def test_named_models_have_their_published_width(model: str) -> None:
    """And as many parameters as Hugging Face counts in the published weights."""
    widths = {"7B": 11008, "13B": 13824, "33B": 17920, "65B": 22016, "8B": 14336, "70B": 28672}
    numbers = {"7B": 6738415616, "13B": 13015864320, "33B": 32528943616, "65B": 65285660672}
    numbers |= {"8B": 8030261248, "70B": 68976648192}
    assert LLAMA_CONFIGS[model].hidden_dim == widths[model]
    assert LLAMA_CONFIGS[model].num_parameters == numbers[model]


def test_ranks_share_the_optimizer() -> None:
    """Four tensors of the trainables' size under ZeRO-2, and six under ZeRO-3."""
    num_bytes = FP32 * VICO_CONFIGS["7B"].num_trainables
    for stage, shared in (("zero2", 4), ("zero3", 6)):
        one, two, many = (_trainable_bytes(VICO_CONFIGS["7B"], stage, n) for n in (1, 2, 10**6))
        assert one - two == shared * num_bytes / 2
        assert one - many == pytest.approx(shared * num_bytes, rel=1e-5)

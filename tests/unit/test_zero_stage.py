"""The ds_config of a run that names none: the planner's for its GPUs, or ZeRO-2 on CPUs."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.errors import refusal
from support.planning import LENGTHS, VICO_CONFIGS, plan_request
from vico.cli.plan_text import CASES, TableCase
from vico.distributed import topology
from vico.errors import UserError
from vico.model.config import LLAMA_CONFIGS
from vico.planner.estimate import SHIPPED_CONFIGS, sized_ds_config
from vico.planner.gpu_specs import GIB, GPUS, Hardware, gpu_by_name, gpu_of_size
from vico.planner.plan import plan
from vico.planner.request import STAGES
from vico.train import zero_stage
from vico.train.config import RunConfig
from vico.train.ds_config import read_config
from vico.train.zero_stage import Choice, choose

PUBLISHED: dict[str, Any] = dict(batch_size=8, accum_iter=2, max_seq_len=160, max_cap_len=384)
OFFLOADED = "ZeRO-3 with weights in the host's memory"


def choice(model: str, hardware: Hardware | None, training: bool = True, **flags: Any) -> Choice:
    num_ranks = hardware.ranks if hardware else 2
    config = RunConfig(model=model, **{**PUBLISHED, **flags})
    return choose(config, LLAMA_CONFIGS[model], num_ranks, hardware, training)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_gets_the_stage_of_the_table(case: TableCase) -> None:
    """With the table's --max_tokens and recomputed layers, on the table's machine."""
    gpu = gpu_by_name(case.gpu) if isinstance(case.gpu, str) else gpu_of_size(case.gpu)
    hardware = Hardware(gpu, case.gpus, case.nodes)
    free = plan(plan_request(case.model, hardware))
    chosen = choice(
        case.model,
        hardware,
        checkpoint_activations=free.checkpointing,
        max_tokens=free.max_tokens,
    )
    assert f"the planner expects {free.memory.total / GIB:.1f} of " in chosen.name
    assert chosen.notes == ()
    assert chosen.ds_config["zero_optimization"] == free.ds_config["zero_optimization"]
    assert "auto" not in json.dumps(chosen.ds_config)
    assert chosen.ds_config["train_batch_size"] == 16 * hardware.ranks


def test_recomputation_avoids_off_loading() -> None:
    """A note names the flags that keep the weights on the GPU."""
    small = Hardware(gpu_of_size(16))
    on_16 = choice("7B", small)
    assert on_16.name.startswith(OFFLOADED)
    free = plan(plan_request("7B", small))
    flags = f"--checkpoint_activations {free.checkpointing} --max_tokens {free.max_tokens}"
    assert free.num_checkpointed > 0
    assert on_16.notes[0] == f"faster, as weights stay on the GPU: {flags} (under zero2)"
    assert choice("7B", small, checkpoint_activations="full").name.startswith("ZeRO-2 (")


def test_evaluation_keeps_nothing_for_backward() -> None:
    small = Hardware(gpu_of_size(16))
    assert choice("7B", small, training=False).name.startswith("ZeRO-2 (")


def test_a_run_that_seems_too_large_is_tried() -> None:
    """With a warning that names what fits."""
    large = choice("65B", Hardware(GPUS["H100"], 8), batch_size=64, max_tokens=0)
    assert large.ds_config["zero_optimization"]["stage"] == 3
    (note,) = large.notes
    assert note.startswith("warning: memory may run out: 65B on 8 x H100: does not fit; ")
    remedy = r"; what fits: --checkpoint_activations \d+ --max_tokens 8192 \(under zero3\)$"
    assert re.search(remedy, note)
    assert "offload_param" in choice("65B", Hardware(gpu_of_size(8))).ds_config["zero_optimization"]


def test_a_gpu_gets_the_planners_token_budget() -> None:
    """Where --max_tokens is not given; a named ds_config gets that of its stage. 0 turns it off."""
    h100s = Hardware(GPUS["H100"], 8)
    free = plan(plan_request("65B", h100s, num_checkpointed=0))
    for named in ("auto", "zero3"):
        chosen = choice("65B", h100s, deepspeed=named)
        assert chosen.max_tokens == free.max_tokens < 8192
        (note,) = chosen.notes
        assert note.startswith(f"--max_tokens {free.max_tokens}: not given, so the planner's, ")
        for budget in (0, 1000):
            assert choice("65B", h100s, deepspeed=named, max_tokens=budget).max_tokens is None
    assert choice("7B", h100s).max_tokens == 8192
    assert choice("7B", None).max_tokens is None, "a CPU"
    does_not_fit = choice("65B", Hardware(gpu_of_size(8)))
    assert does_not_fit.max_tokens is None


def test_more_recomputed_layers_than_the_model_has() -> None:
    said = refusal(choice, "7B", None, checkpoint_activations="33")
    assert said == "--checkpoint_activations 33: the model has 32 layers; full means all"


def test_a_cpu_gets_zero2() -> None:
    on_cpu = choice("7B", None)
    assert on_cpu.name == "ZeRO-2 (no --deepspeed is named and there is no GPU to plan for)"


def test_a_named_config_is_kept() -> None:
    assert choice("7B", Hardware(GPUS["H100"]), deepspeed="zero3").name == "ZeRO-3"


def nodes_choice(hardware: Hardware | None, **flags: Any) -> Choice:
    """Of a 65B on two nodes of eight ranks."""
    config = RunConfig(model="65B", **{**PUBLISHED, **flags})
    return choose(config, LLAMA_CONFIGS["65B"], 16, hardware, training=True, large_nodes=True)


def test_frozen_weights_are_divided_within_each_node_where_that_fits(tmp_path: Path) -> None:
    """Not where a ds_config says otherwise, weights lie on the host, or memory is short."""
    h100s, in_nodes = Hardware(GPUS["H100"], 8, 2), ", frozen weights divided within each node"
    fits = dict(max_tokens=2048)
    for hardware in (h100s, None):
        named = nodes_choice(hardware, deepspeed="zero3", **fits)
        assert named.name == f"ZeRO-3{in_nodes}" and named.ds_config["frozen_shards"] == "node"
    assert nodes_choice(h100s, **fits).name.startswith(f"ZeRO-3{in_nodes} (no --deepspeed is ")
    for name in ("zero2", "zero3_offload"):
        assert "frozen_shards" not in nodes_choice(None, deepspeed=name).ds_config
    small = Hardware(gpu_of_size(24), 8, 2)
    assert nodes_choice(small, deepspeed="zero3", max_tokens=1024).name == "ZeRO-3"
    assert choice("65B", Hardware(GPUS["H100"], 16), deepspeed="zero3", **fits).name == "ZeRO-3"
    own = json.loads((SHIPPED_CONFIGS / "zero3.json").read_text())
    (tmp_path / "own.json").write_text(json.dumps({**own, "frozen_shards": "all"}))
    assert nodes_choice(h100s, deepspeed=str(tmp_path / "own.json"), **fits).name == "ZeRO-3"


@pytest.mark.parametrize(
    ("name", "models", "blocks_ahead"),
    [
        ("zero2", "7B 13B", 0),
        ("zero3", "33B 65B", 1),
        ("zero3_nodes", "33B 65B", 2),
        ("zero3_offload", "13B", 1),
    ],
)
def test_shipped_configs_fit_their_models(name: str, models: str, blocks_ahead: int) -> None:
    """One bucket holds all gradients.

    Under ZeRO-3 `blocks_ahead` decoder blocks are prefetched, and no more than one beside them and
    the output head are live.
    """
    zero = read_config(name, "bf16", 8, 2, 8)["zero_optimization"]
    configs = [VICO_CONFIGS[model] for model in models.split()]
    assert zero["stage"] == (3 if blocks_ahead else 2)
    assert max(config.num_trainables for config in configs) <= zero["reduce_bucket_size"] < 15e6
    if not blocks_ahead:
        return
    for config in configs:
        sized = sized_ds_config("zero3", config)["zero_optimization"]
        block = sized["stage3_prefetch_bucket_size"]
        assert blocks_ahead * block <= zero["stage3_prefetch_bucket_size"]
        live = (blocks_ahead + 1) * block + config.num_embedding_parameters
        assert live <= zero["stage3_max_live_parameters"]


def test_hardware_is_the_smallest_of_all_ranks() -> None:
    first = topology.Member(0, "n0", "NVIDIA H100 80GB HBM3", "a", 2, False, 2, 80 * GIB, 500 * GIB)
    small = replace(
        first, rank=2, host="n1", gpu_uuid="c", gpu_bytes=40 * GIB, host_bytes=100 * GIB
    )
    expected = Hardware(replace(GPUS["H100"], memory_gib=40.0), 1, 2, host_gib=100.0)
    assert zero_stage.hardware([first, replace(first, rank=1, gpu_uuid="b"), small]) == expected
    on_cpu = topology.Member(1, "n1", "cpu", None, 0, True, 1)
    assert zero_stage.hardware([first, on_cpu]) is None


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_request_is_planned_or_refused(data: st.DataObject) -> None:
    """Budgets that are no multiple of the step, small hosts, forced stages and layers."""
    draw = data.draw
    model = draw(st.sampled_from(sorted(LLAMA_CONFIGS)))
    host_gib = draw(st.sampled_from([None, 16, 500]))
    gpu = gpu_of_size(draw(st.integers(2, 90)))
    gpus, nodes = draw(st.sampled_from([1, 8])), draw(st.sampled_from([1, 2]))
    caption, longest = draw(st.sampled_from([0, 194])), draw(st.integers(150, 1500))
    stage = draw(st.sampled_from([None, *STAGES]))
    layers = draw(st.sampled_from([None, 0, 20, LLAMA_CONFIGS[model].n_layers]))
    budget = draw(st.none() | st.integers(64, 9000))
    request = plan_request(
        model,
        Hardware(gpu, gpus, nodes, None, host_gib),
        batch_size=draw(st.sampled_from([1, 8, 64])),
        accum_iter=1,
        stage=stage,
        num_checkpointed=layers,
        max_tokens=budget,
    )
    lengths = replace(LENGTHS, caption=caption, longest=longest, questions=1000)
    try:
        result = plan(replace(request, lengths=lengths))
    except UserError as refused:
        assert "does not fit; " in str(refused)
    else:
        assert result.memory.spare >= 0
        assert (result.stage, result.max_tokens) == (
            stage or result.stage,
            budget or result.max_tokens,
        )


def test_what_takes_the_least() -> None:
    """Quantized weights are not divided; others are, or lie on the host."""
    one = Hardware(gpu_by_name("T4"))
    for hardware, quantize, stage in (
        (one, None, "zero3_offload"),
        (replace(one, gpus=2), None, "zero3"),
        (replace(one, gpus=2), "nf4", "zero2"),
    ):
        request = plan_request("7B", hardware, quantize=quantize)
        assert zero_stage._smallest_stage(request) == stage

"""What a run trains under when it names no ds_config: the planner's choice for the GPUs that came, or the CPU's."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_memory import SHAPES

from support.errors import refusal
from vico.cli.plan import CASES
from vico.distributed import topology
from vico.errors import UserError
from vico.planner import plan as planner
from vico.planner.gpu_specs import GIB, GPUS, Hardware, gpu_by_name, gpu_of_size
from vico.train import zero_stage
from vico.train.config import RunConfig
from vico.train.ds_config import read_config
from vico.train.zero_stage import Choice, choose

PUBLISHED: dict[str, Any] = {
    "batch_size": 8,
    "accum_iter": 2,
    "max_seq_len": 160,
    "max_cap_len": 384,
}


def chosen(model: str, hardware: Hardware | None, training: bool = True, **flags: Any) -> Choice:
    ranks = hardware.ranks if hardware else 2
    return choose(
        RunConfig(model=model, **{**PUBLISHED, **flags}), SHAPES[model], ranks, hardware, training
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_gets_the_stage_of_the_table(case: tuple[str, int, int, float | str]) -> None:
    """With the table's --max_tokens and recomputed layers, a run on that machine gets that ds_config."""
    model, nodes, gpus, gpu = case
    hardware = Hardware(gpu_by_name(gpu) if isinstance(gpu, str) else gpu_of_size(gpu), gpus, nodes)
    free = planner.plan(
        planner.PlanRequest(
            planner.SIZES[model], hardware, planner.TokenLengths(96, 194, 544, 34132)
        )
    )
    found = chosen(
        model, hardware, checkpoint_activations=free.checkpointing, max_tokens=free.max_tokens
    )
    assert (
        f"the planner expects {free.memory.total / GIB:.1f} of " in found.name and found.notes == ()
    )
    zero, planned = found.ds_config["zero_optimization"], free.ds_config["zero_optimization"]
    assert zero == planned and "auto" not in json.dumps(found.ds_config)
    assert found.ds_config["train_batch_size"] == 16 * hardware.ranks


def test_what_a_run_does_not_name_changes_the_choice() -> None:
    on_16 = chosen("7B", Hardware(gpu_of_size(16)))
    assert on_16.name.startswith("ZeRO-3 with weights in the host's memory")
    free = planner.plan(
        planner.PlanRequest(
            planner.SIZES["7B"],
            Hardware(gpu_of_size(16)),
            planner.TokenLengths(96, 194, 544, 34132),
        )
    )
    how = f"--checkpoint_activations {free.checkpointing} --max_tokens {free.max_tokens} (under zero2)"
    assert free.checkpointed > 0 and on_16.notes == (f"faster, as weights stay on the GPU: {how}",)
    assert chosen("7B", Hardware(gpu_of_size(16)), checkpoint_activations="full").name.startswith(
        "ZeRO-2 ("
    )
    assert chosen("7B", Hardware(gpu_of_size(16)), training=False).name.startswith("ZeRO-2 ("), (
        "an evaluation keeps nothing for backward"
    )


def test_what_seems_too_large_is_tried_and_said() -> None:
    large = chosen("65B", Hardware(GPUS["H100"], 8), batch_size=64)
    assert large.ds_config["zero_optimization"]["stage"] == 3
    assert len(large.notes) == 1 and large.notes[0].startswith(
        "warning: memory may run out: 65B on 8 x H100: does not fit; "
    )
    assert re.search(
        r"; what fits: --checkpoint_activations \d+ --max_tokens 8192 \(under zero3\)$",
        large.notes[0],
    )
    assert "offload_param" in chosen("65B", Hardware(gpu_of_size(8))).ds_config["zero_optimization"]


def test_more_layers_than_there_are_is_refused() -> None:
    assert (
        refusal(chosen, "7B", None, checkpoint_activations="33")
        == "--checkpoint_activations 33: the model has 32 layers; full means all"
    )


def test_a_cpu_gets_zero2_and_a_name_is_kept() -> None:
    assert (
        chosen("7B", None).name
        == "ZeRO-2 (no --deepspeed is named and there is no GPU to plan for)"
    )
    assert chosen("7B", Hardware(GPUS["H100"]), deepspeed="zero3").name == "ZeRO-3"


@pytest.mark.parametrize(
    ("name", "sizes", "ahead"),
    [
        ("zero2", "7B 13B", 0),
        ("zero3", "33B 65B", 1),
        ("zero3_nodes", "33B 65B", 2),
        ("zero3_offload", "13B", 1),
    ],
)
def test_shipped_configs_have_the_sizes_of_what_they_are_for(
    name: str, sizes: str, ahead: int
) -> None:
    """One bucket for all gradients; under ZeRO-3 so many decoder blocks are gathered ahead, and no more than one beside them and a head."""
    zero = read_config(name, "bf16", 8, 2, 8)["zero_optimization"]
    assert zero["stage"] == (3 if ahead else 2)
    assert (
        max(planner.SIZES[size].trainables for size in sizes.split())
        <= zero["reduce_bucket_size"]
        < 15e6
    )
    for size in (planner.SIZES[each] for each in sizes.split()):
        if ahead:
            block = planner.ds_config("zero3", size)["zero_optimization"][
                "stage3_prefetch_bucket_size"
            ]
            assert ahead * block <= zero["stage3_prefetch_bucket_size"]
            assert (ahead + 1) * block + size.head <= zero["stage3_max_live_parameters"]


def test_the_smallest_gpu_and_the_emptiest_host_count() -> None:
    first = topology.Member(0, "n0", "NVIDIA H100 80GB HBM3", "a", 2, False, 2, 80 * GIB, 500 * GIB)
    members = [
        first,
        replace(first, rank=1, gpu="b"),
        replace(first, rank=2, host="n1", gpu="c", gpu_bytes=40 * GIB, host_bytes=100 * GIB),
    ]
    assert zero_stage.hardware(members) == Hardware(
        replace(GPUS["H100"], memory_gib=40.0), 1, 2, host_gib=100.0
    )
    assert zero_stage.hardware([first, topology.Member(1, "n1", "cpu", None, 0, True, 1)]) is None


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_task_is_planned_or_refused_in_words(data: st.DataObject) -> None:
    """Budgets that are no multiple of the step, hosts with little memory, stages and layers that are forced."""
    draw = data.draw
    size = planner.SIZES[draw(st.sampled_from(sorted(planner.SIZES)))]
    host = draw(st.sampled_from([None, 16, 500]))
    hardware = Hardware(
        gpu_of_size(draw(st.integers(2, 90))),
        draw(st.sampled_from([1, 8])),
        draw(st.sampled_from([1, 2])),
        None,
        host,
    )
    lengths = planner.TokenLengths(
        96, draw(st.sampled_from([0, 194])), draw(st.integers(150, 1500)), 1000
    )
    forced = draw(st.sampled_from([None, *planner.STAGES]))
    layers, budget = (
        draw(st.sampled_from([None, 0, 20, size.n_layers])),
        draw(st.none() | st.integers(64, 9000)),
    )
    task = planner.PlanRequest(
        size,
        hardware,
        lengths,
        "bf16",
        draw(st.sampled_from([1, 8, 64])),
        1,
        0.5,
        forced,
        layers,
        budget,
    )
    try:
        plan = planner.plan(task)
    except UserError as refused:
        assert "does not fit; " in str(refused)
    else:
        assert plan.memory.spare >= 0 and plan.stage in (forced or plan.stage, plan.stage)
        assert (plan.stage, plan.max_tokens) == (forced or plan.stage, budget or plan.max_tokens)

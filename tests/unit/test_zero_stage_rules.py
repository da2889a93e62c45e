"""What the planner is asked for a run, and the words with which a run says what it chose."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.errors import refusal
from support.planning import plan_request
from vico.distributed.topology import Member
from vico.errors import UserError
from vico.model.config import LLAMA_CONFIGS, ViCoConfig
from vico.planner.estimate import SHIPPED_CONFIGS
from vico.planner.gpu_specs import GIB, GPUS, Hardware, gpu_of_size
from vico.planner.plan import Plan, plan
from vico.planner.request import PlanRequest, TokenLengths
from vico.train import zero_stage
from vico.train.config import RunConfig
from vico.train.zero_stage import Choice, choose, named_ds_config

PUBLISHED: dict[str, Any] = dict(batch_size=8, accum_iter=2, max_seq_len=160, max_cap_len=384)
H100 = Hardware(GPUS["H100"])


def config_of(model: str = "7B", **flags: Any) -> RunConfig:
    return RunConfig(model=model, **{**PUBLISHED, **flags})


def choice(model: str, hardware: Hardware, **flags: Any) -> Choice:
    return choose(config_of(model, **flags), LLAMA_CONFIGS[model], hardware.ranks, hardware, True)


# ---- the request --------------------------------------------------------------------------------


def request_of(training: bool = True, **flags: Any) -> PlanRequest:
    return zero_stage._request(config_of(**flags), LLAMA_CONFIGS["7B"], H100, training)


def test_a_published_run_asks_for() -> None:
    """Everything that the flags say; no layer is recomputed unless they say so."""
    flags = dict(precision="fp16", quantize="nf4", adapter_len=12, max_feats=9)
    assert request_of(**flags) == PlanRequest(
        "7B",
        ViCoConfig.from_llama(LLAMA_CONFIGS["7B"], adapter_len=12, num_slots=9),
        H100,
        TokenLengths(96, 194, 160 + 384, 34132, text=0),
        precision="fp16",
        batch_size=8,
        accum_iter=2,
        num_checkpointed=0,
        max_tokens=None,
        quantize="nf4",
    )


def test_what_an_evaluation_asks_for() -> None:
    """One question at a time and nothing kept, which is as if every layer were recomputed. Texts
    of --keep are a step's alone.
    """
    expected = replace(
        request_of(), batch_size=1, accum_iter=1, num_checkpointed=32, max_tokens=160 + 384
    )
    for trained in ({}, {"keep": 1.0, "text": (Path("a"),)}):
        flags = dict(max_tokens=3000, checkpoint_activations="4", **trained)
        assert request_of(training=False, **flags) == expected


@pytest.mark.parametrize(
    ("flags", "lengths"),
    [
        ({"cap": 0}, TokenLengths(96, 0, 160, 34132)),
        ({"vaq": True, "qav": True}, TokenLengths(3 * 96, 194, 3 * 160 + 384, 34132)),
        (
            {"keep": 1.0, "text": (Path("a"),)},
            TokenLengths(96, 194, 160 + 384 + 64, 34132, text=64),
        ),
        ({"dataset": "tvqa:0.5"}, TokenLengths(121, 194, 544, 61020)),
        # Of an epoch, star has half of 45,731 questions of 98 tokens.
        (
            {"dataset": "nextqa,star:0.5"},
            TokenLengths((34132 * 96 + 22865.5 * 98) / 56997.5, 194, 544, 56998),
        ),
        ({"dataset": "star:0.00001"}, TokenLengths(98, 194, 544, 1)),
    ],
    ids=str,
)
def test_lengths_of_a_run(flags: dict[str, Any], lengths: TokenLengths) -> None:
    """A question has a sequence per prompt, one caption and one text; data sets by their weight."""
    found = request_of(**flags).lengths
    assert found == replace(lengths, question=pytest.approx(lengths.question, rel=1e-12))


def test_layers_and_budgets_of_a_request() -> None:
    for layers, number in (("none", 0), ("7", 7), ("32", 32), ("99", 32), ("full", 32)):
        assert request_of(checkpoint_activations=layers).num_checkpointed == number
    budgets = [request_of(cap=0, dataset="tvqa", max_tokens=limit).max_tokens for limit in (0, 900)]
    assert budgets == [8 * 121, 900]
    mixed = request_of(dataset="nextqa,star:0.5", max_tokens=0)
    assert mixed.max_tokens == 2327, "8 questions of 290.8 tokens, rounded up"


# ---- the words ----------------------------------------------------------------------------------


def expected(best: Plan) -> str:
    total, available = best.memory.total / GIB, best.memory.available / GIB
    machine = best.request.hardware
    return f"the planner expects {total:.1f} of {available:.1f} GiB on {machine}"


def budget_note(best: Plan) -> str:
    return (
        f"--max_tokens {best.max_tokens}: not given, so the planner's, {expected(best)}; a step's "
        "questions are the same, and --max_tokens 0 splits them by --batch_size"
    )


NO_NAME = "no --deepspeed is named"
OFFLOADED = "ZeRO-3 with weights in the host's memory"


@pytest.mark.parametrize(
    ("model", "gib", "title"),
    [("7B", 40, "ZeRO-2"), ("13B", 16, OFFLOADED), ("33B", 24, OFFLOADED)],
)
def test_a_choice_that_fits(model: str, gib: float, title: str) -> None:
    """One note, of the budget: nothing is faster, not even where weights are off-loaded."""
    hardware = Hardware(gpu_of_size(gib))
    best = plan(plan_request(model, hardware, num_checkpointed=0))
    found = choice(model, hardware)
    assert found.name == f"{title} ({NO_NAME}; {expected(best)})"
    assert (found.notes, found.max_tokens) == ((budget_note(best),), best.max_tokens)
    given = choice(model, hardware, max_tokens=best.max_tokens)
    assert (given.notes, given.max_tokens, given.name) == ((), None, found.name)


def test_what_would_be_faster_comes_before_the_budget() -> None:
    hardware = Hardware(gpu_of_size(24), 2)
    best = plan(plan_request("13B", hardware, num_checkpointed=0))
    free = plan(plan_request("13B", hardware))
    assert (best.stage, free.stage) == ("zero3_offload", "zero3")
    faster = (
        f"faster, as weights stay on the GPU: --checkpoint_activations {free.checkpointing} "
        f"--max_tokens {free.max_tokens} (under zero3)"
    )
    assert choice("13B", hardware).notes == (faster, budget_note(best))


@pytest.mark.parametrize(
    ("model", "gib", "quantize", "title"),
    [
        ("33B", 8, None, OFFLOADED),
        ("13B", 8, "nf4", "ZeRO-2"),
        ("33B", 24, "nf4", "ZeRO-2"),
    ],
)
def test_a_choice_that_does_not_fit(
    model: str, gib: float, quantize: str | None, title: str
) -> None:
    """What is short, and the flags that fit where there are some. There is no budget to tell."""
    hardware = Hardware(gpu_of_size(gib))
    shortage = refusal(plan, plan_request(model, hardware, num_checkpointed=0, quantize=quantize))
    try:
        free = plan(plan_request(model, hardware, quantize=quantize))
        flags = f"--checkpoint_activations {free.checkpointing} --max_tokens {free.max_tokens}"
        remedy = f"what fits: {flags} (under {free.stage})"
    except UserError:
        remedy = "`vico plan` tells what a model needs"
    request = plan_request(model, hardware, num_checkpointed=0, quantize=quantize)
    chosen, reason, notes = zero_stage._choose_stage(request)
    assert (zero_stage.TITLES[chosen.stage], chosen.plan) == (title, None)
    assert reason == "the planner knows of nothing that fits, and this takes the least"
    said = shortage.partition("; what would help: ")[0]
    assert notes == (f"warning: memory may run out: {said}; {remedy}",)
    if quantize is None:
        found = choice(model, hardware)
        assert found.name == f"{title} ({NO_NAME}; {reason})"
        assert (found.notes, found.max_tokens) == (notes, None)


# ---- a ds_config that is named ------------------------------------------------------------------


def write_config(folder: Path, **more: Any) -> str:
    content = json.loads((SHIPPED_CONFIGS / "zero3.json").read_text())
    (folder / "own.json").write_text(json.dumps({**content, **more}))
    return str(folder / "own.json")


@pytest.mark.parametrize("shards", ["node", "all"])
def test_how_a_named_config_divides_frozen_weights(shards: str, tmp_path: Path) -> None:
    """As it says, and the budget is that of such a plan."""
    hardware, llama = Hardware(GPUS["H100"], 8, 2), LLAMA_CONFIGS["65B"]
    config = config_of("65B", deepspeed=write_config(tmp_path, frozen_shards=shards))
    asked = dict(stage="zero3", num_checkpointed=0)
    best = plan(plan_request("65B", hardware, node_shards=shards == "node", **asked))
    for large_nodes in (True, False):
        found = choose(config, llama, 16, hardware, True, large_nodes)
        in_nodes = ", frozen weights divided within each node" if shards == "node" else ""
        assert (found.name, found.ds_config["frozen_shards"]) == (f"ZeRO-3{in_nodes}", shards)
        assert (found.notes, found.max_tokens) == ((budget_note(best),), best.max_tokens)


def test_a_named_config_for_which_memory_is_short() -> None:
    """It is taken as it is; nodes are of no help where nothing fits."""
    hardware = Hardware(gpu_of_size(8), 8, 2)
    config = config_of("65B", deepspeed="zero3")
    found = choose(config, LLAMA_CONFIGS["65B"], 16, hardware, True, large_nodes=True)
    assert (found.name, found.notes, found.max_tokens) == ("ZeRO-3", (), None)
    assert "frozen_shards" not in found.ds_config


@pytest.mark.parametrize(
    ("zero", "stage"),
    [
        ({"stage": 1}, "zero2"),
        ({"stage": 2}, "zero2"),
        ({"stage": 3}, "zero3"),
        ({"stage": 3, "offload_param": {}}, "zero3"),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, "zero3_offload"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "zero2"),
    ],
)
def test_the_planners_name_of_a_config(zero: dict[str, Any], stage: str) -> None:
    assert zero_stage._stage_of({"zero_optimization": zero}) == stage


def test_quantized_weights_need_zero_2() -> None:
    """Those that are stored so; fp8 is only how products are computed."""
    for quantize in ("8bit", "nf4"):
        config = config_of(quantize=quantize, deepspeed="zero3")
        assert refusal(named_ds_config, config, 1) == (
            f"--quantize {quantize}: is for ZeRO-2, and --deepspeed zero3 is ZeRO-3; leave one out"
        )


def test_the_ds_config_that_is_named() -> None:
    """With the numbers of the run; auto names none."""
    assert named_ds_config(config_of(), 3) is None
    found = named_ds_config(config_of(deepspeed="zero2"), 3)
    assert found is not None and found["train_batch_size"] == 8 * 2 * 3
    assert found["zero_optimization"]["stage"] == 2


# ---- the machine --------------------------------------------------------------------------------


def member(rank: int, host: str, gpu_gib: int, host_gib: int) -> Member:
    gpu = f"NVIDIA A100-SXM4-{gpu_gib}GB"
    sizes = dict(gpu_bytes=gpu_gib * GIB, host_bytes=host_gib * GIB)
    return Member(rank, host, gpu, f"gpu {rank}", 8, False, None, **sizes)


def test_the_machine_of_ranks_that_differ() -> None:
    """The least of each: GPUs of a node, memory of a GPU and of a host."""
    members = [member(0, "a", 80, 100), member(1, "a", 80, 100)]
    assert zero_stage.hardware(members) == Hardware(
        replace(GPUS["A100-80"], memory_gib=80.0), 2, 1, host_gib=100.0
    )
    members += [member(rank, "b", 40, 60) for rank in (2, 3, 4)]
    assert zero_stage.hardware(members) == Hardware(
        replace(GPUS["A100-40"], memory_gib=40.0), 2, 2, host_gib=60.0
    )
    without = replace(members[1], gpu_bytes=0)
    assert zero_stage.hardware([members[0], without]) is None
    assert zero_stage.hardware([]) is None

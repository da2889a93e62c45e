"""The planner's formulas by hand: lengths, batches, products, gathers, and what is tried."""

from dataclasses import replace
from typing import Any

import pytest

from support.planning import LENGTHS, VICO_CONFIGS, plan_request
from vico.planner import estimate, plan, speed
from vico.planner.estimate import batch_shape, sized_ds_config
from vico.planner.gpu_specs import GPUS, Gpu, Hardware, detected_gpu, gib_of, gpu_by_name
from vico.planner.memory import BatchShape
from vico.planner.plan import Candidate
from vico.planner.request import PlanRequest, TokenLengths
from vico.planner.zero3_trace import Parameter, gathered_modules, live_bytes

H100, NAMELESS = GPUS["H100"], Gpu("own", 80.0, 100.0)


@pytest.mark.parametrize(
    ("lengths", "both", "num_targets"),
    [
        (TokenLengths(96, 194, 544, 1), 290, 4 + 163),
        (TokenLengths(96, 0, 160, 1), 96, 4),
        (TokenLengths(96, 31, 544, 1), 127, 4),
        (TokenLengths(96, 20, 544, 1), 116, 4),  # no caption is so short
        (TokenLengths(96, 194, 608, 1, text=64), 354, 4 + 163 + 63),
        (TokenLengths(96, 0, 161, 1, text=1), 97, 4),
    ],
)
def test_targets_of_a_question(lengths: TokenLengths, both: int, num_targets: int) -> None:
    """Four of an answer; of a caption what is behind its prompt, of a text what is behind BOS."""
    assert lengths.both == both
    assert lengths.target_share == pytest.approx(num_targets / both)


def test_tokens_of_a_request() -> None:
    """In steps of 64, and in a batch no more than are of use."""
    request = plan_request("7B", Hardware(H100, 4, 2))
    assert (request.batch_tokens, request.longest_tokens) == (2368, 576)  # of 2,320 and of 544
    assert replace(request, batch_size=28).batch_tokens == 8128
    assert replace(request, batch_size=29).batch_tokens == 8192
    whole = replace(request, lengths=TokenLengths(32, 32, 640, 1), batch_size=1)
    assert (whole.batch_tokens, whole.longest_tokens) == (64, 640)
    assert request.step_tokens == 8 * 2 * 290
    assert replace(request, batch_size=3, accum_iter=5).step_tokens == 3 * 5 * 290
    assert request.num_shards == replace(request, node_shards=False).num_shards == 8
    assert replace(request, node_shards=True).num_shards == 4


def test_a_batch_by_its_tokens() -> None:
    """Rounded up; a clip for each question."""
    assert batch_shape(290, LENGTHS) == BatchShape(290, 167, 167, 1, 435)
    assert batch_shape(1001, LENGTHS) == BatchShape(1001, 577, 577, 4, 1502)
    assert batch_shape(580, LENGTHS).num_clips == 2 and batch_shape(581, LENGTHS).num_clips == 3


@pytest.mark.parametrize(
    ("hardware", "stage", "more", "unknown"),
    [
        (Hardware(H100), "zero2", {}, ""),
        (Hardware(H100), "zero2", {"quantize": "fp8"}, "how fast H100 trains in fp8"),
        (Hardware(H100), "zero2", {"quantize": "8bit"}, "how fast H100 dequantizes weights"),
        (Hardware(H100), "zero2", {"precision": "fp32"}, "the rate of H100 in fp32"),
        (Hardware(NAMELESS, 8, 2), "zero2", {}, ""),
        (Hardware(NAMELESS, 8), "zero3", {}, "the link between the GPUs (--link)"),
        (Hardware(NAMELESS, 1, 2), "zero3", {}, "the network of a node (--network)"),
        (Hardware(NAMELESS, 1, 2, 100.0), "zero3", {}, ""),
        (Hardware(H100, 8, 2), "zero3", {}, "the network of a node (--network)"),
        (Hardware(H100, 8, 2), "zero3", {"node_shards": True}, ""),
        (Hardware(H100, 8), "zero3", {}, ""),
        (Hardware(NAMELESS), "zero3", {}, ""),
        (Hardware(NAMELESS), "zero3_offload", {}, "the link of own to the host"),
        (Hardware(H100), "zero3_offload", {}, ""),
    ],
)
def test_what_is_not_known(hardware: Hardware, stage: Any, more: Any, unknown: str) -> None:
    request = replace(plan_request("7B", hardware), **more)
    assert speed._unknown_rate(request, stage) == unknown
    found, why = speed.estimate_speed(request, stage, 0, 8192)
    assert (found is None, why) == (bool(unknown), unknown)


def test_products_of_a_token() -> None:
    """Forward and backward by the inputs: four FLOPs per weight, and two where it is run again."""
    request = plan_request("7B", Hardware(H100))
    config = VICO_CONFIGS["7B"]
    layers = 32 * config.num_block_parameters
    head = 32000 * 4096
    plain = 4 * (layers + head * 167 / 290)
    assert speed._flops_per_token(request, 0) == pytest.approx(plain)
    assert speed._flops_per_token(request, 8) == pytest.approx(plain + 2 * layers / 4)
    kept = replace(request, lengths=TokenLengths(96, 194, 608, 1, text=64))
    frozen = 2 * (layers * 64 + head * 63) / 354  # BOS is no target
    expected = 4 * (layers + head * 230 / 354) + frozen
    assert speed._flops_per_token(kept, 0) == pytest.approx(expected)


def test_seconds_of_gathers() -> None:
    """All weights twice, by the slowest link that they cross; at 80 % of its rate."""
    num_bytes = 2 * 2 * VICO_CONFIGS["7B"].num_parameters

    def seconds(hardware: Hardware, stage: Any = "zero3", **more: Any) -> float:
        return speed._gather_seconds(replace(plan_request("7B", hardware), **more), stage)

    assert seconds(Hardware(H100, 8), "zero2") == 0
    assert seconds(Hardware(H100)) == 0
    assert seconds(Hardware(H100, 8)) == pytest.approx(num_bytes * 7 / 8 / 360e9)
    assert seconds(Hardware(H100, 8, 2, 3200.0)) == pytest.approx(num_bytes * 15 / 16 / 320e9)
    assert seconds(Hardware(H100, 8, 2, 8000.0)) == pytest.approx(num_bytes * 15 / 16 / 360e9)
    in_nodes = seconds(Hardware(H100, 8, 2, 8.0), node_shards=True)
    assert in_nodes == pytest.approx(num_bytes * 7 / 8 / 360e9)
    from_host = seconds(Hardware(H100, 2), "zero3_offload")
    assert from_host == pytest.approx(num_bytes / 2 / 51.2e9)
    slow = seconds(Hardware(replace(H100, link_gb=1.0), 2), "zero3_offload")
    assert slow == pytest.approx(num_bytes / 2 / 0.8e9)


def test_a_step_in_equal_micro_batches() -> None:
    """As few as hold its 4,640 tokens; products take longer under ZeRO-3."""
    request = plan_request("7B", Hardware(H100))
    flops = speed._flops_per_token(request, 0) * 4640
    for max_tokens, count in ((4640, 1), (4639, 2), (2320, 2), (1547, 3), (1546, 4)):
        found, _ = speed.estimate_speed(request, "zero2", 0, max_tokens)
        assert found is not None
        assert found.compute_seconds == pytest.approx(flops / count / (989e12 / 2))
        assert found.tokens_per_second == pytest.approx(4640 / count / found.compute_seconds)
        epoch = 34132 * 290 / found.tokens_per_second
        assert found.epoch_seconds == pytest.approx(epoch) and found.gather_seconds == 0
    found, _ = speed.estimate_speed(request, "zero3", 0, 4640)
    assert found is not None and found.compute_seconds == pytest.approx(1.12 * flops / (989e12 / 2))


def candidates(hardware: Hardware, **given: Any) -> list[Candidate]:
    request: PlanRequest = replace(plan_request("7B", hardware), **given)
    return plan._candidates(request)


def test_what_is_tried_in_which_order() -> None:
    """Without recomputing first, in the order of stages; off-loading last."""
    one, eight, nodes = Hardware(H100), Hardware(H100, 8), Hardware(H100, 8, 2)
    off = [Candidate("zero3_offload", 0, False), Candidate("zero3_offload", None, False)]
    two = [Candidate("zero2", 0, False), Candidate("zero2", None, False)]
    three = [Candidate("zero3", 0, False), Candidate("zero3", None, False)]
    assert candidates(one) == [*two, *off]
    assert candidates(eight) == [two[0], three[0], two[1], three[1], *off]
    assert candidates(eight, stage="zero3") == three
    assert candidates(eight, quantize="nf4") == two
    assert candidates(one, num_checkpointed=7) == [
        Candidate("zero2", 7, False),
        Candidate("zero3_offload", 7, False),
    ]
    in_nodes = [Candidate("zero3", 0, True), Candidate("zero3", 0, False)]
    assert candidates(nodes, stage="zero3", num_checkpointed=0) == in_nodes
    for shards in (True, False):
        found = candidates(nodes, stage="zero3", num_checkpointed=0, node_shards=shards)
        assert found == [Candidate("zero3", 0, shards)]
    assert candidates(Hardware(H100, 1, 8), stage="zero3") == three


def test_a_prefetched_block_has_the_sizes_of_the_model() -> None:
    config = VICO_CONFIGS["13B"]
    block = config.num_block_parameters + 2 * 5120 + 2 * 40
    for stage in ("zero3", "zero3_offload"):
        kind: Any = stage
        zero = sized_ds_config(kind, config)["zero_optimization"]
        assert zero["stage3_prefetch_bucket_size"] == block
        assert zero["stage3_max_live_parameters"] == 2 * block + 32000 * 5120
    assert sized_ds_config("zero2", config) == estimate._shipped_config("zero2")


def parameter(name: str, numel: int) -> Parameter:
    return Parameter(name, numel, 2)


def test_parameters_that_are_fetched() -> None:
    """One at a time, or as many as may live."""
    modules = [(parameter(name, 10),) for name in "abcd"]
    # Without prefetching: one parameter, copied out of its buffer of the same size.
    assert live_bytes(modules, 0, 1000) == (20, 40)
    assert live_bytes(modules, 1000, 1000)[0] == 80, "all"
    assert live_bytes(modules, 1000, 20)[0] <= live_bytes(modules, 1000, 30)[0] < 80
    assert parameter("a", 7).num_bytes == 14


def test_small_parameters_are_kept_whole() -> None:
    """Below the threshold they are never gathered; two weights of a block run twice."""
    config = replace(VICO_CONFIGS["7B"], n_layers=1)
    modules = gathered_modules(config, 2, 5000, False)
    assert {len(module) for module in modules} == {1}
    assert [module[0].name for module in modules] == [
        *["adapter_query", "visual_proj", "temporal_emb", "tok_embeddings"],
        *[f"0.attention.{name}" for name in "wq wk wv wk wv wo".split()],
        *[f"0.feed_forward.{name}" for name in "w1 w3 w2".split()],
        "output",
    ]
    whole = gathered_modules(config, 2, 4096, True, linear_itemsize=1)
    (block,) = [module for module in whole if module[0].name.startswith("0.")]
    assert [p.name for p in block] == [
        "0.attention_norm",
        *[f"0.attention.{name}" for name in "wq wk wv wo".split()],
        "0.ffn_norm",
        *[f"0.feed_forward.{name}" for name in "w1 w3 w2".split()],
    ]
    assert {p.name: p.itemsize for p in block if "norm" in p.name} == {
        "0.attention_norm": 2,
        "0.ffn_norm": 2,
    }
    assert {p.itemsize for p in block if "norm" not in p.name} == {1}
    trainables = {p.name: p.itemsize for module in whole[:3] for p in module}
    assert trainables == {"adapter_query": 4, "visual_proj": 4, "temporal_emb": 4}


def test_machines_by_name() -> None:
    assert (str(Hardware(H100)), str(Hardware(H100, 8))) == ("1 x H100", "8 x H100")
    assert str(Hardware(H100, 8, 2)) == "2 x 8 x H100" and Hardware(H100, 8, 2).ranks == 16
    sizes = {"24GB": 24.0, "24 GiB": 24.0, "24G": 24.0, "0.5gb": 0.5, "24": None, "GB": None}
    assert {text: gib_of(text) for text in sizes} == sizes
    assert gpu_by_name("24GB").memory_gib == pytest.approx(0.98 * 24)
    assert detected_gpu("NVIDIA L4", 3 * 2**30).memory_gib == 3.0

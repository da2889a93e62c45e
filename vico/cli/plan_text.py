"""What `vico plan` prints: text, JSON, or the table of vico/planner/README.md."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from vico.data.datasets import DATASETS
from vico.model.config import LLAMA_CONFIGS, ViCoConfig
from vico.planner.estimate import IN_NODES, LEFT_SHARE, OVER_ALL
from vico.planner.gpu_specs import GIB, Hardware, gpu_by_name, gpu_of_size
from vico.planner.plan import Plan, describe_layers, plan
from vico.planner.request import (
    CAPTION_TOKENS,
    PUBLISHED_CAP_LEN,
    PUBLISHED_SEQ_LEN,
    PlanRequest,
    TokenLengths,
)
from vico.planner.speed import LINK_SHARE, ZERO3_PENALTY

UNKNOWN = "n/a"
# Per node: eight ports of 400, as nodes of eight H100 have; and one such port, the thin case.
FAST_NETWORK_GBIT, THIN_NETWORK_GBIT = 3200.0, 400.0


class TableCase(NamedTuple):
    model: str
    nodes: int
    gpus: int  # per node
    gpu: str | int  # its name, or its nominal memory in GiB
    quantize: str | None = None
    network_gbit: float | None = None  # of a node


CASES = (
    TableCase("7B", 1, 1, 16),
    TableCase("7B", 1, 1, 24),
    TableCase("7B", 1, 1, "H100"),
    TableCase("7B", 1, 8, "H100"),
    TableCase("13B", 1, 1, 24),
    TableCase("13B", 1, 8, 24),
    TableCase("13B", 1, 1, "H100"),
    TableCase("33B", 1, 8, "A100-40"),
    TableCase("33B", 1, 8, "H100"),
    TableCase("65B", 1, 8, 48),
    TableCase("65B", 1, 8, "H100"),
    TableCase("65B", 2, 8, "H100", network_gbit=FAST_NETWORK_GBIT),
    TableCase("65B", 2, 8, "H100", network_gbit=THIN_NETWORK_GBIT),
)
QUANTIZED_CASES = (
    TableCase("7B", 1, 1, 8, "nf4"),
    TableCase("7B", 1, 1, 10, "nf4"),
    TableCase("7B", 1, 1, 12, "nf4"),
    TableCase("7B", 1, 1, 12, "8bit"),
    TableCase("13B", 1, 1, 16, "nf4"),
)
TABLE_HEADS = (
    "model | GPUs | stage | recomputed | weights + gathered | activations + work | "
    "total / available | --max_tokens | tokens/s | epoch"
).split(" | ")


def as_json(result: Plan) -> dict[str, Any]:
    """All numbers of a plan, in bytes and seconds."""
    request = result.request
    return {
        "model": _model_json(request),
        "hardware": asdict(request.hardware),
        "lengths": asdict(request.lengths),
        "precision": request.precision,
        "quantize": request.quantize,
        "batch_size": request.batch_size,
        "accum_iter": request.accum_iter,
        "efficiency": request.efficiency,
        "stage": result.stage,
        "checkpointed_layers": result.num_checkpointed,
        "max_tokens": result.max_tokens,
        "largest_tokens": result.largest_tokens,
        "memory_bytes": {**asdict(result.memory), "total": result.memory.total},
        "speed": None if result.speed is None else asdict(result.speed),
        "speed_lacks": result.unknown_rate,
        "frozen_shards": IN_NODES if request.node_shards else OVER_ALL,
        "ds_config": result.ds_config,
    }


def _model_json(request: PlanRequest) -> dict[str, Any]:
    config = request.config
    return {
        "name": request.model,
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "hidden_dim": config.hidden_dim,
        "vocab_size": config.vocab_size,
        "kv_heads": config.n_kv_heads or 0,  # 0: as many as n_heads
        "adapter_len": config.adapter_len,
        "num_slots": config.num_slots,
        "frozen_parameters": config.num_parameters,
        "trainables": config.num_trainables,
    }


def as_text(result: Plan, written: Path | None) -> str:
    """The report. `written`: the file that holds the ds_config, if --write was given."""
    request, memory = result.request, result.memory
    recomputed = describe_layers(result.num_checkpointed, request.config.n_layers)
    lines = [
        f"{request.model} ({_weights_line(request)}) on {request.hardware}",
        "",
        f"stage             {result.stage}{_where(request)}",
        f"checkpointing     {result.checkpointing}: {recomputed} recomputed in backward",
        f"token budget      {result.max_tokens} per micro-batch; "
        f"at most {result.largest_tokens} would fit",
        f"flags             {_flags_line(result, written)}",
        "",
        f"memory per GPU in GiB, {memory.total / GIB:.2f} of {memory.available / GIB:.2f}; "
        f"{LEFT_SHARE:.0%} stay free",
        *_memory_lines(result),
        "",
        *_speed_lines(result),
        "",
        f"assumed           {_assumptions_line(request)}",
        "",
        _ds_config_line(result, written),
        json.dumps(result.ds_config, indent=1),
    ]
    return "\n".join(lines)


def _where(request: PlanRequest) -> str:
    return ", frozen weights divided within each node" if request.node_shards else ""


def _weights_line(request: PlanRequest) -> str:
    text = f"{request.config.num_parameters / 1e9:.2f} G frozen parameters, {request.precision}"
    if request.quantize is not None:
        text += f", linear layers in {request.quantize}"
    return text


def _flags_line(result: Plan, written: Path | None) -> str:
    """The flags of `vico train`. Under ZeRO-3 the shipped config has not this model's sizes."""
    if written is not None:
        ds_config = str(written)
    else:
        ds_config = "zero2" if result.stage == "zero2" else "FILE"
    flags = (
        f"--deepspeed {ds_config} --max_tokens {result.max_tokens} "
        f"--checkpoint_activations {result.checkpointing}"
    )
    quantize = result.request.quantize
    return flags if quantize is None else f"{flags} --quantize {quantize}"


def _memory_lines(result: Plan) -> list[str]:
    memory = result.memory
    dequantizes = result.request.quantize is not None and result.stage == "zero2"
    head = "output head, at the end of forward"
    backward = "backward of a layer: attention, SwiGLU"
    if memory.head >= memory.backward:
        backward += " (not added: the output head needs more, earlier)"
    else:
        head += " (not added: backward needs more, later)"
    gathered = "gathered layers, prefetched ones and their buffers"
    rows = [
        ("frozen weights", memory.weights),
        ("a dequantized weight" if dequantizes else gathered, memory.gathered),
        (f"activations of {result.max_tokens} tokens", memory.activations),
        (head, memory.head),
        (backward, memory.backward),
        ("trainables, their gradients, Adam", memory.trainables),
        ("gradient buckets", memory.buckets),
        ("CUDA context, NCCL, allocator's reserve", memory.reserve),
    ]
    if memory.host:
        rows.append(("host memory per node, for weights", memory.host))
    return [f"  {num_bytes / GIB:8.2f}  {name}" for name, num_bytes in rows]


def _speed_lines(result: Plan) -> list[str]:
    if result.speed is None:
        lines = [f"speed             {UNKNOWN}: {result.unknown_rate} is unknown"]
        gpu, precision = result.request.hardware.gpu, result.request.precision
        if gpu.peak_precision == "fp16" and precision == "bf16":
            remedy = "plan and train with --precision fp16"
            lines.append(f"                  {gpu.name} has no matrix units for bf16: {remedy}")
        return lines
    speed, tflops = result.speed, result.request.hardware.gpu.tflops
    own_work = "" if result.stage == "zero2" else f" and {ZERO3_PENALTY:.0%} for ZeRO-3's own work"
    gathers_decide = speed.gather_seconds > speed.compute_seconds
    return [
        f"speed             {speed.tokens_per_second:,.0f} real tokens/s, "
        f"{duration(speed.epoch_seconds)} per epoch (modelled, not measured)",
        f"                  per micro-batch {speed.compute_seconds:.2f} s of matrix products at "
        f"{result.request.efficiency:.0%} of {tflops:g} TFLOP/s{own_work}, "
        f"overlapped with {speed.gather_seconds:.2f} s of gathers; "
        f"bottleneck: {'gathers' if gathers_decide else 'products'}",
    ]


def _assumptions_line(request: PlanRequest) -> str:
    lengths = request.lengths
    return (
        f"{lengths.questions} questions of {lengths.question:g} tokens, "
        f"captions of {lengths.caption:g}, at most {lengths.longest} together; "
        f"{request.batch_size} x {request.accum_iter} questions per GPU and step; "
        "4 FLOPs per parameter and token, 6 where recomputed; "
        f"gathers at {LINK_SHARE:.0%} of the link"
    )


def _ds_config_line(result: Plan, written: Path | None) -> str:
    if written is not None:
        return f"ds_config, written to {written}"
    return "ds_config" if result.stage == "zero2" else "ds_config (--write FILE writes it)"


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{max(1, minutes)} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def table() -> str:
    """Each model and machine of the table, and the plan that fits."""
    rows = [_table_row(case) for case in (*CASES, *QUANTIZED_CASES)]
    lines = [TABLE_HEADS, ["---"] * len(TABLE_HEADS), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def plan_case(case: TableCase) -> Plan:
    gpu = gpu_by_name(case.gpu) if isinstance(case.gpu, str) else gpu_of_size(case.gpu)
    dataset = DATASETS["nextqa"]
    lengths = TokenLengths(
        question=dataset.mean_question_tokens,
        caption=CAPTION_TOKENS,
        longest=PUBLISHED_SEQ_LEN + PUBLISHED_CAP_LEN,
        questions=dataset.num_train_questions,
    )
    config = ViCoConfig.from_llama(LLAMA_CONFIGS[case.model])
    hardware = Hardware(gpu, case.gpus, case.nodes, case.network_gbit)
    return plan(PlanRequest(case.model, config, hardware, lengths, quantize=case.quantize))


def _machine(hardware: Hardware) -> str:
    network = f", {hardware.network_gbit:,.0f} Gbit/s" if hardware.network_gbit else ""
    return f"{hardware}{network}"


def _table_row(case: TableCase) -> list[str]:
    result = plan_case(case)
    memory, speed = result.memory, result.speed
    n_layers = result.request.config.n_layers
    few_words = {0: "none", n_layers: "all"}
    recomputed = few_words.get(result.num_checkpointed, f"{result.num_checkpointed} of {n_layers}")
    work = memory.activations + max(memory.head, memory.backward)
    return [
        f"{case.model}, {case.quantize}" if case.quantize else case.model,
        _machine(result.request.hardware),
        f"{result.stage}, in nodes" if result.request.node_shards else result.stage,
        recomputed,
        f"{(memory.weights + memory.gathered) / GIB:.1f}",
        f"{work / GIB:.1f}",
        f"{memory.total / GIB:.1f} / {memory.available / GIB:.1f}",
        str(result.max_tokens),
        f"{speed.tokens_per_second / 1000:.1f} k" if speed else UNKNOWN,
        duration(speed.epoch_seconds) if speed else UNKNOWN,
    ]

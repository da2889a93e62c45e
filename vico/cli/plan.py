"""`vico plan`: its flags, what it prints, and the table of its guide."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from vico.data.datasets import DATASETS
from vico.errors import UserError, nearest
from vico.io.atomic import write_json
from vico.planner import plan as planner
from vico.planner.gpu_specs import GIB, GPUS, Gpu, Hardware, gpu_by_name, gpu_of_size
from vico.planner.memory import BYTES, QUANTIZED_BYTES, ModelSize, size_of
from vico.planner.plan import Plan, PlanRequest, TokenLengths

UNKNOWN = "n/a"
PUBLISHED_LIMITS = (160, 384)  # --max_seq_len, --max_cap_len
NETWORK_OF_TABLE = 400.0  # Gbit/s of a node in the table's rows of several nodes
CASES: tuple[tuple[str, int, int, float | str], ...] = (
    ("7B", 1, 1, 16),
    ("7B", 1, 1, 24),
    ("7B", 1, 1, "H100"),
    ("7B", 1, 8, "H100"),
    ("13B", 1, 1, 24),
    ("13B", 1, 8, 24),
    ("13B", 1, 1, "H100"),
    ("33B", 1, 8, "A100-40"),
    ("33B", 1, 8, "H100"),
    ("65B", 1, 8, 48),
    ("65B", 1, 8, "H100"),
    ("65B", 2, 8, "H100"),
)
QUANTIZED_CASES: tuple[tuple[str, int, int, float | str, str], ...] = (
    ("7B", 1, 1, 8, "nf4"),
    ("7B", 1, 1, 10, "nf4"),
    ("7B", 1, 1, 12, "nf4"),
    ("7B", 1, 1, 12, "8bit"),
    ("13B", 1, 1, 16, "nf4"),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see vico plan --help)")


def main(argv: Sequence[str]) -> int:
    flags = _parser().parse_args(list(argv))
    if flags.table:
        print(table())
        return 0
    found = planner.plan(_task(flags))
    if flags.write is not None:
        write_json(flags.write, found.ds_config)
    print(json.dumps(as_json(found)) if flags.json else text(found, flags.write))
    return 0


def _parser() -> argparse.ArgumentParser:
    sizes = ", ".join(planner.SIZES)
    parser = _Parser(
        prog="vico plan",
        description="What a run will need and how fast it can be; no weights are loaded.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--model",
        default="7B",
        help=f"{sizes}, or a folder with params.json or config.json (default: 7B)",
    )
    add("--gpus", type=_count, default=1, help="GPUs per node")
    add("--nodes", type=_count, default=1)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--gpu", help=f"by name: {', '.join(GPUS)}")
    which.add_argument(
        "--gpu_memory",
        type=_positive,
        help="or by its nominal memory, GiB; its speed is then not known",
    )
    add(
        "--link",
        type=_positive,
        metavar="GB",
        help="GB/s between the GPUs of a node, one direction (default: NVLink's where the GPU has it)",
    )
    add("--network", type=_positive, metavar="GBIT", help="Gbit/s of a node")
    add("--host_memory", type=_positive, metavar="GIB", help="of a node, GiB; for off-loading")
    add("--precision", choices=list(BYTES), default="bf16")
    add(
        "--batch_size",
        type=_count,
        default=8,
        help="questions per GPU and micro-batch (default: 8, as published)",
    )
    add(
        "--accum_iter",
        type=_count,
        default=2,
        help="micro-batches per step (default: 2, as published)",
    )
    add("--max_seq_len", type=_count, default=PUBLISHED_LIMITS[0])
    add("--max_cap_len", type=_count, default=PUBLISHED_LIMITS[1])
    add(
        "--dataset",
        choices=list(DATASETS),
        default="nextqa",
        help="for the mean length and the number of questions",
    )
    add(
        "--question_tokens",
        type=_positive,
        help="mean tokens of a question's sequence (default: the data set's)",
    )
    add(
        "--caption_tokens",
        type=_length,
        default=float(planner.CAPTION_TOKENS),
        help="mean tokens of a caption's sequence; 0: --cap 0",
    )
    add("--questions", type=_count, help="training questions (default: the data set's)")
    add(
        "--efficiency",
        type=_share,
        default=planner.EFFICIENCY,
        help="share of the datasheet's rate that the products reach (default: 0.5)",
    )
    add("--max_tokens", type=_count, help="plan with this budget")
    add(
        "--checkpoint_activations",
        metavar="none|full|N",
        help="recompute no layer, all, or the first N",
    )
    add(
        "--quantize",
        choices=list(QUANTIZED_BYTES),
        help="the products' weights in 8 or 4 bits; under ZeRO-2 only",
    )
    add("--deepspeed", choices=planner.STAGES, help="plan with this stage")
    add("--write", type=Path, metavar="FILE", help="write the ds_config")
    add("--json", action="store_true", help="all figures, in bytes and seconds, as one JSON object")
    add(
        "--table",
        action="store_true",
        help="print the table of models and machines of vico/planner/README.md",
    )
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _number(text: str, at_least: float, at_most: float = 1e15) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None
    if not at_least <= value <= at_most:
        raise argparse.ArgumentTypeError(f"{text} must be {at_least:g} to {at_most:g}")
    return value


def _positive(text: str) -> float:
    return _number(text, 1e-3)


def _length(text: str) -> float:
    return _number(text, 0, 1e6)


def _share(text: str) -> float:
    return _number(text, 1e-3, 1)


def _count(text: str) -> int:
    value = _number(text, 1, 1e9)
    if value != int(value):
        raise argparse.ArgumentTypeError(f"{text} must be a whole number")
    return int(value)


def _task(flags: argparse.Namespace) -> PlanRequest:
    if flags.gpu is None and flags.gpu_memory is None:
        raise UserError(
            f"--gpu or --gpu_memory is missing: name the GPU ({', '.join(GPUS)}) or give its memory in GiB"
        )
    gpu = gpu_by_name(flags.gpu) if flags.gpu is not None else gpu_of_size(flags.gpu_memory)
    if flags.link is not None:
        gpu = dataclasses.replace(gpu, link_gb=flags.link)
    if flags.quantize and flags.deepspeed not in (None, "zero2"):
        raise UserError(
            f"--quantize {flags.quantize}: is for ZeRO-2, and --deepspeed is {flags.deepspeed}; leave one out"
        )
    size = model_size(flags.model)
    dataset = DATASETS[flags.dataset]
    longest = flags.max_seq_len + (flags.max_cap_len if flags.caption_tokens else 0)
    lengths = TokenLengths(
        flags.question_tokens or dataset.mean_question_tokens,
        flags.caption_tokens,
        longest,
        flags.questions or dataset.num_train_questions,
    )
    return PlanRequest(
        size,
        Hardware(gpu, flags.gpus, flags.nodes, flags.network, flags.host_memory),
        lengths,
        flags.precision,
        flags.batch_size,
        flags.accum_iter,
        flags.efficiency,
        flags.deepspeed,
        _layers(flags.checkpoint_activations, size),
        flags.max_tokens,
        flags.quantize,
    )


def _layers(text: str | None, size: ModelSize) -> int | None:
    if text is None or text in ("none", "full"):
        return {None: None, "none": 0, "full": size.n_layers}[text]
    if not text.isdecimal() or not text.isascii() or not 1 <= int(text) <= size.n_layers:
        raise UserError(
            f"--checkpoint_activations {text}: must be none, full or a number of layers from 1 to {size.n_layers}"
        )
    return int(text)


def model_size(model: str) -> ModelSize:
    """A named size, or that of a folder's params.json or config.json."""
    if model in planner.SIZES:
        return planner.SIZES[model]
    folder = Path(model)
    if not folder.is_dir():
        raise UserError(
            f"--model {model}: must be {', '.join(planner.SIZES)} or a folder with params.json{nearest(model, planner.SIZES)}"
        )
    from vico.model.weights.load import read_llama_config

    return size_of(folder.resolve().name, read_llama_config(folder))


def as_json(plan: Plan) -> dict[str, Any]:
    task = plan.task
    size = {
        **dataclasses.asdict(task.size),
        "frozen_parameters": task.size.frozen,
        "trainables": task.size.trainables,
    }
    memory = {**dataclasses.asdict(plan.memory), "total": plan.memory.total}
    return {
        "model": size,
        "hardware": dataclasses.asdict(task.hardware),
        "lengths": dataclasses.asdict(task.lengths),
        "precision": task.precision,
        "quantize": task.quantize,
        "batch_size": task.batch_size,
        "accum_iter": task.accum_iter,
        "efficiency": task.efficiency,
        "stage": plan.stage,
        "checkpointed_layers": plan.checkpointed,
        "max_tokens": plan.max_tokens,
        "largest_tokens": plan.largest_tokens,
        "memory_bytes": memory,
        "speed": plan.speed and dataclasses.asdict(plan.speed),
        "speed_lacks": plan.unknown,
        "ds_config": plan.ds_config,
    }


def text(plan: Plan, written: Path | None) -> str:
    task, memory = plan.task, plan.memory
    recomputed = planner.layers_named(plan.checkpointed, task.size)
    kept = f"{task.precision}, products in {task.quantize}" if task.quantize else task.precision
    lines = [
        f"{task.size.name} ({task.size.frozen / 1e9:.2f} G frozen parameters, {kept}) on {task.hardware}",
        "",
        f"stage             {plan.stage}",
        f"checkpointing     {plan.checkpointing}: {recomputed} recomputed in backward",
        f"token budget      {plan.max_tokens} per micro-batch to use; {plan.largest_tokens} would fit",
        f"flags             --deepspeed {_config_named(plan, written)} --max_tokens {plan.max_tokens} "
        f"--checkpoint_activations {plan.checkpointing}"
        + (f" --quantize {task.quantize}" if task.quantize else ""),
        "",
        f"memory per GPU in GiB, {memory.total / GIB:.2f} of {memory.available / GIB:.2f}",
        *(f"  {value / GIB:8.2f}  {name}" for name, value in _categories(plan)),
        *(
            [f"  {memory.host / GIB:8.2f}  host memory of a node, for the weights"]
            if memory.host
            else []
        ),
        "",
        *_speed_lines(plan),
        "",
        "assumed           " + assumptions(task),
        "",
        f"ds_config{f', written to {written}' if written else '' if plan.stage == 'zero2' else ' (--write FILE writes it)'}",
        json.dumps(plan.ds_config, indent=1),
    ]
    return "\n".join(lines)


def _config_named(plan: Plan, written: Path | None) -> str:
    """Under ZeRO-3 the config below has this model's sizes, and the shipped one has not."""
    return str(written or (plan.stage if plan.stage == "zero2" else "FILE"))


def _categories(plan: Plan) -> list[tuple[str, int]]:
    memory = plan.memory
    head_counts = memory.head >= memory.backward
    return [
        ("frozen weights", memory.weights),
        (
            "a weight unpacked for a product"
            if plan.task.quantize
            else "gathered layers, prefetch and their buffers",
            memory.gathered,
        ),
        (f"activations of {plan.max_tokens} tokens", memory.activations),
        (
            "output head, at the end of forward"
            + ("" if head_counts else " (not counted: before backward)"),
            memory.head,
        ),
        (
            "backward of a layer: attention, SwiGLU"
            + (" (not counted: after the head)" if head_counts else ""),
            memory.backward,
        ),
        ("trainables, their gradients, Adam", memory.trainables),
        ("gradient buckets", memory.buckets),
        ("CUDA context, NCCL, allocator's reserve", memory.reserve),
    ]


def _speed_lines(plan: Plan) -> list[str]:
    if plan.speed is None:
        return [f"speed             {UNKNOWN}: not known is {plan.unknown}"]
    speed, gpu = plan.speed, plan.task.hardware.gpu
    bound = "gathers" if speed.gather_seconds > speed.compute_seconds else "products"
    return [
        f"speed             {speed.tokens_per_second:,.0f} real tokens/s, {duration(speed.epoch_seconds)} per epoch (modelled, not measured)",
        f"                  per micro-batch {speed.compute_seconds:.2f} s of products at {plan.task.efficiency:.0%} of {gpu.tflops:g} TFLOP/s, "
        f"{speed.gather_seconds:.2f} s of gathers beside them: the {bound} decide",
    ]


def assumptions(task: PlanRequest) -> str:
    lengths = task.lengths
    return (
        f"{lengths.questions} questions of {lengths.question:g} tokens, captions of {lengths.caption:g}, at most {lengths.longest} together; "
        f"{task.batch_size} x {task.accum_iter} questions per GPU and step; 4 FLOPs per parameter and token, 6 where recomputed; "
        f"gathers at {planner.LINK_SHARE:.0%} of the link"
    )


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return (
        f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{max(1, minutes)} min"
    )


def table() -> str:
    """The table of vico/planner/README.md: each model and machine, and the way that fits."""
    rows = [_row(*case) for case in CASES] + [_row(*case) for case in QUANTIZED_CASES]
    heads = (
        "model",
        "GPUs",
        "stage",
        "recomputed",
        "weights + gathered",
        "activations + work",
        "total / there",
        "--max_tokens",
        "tokens/s",
        "epoch",
    )
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ("---",) * len(heads), *rows))


def plan_case(
    model: str, nodes: int, gpus: int, gpu: float | str, quantize: str | None = None
) -> Plan:
    found: Gpu = gpu_by_name(gpu) if isinstance(gpu, str) else gpu_of_size(gpu)
    dataset = DATASETS["nextqa"]
    lengths = TokenLengths(
        dataset.mean_question_tokens,
        planner.CAPTION_TOKENS,
        sum(PUBLISHED_LIMITS),
        dataset.num_train_questions,
    )
    network = NETWORK_OF_TABLE if nodes > 1 else None
    return planner.plan(
        PlanRequest(
            planner.SIZES[model], Hardware(found, gpus, nodes, network), lengths, quantize=quantize
        )
    )


def _row(
    model: str, nodes: int, gpus: int, gpu: float | str, quantize: str | None = None
) -> tuple[str, ...]:
    plan = plan_case(model, nodes, gpus, gpu, quantize)
    memory, speed = plan.memory, plan.speed
    recomputed = {0: "none", plan.task.size.n_layers: "all"}.get(
        plan.checkpointed, f"{plan.checkpointed} of {plan.task.size.n_layers}"
    )
    return (
        f"{model}, {quantize}" if quantize else model,
        str(plan.task.hardware),
        plan.stage,
        recomputed,
        f"{(memory.weights + memory.gathered) / GIB:.1f}",
        f"{(memory.activations + max(memory.head, memory.backward)) / GIB:.1f}",
        f"{memory.total / GIB:.1f} / {memory.available / GIB:.1f}",
        str(plan.max_tokens),
        f"{speed.tokens_per_second / 1000:.1f} k" if speed else UNKNOWN,
        duration(speed.epoch_seconds) if speed else UNKNOWN,
    )

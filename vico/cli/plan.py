"""`vico plan`: its flags, and the request that they make."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vico.cli import plan_text
from vico.cli.parser import (
    OneLineParser,
    bounded_float,
    path_argument,
    positive_float,
    positive_int,
)
from vico.cli.plan_data import Epoch, Place, of_datasets
from vico.errors import UserError, nearest, one_line
from vico.io import log
from vico.io.atomic import write_json
from vico.io.paths import exists, is_folder
from vico.model.config import (
    FEATURE_WIDTH,
    FP8,
    KEPT_POSITIONS,
    KEPT_WEIGHT,
    LLAMA_CONFIGS,
    QUANTIZATIONS,
    QUANTIZED_BYTES,
    LlamaConfig,
    ViCoConfig,
    named_model,
)
from vico.model.weights import folders
from vico.planner.gpu_specs import FP8_GPUS, GPUS, Hardware, gib_of, gpu_by_name, gpu_of_size
from vico.planner.memory import ITEMSIZE
from vico.planner.plan import plan
from vico.planner.request import (
    CAPTION_TOKENS,
    EFFICIENCY,
    PUBLISHED_CAP_LEN,
    PUBLISHED_SEQ_LEN,
    STAGES,
    PlanRequest,
    TokenLengths,
)
from vico.train.bounds import BOUNDS


def main(argv: Sequence[str]) -> int:
    flags = _parser().parse_args(argv)
    if flags.table:
        print(plan_text.table())
        return 0
    epoch = _epoch(flags)
    result = plan(_request(flags, epoch))
    for note in map(one_line, epoch.notes):  # standard output is one JSON object with --json
        log.warning(note) if flags.json else log.info(note)
    if flags.write is not None:
        write_json(flags.write, result.ds_config)
    if flags.json:
        print(json.dumps(plan_text.as_json(result)))
    else:
        print(plan_text.as_text(result, flags.write))
    return 0


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="vico plan",
        description="Estimate the memory and speed of a run. No weights are loaded.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model",
        default="7B",
        help="a folder with params.json or config.json, inside --llama_model_path or at this path; "
        f"else {', '.join(LLAMA_CONFIGS)}, or a name such as Llama-2-7b-hf (default: 7B)",
    )
    parser.add_argument(
        "--llama_model_path",
        type=path_argument,
        default=folders.DEFAULT,
        help=f"folder with one folder per model (default: {folders.DEFAULT})",
    )
    _add_hardware_flags(parser)
    _add_batch_flags(parser)
    _add_dataset_flags(parser)
    _add_choice_flags(parser)
    add = parser.add_argument
    add("--write", type=path_argument, metavar="FILE", help="write the ds_config")
    add("--json", action="store_true", help="print all numbers as one JSON object: bytes, seconds")
    add(
        "--table",
        action="store_true",
        help="print the table of models and machines of vico/planner/README.md",
    )
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_hardware_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--gpus", type=positive_int, default=1, help="GPUs per node (default: 1)")
    add("--nodes", type=positive_int, default=1, help="number of nodes (default: 1)")
    gpu = parser.add_mutually_exclusive_group()
    gpu.add_argument("--gpu", help=f"the GPU: {', '.join(GPUS)}, or its size (24GB)")
    gpu.add_argument(
        "--gpu_memory",
        type=_gib,
        metavar="GIB",
        help="the GPU's nominal memory instead (24, 24GB); its speed is then unknown",
    )
    add(
        "--link",
        type=positive_float,
        metavar="GB",
        help="GB/s between the GPUs of a node, one direction (default: NVLink's, if the GPU has "
        "it)",
    )
    add("--network", type=positive_float, metavar="GBIT", help="network of a node, Gbit/s")
    add(
        "--host_memory",
        type=_gib,
        metavar="GIB",
        help="memory of a node in GiB, for off-loading",
    )


def _add_batch_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--precision", choices=list(ITEMSIZE), default="bf16", help="default: bf16")
    add(
        "--batch_size",
        type=positive_int,
        default=8,
        help="questions per GPU and micro-batch (default: 8, as published)",
    )
    add(
        "--accum_iter",
        type=positive_int,
        default=2,
        help="micro-batches per step (default: 2, as published)",
    )
    add(
        "--max_seq_len",
        type=positive_int,
        default=PUBLISHED_SEQ_LEN,
        help=f"longest question, tokens (default: {PUBLISHED_SEQ_LEN})",
    )
    add(
        "--max_cap_len",
        type=positive_int,
        default=PUBLISHED_CAP_LEN,
        help=f"longest caption, tokens (default: {PUBLISHED_CAP_LEN})",
    )
    add(
        "--keep",
        nargs="?",
        const=KEPT_WEIGHT,
        type=lambda text: bounded_float(text, *BOUNDS["keep"][:2]),
        metavar="W",
        help=f"as of `vico train`; unless 0, questions bring {KEPT_POSITIONS} tokens of text",
    )
    add(
        "--caption_tokens",
        type=_mean_tokens,
        default=float(CAPTION_TOKENS),
        help=f"mean tokens of a caption's sequence (default: {CAPTION_TOKENS}); 0: no captions",
    )
    add(
        "--feature_width",
        type=positive_int,
        default=FEATURE_WIDTH,
        help=f"numbers per video frame (default: {FEATURE_WIDTH}, of CLIP ViT-L/14)",
    )
    add(
        "--efficiency",
        type=_share,
        default=EFFICIENCY,
        help=f"share of the datasheet's rate that matrix products reach (default: {EFFICIENCY:g})",
    )


def _add_dataset_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--dataset",
        default="nextqa",
        help="sets the mean length and the number of questions: nextqa, star, tvqa, intentqa, a "
        "folder of --data_path, or several with weights (default: nextqa)",
    )
    add(
        "--data_path",
        type=path_argument,
        default=Path("data"),
        help="folder that holds one folder per dataset (default: data)",
    )
    add(
        "--question_tokens",
        type=positive_float,
        help="mean tokens of a question's sequence (default: the dataset's)",
    )
    add("--questions", type=positive_int, help="training questions (default: the dataset's)")


def _add_choice_flags(parser: argparse.ArgumentParser) -> None:
    """What the planner chooses, unless the user does."""
    add = parser.add_argument
    add("--max_tokens", type=positive_int, help="plan with this token budget per micro-batch")
    add(
        "--checkpoint_activations",
        metavar="none|full|N",
        help="recompute no layer, all, or the first N in backward",
    )
    add(
        "--quantize",
        choices=list(QUANTIZATIONS),
        help="the frozen linear layers in 8 or 4 bits (ZeRO-2 only), or computed in fp8",
    )
    add("--deepspeed", choices=STAGES, help="plan with this ZeRO stage")


def _gib(text: str) -> float:
    size = gib_of(text)
    return positive_float(text if size is None else str(size))


def _mean_tokens(text: str) -> float:
    return bounded_float(text, 0, 1e6)


def _share(text: str) -> float:
    return bounded_float(text, 1e-3, 1)


def _epoch(flags: argparse.Namespace) -> Epoch:
    """What --dataset says, where no flag says it otherwise."""
    if flags.question_tokens and flags.questions:
        return Epoch(flags.question_tokens, flags.questions)
    model_folder = folders.model_folder(flags.llama_model_path, flags.model)
    place = Place(flags.data_path, flags.llama_model_path, model_folder, flags.max_seq_len)
    epoch = of_datasets(flags.dataset, place)
    mean, count = flags.question_tokens or epoch.mean_tokens, flags.questions or epoch.num_questions
    return Epoch(mean, count, epoch.notes)


def _request(flags: argparse.Namespace, epoch: Epoch) -> PlanRequest:
    """Raises UserError for flags that contradict each other, or do not fit the model."""
    hardware = _hardware(flags)
    if flags.quantize in QUANTIZED_BYTES and flags.deepspeed not in (None, "zero2"):
        raise UserError(
            f"--quantize {flags.quantize}: is for ZeRO-2, and --deepspeed is {flags.deepspeed}; "
            "leave one out"
        )
    gpu = hardware.gpu.name
    if flags.quantize == FP8 and gpu in GPUS and gpu not in FP8_GPUS:
        raise UserError(
            f"--quantize {FP8}: {gpu} has no fp8 units; those that have are {', '.join(FP8_GPUS)}"
        )
    model, config = named_config(flags.model, flags.llama_model_path)
    text = KEPT_POSITIONS if flags.keep else 0
    lengths = TokenLengths(
        question=epoch.mean_tokens,
        caption=flags.caption_tokens,
        longest=flags.max_seq_len + (flags.max_cap_len if flags.caption_tokens else 0) + text,
        questions=epoch.num_questions,
        text=text,
    )
    return PlanRequest(
        model,
        ViCoConfig.from_llama(config, feature_width=flags.feature_width),
        hardware,
        lengths,
        precision=flags.precision,
        batch_size=flags.batch_size,
        accum_iter=flags.accum_iter,
        efficiency=flags.efficiency,
        stage=flags.deepspeed,
        num_checkpointed=_num_checkpointed(flags.checkpoint_activations, config.n_layers),
        max_tokens=flags.max_tokens,
        quantize=flags.quantize,
    )


def _hardware(flags: argparse.Namespace) -> Hardware:
    if flags.gpu is not None:
        gpu = gpu_by_name(flags.gpu)
    elif flags.gpu_memory is not None:
        gpu = gpu_of_size(flags.gpu_memory)
    else:
        raise UserError(
            f"--gpu or --gpu_memory is missing: name the GPU ({', '.join(GPUS)}) or give its "
            "memory in GiB"
        )
    if flags.link is not None:
        gpu = replace(gpu, link_gb=flags.link)
    return Hardware(gpu, flags.gpus, flags.nodes, flags.network, flags.host_memory)


def _num_checkpointed(text: str | None, n_layers: int) -> int | None:
    """The number of layers that --checkpoint_activations means; None: the planner decides."""
    named = {None: None, "none": 0, "full": n_layers}
    if text in named:
        return named[text]
    assert text is not None
    if not text.isdecimal() or not text.isascii() or not 1 <= int(text) <= n_layers:
        raise UserError(
            f"--checkpoint_activations {text}: must be none, full or a number of layers from 1 "
            f"to {n_layers}"
        )
    return int(text)


def named_config(model: str, llama_folder: Path = folders.DEFAULT) -> tuple[str, LlamaConfig]:
    """Name and dimensions of a folder's params.json or config.json, or of a known model."""
    folder = folders.model_folder(llama_folder, model)
    has_config = any(exists(folder / name) for name in ("params.json", "config.json"))
    if model in LLAMA_CONFIGS and not has_config:
        return model, LLAMA_CONFIGS[model]
    if not is_folder(folder):
        if (name := named_model(model)) is not None:
            return name, LLAMA_CONFIGS[name]
        raise UserError(
            f"--model {model}: must be {', '.join(LLAMA_CONFIGS)}, a name such as llama-2-7b, or a "
            f"folder with params.json or config.json{nearest(model.upper(), LLAMA_CONFIGS)}"
        )
    # Imports torch, which takes seconds.
    from vico.model.weights.load import read_llama_config

    config = read_llama_config(folder)
    return folder.resolve().name, replace(config, n_kv_heads=config.kv_heads)


if __name__ == "__main__":  # `python -m vico.cli.plan`, or this file
    from vico.cli.main import console

    console(command="plan")

"""The `gpu` suite: plain against fast on one GPU, in half precision, with random weights.

Correctness comes first. The suite reports no times where a backend, the toy model, or the big
model's losses and scores differ by more than rounding explains. With `--tiny --device cpu`
everything but the device's events and allocator runs anywhere.
"""

import argparse
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.baseline import correctness
from benchmarks.baseline.models import MODELS, SIZES, TOY
from benchmarks.measure.ceilings import SUSTAINED_SECONDS, device_ceilings
from benchmarks.measure.clocks import Clock
from benchmarks.measure.metrics import FORMULAS, print_formulas
from benchmarks.measure.peak_rates import peak_rate
from benchmarks.measure.spreads import UNKNOWN
from benchmarks.report.record import new_record, settings, write_record
from benchmarks.suites.gpu_bench import LONG, VARIANTS, Bench, make_bench
from benchmarks.suites.gpu_compare import compare, print_comparison
from benchmarks.suites.gpu_fp8 import in_fp8
from benchmarks.suites.gpu_memory import small_cards, step_peaks, time_splits, token_budgets
from benchmarks.suites.gpu_peers import best_ratios, peers
from vico.data.evaluation_batches import EVALUATION_TOKENS
from vico.errors import UserError
from vico.io import log
from vico.model.config import LlamaConfig
from vico.train.backbone import DTYPES

TASKS = ("vqa", "cap", "both", LONG)
# Fields of a comparison that are not reported where the variants differ.
TIMED = ("seconds", "figures", "ratio", "data_wait_seconds")
CHECKED = LlamaConfig(256, 4, 4, 2000, multiple_of=64)


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", choices=SIZES, default="7B")
    add("--precision", choices=["bf16", "fp16"], default="bf16")
    add("--attention", default="auto", help="of the fast variant")
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--steps", type=int, default=30, help="timed steps of each variant")
    add("--warmup", type=int, default=5, help="steps before them")
    add("--questions", type=int, default=8, help="of a training step; the published batch")
    add("--videos", type=int, default=4, help="of a scoring step, each with all its questions")
    add(
        "--tasks",
        nargs="+",
        choices=TASKS,
        default=list(TASKS),
        help="what the samples of a training step are; both_long: with captions of 200 to 358",
    )
    add(
        "--budgets",
        nargs="*",
        type=int,
        default=[2048, 4096, 8192, 16384],
        help="tokens of a step, the fast variant alone",
    )
    add(
        "--score_tokens",
        type=int,
        default=EVALUATION_TOKENS,
        help="tokens of the prompts in a scoring forward of the fast variant",
    )
    add("--no_peers", action="store_true", help="leave out transformers with PEFT")
    add("--num_workers", type=int, default=4, help="data workers of each variant")
    add("--seed", type=int, default=0)
    add(
        "--tiny",
        action="store_true",
        help="a toy model and few steps, to try the harness; its metrics mean nothing",
    )


def run(args: argparse.Namespace) -> int:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: there is no GPU here; `--tiny --device cpu` tries the harness"
        )
    if args.tiny:
        args.steps, args.warmup, args.num_workers = min(args.steps, 2), 1, 0
        args.questions, args.videos, args.budgets = min(args.questions, 2), 1, args.budgets[:1]
    device, dtype = torch.device(args.device), DTYPES[args.precision]
    config = TOY if args.tiny else MODELS[args.model]
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = peak_rate(device_name, args.precision)
    record = new_record("gpu", settings(args)) | {
        "shape": asdict(config),
        "formulas": FORMULAS,
        "clock": Clock(device).kind,
        "ratios": {},
        "ratio_spreads": {},
        "peak": asdict(peak) if peak else UNKNOWN,
    }
    size, copy_mib = (256, 16) if args.tiny else (8192, 1024)
    ceilings = record["ceilings"] = device_ceilings(
        device, dtype, size, copy_mib, sustained_seconds=0 if args.tiny else SUSTAINED_SECONDS
    )
    log.info(
        f"{device_name}: peak {record['peak']}; "
        f"measured {ceilings['matmul_tflops']:.3f} TFLOP/s, {ceilings['product']}"
    )
    print_formulas()
    record["checks"] = check(args, config, device)
    record["equal"] = all(result["equal"] for result in record["checks"].values())
    if record["equal"]:
        peak_tflops = peak.tflops if peak else None
        try:
            bench = make_bench(args, config, device, peak_tflops, ceilings["matmul_tflops"])
            measure(record, bench)
        except torch.cuda.OutOfMemoryError as error:
            cause = str(error).split(".")[0]
            raise UserError(
                f"{device_name}: out of memory ({cause}); choose fewer --questions or --videos"
            ) from None
    if not record["equal"]:
        log.error(
            "the variants do not compute the same (distances above and in the record); "
            "there is nothing to report"
        )
        _remove_times(record)
    write_record(record, args.results)
    return 0 if record["equal"] else 1


def check(args: argparse.Namespace, config: LlamaConfig, device: torch.device) -> dict[str, Any]:
    """Everything that must be correct before any time is taken."""
    dtype = DTYPES[args.precision]
    if args.tiny:
        toy, heads, repeats, num_videos = TOY, TOY, 3, 1
    else:
        toy, heads, repeats, num_videos = CHECKED, replace(config, n_layers=1), 20, 8
    attention = correctness.attention_backends(heads, device, dtype, repeats)
    for name, backend in attention["backends"].items():
        result = f"not available: {backend['why']}"
        if backend["runs"]:
            result = f"worst distance {backend['worst']:.1e}"
        log.info(f"attention {name:12s} {result}")
    steps = correctness.twenty_steps(toy, device, dtype)
    log.info(
        f"20 toy steps {args.precision} on {device.type} against fp32 on the CPU: "
        f"losses within {steps['worst_relative']:.1e}"
    )
    distances = correctness.toy_distances(toy, device, dtype, num_videos)
    for name, means in distances["means"].items():
        values = ", ".join(f"{key} {value:.2e}" for key, value in means.items())
        log.info(f"distance to fp32 of {name}: {values}")
    return {"attention": attention, "steps": steps, "distance_to_fp32": distances}


def measure(record: dict[str, Any], bench: Bench) -> None:
    """All measurements into `record`. Ends early where the variants do not agree."""
    args = bench.args
    record |= {"training": {}, "scoring": {}}
    cases = [("training", task, args.questions) for task in args.tasks]
    cases.append(("scoring", "score", args.videos))
    for part, kind, num in cases:
        compared = record[part][kind] = compare(bench, kind, num)
        if not compared["equal"]:
            record |= {"equal": False, "ratios": {}, "ratio_spreads": {}}
            return
        key = kind if kind == "score" else f"train_{kind}"
        record["ratios"][key] = compared["ratio"]["median"]
        record["ratio_spreads"][key] = compared["ratio"]
        print_comparison(key, compared["figures"], compared["ratio"])
    record["memory"] = step_peaks(bench)
    for what, by_variant in record["memory"].items():
        plain, fast = (by_variant[name]["allocated_gib"] for name in ("plain", "fast"))
        record["ratios"][f"peak_memory_{what}"] = plain / max(fast, 1e-9)
    plain, fast = (record["memory"]["train"][n]["timed"]["reserved_gib"] for n in VARIANTS)
    if plain != UNKNOWN:
        record["ratios"]["reserved_memory_train_timed"] = plain / fast
    record["budgets"] = token_budgets(bench)
    record["small_cards"] = small_cards(bench)
    record["time_split"] = time_splits(bench)
    record["fp8"] = in_fp8(bench)
    record["peers"] = peers(bench)
    record["peer_ratios"] = best_ratios(record["peers"])
    ratios = ", ".join(f"{key} {value:.2f}" for key, value in record["ratios"].items())
    log.info(f"plain over fast: {ratios}")


def _remove_times(record: dict[str, Any]) -> None:
    for part in ("training", "scoring"):
        for compared in record.get(part, {}).values():
            for name in TIMED:
                compared.pop(name, None)

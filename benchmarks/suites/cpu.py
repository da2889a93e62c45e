"""The `cpu` suite: plain against packed, fp32, one thread, in minutes; refuses to report where they do not compute the same.

Two models of width 512 and 8 layers: with 32,000 pieces (wide) and with so few that the head's share of the products is a
7B's. Every round brings a fresh micro-batch to train on and fresh videos to score, each variant in turn.
"""

import argparse
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.baseline.variants import (
    MAX_CAP_LEN,
    MAX_SEQ_LEN,
    Packed,
    Plain,
    Variant,
    make_pair,
    take_gradients,
    training_batch,
    with_vico_products,
)
from benchmarks.measure.clocks import cpu_ceilings, cpu_seconds, ratio_spread, spread
from benchmarks.measure.metrics import Amount, layer_parameters, of_packed, of_plain
from benchmarks.measure.time_split import time_split
from benchmarks.measure.workload import (
    RealWorkload,
    ScoringWork,
    SyntheticWorkload,
    TrainingWork,
    Workload,
)
from benchmarks.report.record import new_record, settings, write
from benchmarks.suites import step_memory as memory
from vico.model.config import LlamaConfig

CPU = torch.device("cpu")
WIDE_VOCABULARY, NARROW_VOCABULARY = (
    32000,
    1216,
)  # 1216: 2.2 % of the products are the head's, 7B: 2.0 %
# Rounding of fp32 in another order, through 8 layers; seen: losses 1e-7, scores 2e-6, gradients 2e-6 of the largest entry.
LOSS_RTOL, GRADIENT_RTOL, SCORE_ATOL = 1e-5, 1e-4, 1e-5


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rounds", type=int, default=5, help="interleaved rounds, each with fresh batches"
    )
    parser.add_argument(
        "--warmup",
        type=int,
        default=1,
        help="rounds before them, of the packed variants; plain warms up on one question",
    )
    parser.add_argument(
        "--questions",
        type=int,
        default=8,
        help="questions of a training micro-batch; each brings its caption",
    )
    parser.add_argument(
        "--videos",
        type=int,
        default=1,
        help="videos per scoring round, each with all its questions",
    )
    parser.add_argument(
        "--waterfall", action="store_true", help="also the steps between plain and fast"
    )
    parser.add_argument(
        "--profile", action="store_true", help="also where the time goes, by kind of operator"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--data_path",
        type=Path,
        help="folder of real annotation files, with --tokenizer; default: synthetic ids",
    )
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--dataset", default="nextqa")
    parser.add_argument("--split", default="val")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="a toy model in seconds, to try the harness; its ratios mean nothing",
    )


@dataclass
class Round:
    """What one round gave, by variant name."""

    losses: dict[str, list[float]] = field(default_factory=dict)  # per task
    gradients: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, dict[str, float]] = field(default_factory=lambda: {"train": {}, "score": {}})


def differences(result: Round, baseline: str) -> dict[str, float]:
    """The largest distances of any variant to the baseline, and predictions that are not the same."""
    worst = {
        "loss_relative": 0.0,
        "gradient_relative": 0.0,
        "score_absolute": 0.0,
        "predictions": 0.0,
    }
    for name in result.losses:
        pairs = zip(result.losses[name], result.losses[baseline], strict=True)
        worst["loss_relative"] = max(worst["loss_relative"], *(_worse(a, b) for a, b in pairs))
        mine, theirs = result.gradients[name], result.gradients[baseline]
        assert set(mine) == set(theirs), f"{name} has gradients of other trainables than {baseline}"
        distances = (
            float((mine[n] - theirs[n]).abs().max() / theirs[n].abs().max()) for n in theirs
        )
        worst["gradient_relative"] = max(
            worst["gradient_relative"], *(d if d == d else float("inf") for d in distances)
        )
        scores, expected = result.scores[name], result.scores[baseline]
        distance = float((scores - expected).abs().max())
        worst["score_absolute"] = max(
            worst["score_absolute"], distance if distance == distance else float("inf")
        )
        worst["predictions"] += int((scores.argmin(1) != expected.argmin(1)).sum())
    return worst


def _worse(a: float, b: float) -> float:
    distance = abs(a - b) / abs(b)
    return distance if distance == distance else float("inf")  # nan is no agreement


def is_equal(worst: dict[str, float]) -> bool:
    return (
        worst["loss_relative"] <= LOSS_RTOL
        and worst["gradient_relative"] <= GRADIENT_RTOL
        and worst["score_absolute"] <= SCORE_ATOL
        and worst["predictions"] == 0
    )


def run_round(
    variants: list[Variant], training: TrainingWork, scoring: ScoringWork, place: int
) -> Round:
    """Each variant in turn, the order turned round from round to round."""
    result = Round()
    for variant in variants if place % 2 == 0 else variants[::-1]:
        result.seconds["train"][variant.name], result.losses[variant.name] = cpu_seconds(
            partial(variant.train, training)
        )
        result.gradients[variant.name] = take_gradients(variant.model)
    for variant in variants if place % 2 == 0 else variants[::-1]:
        result.seconds["score"][variant.name], result.scores[variant.name] = cpu_seconds(
            partial(variant.score, scoring)
        )
    return result


def make_variants(shape: LlamaConfig, waterfall: bool) -> list[Variant]:
    plain, fast = make_pair(shape)
    between: list[Variant] = []
    if waterfall:
        between = [
            Plain(plain, CPU, longest=True, name="plain, padded to the longest"),
            Plain(with_vico_products(plain), CPU, longest=True, name="and ViCo's products"),
            Packed(fast, CPU, share=False, name="packed, nothing shared"),
        ]
    return [Plain(plain, CPU), *between, Packed(fast, CPU)]


def run_geometry(
    name: str, shape: LlamaConfig, workload: Workload, args: argparse.Namespace, ceiling: float
) -> dict[str, Any]:
    """All rounds of one geometry; "equal" says whether they may be reported."""
    variants = make_variants(shape, args.waterfall)
    for variant in variants:
        for place in range(args.warmup if isinstance(variant, Packed) else 1):
            full = isinstance(variant, Packed)
            variant.train(workload.training(10**6 + place, args.questions if full else 1))
            if full:
                variant.score(workload.scoring(10**6 + place, args.videos))
            take_gradients(variant.model)
    seconds: dict[str, dict[str, list[float]]] = {
        what: defaultdict(list) for what in ("train", "score")
    }
    tokens: dict[str, list[int]] = {"train": [], "score": []}
    amounts: dict[str, list[Amount]] = {variant.name: [] for variant in variants}
    out: dict[str, Any] = {
        "shape": asdict(shape),
        "workload": workload.description,
        "rounds": [],
        "equal": True,
    }
    for place in range(args.rounds):
        training, scoring = (
            workload.training(place, args.questions),
            workload.scoring(place, args.videos),
        )
        result = run_round(variants, training, scoring, place)
        worst = differences(result, "plain")
        for what in seconds:
            for variant in variants:
                seconds[what][variant.name].append(result.seconds[what][variant.name])
        for variant in variants:
            amounts[variant.name].append(amount_of(variant, training, shape))
        tokens["train"].append(training.num_real_tokens)
        tokens["score"].append(scoring.num_real_tokens)
        predictions = {
            variant: scores.argmin(1).tolist() for variant, scores in result.scores.items()
        }
        out["rounds"].append(
            {
                "losses": result.losses,
                "predictions": predictions,
                "questions_scored": len(scoring.questions),
                "differences": worst,
            }
        )
        out["equal"] = out["equal"] and is_equal(worst)
        say(name, place, result, worst)
        if not out["equal"]:
            return out
    out["cpu_seconds"], out["real_tokens"] = (
        {what: dict(by) for what, by in seconds.items()},
        tokens,
    )
    out["figures"] = figures(out, shape, args.questions, ceiling, amounts)
    if args.profile:
        training, scoring = workload.training(0, args.questions), workload.scoring(0, args.videos)
        out["time_split"] = {
            v.name: split_of(v, shape, training, scoring) for v in (variants[0], variants[-1])
        }
    return out


def say(name: str, place: int, result: Round, worst: dict[str, float]) -> None:
    for variant, losses in result.losses.items():
        times = f"{result.seconds['train'][variant]:7.2f} s train {result.seconds['score'][variant]:7.2f} s score"
        predictions = "".join("ABCDE"[p] for p in result.scores[variant].argmin(1).tolist())
        print(
            f"{name:12s} round {place + 1}  {variant:28s}{times}  vqa {losses[0]:.6f} cap {losses[1]:.6f}  {predictions}",
            flush=True,
        )
    print(
        "             largest differences: "
        + ", ".join(f"{key} {value:.1e}" for key, value in worst.items()),
        flush=True,
    )


def amount_of(variant: Variant, work: TrainingWork, shape: LlamaConfig) -> Amount:
    if isinstance(variant, Packed):
        return of_packed(
            shape,
            [training_batch(work, variant.share)],
            2 * len(work.vqa),
            len(work.vqa),
            training=True,
        )
    assert isinstance(variant, Plain)
    return of_plain(
        shape, work, (variant.width(work.vqa, MAX_SEQ_LEN), variant.width(work.cap, MAX_CAP_LEN))
    )


def figures(
    out: dict[str, Any],
    shape: LlamaConfig,
    num_questions: int,
    ceiling: float,
    amounts: dict[str, list[Amount]],
) -> dict[str, Any]:
    """Rates by variant. FLOPs of a step: 4 (forward, input gradient) times the layers' parameters, per real token."""
    scored = [r["questions_scored"] for r in out["rounds"]]
    rates: dict[str, Any] = {}
    for name, times in out["cpu_seconds"]["train"].items():
        tokens = spread([n / t for n, t in zip(out["real_tokens"]["train"], times, strict=True)])
        gflops = 4 * layer_parameters(shape) * tokens["median"] / 1e9
        rates[name] = {
            "train_seconds": spread(times),
            "real_tokens_per_second": tokens,
            "padded_tokens_per_second": spread(
                [a.padded_tokens / t for a, t in zip(amounts[name], times, strict=True)]
            ),
            "target_tokens_per_second": spread(
                [a.target_tokens / t for a, t in zip(amounts[name], times, strict=True)]
            ),
            "samples_per_second": spread([num_questions / t for t in times]),
            "useful_gflops_of_layers": gflops,
            "share_of_measured_ceiling": gflops / ceiling,
            "score_seconds": spread(out["cpu_seconds"]["score"][name]),
            "questions_per_second": spread(
                [n / t for n, t in zip(scored, out["cpu_seconds"]["score"][name], strict=True)]
            ),
        }
    return rates


def split_of(
    variant: Variant, shape: LlamaConfig, training: TrainingWork, scoring: ScoringWork
) -> dict[str, Any]:
    train, train_rows = time_split(lambda: variant.train(training), shape, CPU)
    take_gradients(variant.model)
    score, score_rows = time_split(lambda: variant.score(scoring), shape, CPU)
    return {"train": train, "score": score, "train_rows": train_rows, "score_rows": score_rows}


def geometries(tiny: bool) -> dict[str, LlamaConfig]:
    if tiny:
        return {
            "wide": LlamaConfig(64, 2, 4, 600, multiple_of=32),
            "7b_geometry": LlamaConfig(64, 2, 4, 300, multiple_of=32),
        }
    return {
        "wide": LlamaConfig(512, 8, 8, WIDE_VOCABULARY),
        "7b_geometry": LlamaConfig(512, 8, 8, NARROW_VOCABULARY),
    }


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    config = settings(args) | {
        "precision": "fp32",
        "threads": 1,
        "max_seq_len": MAX_SEQ_LEN,
        "max_cap_len": MAX_CAP_LEN,
        "adapter_len": 10,
        "max_feats": 10,
    }
    record = new_record("cpu", config)
    record["ceilings"] = cpu_ceilings()
    print(
        "ceilings of one thread: "
        + ", ".join(f"{key} {value:.1f}" for key, value in record["ceilings"].items()),
        flush=True,
    )
    print("useful FLOPs of a training step: 4 x parameters of the layers x real tokens", flush=True)
    record |= {
        "equal": True,
        "tolerances": {"loss": LOSS_RTOL, "gradient": GRADIENT_RTOL, "score": SCORE_ATOL},
        "ratios": {},
        "geometries": {},
    }
    for name, shape in geometries(args.tiny).items():
        workload = _workload(args, shape)
        measured = run_geometry(name, shape, workload, args, record["ceilings"]["matmul_gflops"])
        record["geometries"][name] = measured
        record["equal"] = record["equal"] and measured["equal"]
        if not record["equal"]:
            break
    if not record["equal"]:
        print(
            "vico: error: the variants do not compute the same (differences above); nothing to report",
            file=sys.stderr,
            flush=True,
        )
        record["ratios"] = {}
        for measured in record["geometries"].values():
            for key in ("cpu_seconds", "figures", "time_split"):
                measured.pop(key, None)
        write(record, args.results)
        return 1
    record["memory"] = {
        variant: memory.measured(variant, geometries(args.tiny)["wide"], args.questions)
        for variant in ("plain", "fast")
    }
    record["ratios"], record["ratio_spreads"] = ratios(record)
    print(
        "plain over fast: "
        + ", ".join(f"{key} {value:.2f}" for key, value in record["ratios"].items()),
        flush=True,
    )
    write(record, args.results)
    return 0


def _workload(args: argparse.Namespace, shape: LlamaConfig) -> Workload:
    if args.data_path is None:
        return SyntheticWorkload(shape.vocab_size, seed=args.seed)
    if args.tokenizer is None:
        raise SystemExit("vico: error: --data_path needs --tokenizer, the LLaMA tokenizer.model")
    limits = (MAX_SEQ_LEN, MAX_CAP_LEN)
    return RealWorkload(
        args.data_path,
        args.dataset,
        args.split,
        args.tokenizer,
        shape.vocab_size,
        args.seed,
        limits,
    )


def ratios(record: dict[str, Any]) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Plain over fast: medians of the rounds' own ratios, and their spreads."""
    spreads = {
        f"{what}_{name}": ratio_spread(
            measured["cpu_seconds"][what]["plain"], measured["cpu_seconds"][what]["fast"]
        )
        for name, measured in record["geometries"].items()
        for what in ("train", "score")
    }
    values = {key: value["median"] for key, value in spreads.items()}
    values["peak_memory_wide"] = record["memory"]["plain"]["growth_mib"] / max(
        record["memory"]["fast"]["growth_mib"], 1e-9
    )
    return values, spreads

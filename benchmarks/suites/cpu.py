"""The `cpu` suite: plain against packed, fp32, one thread, in minutes.

It reports nothing where the variants do not compute the same. Two models of width 512 with 8 layers
run: one with LLaMA's 32,000 pieces ("wide"), one whose output head has the same share of the
products as a 7B's ("7b_geometry"). Every round has a fresh micro-batch to train on and fresh videos
to score.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.baseline.models import ADAPTER_LEN, take_gradients
from benchmarks.baseline.peers import why_no_peers
from benchmarks.baseline.variants import Packed, Variant
from benchmarks.measure.ceilings import cpu_ceilings
from benchmarks.measure.lengths import MAX_CAP_LEN, MAX_SEQ_LEN, NUM_SLOTS, Lengths
from benchmarks.measure.metrics import layer_parameters
from benchmarks.measure.real_workload import RealWorkload
from benchmarks.measure.spreads import ratio_spread, spread
from benchmarks.measure.time_split import time_split
from benchmarks.measure.workload import ScoringWork, SyntheticWorkload, TrainingWork, Workload
from benchmarks.report.record import new_record, settings, write_record
from benchmarks.suites import cpu_peers, cpu_rounds
from benchmarks.suites.cpu_peers import CpuPeers
from benchmarks.suites.cpu_rounds import CPU, GRADIENT_RTOL, LOSS_RTOL, SCORE_ATOL, TRAINING
from benchmarks.suites.step_memory import step_memory
from vico.errors import UserError
from vico.io import log
from vico.model.config import LLAMA_VOCAB_SIZE, LlamaConfig

# The head has 2.2 % of the products; a 7B's has 2.0 %.
NARROW_VOCAB_SIZE = 1216
TIMED = (
    "cpu_seconds",
    "figures",
    "time_split",
    "peers",
    "peer_seconds",
)  # fields of a geometry that are not reported alone


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="interleaved rounds, each with fresh batches")
    add(
        "--warmup",
        type=int,
        default=1,
        help="rounds before them, of the packed variants; plain warms up on one question",
    )
    add(
        "--questions",
        type=int,
        default=8,
        help="questions of a training micro-batch; each has its caption",
    )
    add(
        "--videos",
        type=int,
        default=1,
        help="videos per scoring round, each with all its questions",
    )
    add("--waterfall", action="store_true", help="add the steps between plain and fast")
    add("--no_peers", action="store_true", help="leave out transformers with PEFT")
    add("--profile", action="store_true", help="add the time by category of operator")
    add("--seed", type=int, default=0)
    add(
        "--data_path",
        type=Path,
        help="folder of real annotation files, with --tokenizer; default: synthetic ids",
    )
    add("--tokenizer", type=Path)
    add("--dataset", default="nextqa")
    add("--split", default="val")
    add(
        "--tiny",
        action="store_true",
        help="a toy model in seconds, to try the harness; its ratios mean nothing",
    )


def geometries(tiny: bool) -> dict[str, LlamaConfig]:
    if tiny:
        return {
            "wide": LlamaConfig(64, 2, 4, 600, multiple_of=32),
            "7b_geometry": LlamaConfig(64, 2, 4, 300, multiple_of=32),
        }
    return {
        "wide": LlamaConfig(512, 8, 8, LLAMA_VOCAB_SIZE),
        "7b_geometry": LlamaConfig(512, 8, 8, NARROW_VOCAB_SIZE),
    }


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    record = new_record("cpu", settings(args) | _constants())
    record["ceilings"] = cpu_ceilings()
    log.info(f"ceilings of one thread: {_pairs(record['ceilings'], '.1f')}")
    log.info("useful FLOPs of a training step: 4 x parameters of the layers x real tokens")
    record |= {
        "equal": True,
        "tolerances": {"loss": LOSS_RTOL, "gradient": GRADIENT_RTOL, "score": SCORE_ATOL},
        "ratios": {},
        "geometries": {},
    }
    configs = geometries(args.tiny)
    for name, config in configs.items():
        measured = run_geometry(name, config, args, record["ceilings"]["matmul_gflops"])
        record["geometries"][name] = measured
        if not measured["equal"]:
            return _refuse(record, args.results)
    record["memory"] = {
        variant: step_memory(variant, configs["wide"], args.questions)
        for variant in ("plain", "fast")
    }
    record["ratios"], record["ratio_spreads"] = ratios(record)
    log.info(f"plain over fast: {_pairs(record['ratios'], '.2f')}")
    record["peer_ratios"] = peer_ratios(record)
    for key, ratio in record["peer_ratios"].items():
        log.info(f"{key}: the best peer over fast {ratio['median']:.2f} ({ratio['peer']})")
    write_record(record, args.results)
    return 0


def _constants() -> dict[str, Any]:
    return {
        "precision": "fp32",
        "threads": 1,
        "max_seq_len": MAX_SEQ_LEN,
        "max_cap_len": MAX_CAP_LEN,
        "adapter_len": ADAPTER_LEN,
        "max_feats": NUM_SLOTS,
    }


def _pairs(values: dict[str, float], form: str) -> str:
    return ", ".join(f"{key} {value:{form}}" for key, value in values.items())


def _refuse(record: dict[str, Any], results: Path) -> int:
    """Writes the record with the differences, without times."""
    log.error(
        "the variants do not compute the same (differences above); there is nothing to report"
    )
    record["equal"] = False
    for measured in record["geometries"].values():
        for key in TIMED:
            measured.pop(key, None)
    write_record(record, results)
    return 1


def make_workload(args: argparse.Namespace, config: LlamaConfig, lengths: Lengths) -> Workload:
    if args.data_path is None:
        return SyntheticWorkload(config.vocab_size, seed=args.seed, lengths=lengths)
    if args.tokenizer is None:
        raise UserError("--data_path needs --tokenizer, the LLaMA tokenizer.model")
    return RealWorkload(
        args.data_path,
        args.dataset,
        args.split,
        args.tokenizer,
        config.vocab_size,
        args.seed,
        (MAX_SEQ_LEN, MAX_CAP_LEN),
        lengths,
    )


def run_geometry(
    name: str, config: LlamaConfig, args: argparse.Namespace, ceiling: float
) -> dict[str, Any]:
    """All rounds of one geometry; "equal" tells whether they may be reported.

    `ceiling` is the rate of the best matrix product of this machine, GFLOP/s.
    """
    lengths = Lengths.load()
    workload = make_workload(args, config, lengths)
    long_workload = make_workload(args, config, lengths.with_long_captions())
    variants = cpu_rounds.make_variants(config, args.waterfall)
    cpu_rounds.warm_up(variants, workload, args.warmup, args.questions, args.videos)
    measured = cpu_rounds.Measurements()
    out: dict[str, Any] = {
        "shape": asdict(config),
        "workload": workload.description,
        "long_captions": list(lengths.long_caption),
        "rounds": measured.rounds,
        "equal": True,
    }
    peers, checked = make_peers(args, variants[-1], workload)
    out["peer_differences"] = checked
    if peers is not None and not cpu_peers.is_equal(checked):
        return out | {"equal": False}
    for index in range(args.rounds):
        works = {}
        for what, source in zip(TRAINING, (workload, long_workload), strict=True):
            works[what] = source.training(index, args.questions)
        scoring = workload.scoring(index, args.videos)
        result = cpu_rounds.run_round(variants, works, scoring, index)
        worst = cpu_rounds.differences(result, "plain")
        counts = {v.name: cpu_rounds.count(v, works["train"], config) for v in variants}
        measured.add(result, worst, counts, works, scoring)
        cpu_rounds.print_round(name, index, result, worst)
        if not cpu_rounds.is_equal(worst):
            return out | {"equal": False}
        if peers is not None:
            peers.run_round(works, scoring, index)
    out |= {"cpu_seconds": measured.seconds, "real_tokens": measured.real_tokens}
    out["figures"] = metrics(measured, config, args.questions, ceiling)
    if peers is not None:
        fast_seconds = {what: by_name["fast"] for what, by_name in measured.seconds.items()}
        out |= {"peer_seconds": peers.seconds, "peers": peers.ratios(fast_seconds)}
    if args.profile:
        training = workload.training(0, args.questions)
        scoring = workload.scoring(0, args.videos)
        plain, fast = variants[0], variants[-1]
        out["time_split"] = {
            v.name: time_split_of(v, config, training, scoring) for v in (plain, fast)
        }
    return out


def make_peers(
    args: argparse.Namespace, fast: Variant, workload: Workload
) -> tuple[CpuPeers | None, dict[str, Any]]:
    """(the peers, their distances to fast with its gates at 0); or None and why there are none."""
    why = "--no_peers" if args.no_peers else why_no_peers()
    if why:
        log.info(f"peers: not measured: {why}")
        return None, {"not_measured": why}
    assert isinstance(fast, Packed)
    peers = CpuPeers(fast)
    index = cpu_rounds.FIRST_WARMUP
    work = (workload.training(index, args.questions), workload.scoring(index, args.videos))
    checked = peers.differences(*work)
    log.info(f"peers against fast with its gates at 0: {_pairs(checked, '.1e')}")
    return peers, checked


def metrics(
    measured: cpu_rounds.Measurements, config: LlamaConfig, num_questions: int, ceiling: float
) -> dict[str, Any]:
    """Rates by variant. A step needs 4 FLOPs per parameter of the layers and real token."""
    scored = [entry["questions_scored"] for entry in measured.rounds]
    by_variant: dict[str, Any] = {}
    for name, seconds in measured.seconds["train"].items():
        score_seconds = measured.seconds["score"][name]
        real_tokens = ratio_spread(measured.real_tokens["train"], seconds)
        gflops = 4 * layer_parameters(config) * real_tokens["median"] / 1e9
        run_flops = [c.run_flops / 1e9 for c in measured.counts[name]]
        padded = [c.padded_tokens for c in measured.counts[name]]
        targets = [c.target_tokens for c in measured.counts[name]]
        by_variant[name] = {
            "train_seconds": spread(seconds),
            "real_tokens_per_second": real_tokens,
            "padded_tokens_per_second": ratio_spread(padded, seconds),
            "target_tokens_per_second": ratio_spread(targets, seconds),
            "samples_per_second": spread([num_questions / s for s in seconds]),
            "useful_gflops_of_layers": gflops,
            "share_of_measured_ceiling": gflops / ceiling,
            "run_share_of_measured_ceiling": ratio_spread(run_flops, seconds)["median"] / ceiling,
            "score_seconds": spread(score_seconds),
            "questions_per_second": ratio_spread(scored, score_seconds),
        }
    return by_variant


def time_split_of(
    variant: Variant, config: LlamaConfig, training: TrainingWork, scoring: ScoringWork
) -> dict[str, Any]:
    train, train_rows = time_split(lambda: variant.train(training), config, CPU)
    take_gradients(variant.model)
    score, score_rows = time_split(lambda: variant.score(scoring), config, CPU)
    return {"train": train, "score": score, "train_rows": train_rows, "score_rows": score_rows}


def ratios(record: dict[str, Any]) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Plain over fast: medians of the ratios within each round, and their spreads."""
    spreads = {}
    for name, measured in record["geometries"].items():
        for what, seconds in measured["cpu_seconds"].items():
            spreads[f"{what}_{name}"] = ratio_spread(seconds["plain"], seconds["fast"])
    medians = {key: value["median"] for key, value in spreads.items()}
    plain, fast = (record["memory"][variant]["growth_mib"] for variant in ("plain", "fast"))
    medians["peak_memory_wide"] = plain / max(fast, 1e-9)
    return medians, spreads


def peer_ratios(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The best peer over fast, by the keys of "ratios"."""
    found = {}
    for name, measured in record["geometries"].items():
        for what, by_peer in measured.get("peers", {}).items():
            found[f"{what}_{name}"] = cpu_peers.best(by_peer)
    return found

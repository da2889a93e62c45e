"""The `gpu` suite: plain against fast on one GPU in half precision, random weights made there; correctness first, then speed.

It refuses to report where a backend, the toy model or the big model's losses and scores are farther from each other than
rounding explains. With `--tiny --device cpu` everything but the device's events and allocator runs anywhere.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.baseline import correctness
from benchmarks.baseline.variants import (
    MAX_CAP_LEN,
    MAX_SEQ_LEN,
    MODELS,
    Packed,
    Plain,
    make_shared_pair,
    scoring_batches,
    training_batch,
)
from benchmarks.measure import metrics as figures
from benchmarks.measure.clocks import GIB, Clock, device_ceilings, device_peak, ratio_spread, spread
from benchmarks.measure.peak_rates import peak_of
from benchmarks.measure.time_split import time_split
from benchmarks.measure.workload import ScoringWork, SyntheticWorkload, TrainingWork
from benchmarks.report.record import new_record, settings, write
from vico.data.evaluation_batches import EVALUATION_TOKENS
from vico.errors import UserError
from vico.model import config
from vico.model.attention.backends import choose_attention
from vico.model.batch import PackedBatch
from vico.model.block_runners import choose_block_runners
from vico.model.config import LlamaConfig
from vico.model.ops import triton_ops
from vico.train.build import DTYPES
from vico.train.optim import make_optimizer

LIMITS = (MAX_SEQ_LEN, MAX_CAP_LEN)
TASKS = ("vqa", "cap", "both")
# (nominal size, GiB that a process's tensors can have there, whether all layers are recomputed): cards a 7B must fit on.
SMALL_CARDS = (("24 GB", 22.5, False), ("16 GB", 14.9, True))
# Of the two models in half precision on the same samples. Losses are means over hundreds of targets; scores are means over four,
# and the baseline's logits in bf16 stand on a grid of 0.06. The bounds find another computation, not another rounding.
BOUNDS = {"loss_relative": 1e-2, "score_mean_absolute": 0.1}
Result = list[float] | torch.Tensor  # losses, or scores


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=[name for name in MODELS if name != "toy"], default="7B")
    parser.add_argument("--precision", choices=["bf16", "fp16"], default="bf16")
    parser.add_argument("--attention", default="auto", help="of the fast variant")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each variant")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them")
    parser.add_argument(
        "--questions", type=int, default=8, help="of a training step; the published batch"
    )
    parser.add_argument(
        "--videos", type=int, default=4, help="of a scoring step, each with all its questions"
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="what a training step holds"
    )
    parser.add_argument(
        "--budgets",
        nargs="*",
        type=int,
        default=[2048, 4096, 8192, 16384],
        help="tokens of a step, the fast variant alone",
    )
    parser.add_argument(
        "--score_tokens",
        type=int,
        default=EVALUATION_TOKENS,
        help="prompts' tokens per scoring forward of the fast variant",
    )
    parser.add_argument("--num_workers", type=int, default=4, help="data workers of each variant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="a toy model, few steps: tries the harness, its figures mean nothing",
    )


@dataclass(frozen=True)
class Item:
    """What a data worker hands over: the work, and for the fast variant its packed streams."""

    work: TrainingWork | ScoringWork
    batches: tuple[PackedBatch, ...] = ()

    def pin_memory(self) -> "Item":
        return Item(self.work, tuple(batch.pin_memory() for batch in self.batches))


@dataclass(frozen=True)
class WorkItems(Dataset[Item]):
    workload: SyntheticWorkload
    kind: str  # a task, "both", or "score"
    num: int  # questions, or videos
    packed: bool
    score_tokens: int

    def __getitem__(self, place: int) -> Item:
        if self.kind == "score":
            scoring = self.workload.scoring(place, self.num)
            return Item(
                scoring,
                tuple(scoring_batches(scoring, score_tokens=self.score_tokens))
                if self.packed
                else (),
            )
        work = self.workload.training(place, self.num)
        work = (
            replace(work, cap=())
            if self.kind == "vqa"
            else replace(work, vqa=())
            if self.kind == "cap"
            else work
        )
        return Item(work, (training_batch(work),) if self.packed else ())


@dataclass(frozen=True)
class Bench:
    """The models under test, and everything that a measurement of them needs."""

    plain: Plain
    fast: Packed
    optimizer: torch.optim.Optimizer
    shape: LlamaConfig
    workload: SyntheticWorkload
    device: torch.device
    args: argparse.Namespace
    peak_tflops: float | None
    ceiling_tflops: float

    def items(self, kind: str, num: int, packed: bool, count: int) -> Iterator[Item]:
        data = WorkItems(self.workload, kind, num, packed, self.args.score_tokens)
        return iter(
            DataLoader(
                data,
                sampler=range(count),
                batch_size=None,
                num_workers=self.args.num_workers,
                pin_memory=self.device.type == "cuda",
            )
        )

    def run(self, name: str, item: Item) -> Result:
        """One step: forward, backward, update; or the scores of some videos."""
        if isinstance(item.work, ScoringWork):
            return (
                self.plain.score(item.work)
                if name == "plain"
                else self.fast.score_batches(item.batches)
            )
        losses = (
            self.plain.train(item.work)
            if name == "plain"
            else self.fast.train_batch(item.batches[0])
        )
        self.optimizer.step()  # at a rate of 0: all of its work, and the same weights for both variants
        self.optimizer.zero_grad(set_to_none=True)
        return losses

    def amount(self, name: str, item: Item) -> figures.Amount:
        if name == "plain":
            return figures.of_plain(self.shape, item.work, LIMITS)
        training = isinstance(item.work, TrainingWork)
        sequences = (
            len(item.work.vqa) + len(item.work.cap)
            if isinstance(item.work, TrainingWork)
            else 5 * len(item.work.questions)
        )
        asked = (
            (len(item.work.vqa) or len(item.work.cap))
            if isinstance(item.work, TrainingWork)
            else len(item.work.questions)
        )
        return figures.of_packed(self.shape, item.batches, sequences, asked, training)

    def rates(self, seconds: list[float], amounts: list[figures.Amount]) -> dict[str, Any]:
        return figures.rates(seconds, amounts, self.peak_tflops, self.ceiling_tflops)


def compare(bench: Bench, kind: str, num: int) -> dict[str, Any]:
    """Plain and fast in turn on the same samples, a step each; the order turns round from step to step."""
    args, clock = bench.args, Clock(bench.device)
    count = args.warmup + args.steps
    record_sizes(bench, bench.items(kind, num, True, count))
    streams = {name: bench.items(kind, num, name == "fast", count) for name in ("plain", "fast")}
    marks: dict[str, list[tuple[Any, Any]]] = {"plain": [], "fast": []}
    waits: dict[str, list[float]] = {"plain": [], "fast": []}
    amounts: dict[str, list[figures.Amount]] = {"plain": [], "fast": []}
    out: dict[str, Any] = {"rounds": [], "equal": True, "bounds": BOUNDS}
    for place in range(count):
        results: dict[str, Result] = {}
        for name in ("plain", "fast") if place % 2 == 0 else ("fast", "plain"):
            start, asked = clock.now(), time.perf_counter()
            item = next(streams[name])  # waiting for data is part of the step
            waited = time.perf_counter() - asked
            results[name] = bench.run(name, item)
            stop = clock.now()
            if place >= args.warmup:
                marks[name].append((start, stop))
                waits[name].append(waited)
                amounts[name].append(bench.amount(name, item))
        round_ = agreement(results)
        out["rounds"].append(round_)
        say(kind, place - args.warmup, round_)
        if not round_["equal"]:
            return out | {"equal": False}
    seconds = {name: [clock.between(*pair) for pair in pairs] for name, pairs in marks.items()}
    out |= {"seconds": seconds, "data_wait_seconds": waits}
    out["figures"] = {
        n: bench.rates(seconds[n], amounts[n]) | {"data_wait_seconds": spread(waits[n])}
        for n in seconds
    }
    out["ratio"] = ratio_spread(seconds["plain"], seconds["fast"])
    return out


def record_sizes(bench: Bench, items: Iterator[Item]) -> None:
    """Meet every size of these training steps twice: a run records it then, once, and goes on for hours."""
    replayed = bench.fast.model.graphed
    for item in items:
        short = [
            batch
            for batch in item.batches
            if batch.num_rows < config.MAX_GRAPH_ROWS and isinstance(item.work, TrainingWork)
        ]
        for _ in range(2):
            if replayed is not None and not all(
                replayed.is_captured(batch.segments) for batch in short
            ):
                bench.run("fast", item)


def forget_records(bench: Bench) -> None:
    """So that the next step is one that starts its kernels one by one: the profiler then knows them, and the allocator their memory."""
    model = bench.fast.model
    choose_block_runners(model, model.attend, model.num_checkpointed)
    gc.collect()


def agreement(results: dict[str, Result]) -> dict[str, Any]:
    """Both variants' losses, or predictions, and whether they are no farther apart than BOUNDS."""
    plain, fast = results["plain"], results["fast"]
    if isinstance(plain, torch.Tensor) and isinstance(fast, torch.Tensor):
        distance = float((plain.double() - fast.double()).abs().mean())
        predictions = {
            name: scores.argmin(1).tolist() for name, scores in (("plain", plain), ("fast", fast))
        }
        other = sum(a != b for a, b in zip(predictions["plain"], predictions["fast"], strict=True))
        facts = {
            "predictions": predictions,
            "score_mean_absolute": distance,
            "predictions_differ": other,
        }
        return facts | {"equal": distance <= BOUNDS["score_mean_absolute"]}  # nan is not
    pairs = [(float(a), float(b)) for a, b in zip(plain, fast, strict=True)]
    distance = max(abs(a - b) / abs(a) if a != b else 0.0 for a, b in pairs)
    agrees = all(abs(a - b) <= BOUNDS["loss_relative"] * abs(a) for a, b in pairs)
    return {
        "losses": {"plain": [a for a, _ in pairs], "fast": [b for _, b in pairs]},
        "loss_relative": distance,
        "equal": agrees,
    }


def say(kind: str, place: int, round_: dict[str, Any]) -> None:
    name = f"{kind:6s} {'warm-up' if place < 0 else f'step {place + 1}':8s}"
    for variant in ("plain", "fast"):
        if "losses" in round_:
            print(
                f"{name} {variant:6s} vqa, cap "
                + "  ".join(f"{loss:.5f}" for loss in round_["losses"][variant]),
                flush=True,
            )
        else:
            print(
                f"{name} {variant:6s} "
                + "".join("ABCDE"[p] for p in round_["predictions"][variant]),
                flush=True,
            )


def say_figures(key: str, by_variant: dict[str, Any], ratio: dict[str, float]) -> None:
    for name, found in by_variant.items():
        mfu = found["mfu"]["median"] if isinstance(found["mfu"], dict) else None
        share = figures.UNKNOWN if mfu is None else f"{mfu:.1%}"
        print(
            f"{key} {name}: {found['seconds']['median']:.4f} s, {found['real_tokens_per_second']['median']:.0f} real tokens/s, "
            f"{found['questions_per_second']['median']:.1f} questions/s, MFU {share}",
            flush=True,
        )
    print(
        f"{key}: plain over fast {ratio['median']:.2f} ({ratio['p10']:.2f} to {ratio['p90']:.2f})",
        flush=True,
    )


def memory(bench: Bench) -> dict[str, Any]:
    """Of a training step with both tasks and of scoring, for each variant; both share one copy of the weights."""
    found: dict[str, Any] = {}
    for kind, num in (("both", bench.args.questions), ("score", bench.args.videos)):
        for name in ("plain", "fast"):
            forget_records(bench)
            item = WorkItems(bench.workload, kind, num, name == "fast", bench.args.score_tokens)[0]
            key = "train" if kind == "both" else kind
            found.setdefault(key, {})[name] = device_peak(
                partial(bench.run, name, item), bench.device
            )
            if name == "fast" and kind == "both" and bench.device.type == "cuda":
                found[key][name]["reserved_once_recorded_gib"] = _reserved_once_recorded(
                    bench, item
                )
    return found


def _reserved_once_recorded(bench: Bench, item: Item) -> float:
    for _ in range(2):
        bench.run("fast", item)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(bench.device) / GIB


def budgets(bench: Bench) -> dict[str, Any]:
    """The fast variant alone on larger steps, until memory ends."""
    mean = bench.workload.training(0, 64).num_real_tokens / 64
    return {
        str(budget): _until_memory_ends(partial(_alone, bench, max(1, round(budget / mean))))
        for budget in bench.args.budgets
    }


def _until_memory_ends(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    with suppress(torch.cuda.OutOfMemoryError):
        return run()
    gc.collect()  # here, where the error and its frames are gone
    torch.cuda.empty_cache()
    return {"out_of_memory": True}


def _alone(bench: Bench, questions: int) -> dict[str, Any]:
    args, clock = bench.args, Clock(bench.device)
    record_sizes(bench, bench.items("both", questions, True, args.warmup + args.steps))
    stream = bench.items("both", questions, True, args.warmup + args.steps)
    marks, amounts = [], []
    for _ in range(args.warmup + args.steps):
        start = clock.now()
        item = next(stream)
        bench.run("fast", item)
        marks.append((start, clock.now()))
        amounts.append(bench.amount("fast", item))
    seconds = [clock.between(*pair) for pair in marks[args.warmup :]]
    forget_records(bench)  # whose memory the allocator does not count as allocated
    peak = device_peak(lambda: bench.run("fast", item), bench.device)
    rates = bench.rates(seconds, amounts[args.warmup :])
    rate = rates["real_tokens_per_second"]["median"]
    print(
        f"{questions} questions a step: {rate:.0f} real tokens/s, peak {peak['allocated_gib']:.1f} GiB",
        flush=True,
    )
    return {"questions": questions, "seconds": seconds, "figures": rates, "memory": peak}


def small_cards(bench: Bench) -> dict[str, Any]:
    """A training step where the allocator may take no more than a smaller card has, as `vico plan` says it fits."""
    if bench.device.type != "cuda":
        return {}
    found: dict[str, Any] = {}
    item = WorkItems(bench.workload, "both", bench.args.questions, True, bench.args.score_tokens)[0]
    there = torch.cuda.get_device_properties(bench.device).total_memory
    for nominal, allowed, recomputes in SMALL_CARDS:
        if allowed * GIB >= there:
            continue  # this card is the smaller one
        bench.fast.model.num_checkpointed = recomputed = bench.shape.n_layers if recomputes else 0
        forget_records(bench)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(allowed * GIB / there)
        found[nominal] = {
            "allowed_gib": allowed,
            "recomputed_layers": recomputed,
        } | _until_memory_ends(partial(_step_memory, bench, item))
        print(f"a card of {nominal}: {found[nominal]}", flush=True)
    bench.fast.model.num_checkpointed = 0
    torch.cuda.set_per_process_memory_fraction(1.0)
    return found


def _step_memory(bench: Bench, item: Item) -> dict[str, Any]:
    return device_peak(partial(bench.run, "fast", item), bench.device)


def splits(bench: Bench) -> dict[str, Any]:
    """Where the time of a training step and of a scoring step goes."""
    found: dict[str, Any] = {}
    for name in ("plain", "fast"):
        found[name] = {}
        training = [
            ("train" if task == "both" else f"train_{task}", task, bench.args.questions)
            for task in bench.args.tasks
        ]
        for key, kind, num in (*training, ("score", "score", bench.args.videos)):
            item = WorkItems(bench.workload, kind, num, name == "fast", bench.args.score_tokens)[0]
            forget_records(bench)
            found[name][key], found[name][f"{key}_rows"] = time_split(
                partial(bench.run, name, item), bench.shape, bench.device
            )
    return found


def check(args: argparse.Namespace, shape: LlamaConfig, device: torch.device) -> dict[str, Any]:
    """Everything that must hold before any time is taken."""
    dtype = DTYPES[args.precision]
    toy = MODELS["toy"] if args.tiny else LlamaConfig(256, 4, 4, 2000, multiple_of=64)
    heads = toy if args.tiny else replace(shape, n_layers=1)
    found = {
        "attention": correctness.attention_backends(
            heads, device, dtype, repeats=3 if args.tiny else 20
        ),
        "steps": correctness.twenty_steps(toy, device, dtype),
        "distance_to_fp32": correctness.toy_distances(
            toy, device, dtype, videos=1 if args.tiny else 8
        ),
    }
    for name, entry in found["attention"]["backends"].items():
        print(
            f"attention {name:12s} "
            + (
                f"worst distance {entry['worst']:.1e}"
                if entry["runs"]
                else f"not here: {entry['why']}"
            ),
            flush=True,
        )
    print(
        f"20 toy steps {args.precision} on {device.type} against fp32 on the CPU: losses within {found['steps']['worst_relative']:.1e}",
        flush=True,
    )
    for name, means in found["distance_to_fp32"]["means"].items():
        print(
            f"distance to fp32 of {name}: "
            + ", ".join(f"{key} {value:.2e}" for key, value in means.items()),
            flush=True,
        )
    return found


def run(args: argparse.Namespace) -> int:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: there is no GPU here; `--tiny --device cpu` tries the harness"
        )
    if args.tiny:
        args.steps, args.warmup, args.num_workers = min(args.steps, 2), 1, 0
        args.questions, args.videos, args.budgets = min(args.questions, 2), 1, args.budgets[:1]
    device, dtype = torch.device(args.device), DTYPES[args.precision]
    shape = MODELS["toy" if args.tiny else args.model]
    record = new_record("gpu", settings(args)) | {
        "shape": asdict(shape),
        "formulas": figures.FORMULAS,
        "clock": Clock(device).kind,
        "ratios": {},
        "ratio_spreads": {},
    }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = peak_of(name, args.precision)
    record["peak"] = asdict(peak) if peak else figures.UNKNOWN
    record["ceilings"] = device_ceilings(
        device, dtype, 256 if args.tiny else 8192, 16 if args.tiny else 1024
    )
    print(
        f"{name}: peak {record['peak']}; measured {record['ceilings']['matmul_tflops']:.3f} TFLOP/s, {record['ceilings']['product']}",
        flush=True,
    )
    figures.say_formulas()
    record["checks"] = check(args, shape, device)
    record["equal"] = all(found["equal"] for found in record["checks"].values())
    if record["equal"]:
        try:
            measure(
                record,
                _bench(
                    args,
                    shape,
                    device,
                    peak.tflops if peak else None,
                    record["ceilings"]["matmul_tflops"],
                ),
            )
        except torch.cuda.OutOfMemoryError as problem:
            raise UserError(
                f"{name}: its memory ended ({str(problem).split('.')[0]}); choose fewer --questions or --videos"
            ) from None
    if not record["equal"]:
        print(
            "vico: error: the variants do not compute the same (distances above and in the record); nothing to report",
            file=sys.stderr,
        )
        for key in ("training", "scoring"):
            for measured in record.get(key, {}).values():
                for timed in ("seconds", "figures", "ratio", "data_wait_seconds"):
                    measured.pop(timed, None)
    write(record, args.results)
    return 0 if record["equal"] else 1


def _bench(
    args: argparse.Namespace,
    shape: LlamaConfig,
    device: torch.device,
    peak: float | None,
    ceiling: float,
) -> Bench:
    dtype = DTYPES[args.precision]
    plain, fast = make_shared_pair(shape, dtype, device, args.seed)
    attend, why = choose_attention(args.attention, device, dtype)
    graphs = choose_block_runners(fast, attend)
    print(f"fast: {why}, {triton_ops.describe(device)}, {graphs}", flush=True)
    optimizer = make_optimizer([p for p in fast.parameters() if p.requires_grad], weight_decay=0.14)
    pair = Plain(plain, device), Packed(fast, device, score_tokens=args.score_tokens)
    return Bench(
        *pair,
        optimizer,
        shape,
        SyntheticWorkload(shape.vocab_size, seed=args.seed),
        device,
        args,
        peak,
        ceiling,
    )


def measure(record: dict[str, Any], bench: Bench) -> None:
    """All measurements into `record`; ends early where the variants do not agree."""
    args = bench.args
    record |= {"training": {}, "scoring": {}}
    cases = [("training", task, args.questions) for task in args.tasks] + [
        ("scoring", "score", args.videos)
    ]
    for part, kind, num in cases:
        found = record[part][kind] = compare(bench, kind, num)
        if not found["equal"]:
            record |= {"equal": False, "ratios": {}, "ratio_spreads": {}}
            return
        key = kind if kind == "score" else f"train_{kind}"
        record["ratios"][key], record["ratio_spreads"][key] = (
            found["ratio"]["median"],
            found["ratio"],
        )
        say_figures(key, found["figures"], found["ratio"])
    record["memory"] = memory(bench)
    for what, by in record["memory"].items():
        record["ratios"][f"peak_memory_{what}"] = by["plain"]["allocated_gib"] / max(
            by["fast"]["allocated_gib"], 1e-9
        )
    record["budgets"] = budgets(bench)
    record["small_cards"] = small_cards(bench)
    record["time_split"] = splits(bench)
    print(
        "plain over fast: "
        + ", ".join(f"{key} {value:.2f}" for key, value in record["ratios"].items()),
        flush=True,
    )

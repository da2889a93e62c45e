"""The peers of the `gpu` suite: each in turn with fast, on the same samples. Never run on a GPU.

Peers run after everything else, because they hold copies of wq and wk. Flash attention comes from
the flash-attn package; without it, the packed peers are not run.
"""

import gc
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.baseline.models import gates_at_zero
from benchmarks.baseline.peers import LETTERS, HfModel, Peer, PeerKind, PeerScoring, why_no_peers
from benchmarks.measure.clocks import Clock
from benchmarks.measure.spreads import ratio_spread, spread
from benchmarks.suites.gpu_bench import Bench, Item
from benchmarks.suites.gpu_compare import BOUNDS
from benchmarks.suites.gpu_memory import or_out_of_memory
from vico.io import log
from vico.train.optim import make_optimizer

FLASH = "flash_attention_2"
KINDS = (
    PeerKind("HF + PEFT LoRA, padded to the longest, SDPA", "LoRA", "longest"),
    PeerKind("HF + PEFT LoRA, sorted by length, SDPA", "LoRA", "sorted"),
    PeerKind("HF + PEFT LoRA, packed, flash attention", "LoRA", "packed", FLASH),
    PeerKind(
        "HF + PEFT AdaptionPrompt, packed, flash attention", "AdaptionPrompt", "packed", FLASH
    ),
)
SCORING_KIND = KINDS[1]


def peers(bench: Bench) -> dict[str, Any]:
    """By step and peer: the peer's time over that of fast; or {} and why in the log."""
    if why := "--no_peers" if bench.args.no_peers else why_no_peers():
        log.info(f"peers: not measured: {why}")
        return {}
    steps = {}
    for task in bench.args.tasks:
        if task.startswith("both"):
            steps["train_both" if task == "both" else f"train_{task}"] = task
    out: dict[str, Any] = {key: {} for key in steps}
    for kind in KINDS:
        for key, task in steps.items():
            out[key][kind.name] = _run(kind, partial(_train, bench, kind, task))
            log.info(f"{key}: {kind.name}: {_described(out[key][kind.name])}")
    out["score"] = _run(SCORING_KIND, partial(_score, bench))
    if "not_run" in out["score"]:
        out["score"] = {SCORING_KIND.name: out["score"]}
    return out


def best_ratios(by_step: dict[str, Any]) -> dict[str, Any]:
    """The fastest peer of each step that one ran."""
    found = {}
    for key, by_peer in by_step.items():
        ran = {name: result for name, result in by_peer.items() if "median" in result}
        if ran:
            name = min(ran, key=lambda peer: ran[peer]["median"])
            found[key] = {"peer": name, **ran[name]}
    return found


def _described(result: dict[str, Any]) -> str:
    return result.get("not_run") or f"{result['median']:.2f} times as long as fast"


def _run(kind: PeerKind, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it measured, or {"not_run": why}."""
    if kind.attention == FLASH and importlib.util.find_spec("flash_attn") is None:
        return {"not_run": "the flash-attn package is not installed"}
    result = or_out_of_memory(measure)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"not_run": "out of memory"} if "out_of_memory" in result else result


def _train(bench: Bench, kind: PeerKind, task: str) -> dict[str, Any]:
    args = bench.args
    peer = Peer(kind, HfModel(bench.fast.model, kind), bench.device)
    trainables = [p for p in peer.model.parameters() if p.requires_grad]
    optimizer = make_optimizer(trainables, weight_decay=0.14)

    def step(item: Item) -> list[float]:
        losses = peer.train(item.work)  # type: ignore[arg-type]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return losses

    item = bench.dataset(task, args.questions, "fast")[0]
    with gates_at_zero(bench.fast.model):
        pairs = zip(step(item), bench.run("fast", item), strict=True)
    if not all(abs(a - b) <= BOUNDS["loss_relative"] * abs(b) for a, b in pairs):
        return {"not_run": "its losses are not those of fast with its gates at 0"}
    bench.capture_graphs(task, args.questions, args.warmup + args.steps)
    return _in_turn(bench, (task, args.questions), {kind.name: step})[kind.name]


def _score(bench: Bench) -> dict[str, Any]:
    model = HfModel(bench.fast.model, SCORING_KIND)
    ways = PeerScoring(model, bench.device).ways()
    work = ("score", bench.args.videos)
    item = bench.dataset(*work, "fast")[0]
    with gates_at_zero(bench.fast.model):
        exact = torch.as_tensor(bench.run("fast", item))
    runs = {}
    for name, way in ways.items():
        runs[name] = _on_work(way)
        # The letters' logits are one of four tokens' and cannot be compared.
        distance = float((torch.as_tensor(runs[name](item)) - exact).abs().mean())
        if name != LETTERS and not distance <= BOUNDS["score_mean_absolute"]:
            return {"not_run": f"{name}: its scores are not those of fast with its gates at 0"}
    return _in_turn(bench, work, runs)


def _on_work(way: Callable[[Any], torch.Tensor]) -> Callable[[Item], object]:
    return lambda item: way(item.work)


def _in_turn(
    bench: Bench, work: tuple[str, int], runs: dict[str, Callable[[Item], object]]
) -> dict[str, Any]:
    """A step of each of `runs` and of fast in turn: times over that of fast, with the times."""
    args, clock = bench.args, Clock(bench.device)
    everything: dict[str, Callable[[Item], object]] = {**runs, "fast": partial(bench.run, "fast")}
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in everything}
    for index, item in enumerate(bench.items(*work, "fast", args.warmup + args.steps)):
        for name in list(everything)[:: 1 if index % 2 == 0 else -1]:
            start = clock.now()
            everything[name](item)
            if index >= args.warmup:
                marks[name].append((start, clock.now()))
    seconds = {}
    for name, pairs in marks.items():
        seconds[name] = [clock.between(*pair) for pair in pairs]
    ratios = {}
    for name in runs:
        times = {"seconds": spread(seconds[name]), "fast_seconds": spread(seconds["fast"])}
        ratios[name] = ratio_spread(seconds[name], seconds["fast"]) | times
    return ratios

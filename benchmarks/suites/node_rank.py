"""What every rank of the `node` suite does: the real engine and the real train_step on random weights and synthetic samples.

Weights are a function of (seed, name): every rank makes a tensor and keeps its part, so that no stage and no number of ranks
changes them, and nothing is exchanged.
"""

import argparse
import gc
import json
import os
import socket
import zlib
from collections.abc import Iterator
from dataclasses import asdict, astuple, fields
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks.baseline.variants import MODELS, make_fast, random_value
from benchmarks.measure import metrics as figures
from benchmarks.measure.clocks import (
    GIB,
    Clock,
    device_ceilings,
    hardware,
    resident_peak_gib,
    spread,
)
from benchmarks.measure.peak_rates import peak_of
from benchmarks.measure.workload import SyntheticWorkload
from vico.data.batching import Step
from vico.data.bin_packing import greedy_balance
from vico.data.dataloader import loader
from vico.data.packing import Example, pack
from vico.distributed import world as dist
from vico.distributed.world import World
from vico.io.atomic import write_text
from vico.model import config
from vico.model.attention.backends import choose_attention
from vico.model.block_runners import choose_block_runners
from vico.model.config import LlamaConfig
from vico.model.ops import triton_ops
from vico.train.build import DTYPES, why_no_graphs
from vico.train.ds_config import read_config
from vico.train.engine import Engine, zero_init
from vico.train.optim import make_optimizer
from vico.train.step import train_step

TASK_WEIGHTS = (1.0, 0.5)
LR = 0.0  # the update does all of its work, and every case sees the same weights: losses can be compared


class RankSteps(Dataset[Step]):
    """Item (epoch, place): this rank's share of a step whose samples are the same for any number of ranks."""

    def __init__(
        self,
        workload: SyntheticWorkload,
        questions_per_step: int,
        micro_questions: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._workload, self._num, self._micro, self._rank, self._world_size = (
            workload,
            questions_per_step,
            micro_questions,
            rank,
            world_size,
        )

    def __getitem__(self, item: tuple[int, int]) -> Step:
        work = self._workload.training(item[1], self._num)
        sizes = [len(v.tokens) + len(c.tokens) for v, c in zip(work.vqa, work.cap, strict=True)]
        mine = greedy_balance(sizes, self._world_size)[self._rank]
        groups = (
            greedy_balance([sizes[i] for i in mine], -(-len(mine) // self._micro)) if mine else []
        )
        batches = []
        for group in groups:
            places = [mine[i] for i in group]
            examples = [
                Example(s[p], clip, task)
                for task, s in enumerate((work.vqa, work.cap))
                for clip, p in enumerate(places)
            ]
            batches.append(pack(examples, work.features_VFC[places]))
        dummy = (
            pack([Example(work.vqa[0], 0, len(TASK_WEIGHTS))], work.features_VFC[:1])
            if self._world_size > 1
            else None
        )
        counts = sum(
            (torch.bincount(b.target_tasks, minlength=2) for b in batches),
            start=torch.zeros(2, dtype=torch.int64),
        )
        return Step(tuple(batches), dummy, counts, sum(b.num_real_tokens for b in batches))


def measure(args: argparse.Namespace) -> dict[str, Any] | None:
    """All cases on these ranks; what rank 0 returns, the others return None."""
    world = dist.connect()
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    torch.set_num_threads(
        int(os.environ.get("OMP_NUM_THREADS") or max(1, len(os.sched_getaffinity(0)) // local))
    )
    toy = args.sizes == ["toy"]
    dtype = DTYPES[args.precision]
    found: dict[str, Any] = {
        "ranks": world.size,
        "hosts": _hosts(world),
        "hardware": hardware(),
        "clock": Clock(world.device, wall=True).kind,
        "ceilings": device_ceilings(
            world.device, dtype, 256 if toy else 8192, 4 if toy else 1024, 5 if toy else 20
        ),
        "collectives": collectives(world, 4 if toy else 512, 5 if toy else 20),
        "cases": [],
    }
    for size in args.sizes:
        for stage in args.stages:
            for case in _cases(args, world, size, stage, found["ceilings"]["matmul_tflops"]):
                found["cases"].append(case)
                if world.is_main and args.part is not None:
                    write_text(args.part, json.dumps(found))
    main = world.is_main
    dist.disconnect(world)
    return found if main else None


def _hosts(world: World) -> list[str]:
    names: list[str] = [""] * world.size
    torch_dist.all_gather_object(names, socket.gethostname(), group=world.host_group)
    return sorted(set(names))


def _cases(
    args: argparse.Namespace, world: World, size: str, stage: int, ceiling: float
) -> Iterator[dict[str, Any]]:
    """Weak and strong scaling of one size and stage, on one engine."""
    shape, dtype = MODELS[size], DTYPES[args.precision]
    facts: dict[str, Any] = {
        "size": size,
        "stage": stage,
        "ranks": world.size,
        "precision": args.precision,
        "shape": asdict(shape),
    }
    if stage < 3 and world.device.type == "cuda":
        needed = figures.all_parameters(shape) * dtype.itemsize
        there = torch.cuda.get_device_properties(world.device).total_memory
        if needed > 0.92 * there:
            world.print_rank0(
                f"{size} ZeRO-{stage}: not run: {needed / GIB:.0f} GiB of weights on each GPU of {there / GIB:.0f} GiB"
            )
            yield facts | {
                "not_run": f"{needed / GIB:.0f} GiB of weights per GPU, {there / GIB:.0f} GiB of memory"
            }
            return
    engine = make_engine(args, world, shape, stage)
    for kind in args.scaling:
        questions = args.questions * world.size if kind == "weak" else args.strong_questions
        yield (
            facts
            | {"attention": engine.attention, "scaling": kind}
            | _timed(args, world, engine, shape, questions, ceiling)
        )
    del engine
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()


def make_engine(args: argparse.Namespace, world: World, shape: LlamaConfig, stage: int) -> Engine:
    """As vico.assembly.build_engine makes it, but for where the weights come from."""
    dtype = DTYPES[args.precision]
    attend, why = choose_attention(args.attention, world.device, dtype)
    config = read_config(f"zero{stage}", args.precision, args.questions, 1, world.size)
    with zero_init(config, world.device):
        model = make_fast(shape, dtype)
    fill_random(model, args.seed, world)
    graphs = choose_block_runners(model, attend, no_graphs=why_no_graphs(config))
    why += f", {triton_ops.describe(world.device)}, {graphs}"
    optimizer = make_optimizer(
        [p for p in model.parameters() if p.requires_grad], weight_decay=0.14
    )
    return Engine(model, optimizer, config, dtype, why)


def fill_random(model: nn.Module, seed: int, world: World) -> None:
    """Under stage 3 a parameter is in parts, one per rank, laid out one after the other: each rank fills its own."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator(world.device).manual_seed(
                zlib.crc32(f"{seed} {name}".encode())
            )
            value = random_value(name, getattr(parameter, "ds_shape", parameter.shape), generator)
            if hasattr(parameter, "ds_id"):
                part: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
                mine = value.flatten()[world.rank * part.numel() :][: part.numel()]
                part[: len(mine)].copy_(mine)
            else:
                parameter.copy_(value)


def _timed(
    args: argparse.Namespace,
    world: World,
    engine: Engine,
    shape: LlamaConfig,
    questions: int,
    ceiling: float,
) -> dict[str, Any]:
    steps = RankSteps(
        SyntheticWorkload(shape.vocab_size, seed=args.seed),
        questions,
        args.questions,
        world.rank,
        world.size,
    )
    schedule = [(0, place) for place in range(args.warmup + args.steps)]
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    _record_sizes(world, engine, steps, schedule)
    clock, marks, amounts, losses = Clock(world.device, wall=True), [], [], []
    num_micro_batches = 0
    stream = iter(loader(steps, schedule, args.num_workers, world.device.type == "cuda"))  # type: ignore[arg-type]
    for place in range(len(schedule)):
        start = clock.now()
        step = next(stream)  # waiting for data is part of the step
        report = train_step(engine, step, place + 1, TASK_WEIGHTS, LR, world)
        marks.append((start, clock.now()))
        losses.append(report.task_losses())
        samples = sum(len(b.target_sequences.unique()) for b in step.micro_batches)
        amounts.append(
            figures.of_packed(shape, step.micro_batches, samples, samples // 2, training=True)
        )
        num_micro_batches = max(num_micro_batches, len(step.micro_batches))
    mine = torch.tensor(
        [clock.between(*pair) for pair in marks[args.warmup :]], dtype=torch.float64
    )
    seconds = world.gather(mine).amax(dim=0).tolist()
    totals = world.sum(
        torch.tensor([astuple(a) for a in amounts[args.warmup :]], dtype=torch.float64)
    ).tolist()
    everyone = [figures.Amount(*row) for row in totals]
    peak = (
        peak_of(torch.cuda.get_device_name(world.device), args.precision)
        if world.device.type == "cuda"
        else None
    )
    case: dict[str, Any] = {
        "questions_per_step": questions,
        "micro_batches": num_micro_batches,
        "losses": losses,
        "seconds": seconds,
        "work": [
            dict(zip((f.name for f in fields(figures.Amount)), row, strict=True)) for row in totals
        ],
        "figures": figures.rates(
            seconds, everyone, peak.tflops if peak else None, ceiling, world.size
        ),
        "memory": _memory(world),
        "communication": communication(shape, engine, world.size, num_micro_batches),
    }
    speed, held = (
        case["figures"]["real_tokens_per_second"]["median"],
        case["memory"]["allocated_gib"],
    )
    loss = ", ".join(f"{value:.5f}" for value in losses[0])
    world.print_rank0(
        f"ZeRO-{engine.stage} {questions} questions a step: {speed:.1f} real tokens/s, {held:.2f} GiB at most; first losses vqa, cap {loss}"
    )
    return case


def _record_sizes(
    world: World, engine: Engine, steps: RankSteps, schedule: list[tuple[int, int]]
) -> None:
    """Where short micro-batches are replayed, meet each size twice: a run records it then, once, and goes on for hours."""
    replayed = engine.module.graphed
    short = replayed is not None and any(
        batch.num_rows < config.MAX_GRAPH_ROWS for batch in steps[schedule[0]].micro_batches
    )
    if world.gather(torch.tensor(short)).any():  # all ranks step together
        for number, item in enumerate(schedule * 2):
            train_step(engine, steps[item], number + 1, TASK_WEIGHTS, LR, world)


def _memory(world: World) -> dict[str, Any]:
    """Of the rank that holds most."""
    if world.device.type != "cuda":
        held = world.gather(torch.tensor([resident_peak_gib()]))
        return {
            "allocated_gib": float(held.max()),
            "reserved_gib": figures.UNKNOWN,
            "of": "resident memory of a whole process, since its start",
        }
    peaks = [
        torch.cuda.max_memory_allocated(world.device),
        torch.cuda.max_memory_reserved(world.device),
    ]
    allocated, reserved = (
        world.gather(torch.tensor(peaks, dtype=torch.float64)).amax(dim=0) / GIB
    ).tolist()
    return {"allocated_gib": allocated, "reserved_gib": reserved, "of": "the device, in all steps"}


def communication(
    shape: LlamaConfig, engine: Engine, ranks: int, micro_batches: int
) -> dict[str, Any]:
    """Bytes that each rank receives per step. Computed, not measured."""
    fp32_bytes, weight_bytes = (
        4,
        next(p for p in engine.module.parameters() if not p.requires_grad).element_size(),
    )
    trainables = sum(getattr(p, "ds_numel", p.numel()) for p in engine.trainables.values())
    others = (ranks - 1) / ranks
    gradients = others * fp32_bytes * trainables * micro_batches
    head = shape.vocab_size * shape.dim
    if engine.stage < 3:
        parameters, rule = (
            others * fp32_bytes * trainables,
            "each micro-batch's gradients reduced to their owners, then the updated trainables gathered once",
        )
    else:
        once = 2 * (figures.layer_parameters(shape) + head) + head
        parameters = others * micro_batches * (weight_bytes * once + 2 * fp32_bytes * trainables)
        rule = "per micro-batch: layers, head and trainables gathered in forward and backward, embeddings in forward, gradients reduced to owners"
    return {
        "bytes_per_step": gradients + parameters,
        "gradients": gradients,
        "parameters": parameters,
        "computed_as": f"(n-1)/n of: {rule}",
    }


def collectives(world: World, mib: int, repeats: int) -> dict[str, Any]:
    """What the links between the ranks carry at best: bus bandwidth of an all-gather and an all-reduce of `mib` MiB."""
    if world.size == 1:
        return {
            "all_gather_gb_per_second": figures.UNKNOWN,
            "all_reduce_gb_per_second": figures.UNKNOWN,
        }
    clock, size = Clock(world.device, wall=True), mib * 2**18 // world.size * world.size
    whole = torch.ones(size, device=world.device)
    part = whole[: size // world.size].clone()
    found: dict[str, Any] = {
        "mib": mib,
        "formula": "bus bandwidth: (n-1)/n of the bytes per second for all-gather, 2 (n-1)/n for all-reduce",
    }
    runs = {
        "all_gather": (1, lambda: torch_dist.all_gather_into_tensor(whole, part)),
        "all_reduce": (2, lambda: torch_dist.all_reduce(whole, op=torch_dist.ReduceOp.MAX)),
    }
    for name, (passes, run) in runs.items():
        times = []
        for i in range(repeats + 2):
            world.barrier()
            seconds = clock.time(run)
            if i >= 2:
                times.append(seconds)
        slowest = world.gather(torch.tensor(times, dtype=torch.float64)).amax(dim=0).tolist()
        found[f"{name}_seconds"] = spread(slowest)
        found[f"{name}_gb_per_second"] = (
            passes
            * (world.size - 1)
            / world.size
            * size
            * 4
            / found[f"{name}_seconds"]["median"]
            / 1e9
        )
    return found

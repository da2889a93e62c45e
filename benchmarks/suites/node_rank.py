"""What every rank of the `node` suite does: the real engine and `train_step`, synthetic samples.

Weights are random, a function of the seed and the parameter's name. Every rank makes each tensor
and keeps its part. So neither the stage nor the number of ranks changes them, and nothing is sent.
"""

import argparse
import gc
import json
import os
import socket
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, astuple
from typing import Any, NoReturn

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from benchmarks.baseline.models import MODELS, make_fast, random_value
from benchmarks.measure.ceilings import SUSTAINED_SECONDS, device_ceilings
from benchmarks.measure.clocks import Clock
from benchmarks.measure.hardware import hardware
from benchmarks.measure.memory import resident_peak_gib
from benchmarks.measure.metrics import WorkCounts, count_packed, rates
from benchmarks.measure.peak_rates import peak_rate
from benchmarks.measure.spreads import UNKNOWN
from benchmarks.measure.workload import SyntheticWorkload
from benchmarks.suites.node import OUT_OF_MEMORY
from benchmarks.suites.node_plan import CasePlan, out_of_memory, plan_case, small
from benchmarks.suites.node_profile import communication_time, over_ranks
from benchmarks.suites.node_steps import TASK_WEIGHTS, RankSteps
from benchmarks.suites.node_traffic import collectives, communication
from vico.data.batching import Step
from vico.data.dataloader import loader
from vico.distributed import world as dist
from vico.distributed.world import World
from vico.errors import UserError
from vico.io import log
from vico.io.atomic import write_text
from vico.model.attention.backends import choose_attention
from vico.model.block_runners import choose_block_runners
from vico.model.config import MAX_GRAPH_ROWS, LlamaConfig
from vico.model.ops import triton_ops
from vico.planner.gpu_specs import GIB
from vico.train.backbone import DTYPES
from vico.train.build import why_no_graphs
from vico.train.ds_config import read_config
from vico.train.engine import Engine, zero_init
from vico.train.optim import make_optimizer
from vico.train.step import train_step

# The update does all of its work, and all cases keep the same weights: losses can be compared.
LR = 0.0
# As published: 16 questions of each rank, in two micro-batches.
RECIPE_QUESTIONS, RECIPE_PIECES = 16, 2
# Share of a GPU's memory that the frozen weights may take.
MAX_WEIGHT_SHARE = 0.92

Case = dict[str, Any]
Schedule = list[tuple[int, int]]  # (epoch, index) of each step


def measure(args: argparse.Namespace) -> dict[str, Any] | None:
    """All cases on these ranks: the result on rank 0, None on the others."""
    world = dist.connect()
    _set_num_threads()
    size, copy_mib, collective_mib, repeats = (256, 4, 4, 5) if args.tiny else (8192, 1024, 512, 20)
    dtype = DTYPES[args.precision]
    ceilings = device_ceilings(
        world.device, dtype, size, copy_mib, repeats, 0 if args.tiny else SUSTAINED_SECONDS
    )
    result: dict[str, Any] = {
        "ranks": world.size,
        "hosts": _hosts(world),
        "hardware": hardware(),
        "clock": Clock(world.device, wall=True).kind,
        "ceilings": ceilings,
        "collectives": collectives(world, collective_mib, repeats),
        "cases": [],
    }
    for name in args.sizes:
        for stage in args.stages:
            for case in _cases(args, world, name, stage, ceilings["matmul_tflops"]):
                result["cases"].append(case)
                if world.is_main and args.part is not None:
                    write_text(args.part, json.dumps(result))
    is_main = world.is_main
    dist.disconnect(world)
    return result if is_main else None


def _set_num_threads() -> None:
    """As many as OMP_NUM_THREADS says, or this rank's share of the machine's cores."""
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    share = max(1, len(os.sched_getaffinity(0)) // local_size)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or share))


def _hosts(world: World) -> list[str]:
    names: list[str] = [""] * world.size
    torch_dist.all_gather_object(names, socket.gethostname(), group=world.host_group)
    return sorted(set(names))


def _cases(
    args: argparse.Namespace, world: World, size: str, stage: int, ceiling: float
) -> Iterator[Case]:
    """Weak and strong scaling of one size and stage, on one engine."""
    config = small(MODELS[size]) if args.tiny and size != "toy" else MODELS[size]
    facts: Case = {
        "size": size,
        "stage": stage,
        "ranks": world.size,
        "precision": args.precision,
        "shape": asdict(config),
    }
    if stage < 3 and world.device.type == "cuda":
        weights = config.num_parameters * DTYPES[args.precision].itemsize
        total = torch.cuda.get_device_properties(world.device).total_memory
        if weights > MAX_WEIGHT_SHARE * total:
            weights_gib, total_gib = f"{weights / GIB:.0f} GiB", f"{total / GIB:.0f} GiB"
            world.print_rank0(
                f"{size} ZeRO-{stage}: not run: {weights_gib} of weights on each GPU of {total_gib}"
            )
            yield facts | {"not_run": f"{weights_gib} of weights per GPU, {total_gib} of memory"}
            return
    plan = plan_case(args, world, size, config, stage)
    facts["predicted"] = plan.predicted
    if plan.questions < 1:
        world.print_rank0(f"{size} ZeRO-{stage}: not run: the planner says no question fits")
        yield facts | {"not_run": "the planner says no question fits"}
        return
    kind = args.scaling[0]
    try:
        engine = make_engine(args, world, config, stage, plan.questions)
        for kind in args.scaling:
            work = _case_work(kind, args, world.size, plan)
            timed = _time_steps(args, world, engine, config, work, ceiling)
            yield facts | {"attention": engine.attention, "scaling": kind} | timed
        del engine
    except torch.cuda.OutOfMemoryError as error:
        facts |= {"scaling": kind, "not_run": f"out of memory: {out_of_memory(error)}"}
        world.set_phase("out of memory")
        if world.size > 1:
            _end_out_of_memory(args, facts)
        log.info(f"{size} ZeRO-{stage} {kind}: {facts['not_run']}")
        yield facts
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()


def _case_work(kind: str, args: argparse.Namespace, ranks: int, plan: CasePlan) -> tuple[int, int]:
    """(questions of all ranks' step, questions of a micro-batch)."""
    if kind == "recipe":
        fitting = plan.questions if plan.predicted else RECIPE_QUESTIONS
        return RECIPE_QUESTIONS * ranks, min(RECIPE_QUESTIONS // RECIPE_PIECES, fitting)
    num = args.strong_questions if kind == "strong" else plan.questions * ranks
    return num, plan.questions


def _end_out_of_memory(args: argparse.Namespace, facts: Case) -> NoReturn:
    """Leave the case's row for the process that started the ranks, and end them all.

    The other ranks wait for this one in a collective.
    """
    if args.part is not None:
        write_text(args.part.with_suffix(OUT_OF_MEMORY), json.dumps(facts))
    raise UserError(f"{facts['size']} ZeRO-{facts['stage']}: {facts['not_run']}; fewer --questions")


def make_engine(
    args: argparse.Namespace, world: World, config: LlamaConfig, stage: int, questions: int
) -> Engine:
    """As vico.train.build.build_engine does, but with random weights."""
    dtype = DTYPES[args.precision]
    attend, reason = choose_attention(args.attention, world.device, dtype)
    ds_config = read_config(f"zero{stage}", args.precision, questions, 1, world.size)
    with zero_init(ds_config, world.device):
        model = make_fast(config, dtype)
    set_random_weights(model, args.seed, world)
    graphs = choose_block_runners(model, attend, no_graphs=why_no_graphs(ds_config))
    description = f"{reason}, {triton_ops.describe(world.device)}, {graphs}"
    trainables = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(trainables, weight_decay=0.14)
    return Engine(model, optimizer, ds_config, dtype, description)


@torch.no_grad()
def set_random_weights(model: nn.Module, seed: int, world: World) -> None:
    """Under stage 3 the ranks hold consecutive parts of a flat parameter; each sets its own."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator(world.device)
        generator.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        value = random_value(name, getattr(parameter, "ds_shape", parameter.shape), generator)
        if not hasattr(parameter, "ds_id"):
            parameter.copy_(value)
            continue
        part: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        mine = value.flatten()[world.rank * part.numel() :][: part.numel()]
        part[: len(mine)].copy_(mine)


def _time_steps(
    args: argparse.Namespace,
    world: World,
    engine: Engine,
    config: LlamaConfig,
    work: tuple[int, int],
    ceiling: float,
) -> Case:
    """Timed steps of all ranks; a step takes as long as on its slowest rank.

    `work`: the questions of all ranks' step, and those of a micro-batch.
    """
    num_questions, questions = work
    workload = SyntheticWorkload(config.vocab_size, seed=args.seed)
    steps = RankSteps(workload, num_questions, questions, world.rank, world.size)
    schedule = [(0, index) for index in range(args.warmup + args.steps)]
    on_gpu = world.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(world.device)
    _capture_graphs(world, engine, steps, schedule)
    clock, marks, counts, losses = Clock(world.device, wall=True), [], [], []
    waits = []
    num_micro_batches = 0
    stream = iter(loader(steps, schedule, args.num_workers, on_gpu))  # type: ignore[arg-type]
    for number in range(1, len(schedule) + 1):
        start = clock.now()
        # Waiting for data is part of the step.
        wait_start = time.perf_counter()
        step = next(stream)
        waits.append(time.perf_counter() - wait_start)
        report = train_step(engine, step, number, TASK_WEIGHTS, LR, world)
        marks.append((start, clock.now()))
        losses.append(report.task_losses())
        counts.append(_count(config, step))
        num_micro_batches = max(num_micro_batches, len(step.micro_batches))
    own_seconds = [clock.between(*pair) for pair in marks[args.warmup :]]
    seconds = world.gather(torch.tensor(own_seconds, dtype=torch.float64)).amax(dim=0).tolist()
    total_counts = _sum_counts(world, counts[args.warmup :])
    peak_tflops = _peak_tflops(world, args.precision)
    tokens = [int(count.real_tokens) for count in counts[args.warmup :]]
    by_rank = over_ranks(world, own_seconds, waits[args.warmup :], tokens)
    profiled = communication_time(
        lambda: train_step(engine, step, len(schedule) + 1, TASK_WEIGHTS, LR, world), world
    )
    case: Case = {
        "questions_per_step": num_questions,
        "questions_per_micro_batch": questions,
        "by_rank": by_rank,
        "communication_time": profiled,
        "micro_batches": num_micro_batches,
        "losses": losses,
        "seconds": seconds,
        "work": [asdict(total) for total in total_counts],
        "figures": rates(seconds, total_counts, peak_tflops, ceiling, world.size),
        "memory": _memory(world),
        "communication": communication(config, engine, world.size, num_micro_batches),
    }
    _print_case(world, engine.stage, case)
    return case


def _capture_graphs(world: World, engine: Engine, steps: RankSteps, schedule: Schedule) -> None:
    """Where short micro-batches are replayed, runs each size twice, which captures it.

    A training run captures once and replays for hours.
    """
    is_short = [b.num_rows < MAX_GRAPH_ROWS for b in steps[schedule[0]].micro_batches]
    replays = engine.module.graphed is not None and any(is_short)
    # All ranks step together, so one is enough.
    if world.gather(torch.tensor(replays)).any():
        for number, item in enumerate(schedule * 2, start=1):
            train_step(engine, steps[item], number, TASK_WEIGHTS, LR, world)


def _count(config: LlamaConfig, step: Step) -> WorkCounts:
    num_sequences = sum(len(b.target_sequences.unique()) for b in step.micro_batches)
    num_questions = num_sequences // 2
    return count_packed(config, step.micro_batches, num_sequences, num_questions, training=True)


def _sum_counts(world: World, counts: list[WorkCounts]) -> list[WorkCounts]:
    """Each step's counts, summed over the ranks."""
    rows = torch.tensor([astuple(c) for c in counts], dtype=torch.float64)
    return [WorkCounts(*row) for row in world.sum(rows).tolist()]


def _peak_tflops(world: World, precision: str) -> float | None:
    if world.device.type != "cuda":
        return None
    peak = peak_rate(torch.cuda.get_device_name(world.device), precision)
    return peak.tflops if peak else None


def _memory(world: World) -> dict[str, Any]:
    """Of the rank with the highest peak."""
    if world.device.type != "cuda":
        resident = world.gather(torch.tensor([resident_peak_gib()]))
        return {
            "allocated_gib": float(resident.max()),
            "reserved_gib": UNKNOWN,
            "of": "resident memory of a whole process, since its start",
        }
    allocated = torch.cuda.max_memory_allocated(world.device)
    reserved = torch.cuda.max_memory_reserved(world.device)
    peaks = world.gather(torch.tensor([allocated, reserved], dtype=torch.float64)).amax(dim=0)
    allocated_gib, reserved_gib = (peaks / GIB).tolist()
    return {
        "allocated_gib": allocated_gib,
        "reserved_gib": reserved_gib,
        "of": "the device, in all steps",
    }


def _print_case(world: World, stage: int, case: Case) -> None:
    speed = case["figures"]["real_tokens_per_second"]["median"]
    losses = ", ".join(f"{loss:.5f}" for loss in case["losses"][0])
    world.print_rank0(
        f"ZeRO-{stage} {case['questions_per_step']} questions a step: {speed:.1f} real tokens/s, "
        f"{case['memory']['allocated_gib']:.2f} GiB at most; first losses vqa, cap {losses}"
    )

"""What every rank of the `node` suite does: the real engine and `train_step`, synthetic samples."""

import argparse
import gc
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as torch_dist

from benchmarks.baseline.models import MODELS
from benchmarks.measure.ceilings import SUSTAINED_SECONDS, device_ceilings
from benchmarks.measure.clocks import Clock
from benchmarks.measure.hardware import hardware, watched_gpus
from benchmarks.measure.lengths import Lengths
from benchmarks.measure.memory import resident_peak_gib
from benchmarks.measure.metrics import WorkCounts, count_packed, rates
from benchmarks.measure.peak_rates import peak_rate
from benchmarks.measure.spreads import UNKNOWN
from benchmarks.measure.workload import SyntheticWorkload
from benchmarks.suites.node.communication_time import communication_time, over_ranks, overlap
from benchmarks.suites.node.engine import make_engine
from benchmarks.suites.node.plan import CasePlan, out_of_memory, plan_case, small, too_large
from benchmarks.suites.node.recipe import Start, besides_steps, process_seconds, seconds_of, slowest
from benchmarks.suites.node.steps import TASK_WEIGHTS, RankSteps
from benchmarks.suites.node.suite import KEPT, LONG, OUT_OF_MEMORY, RECIPE, STRONG, WEAK
from benchmarks.suites.node.traffic import collectives, communication
from vico.data.batching import Step
from vico.data.dataloader import loader
from vico.distributed import world as dist
from vico.distributed.cores import host_cores
from vico.distributed.world import World
from vico.errors import UserError
from vico.io import log
from vico.io.atomic import write_text
from vico.model.config import MAX_GRAPH_ROWS, LlamaConfig
from vico.planner.gpu_specs import GIB
from vico.train.backbone import DTYPES
from vico.train.engine import Engine
from vico.train.step import train_step

# The update does all of its work, and all cases keep the same weights: losses can be compared.
LR = 0.0
# As published: 16 questions of each rank, in two micro-batches.
RECIPE_QUESTIONS, RECIPE_PIECES = 16, 2
SCORED_VIDEOS = 16  # of each rank, with all their questions
NOTHING_FITS = "the planner says no question fits"

Case = dict[str, Any]
Schedule = list[tuple[int, int]]  # (epoch, index) of each step


def measure(args: argparse.Namespace) -> dict[str, Any] | None:
    """All cases on these ranks: the result on rank 0, None on the others."""
    start: Start = {"imports_seconds": process_seconds()}
    begun = time.perf_counter()
    world = dist.connect()
    start["connect_seconds"] = slowest(world, time.perf_counter() - begun)
    start["imports_seconds"] = slowest(world, start["imports_seconds"])
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
            for case in _cases(args, world, name, stage, ceilings["matmul_tflops"], start):
                result["cases"].append(case)
                if world.is_main and args.part is not None:
                    write_text(args.part, json.dumps(result))
    is_main = world.is_main
    dist.disconnect(world)
    return result if is_main else None


def _set_num_threads() -> None:
    """As many as OMP_NUM_THREADS says, or this rank's share of the machine's cores."""
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    share = max(1, host_cores() // local_size)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or share))


def _hosts(world: World) -> list[str]:
    names: list[str] = [""] * world.size
    torch_dist.all_gather_object(names, socket.gethostname(), group=world.host_group)
    return sorted(set(names))


@dataclass(frozen=True)
class _Setting:
    """The cases of one size and stage."""

    args: argparse.Namespace
    world: World
    config: LlamaConfig
    stage: int
    ceiling: float
    workloads: dict[str, SyntheticWorkload]  # by kind; others are as WEAK
    plans: dict[str, CasePlan]  # as well
    facts: Case  # of all cases; "scaling": the kind that runs

    def of_kind(self, kind: str) -> tuple[SyntheticWorkload, CasePlan]:
        name = kind if kind in self.workloads else WEAK
        return self.workloads[name], self.plans[name]


def _cases(
    args: argparse.Namespace,
    world: World,
    size: str,
    stage: int,
    ceiling: float,
    start: Start | None = None,
) -> Iterator[Case]:
    """All kinds of one size and stage. `start`: seconds of what came before."""
    config = small(MODELS[size]) if args.tiny and size != "toy" else MODELS[size]
    facts: Case = {
        "size": size,
        "stage": stage,
        "ranks": world.size,
        "precision": args.precision,
        "shape": asdict(config),
    }
    if refusal := too_large(args, world, config, stage):
        world.print_rank0(f"{size} ZeRO-{stage}: not run: {refusal}")
        yield facts | {"not_run": refusal}
        return
    lengths = Lengths.load()
    plans, workloads = {}, {}
    for kind, used in ((WEAK, lengths), (LONG, lengths.with_long_captions())):
        workloads[kind] = SyntheticWorkload(config.vocab_size, seed=args.seed, lengths=used)
        plans[kind] = plan_case(args, world, size, config, stage, workloads[kind])
    facts["predicted"] = plans[WEAK].predicted
    if plans[WEAK].questions < 1:
        world.print_rank0(f"{size} ZeRO-{stage}: not run: {NOTHING_FITS}")
        yield facts | {"not_run": NOTHING_FITS}
        return
    try:
        setting = _Setting(args, world, config, stage, ceiling, workloads, plans, facts)
        yield from _run_kinds(setting, start or {})
    except torch.cuda.OutOfMemoryError as error:
        facts["not_run"] = f"out of memory: {out_of_memory(error)}"
        world.set_phase("out of memory")
        if world.size > 1:
            _end_out_of_memory(args, facts)
        log.info(f"{size} ZeRO-{stage} {facts['scaling']}: {facts['not_run']}")
        yield facts
    free_memory(world)


def free_memory(world: World) -> None:
    """Engines have cycles, and torch keeps what is freed."""
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()


def _run_kinds(setting: _Setting, start: Start) -> Iterator[Case]:
    """On one engine, but KEPT on one of its own."""
    args, world, facts = setting.args, setting.world, setting.facts
    facts["scaling"] = args.scaling[0]
    engine, start = _start(setting, start)
    weak: Case = {}
    for kind in args.scaling:
        if kind == KEPT:
            continue
        workload, plan = setting.of_kind(kind)
        facts |= {"scaling": kind, "predicted": plan.predicted}
        if plan.questions < 1:
            yield facts | {"not_run": NOTHING_FITS}
            continue
        work = _case_work(kind, args, world.size, plan)
        timed = time_steps(args, world, engine, setting.config, work, setting.ceiling, workload)
        if kind == RECIPE:
            videos = 1 if args.tiny else SCORED_VIDEOS
            besides = besides_steps(world, engine, workload, videos, args.warmup + args.steps)
            timed["run"] = start | besides
            world.print_rank0(f"besides steps: {json.dumps(timed['run'])}")
        weak = timed if kind == WEAK else weak
        yield facts | {"attention": engine.attention} | timed
    del engine
    if KEPT in args.scaling and setting.stage == 3 and world.size > 1:
        free_memory(world)
        yield _kept_case(setting, weak)


def _start(setting: _Setting, before: Start) -> tuple[Engine, Start]:
    """The engine after its first step, and how long that took on the slowest rank."""
    args, world, config = setting.args, setting.world, setting.config
    workload, plan = setting.of_kind(WEAK)
    begun = time.perf_counter()
    engine = make_engine(args, world, config, setting.stage, plan.questions, plan.in_nodes)
    engine_seconds = slowest(world, time.perf_counter() - begun)
    steps = RankSteps(workload, *_case_work(WEAK, args, world.size, plan), world.rank, world.size)
    step = steps[0, 0]
    first = seconds_of(world, lambda: train_step(engine, step, 1, TASK_WEIGHTS, LR, world))
    return engine, {**before, "engine_seconds": engine_seconds, "first_step_seconds": first}


def _kept_case(setting: _Setting, weak: Case) -> Case:
    """The steps of `weak`, with all frozen weights on each rank: what the gathers cost."""
    args, world, config = setting.args, setting.world, setting.config
    workload, plan = setting.of_kind(WEAK)
    facts = setting.facts
    facts |= {"scaling": KEPT, "predicted": {}}
    if not plan.keeps_fit:
        return facts | {"not_run": "all weights on each GPU do not fit"}
    engine = make_engine(args, world, config, setting.stage, plan.questions, keeps_weights=True)
    work = _case_work(WEAK, args, world.size, plan)
    timed = time_steps(args, world, engine, config, work, setting.ceiling, workload)
    return facts | {"attention": engine.attention, "overlap": overlap(weak, timed)} | timed


def _case_work(kind: str, args: argparse.Namespace, ranks: int, plan: CasePlan) -> tuple[int, int]:
    """(questions of all ranks' step, questions of a micro-batch)."""
    if kind == RECIPE:
        fitting = plan.questions if plan.predicted else RECIPE_QUESTIONS
        return RECIPE_QUESTIONS * ranks, min(RECIPE_QUESTIONS // RECIPE_PIECES, fitting)
    num = args.strong_questions if kind == STRONG else plan.questions * ranks
    return num, plan.questions


def _end_out_of_memory(args: argparse.Namespace, facts: Case) -> NoReturn:
    """Leave the case's row for the process that started the ranks, and end them all.

    The other ranks wait for this one in a collective.
    """
    if args.part is not None:
        write_text(args.part.with_suffix(OUT_OF_MEMORY), json.dumps(facts))
    raise UserError(f"{facts['size']} ZeRO-{facts['stage']}: {facts['not_run']}; fewer --questions")


def time_steps(
    args: argparse.Namespace,
    world: World,
    engine: Engine,
    config: LlamaConfig,
    work: tuple[int, int],
    ceiling: float,
    workload: SyntheticWorkload,
) -> Case:
    """Timed steps of all ranks; a step takes as long as on its slowest rank.

    `work`: the questions of all ranks' step, and those of a micro-batch.
    """
    num_questions, questions = work
    steps = RankSteps(workload, num_questions, questions, world.rank, world.size)
    schedule = [(0, index) for index in range(args.warmup + args.steps)]
    free_memory(world)  # what earlier cases reserved is not of this one
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    _capture_graphs(world, engine, steps, schedule)
    with watched_gpus(world.is_main) as watched:
        ran = _run_steps(args, world, engine, steps, schedule)
    own_seconds, counts = ran.seconds[args.warmup :], []
    for step in ran.steps[args.warmup :]:
        counts.append(_count(config, step))
    seconds = world.gather(torch.tensor(own_seconds, dtype=torch.float64)).amax(dim=0).tolist()
    total_counts = _sum_counts(world, counts)
    peak_tflops = _peak_tflops(world, args.precision)
    tokens = [int(count.real_tokens) for count in counts]
    num_micro_batches = max(len(step.micro_batches) for step in ran.steps)
    last, number = ran.steps[-1], len(schedule) + 1
    case: Case = {
        "questions_per_step": num_questions,
        "questions_per_micro_batch": questions,
        "captions": list(workload.caption_tokens),
        "by_rank": over_ranks(world, own_seconds, ran.waits[args.warmup :], tokens),
        "communication_time": communication_time(
            lambda: train_step(engine, last, number, TASK_WEIGHTS, LR, world), world
        ),
        **watched,
        "micro_batches": num_micro_batches,
        "losses": ran.losses,
        "seconds": seconds,
        "work": [asdict(total) for total in total_counts],
        "figures": rates(seconds, total_counts, peak_tflops, ceiling, world.size),
        "memory": _memory(world),
        "communication": communication(config, engine, world.size, num_micro_batches),
    }
    _print_case(world, engine.stage, case)
    return case


class _Ran(NamedTuple):
    """Of each step of this rank, warm-up included."""

    steps: list[Step]
    losses: list[list[float | None]]
    seconds: list[float]
    waits: list[float]  # for its data; part of the seconds


def _run_steps(
    args: argparse.Namespace,
    world: World,
    engine: Engine,
    steps: RankSteps,
    schedule: Schedule,
) -> _Ran:
    clock, marks = Clock(world.device, wall=True), []
    ran = _Ran([], [], [], [])
    pin = world.device.type == "cuda"
    stream = iter(loader(steps, schedule, args.num_workers, pin))  # type: ignore[arg-type]
    for number in range(1, len(schedule) + 1):
        start = clock.now()
        wait_start = time.perf_counter()
        step = next(stream)
        ran.waits.append(time.perf_counter() - wait_start)
        report = train_step(engine, step, number, TASK_WEIGHTS, LR, world)
        marks.append((start, clock.now()))
        ran.losses.append(report.task_losses())
        ran.steps.append(step)
    ran.seconds.extend(clock.between(*pair) for pair in marks)
    return ran


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

"""The `one_of_eight` suite: what one GPU can show of eight.

One rank runs alone under torch's "fake" process group, in which every exchange ends at once: a
gather gives this rank's own part in place of the others'. Memory, DeepSpeed's hooks, copies of what
was gathered and products are those of a rank of N. No communication takes time and losses mean
nothing.
"""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from benchmarks.baseline.models import MODELS
from benchmarks.measure.ceilings import device_ceilings
from benchmarks.measure.metrics import FORMULAS
from benchmarks.measure.workload import SyntheticWorkload
from benchmarks.report.record import new_record, settings, write_record
from benchmarks.suites.node.engine import make_engine
from benchmarks.suites.node.plan import out_of_memory, plan_case, small
from benchmarks.suites.node.rank import NOTHING_FITS, free_memory, time_steps
from benchmarks.suites.node.suite import ALONE, LOSS_BOUNDS
from vico.distributed.topology import Member
from vico.distributed.world import World, choose_device, prepare_deepspeed
from vico.errors import UserError
from vico.io import log
from vico.train.backbone import DTYPES

LIMITS = (
    "one rank of several, alone: no communication takes time, and losses mean nothing; tokens/s "
    "are those of all ranks, if each were as fast"
)


@dataclass(frozen=True)
class LoneWorld(World):
    """This rank and others that have the same values, as far as exchanges show."""

    def sum(self, values: Tensor) -> Tensor:
        return values.mul_(self.size)

    def gather(self, values: Tensor) -> Tensor:
        return torch.stack([values] * self.size)

    def gather_objects(self, value: Any) -> list[Any]:
        return [value] * self.size

    def max(self, value: int) -> int:
        return value

    def barrier(self) -> None:
        return


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ranks", type=int, default=8, help="of which one runs")
    add("--sizes", nargs="+", choices=list(MODELS), default=["33B", "65B"])
    add("--stage", type=int, choices=[2, 3], default=3, help="ZeRO stage")
    add("--questions", type=int, help="of a micro-batch; default: as the node suite")
    add("--precision", choices=sorted(LOSS_BOUNDS), default="bf16")
    add("--attention", default="auto")
    add("--steps", type=int, default=10, help="timed steps")
    add("--warmup", type=int, default=3, help="steps before them")
    add("--num_workers", type=int, default=2, help="data workers")
    add("--seed", type=int, default=0)
    add("--tiny", action="store_true", help="these sizes in small and few steps")


def run(args: argparse.Namespace) -> int:
    if args.ranks < 2:
        raise UserError(f"--ranks {args.ranks}: must be 2 or more, of which one runs")
    if args.tiny:
        args.steps, args.warmup, args.num_workers = min(args.steps, 2), 1, 0
    record = new_record("one_of_eight", settings(args)) | {"formulas": FORMULAS, "limits": LIMITS}
    with _alone(args.ranks) as world:
        dtype, size = DTYPES[args.precision], 256 if args.tiny else 8192
        ceilings = record["ceilings"] = device_ceilings(world.device, dtype, size, 16)
        ceiling = ceilings["matmul_tflops"]
        record["cases"] = [_case(args, world, name, ceiling) for name in args.sizes]
    record["equal"] = True  # there is nothing to compare with
    log.info(LIMITS)
    write_record(record, args.results)
    return 0


@contextmanager
def _alone(num_ranks: int) -> Iterator[LoneWorld]:
    """Rank 0 of a fake group."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    device = choose_device()
    prepare_deepspeed(device)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it
    import deepspeed

    torch_dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False, verbose=False)
    own = Member.of_this_process(0, device)
    members = tuple(replace(own, rank=rank, local_size=num_ranks) for rank in range(num_ranks))
    try:
        yield LoneWorld(0, num_ranks, device, None, members=members)
    finally:
        deepspeed.comm.destroy_process_group()


def _case(args: argparse.Namespace, world: World, size: str, ceiling: float) -> dict[str, Any]:
    free_memory(world)
    config = small(MODELS[size]) if args.tiny and size != "toy" else MODELS[size]
    workload = SyntheticWorkload(config.vocab_size, seed=args.seed)
    plan = plan_case(args, world, size, config, args.stage, workload)
    facts = {
        "size": size,
        "stage": args.stage,
        "ranks": world.size,
        "scaling": ALONE,
        "precision": args.precision,
        "shape": asdict(config),
        "predicted": plan.predicted,
    }
    if plan.questions < 1:
        return facts | {"not_run": NOTHING_FITS}
    work = (plan.questions * world.size, plan.questions)
    try:
        engine = make_engine(args, world, config, args.stage, plan.questions)
        timed = time_steps(args, world, engine, config, work, ceiling, workload)
    except torch.cuda.OutOfMemoryError as error:
        return facts | {"not_run": f"out of memory: {out_of_memory(error)}"}
    return facts | {"attention": engine.attention} | timed

"""What a run does besides its steps, timed once: it starts, scores, saves and resumes."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks.baseline.variants import scoring_batches
from benchmarks.measure.workload import SyntheticWorkload
from vico.checkpoint.format import TrainState
from vico.checkpoint.read import read
from vico.checkpoint.write import RunIdentity, save
from vico.data.evaluation_batches import share_of
from vico.distributed.world import World
from vico.train.engine import Engine

SCORING_REPEATS = 3
Start = dict[str, float]


def process_seconds() -> float:
    """Since this process was started, its imports included."""
    return time.time() - psutil.Process().create_time()


def slowest(world: World, seconds: float) -> float:
    """Of the ranks' values. A collective."""
    return float(world.gather(torch.tensor(seconds, dtype=torch.float64)).max())


def seconds_of(world: World, run: Callable[[], object]) -> float:
    """Wall time of one call that begins on all ranks together, of the slowest. A collective."""
    world.barrier()
    start = time.perf_counter()
    run()
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return slowest(world, time.perf_counter() - start)


def besides_steps(
    world: World, engine: Engine, workload: SyntheticWorkload, videos: int, updates: int
) -> dict[str, Any]:
    """Seconds to save and to resume, and questions scored per second. A collective.

    `videos`: of each rank, all their questions are scored. `updates`: that Adam has seen.
    """
    return {
        "scoring": _scoring(world, engine, workload, videos),
        **_save_and_resume(world, engine, updates),
    }


def _scoring(
    world: World, engine: Engine, workload: SyntheticWorkload, videos: int
) -> dict[str, Any]:
    """As an evaluation does, of batches that are packed already."""
    work = workload.scoring(0, videos * world.size)
    batches = scoring_batches(work)
    chunks = share_of([[batch] for batch in batches], world.rank, world.size)
    losses: list[Tensor] = []

    def score() -> None:
        losses.clear()
        for chunk in chunks:
            # All ranks run as many forwards; ZeRO-3 gathers in each.
            batch = chunk[0] if chunk else batches[0]
            losses.append(engine.forward(batch.to(world.device)))
        torch.cat(losses).cpu()

    engine.train(False)
    with torch.no_grad():
        score()
        seconds = [seconds_of(world, score) for _ in range(SCORING_REPEATS)]
    return {
        "questions": len(work.questions),
        "seconds": seconds,
        "questions_per_second": len(work.questions) / statistics.median(seconds),
    }


def _save_and_resume(world: World, engine: Engine, updates: int) -> dict[str, Any]:
    """A save as training makes it; then rank 0 reads and checks it, and Adam's moments are set.

    Weights are loaded when the engine is made: that is part of the start.
    """
    weights, moments = engine.state()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "checkpoint"

        def write() -> None:
            weights, moments = engine.state()
            engine.require_live(weights)
            if world.is_main:
                state = TrainState(updates, num_updates=updates)
                save(target, weights, moments, state, RunIdentity("", {}, {}))
            world.barrier()

        def resume() -> None:
            if world.is_main:
                found = read(target)
                assert found.moments is not None and found.weights.keys() == weights.keys()
                moments.update(found.moments)
            engine.set_moments(moments, updates)
            world.barrier()

        save_seconds, resume_seconds = seconds_of(world, write), seconds_of(world, resume)
        num_bytes = sum(path.stat().st_size for path in target.glob("*")) if world.is_main else 0
    after, after_moments = engine.state()
    equal = _are_equal(after, weights) and _are_equal(after_moments, moments)
    return {
        "save_seconds": save_seconds,
        "resume_seconds": resume_seconds,
        "checkpoint_bytes": num_bytes,
        "equal": equal,
    }


def _are_equal(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return all(torch.equal(some[name], other) for name, other in others.items())

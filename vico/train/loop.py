"""Training, from the settings to the last checkpoint. One optimizer step is `train_step`; everything it does is named there."""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vico.checkpoint import fingerprint, published, restart_limit, write
from vico.checkpoint import read as checkpoints
from vico.checkpoint.format import Checkpoint, TrainState
from vico.data.batching import TrainingSteps
from vico.data.dataloader import loader, start_forkserver
from vico.distributed import signals
from vico.distributed.world import World
from vico.errors import DiskError, InUseError
from vico.io import output_dir as lock
from vico.io.atomic import make_folder, repair_folder, write_bytes, write_json
from vico.io.failpoints import reached
from vico.model.vico import initial_trainables
from vico.train.build import Inputs, build_engine, read_inputs
from vico.train.config import RunConfig
from vico.train.engine import Engine
from vico.train.evaluate import Evaluation, evaluate, report
from vico.train.optim import learning_rate, peak_learning_rate
from vico.train.progress_bar import ProgressBar
from vico.train.rank_consistency import require_same_files
from vico.train.resume import find_start, read_args, run_of, start_progress, with_empty_sums
from vico.train.run_log import RunLog, gaps, memory_curves, read_logs
from vico.train.step import StepReport, train_step


def train(config: RunConfig, world: World) -> None:
    """Train, or go on training, in config.output_dir; with --resume and --init_eval only evaluate.

    Raises Stopped when a signal has asked for it; what was trained is saved then.
    """
    evaluation_split = config.split if config.init_eval else "val"
    only_evaluate = config.init_eval and config.resume is not None
    with world.raise_together():
        if world.is_main and not only_evaluate and os.path.exists(config.output_dir / "args.json"):
            _take_over(config.output_dir)
    require_same_files(world, config)
    world.set_phase("reading the inputs")
    if config.num_workers:
        start_forkserver()
    with world.raise_together():
        found = find_start(config)
        start = found.checkpoint
        splits = (
            (evaluation_split,)
            if only_evaluate
            else tuple(dict.fromkeys(("train", "val", evaluation_split)))
        )
        inputs = read_inputs(config, splits, world)
        reached("inputs")
        if start is not None:
            start = checkpoints.validate_for_model(
                start, inputs.trainable_shapes, inputs.weights.config.n_layers
            )
    if world.is_main:
        inputs.cache.flush()
    for note in (*found.notes, *inputs.notes, *(start.notes if start else ())):
        world.print_rank0(note)
    place = (
        None if only_evaluate else _find_position(config, world, inputs, start)
    )  # before minutes are spent on loading the weights
    trainables = (
        start.weights
        if start
        else initial_trainables(inputs.trainable_shapes, config.bias, config.seed)
    )
    engine = build_engine(config, inputs, trainables, world)
    if config.init_eval and (only_evaluate or start is None):
        report(
            evaluate(engine, inputs, evaluation_split, config, world),
            evaluation_split,
            config,
            world,
        )
    if place is not None:
        _train(config, world, inputs, engine, found.run, start, *place)


def _take_over(output_dir: Path) -> None:
    """Nobody else writes here from now on, and what a killed run left half-written is gone before checkpoints are looked for."""
    if note := lock.take(output_dir):
        print(note, flush=True)
    if mended := repair_folder(output_dir):
        print(f"{output_dir}: a run was killed while it wrote; {', '.join(mended)}", flush=True)


def _find_position(
    config: RunConfig, world: World, inputs: Inputs, start: Checkpoint | None
) -> tuple[TrainingSteps, dict[str, str], TrainState]:
    """The steps of this run, the fingerprints of what it is trained on, and where it stands."""
    steps = TrainingSteps(
        inputs.questions["train"],
        inputs.captions,
        inputs.features,
        inputs.prompts,
        num_slots=config.max_feats,
        tasks=config.tasks,
        micro_batch_size=config.batch_size,
        accumulation=config.accum_iter,
        rank=world.rank,
        world_size=world.size,
        seed=config.seed,
        shuffle=not config.no_shuffle,
        crop=config.caption_crop == "sentence",
        max_tokens=config.max_tokens,
    )
    world.set_phase("taking fingerprints of backbone and data")
    with world.raise_together():
        # Rank 0's are enough: that the hosts have the same files is known. It alone writes checkpoints, too.
        prints = (
            fingerprint.of_run(
                inputs.weights, inputs.questions, inputs.captions, inputs.features, inputs.cache
            )
            if world.is_main
            else {}
        )
        progress = start_progress(
            start, steps.steps_per_epoch, steps.questions_per_step, config, prints
        )
    if world.is_main:
        inputs.cache.flush()
    return steps, prints, progress


def _train(
    config: RunConfig,
    world: World,
    inputs: Inputs,
    engine: Engine,
    run_id: str,
    start: Checkpoint | None,
    steps: TrainingSteps,
    prints: dict[str, str],
    progress: TrainState,
) -> None:
    if start is not None and start.moments is not None:
        engine.set_moments(start.moments, progress.num_updates)
    last_step = min(
        config.epochs * steps.steps_per_epoch,
        config.max_steps or config.epochs * steps.steps_per_epoch,
    )
    if progress.step >= last_step and not progress.evaluation_due:
        world.print_rank0(
            f"{config.output_dir}: this run is complete at step {progress.step} of {last_step}; nothing to train"
        )
        return
    peak_lr = peak_learning_rate(config.lr, config.blr, steps.questions_per_step)
    with world.raise_together():
        log = _open_log(config, world, run_id, progress, steps, peak_lr)
    run = _Run(
        config, world, inputs, engine, run_id, prints, log, progress, steps.steps_per_epoch, peak_lr
    )
    where = f"{world.size} rank(s) on {world.device.type}, {inputs.stage}, {config.precision}, {engine.attention}"
    world.print_rank0(
        f"training steps {progress.step + 1} to {last_step}, {steps.steps_per_epoch} per epoch, {steps.questions_per_step} questions each; {where}"
    )
    try:
        _run_steps(run, steps, last_step)
    except signals.Stopped as stop:
        _save(run, progress)
        if world.is_main:
            restart_limit.clear(config.output_dir)
        name, place = (
            signal.Signals(stop.number).name,
            config.output_dir / f"checkpoint-{progress.step}",
        )
        raise signals.Stopped(
            stop.number, f"stopped by {name}; saved {place}; the same command goes on there"
        ) from None
    except DiskError:
        if world.is_main:
            restart_limit.clear(config.output_dir)  # with more space the same command does not fail
        raise
    if log is not None:
        log.close()
        restart_limit.clear(config.output_dir)
    world.print_rank0(
        f"done: {config.output_dir}; curves: tensorboard --logdir {config.output_dir / 'runs'}"
    )


@dataclass(frozen=True)
class _Run:
    """What stays the same through a run, and where it stands."""

    config: RunConfig
    world: World
    inputs: Inputs
    engine: Engine
    id: str
    fingerprints: dict[str, str]
    log: RunLog | None  # of the main rank
    progress: TrainState
    steps_per_epoch: int
    peak_lr: float

    def lr(self, step: int) -> float:
        c = self.config
        return learning_rate(
            step, self.steps_per_epoch, self.peak_lr, c.min_lr, c.warmup_epochs, c.epochs
        )


def _run_steps(run: _Run, steps: TrainingSteps, last_step: int) -> None:
    config, world, progress = run.config, run.world, run.progress
    if (
        progress.evaluation_due
    ):  # the run was stopped between an epoch's last step and the end of its evaluation
        _end_epoch(run)
    schedule = [divmod(k, steps.steps_per_epoch) for k in range(progress.step, last_step)]
    if schedule:
        _dry_run(run, steps)
        world.set_phase(f"waiting for the data of step {progress.step + 1}")
    with ProgressBar("training", last_step, "step", world.is_main, done=progress.step) as bar:
        step_start = time.perf_counter()
        for (epoch, place), batch in zip(
            schedule,
            loader(steps, schedule, config.num_workers, world.device.type == "cuda"),
            strict=True,
        ):
            lr = run.lr(progress.step)
            number = progress.step + 1
            report = train_step(
                run.engine,
                batch,
                number,
                config.task_weights,
                lr,
                world,
                run.log.error if run.log else None,
            )
            seconds, step_start = (
                time.perf_counter() - step_start,
                time.perf_counter(),
            )  # waiting for data included
            _advance(progress, report)
            world.set_phase(f"waiting for the data of step {number + 1}")
            loss = _log_step(run.log, config, progress.step, epoch, report, lr, seconds)
            bar.advance(f"epoch {epoch}  loss {loss:.4f}  lr {lr:.2e}  {seconds:.2f} s/step")
            progress.evaluation_due = (
                place + 1 == steps.steps_per_epoch or progress.step == last_step
            )
            if report.stop_signal:
                raise signals.Stopped(report.stop_signal, "stopped between two steps")
            if progress.evaluation_due:
                _end_epoch(run)
                step_start = time.perf_counter()
            elif config.save_steps and progress.step % config.save_steps == 0:
                _save(run, progress)


def _dry_run(run: _Run, steps: TrainingSteps) -> None:
    """Before the first step, the longest micro-batch that any can bring: what does not fit ends in minute one and not in hour ten."""
    world = run.world
    with world.raise_together():
        batch, num_questions = steps.longest()
    what = f"the longest micro-batch ({num_questions} questions, {batch.num_real_tokens:,} tokens)"
    world.set_phase(f"trying {what}")
    began = time.perf_counter()
    reached("rehearsal")
    run.engine.train(True)
    run.engine.dry_run(batch.to(world.device))
    where, peak = list(memory_curves(world.device).items())[-1]
    world.print_rank0(
        f"{what} fits: {time.perf_counter() - began:.1f} s, {where.split('/')[1].replace('_', ' ').removesuffix(' gib')} {peak:.1f} GiB"
    )


def _advance(progress: TrainState, report: StepReport) -> None:
    progress.step += 1
    progress.num_updates += 1
    progress.epoch_loss_sums = [
        a + b for a, b in zip(progress.epoch_loss_sums, report.loss_sums, strict=True)
    ]
    progress.epoch_target_counts = [
        a + b for a, b in zip(progress.epoch_target_counts, report.target_counts, strict=True)
    ]


def _open_log(
    config: RunConfig,
    world: World,
    run_id: str,
    progress: TrainState,
    steps: TrainingSteps,
    peak_lr: float,
) -> RunLog | None:
    if not world.is_main:
        return None
    make_folder(config.output_dir)
    _take_over(config.output_dir)
    saved = (
        read_args(config.output_dir / "args.json")
        if os.path.exists(config.output_dir / "args.json")
        else None
    )
    if saved is not None and run_of(saved) != run_id:
        raise InUseError(
            f"{config.output_dir}: another run began and wrote here while this one was starting; choose another --output_dir"
        )
    found = read_logs(config.output_dir)
    restart_limit.record_start(config.output_dir, config.to_json(), found.last_step)
    if config.resume is None and saved is not None:  # what this run started from stays known
        resumed = saved.get("resume")
        config = replace(config, resume=None if resumed is None else Path(resumed))
    if saved is not None:
        where = progress.step, progress.evaluation_due, steps.steps_per_epoch
        for line in gaps(config.output_dir, found, *where, from_start=config.resume is None):
            print(f"note: {line}", flush=True)
    facts = {
        "world_size": world.size,
        "steps_per_epoch": steps.steps_per_epoch,
        "peak_lr": peak_lr,
        "run": run_id,
    }
    write_json(config.output_dir / "args.json", {**config.to_json(), **facts})
    log = RunLog(config.output_dir, found, progress.step, progress.evaluation_due)
    again = f" ({log.num_dropped} step(s) to redo)" if log.num_dropped else ""
    if progress.step:
        print(f"resuming from step {progress.step}{again}", flush=True)
    elif again:
        print(
            f"no checkpoint had been saved yet: starting at step 1 again{again}; --save_steps saves more often",
            flush=True,
        )
    return log


def _total_loss(config: RunConfig, losses: list[float | None]) -> float:
    return sum(
        w * loss for w, loss in zip(config.task_weights, losses, strict=True) if loss is not None
    )


def _log_step(
    log: RunLog | None,
    config: RunConfig,
    step: int,
    epoch: int,
    report: StepReport,
    lr: float,
    seconds: float,
) -> float:
    """Write the step's line; returns its loss."""
    losses = report.task_losses()
    total = _total_loss(config, losses)
    if log is not None:
        by_task = {
            "vqa_loss": None,
            "cap_loss": None,
            **{f"{task}_loss": loss for task, loss in zip(config.tasks, losses, strict=True)},
        }
        counted = {
            f"{task}_targets": n for task, n in zip(config.tasks, report.target_counts, strict=True)
        }
        targets = {"vqa_targets": 0, "cap_targets": 0, **counted}
        sizes = {**targets, "real_tokens": report.num_real_tokens, "step_seconds": seconds}
        log.step(
            {
                "step": step,
                "epoch": epoch,
                "loss": total,
                **by_task,
                "lr": lr,
                "grad_norm": report.grad_norm,
                **sizes,
            },
            {
                **{f"train/{name}": value for name, value in by_task.items() if value is not None},
                **{"train/loss": total, "train/lr": lr, "train/grad_norm": report.grad_norm},
                **{
                    "perf/step_seconds": seconds,
                    "perf/real_tokens_per_second": report.num_real_tokens / seconds,
                },
            },
        )
    return total


def _end_epoch(run: _Run) -> None:
    """Validate, log the epoch, save the checkpoint and, when it is the best so far, the best checkpoint."""
    config, world, progress = run.config, run.world, run.progress
    start = time.perf_counter()
    evaluation = evaluate(run.engine, run.inputs, "val", config, world)
    eval_seconds = time.perf_counter() - start
    losses = [
        s / n if n else None
        for s, n in zip(progress.epoch_loss_sums, progress.epoch_target_counts, strict=True)
    ]
    accuracy = evaluation.accuracies["acc"]
    improved = progress.best_accuracy is None or accuracy > progress.best_accuracy
    after = replace(
        progress,
        best_accuracy=accuracy if improved else progress.best_accuracy,
        evaluation_due=False,
    )
    if progress.step % run.steps_per_epoch == 0:
        after = with_empty_sums(after, config)

    def write_epoch(weights: dict[str, Tensor]) -> None:
        epoch, lr = (progress.step - 1) // run.steps_per_epoch, run.lr(progress.step - 1)
        record = _log_epoch(
            run.log,
            config,
            world,
            progress.step,
            epoch,
            lr,
            losses,
            evaluation,
            weights,
            eval_seconds,
        )
        evaluation.write(config.output_dir, "val")
        print(
            f"epoch {epoch}: {json.dumps({k: v for k, v in record.items() if k != 'epoch'})}",
            flush=True,
        )

    _save(run, after, best=improved, first=write_epoch)
    vars(progress).update(vars(after))


def _save(
    run: _Run,
    progress: TrainState,
    best: bool = False,
    first: Callable[[dict[str, Tensor]], None] | None = None,
) -> None:
    """Write the checkpoint of this step, on the main rank, after what comes `first`. A collective of all ranks."""
    run.world.set_phase(f"saving step {progress.step}")
    start = time.perf_counter()
    weights, moments = run.engine.state()
    output_dir, keep = run.config.output_dir, run.config.save_total_limit
    with run.world.raise_together():
        if not run.world.is_main:
            return
        if first is not None:
            begun = time.perf_counter()
            first(weights)
            start += time.perf_counter() - begun
        if best:  # before the other one, which already says that this accuracy is the best
            if run.config.save_legacy:
                write_bytes(
                    output_dir / published.BEST_FILE,
                    published.to_bytes(weights, run.config.to_json()),
                )
            write.save(
                output_dir / "checkpoint_best",
                weights,
                moments,
                progress,
                run.config,
                run.fingerprints,
                run.id,
            )
        write.save_step(
            output_dir, keep, weights, moments, progress, run.config, run.fingerprints, run.id
        )
        if run.log is not None:
            run.log.saved(progress.step, time.perf_counter() - start)


def _log_epoch(
    log: RunLog | None,
    config: RunConfig,
    world: World,
    step: int,
    epoch: int,
    lr: float,
    losses: list[float | None],
    evaluation: Evaluation,
    weights: dict[str, Tensor],
    eval_seconds: float,
) -> dict[str, Any]:
    assert log is not None
    by_task = {f"train_{task}_loss": loss for task, loss in zip(config.tasks, losses, strict=True)}
    train = {
        "train_loss": _total_loss(config, losses),
        "train_vqa_loss": None,
        "train_cap_loss": None,
        **by_task,
    }
    record = {
        **train,
        "train_lr": lr,
        "epoch": epoch,
        "step": step,
        **{f"val_{k}": v for k, v in evaluation.results().items()},
    }
    gates = {f"gates/{n.replace('.attention', '')}": v for n, v in weights.items() if "gate" in n}
    curves = {
        **{f"eval/{name}": value for name, value in evaluation.accuracies.items()},
        **{
            name: float((value.tanh() if name.endswith("gate1") else value).mean())
            for name, value in gates.items()
        },
        **{"perf/eval_questions_per_second": len(evaluation.questions) / eval_seconds},
        **memory_curves(world.device),
    }
    log.epoch(record, curves)
    return record

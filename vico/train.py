"""Training, from the settings to the last checkpoint. One optimizer step is `train_step`; everything it does is named there."""

import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vico import checkpoint as checkpoints
from vico.assembly import Inputs, build_engine, read_inputs
from vico.checkpoint import Checkpoint, Progress
from vico.config import RunConfig, differences
from vico.data.batches import Step, TrainingSteps, loader
from vico.dist import World
from vico.engine import Engine
from vico.errors import TrainingFault, UserError
from vico.evaluate import Evaluation, evaluate, report
from vico.files import make_folder, mend_folders, write_json
from vico.meters import Progress as ProgressBar
from vico.meters import RunLog, memory_curves
from vico.model.vico import initial_trainables
from vico.optim import learning_rate, peak_learning_rate
from vico.records import PackedBatch
from vico.textfiles import read_json_object


@dataclass(frozen=True)
class StepReport:
    """Of one optimizer step, over all ranks and micro-batches."""

    loss_sums: list[float]  # per task
    target_counts: list[int]  # per task
    grad_norm: float
    num_real_tokens: int

    def task_losses(self) -> list[float | None]:
        return [s / n if n else None for s, n in zip(self.loss_sums, self.target_counts, strict=True)]


def train(config: RunConfig, world: World) -> None:
    """Train, or go on training, in config.output_dir; with --resume and --init_eval only evaluate."""
    with world.agreeing():
        start = find_start(config)
        evaluation_split = config.split if config.init_eval else "val"
        only_evaluate = config.init_eval and config.resume is not None
        splits = (evaluation_split,) if only_evaluate else tuple(dict.fromkeys(("train", "val", evaluation_split)))
        inputs = read_inputs(config, splits, world)
        if start is not None:
            start = checkpoints.fitted(start, inputs.trainable_shapes, inputs.weights.shape.n_layers)
    for note in (*inputs.notes, *(start.notes if start else ())):
        world.say(note)
    trainables = start.weights if start else initial_trainables(inputs.trainable_shapes, config.bias, config.seed)
    engine = build_engine(config, inputs, trainables, world)
    if config.init_eval and (only_evaluate or start is None):
        report(evaluate(engine, inputs, evaluation_split, config, world), evaluation_split, config, world)
    if not only_evaluate:
        _train(config, world, inputs, engine, start)


def find_start(config: RunConfig) -> Checkpoint | None:
    """The checkpoint to start from: of this very run where output_dir holds one, else --resume, else none.

    Raises UserError when output_dir belongs to a run with other settings.
    """
    if config.init_eval and config.resume is not None:
        return checkpoints.read(config.resume)
    output_dir = config.output_dir
    named = config.resume
    if not os.path.exists(output_dir / "args.json"):
        refuse_foreign(output_dir)
    else:
        saved = _read_args(output_dir / "args.json")
        if changed := differences(saved, config):
            raise UserError(f"{output_dir}: holds a run with other settings ({'; '.join(changed)}); choose another --output_dir")
        own = checkpoints.newest(output_dir)
        if own is not None:
            if named not in (None, own) and str(named) != saved.get("resume"):
                raise UserError(
                    f"{output_dir}: holds a run that stands at {own.name} and did not start from --resume {named}; leave --resume out to go on "
                    "there, or choose another --output_dir"
                )
            named = own
    return None if named is None else checkpoints.read(named)


def refuse_foreign(output_dir: Path) -> None:
    """A folder without args.json may hold predictions, but no run: a lineage's log.txt would be rewritten, a checkpoint replaced."""
    names = ("log.txt", "steps.jsonl", "checkpoint_best")
    found = next((output_dir / name for name in names if os.path.lexists(output_dir / name)), None) or checkpoints.newest(output_dir)
    if found is not None:
        raise UserError(f"{found}: is of another program or run (there is no args.json beside it); choose another --output_dir")


def _read_args(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path, "args.json")
    except UserError as error:
        raise UserError(f"{error}, or choose another --output_dir: it cannot be told whose run this folder holds") from None


def _train(config: RunConfig, world: World, inputs: Inputs, engine: Engine, start: Checkpoint | None) -> None:
    steps = TrainingSteps(
        inputs.questions["train"], inputs.captions, inputs.features, inputs.prompts, num_slots=config.max_feats, tasks=config.tasks,
        micro_batch_size=config.batch_size, accumulation=config.accum_iter, rank=world.rank, world_size=world.size, seed=config.seed,
        shuffle=not config.no_shuffle, crop=config.caption_crop == "sentence", max_tokens=config.max_tokens,
    )  # fmt: skip
    progress = _start_progress(start, steps, config)
    if start is not None and start.moments is not None:
        engine.set_moments(start.moments, progress.num_updates)
    last_step = min(config.epochs * steps.steps_per_epoch, config.max_steps or config.epochs * steps.steps_per_epoch)
    if progress.step >= last_step:
        world.say(f"{config.output_dir}: this run is complete at step {progress.step} of {last_step}; nothing to train")
        return
    peak_lr = peak_learning_rate(config.lr, config.blr, steps.questions_per_step)
    with world.agreeing():
        log = _open_log(config, world, progress, steps, peak_lr)
    where = f"{world.size} rank(s) on {world.device.type}, ZeRO-{engine.stage}, {config.precision}, {engine.attention}"
    world.say(
        f"training steps {progress.step + 1} to {last_step}, {steps.steps_per_epoch} per epoch, {steps.questions_per_step} questions each; {where}"
    )

    schedule = [divmod(k, steps.steps_per_epoch) for k in range(progress.step, last_step)]
    with ProgressBar("training", last_step, "step", world.is_main, done=progress.step) as bar:
        step_start = time.perf_counter()
        for (epoch, place), batch in zip(schedule, loader(steps, schedule, config.num_workers, world.device.type == "cuda"), strict=True):
            lr = learning_rate(progress.step, steps.steps_per_epoch, peak_lr, config.min_lr, config.warmup_epochs, config.epochs)
            report = train_step(engine, batch, config.task_weights, lr, world, log.error if log else None)
            seconds, step_start = time.perf_counter() - step_start, time.perf_counter()  # waiting for data included
            _advance(progress, report)
            loss = _log_step(log, config, progress.step, epoch, report, lr, seconds)
            bar.advance(f"epoch {epoch}  loss {loss:.4f}  lr {lr:.2e}  {seconds:.2f} s/step")
            if place + 1 == steps.steps_per_epoch or progress.step == last_step:
                _end_epoch(config, world, inputs, engine, log, progress, epoch, lr, finished=place + 1 == steps.steps_per_epoch)
                step_start = time.perf_counter()
    if log is not None:
        log.close()
    world.say(f"done: {config.output_dir}; curves: tensorboard --logdir {config.output_dir / 'runs'}")


def train_step(
    engine: Engine, step: Step, task_weights: tuple[float, ...], lr: float, world: World, error: UserError | None = None
) -> StepReport:
    """One optimizer step: agree on the targets of all ranks, then forward and backward each micro-batch, then update.

    The loss is the weighted sum over tasks of the mean over the task's targets in the whole step (METHOD section 3), so
    each micro-batch adds its sum of losses divided by the step's count.
    """
    error = step.error or error
    numbers = torch.tensor([len(step.micro_batches), step.num_real_tokens, error is not None])
    totals = world.gather(torch.cat([step.target_counts, numbers]))
    if totals[:, -1].any():
        with world.agreeing():
            if error is not None:
                raise error
    counts, num_micro_batches = totals[:, :-3].sum(dim=0), int(totals[:, -3].max())
    weights = torch.tensor(task_weights, dtype=torch.float64) / counts.clamp(min=1)
    weights = weights.to(world.device, torch.float32, non_blocking=True)
    engine.train(True)
    loss_sums = torch.zeros(len(counts), dtype=torch.float64, device=world.device)
    for i in range(num_micro_batches):
        micro_batch = step.micro_batches[i] if i < len(step.micro_batches) else step.dummy
        assert micro_batch is not None
        micro_batch = micro_batch.to(world.device)
        losses = engine.forward(micro_batch)
        sums = sums_by_task(losses, micro_batch, len(counts))
        loss_sums += sums.detach()
        engine.backward((sums.float() * weights).sum(), last=i + 1 == num_micro_batches)
    loss_sums = world.sum(loss_sums.cpu())  # waits for the device; the loss must be known good before the update
    if not loss_sums.isfinite().all():
        raise TrainingFault(
            "the loss is not finite; the update was not made; try a lower --blr, or --precision bf16 or fp32; at step 1, look for NaN in the weights"
        )
    grad_norm, updated = engine.step(lr)
    if not updated:
        raise TrainingFault("a gradient is not finite; the update was not made; try a lower --blr, or --precision bf16 or fp32")
    return StepReport(loss_sums.tolist(), counts.tolist(), grad_norm, int(totals[:, -2].sum()))


def sums_by_task(losses: Tensor, batch: PackedBatch, num_tasks: int) -> Tensor:
    """Sum of the losses of each task, float64 [tasks]; masked sums, because adding by index has no fixed order on a GPU."""
    return torch.stack([torch.where(batch.target_tasks == task, losses, 0.0).double().sum() for task in range(num_tasks)])


def _start_progress(start: Checkpoint | None, steps: TrainingSteps, config: RunConfig) -> Progress:
    """Where the run stands. Raises UserError when `start` is of a run that this one does not continue."""
    if start is None or start.moments is None:
        return _with_empty_sums(Progress(questions_per_step=steps.questions_per_step), config)
    if start.lineage_epoch is not None:
        done = replace(start.progress, step=(start.lineage_epoch + 1) * steps.steps_per_epoch, questions_per_step=steps.questions_per_step)
        return _with_empty_sums(done, config)
    if changed := differences({name: _plain(value) for name, value in start.settings.items()}, config):
        raise UserError(
            f"{start.path}: was written by a run with other settings ({'; '.join(changed)}); give the same flags, or start a new run "
            f"from its weights by --resume {start.path / checkpoints.WEIGHTS}"
        )
    if start.progress.questions_per_step != steps.questions_per_step:
        raise UserError(
            f"{start.path}: its steps took {start.progress.questions_per_step} questions and these would take {steps.questions_per_step}; "
            "choose ranks, --batch_size and --accum_iter with the same product"
        )
    if config.output_dir not in start.path.parents:  # another run's best is not this one's
        return replace(start.progress, best_accuracy=None)
    return start.progress


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _with_empty_sums(progress: Progress, config: RunConfig) -> Progress:
    return replace(progress, epoch_loss_sums=[0.0] * len(config.tasks), epoch_target_counts=[0] * len(config.tasks))


def _advance(progress: Progress, report: StepReport) -> None:
    progress.step += 1
    progress.num_updates += 1
    progress.epoch_loss_sums = [a + b for a, b in zip(progress.epoch_loss_sums, report.loss_sums, strict=True)]
    progress.epoch_target_counts = [a + b for a, b in zip(progress.epoch_target_counts, report.target_counts, strict=True)]


def _open_log(config: RunConfig, world: World, progress: Progress, steps: TrainingSteps, peak_lr: float) -> RunLog | None:
    if not world.is_main:
        return None
    make_folder(config.output_dir)
    mend_folders(config.output_dir)
    if config.resume is None and os.path.exists(config.output_dir / "args.json"):  # what this run started from stays known
        config = replace(config, resume=_path(_read_args(config.output_dir / "args.json").get("resume")))
    facts = {"world_size": world.size, "steps_per_epoch": steps.steps_per_epoch, "peak_lr": peak_lr}
    write_json(config.output_dir / "args.json", {**config.to_json(), **facts})
    if progress.step:
        print(f"resuming from step {progress.step}", flush=True)
    return RunLog(config.output_dir, progress.step)


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _total_loss(config: RunConfig, losses: list[float | None]) -> float:
    return sum(w * loss for w, loss in zip(config.task_weights, losses, strict=True) if loss is not None)


def _log_step(log: RunLog | None, config: RunConfig, step: int, epoch: int, report: StepReport, lr: float, seconds: float) -> float:
    """Write the step's line; returns its loss."""
    losses = report.task_losses()
    total = _total_loss(config, losses)
    if log is not None:
        by_task = {"vqa_loss": None, "cap_loss": None, **{f"{task}_loss": loss for task, loss in zip(config.tasks, losses, strict=True)}}
        counted = {f"{task}_targets": n for task, n in zip(config.tasks, report.target_counts, strict=True)}
        targets = {"vqa_targets": 0, "cap_targets": 0, **counted}
        sizes = {**targets, "real_tokens": report.num_real_tokens, "step_seconds": seconds}
        log.step(
            {"step": step, "epoch": epoch, "loss": total, **by_task, "lr": lr, "grad_norm": report.grad_norm, **sizes},
            {
                **{f"train/{name}": value for name, value in by_task.items() if value is not None},
                **{"train/loss": total, "train/lr": lr, "train/grad_norm": report.grad_norm},
                **{"perf/step_seconds": seconds, "perf/real_tokens_per_second": report.num_real_tokens / seconds},
            },
        )
    return total


def _end_epoch(
    config: RunConfig, world: World, inputs: Inputs, engine: Engine, log: RunLog | None, progress: Progress, epoch: int, lr: float, finished: bool
) -> None:  # fmt: skip
    """Validate, log the epoch, save the checkpoint and, when it is the best so far, the best checkpoint."""
    start = time.perf_counter()
    evaluation = evaluate(engine, inputs, "val", config, world)
    eval_seconds = time.perf_counter() - start
    losses = [s / n if n else None for s, n in zip(progress.epoch_loss_sums, progress.epoch_target_counts, strict=True)]
    accuracy = evaluation.accuracies["acc"]
    improved = progress.best_accuracy is None or accuracy > progress.best_accuracy
    progress.best_accuracy = accuracy if improved else progress.best_accuracy
    weights, moments = engine.state()
    saved = _with_empty_sums(progress, config) if finished else replace(progress)
    with world.agreeing():
        if world.is_main:
            record = _log_epoch(log, config, world, progress.step, epoch, lr, losses, evaluation, weights, eval_seconds)
            evaluation.write(config.output_dir, "val")
            if improved:  # first: the other one already says that this accuracy is the best
                checkpoints.save(config.output_dir / "checkpoint_best", weights, moments, saved, config)
            checkpoints.save(config.output_dir / f"checkpoint-{progress.step}", weights, moments, saved, config)
            print(f"epoch {epoch}: {json.dumps({k: v for k, v in record.items() if k != 'epoch'})}", flush=True)
    progress.epoch_loss_sums, progress.epoch_target_counts = list(saved.epoch_loss_sums), list(saved.epoch_target_counts)


def _log_epoch(
    log: RunLog | None, config: RunConfig, world: World, step: int, epoch: int, lr: float, losses: list[float | None],
    evaluation: Evaluation, weights: dict[str, Tensor], eval_seconds: float,
) -> dict[str, Any]:  # fmt: skip
    assert log is not None
    by_task = {f"train_{task}_loss": loss for task, loss in zip(config.tasks, losses, strict=True)}
    train = {"train_loss": _total_loss(config, losses), "train_vqa_loss": None, "train_cap_loss": None, **by_task}
    record = {**train, "train_lr": lr, "epoch": epoch, "step": step, **{f"val_{k}": v for k, v in evaluation.accuracies.items()}}
    gates = {f"gates/{n.replace('.attention', '')}": v for n, v in weights.items() if "gate" in n}
    curves = {
        **{f"eval/{name}": value for name, value in evaluation.accuracies.items()},
        **{name: float((value.tanh() if name.endswith("gate1") else value).mean()) for name, value in gates.items()},
        **{"perf/eval_questions_per_second": len(evaluation.questions) / eval_seconds},
        **memory_curves(world.device),
    }
    log.epoch(record, curves)
    return record

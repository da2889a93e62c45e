"""The training loop: steps, evaluation at the end of each epoch, checkpoints, logs.

One optimizer step is `train_step` (step.py). What happens before the first one is start.py's.
"""

import json
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from vico.checkpoint import published, restart_limit
from vico.checkpoint.format import TrainState
from vico.checkpoint.write import save, save_step
from vico.data.batching import Step
from vico.data.dataloader import loader
from vico.distributed import signals
from vico.errors import DiskError, InUseError
from vico.io import log, streams
from vico.io.atomic import write_bytes, write_json, write_lines
from vico.io.failpoints import reached
from vico.io.host_memory import return_free_memory
from vico.io.paths import is_folder
from vico.train.attention_shares import measure_attention, measured_attention
from vico.train.cognition import measure_texts, measured_texts
from vico.train.evaluate import evaluate, report
from vico.train.gradient_order import GradientOrder
from vico.train.heat_map import gate_curves, gate_record, gates_picture
from vico.train.log_records import EpochResult, epoch_curves, epoch_record, log_step
from vico.train.progress_bar import ProgressBar
from vico.train.reporters import Reported, Reporters, chosen
from vico.train.resume import run_id_of, with_empty_sums
from vico.train.run_log import RunLog, gaps, memory_curves, read_logs
from vico.train.start import Run
from vico.train.step import StepReport, mean_losses, train_step


def run(run: Run) -> None:
    """Train to the last step. A collective.

    Raises Stopped after a stop signal, with the state saved.
    """
    config, world, state = run.config, run.world, run.state
    if config.init_eval and run.from_scratch:
        evaluation = evaluate(run.engine, run.inputs, config.split, config, world)
        path = run.output_dir.predictions(config.split)
        more = measured_texts(run.engine, run.inputs, world)
        more |= measured_attention(run.engine, run.inputs, config, world)
        report(evaluation, path, {"split": config.split}, world, more)
    if run.is_complete:
        world.print_rank0(
            f"{config.output_dir}: this run is complete at step {state.step} of {run.last_step}; "
            f"nothing to train, and a larger {run.limit} trains on"
        )
        return
    early_save: int | None = None
    with world.raise_together():
        run_log = None
        if world.is_main:
            run_log, early_save = _open_log(run)
    early_save = world.max(early_save or 0)
    restart_limit.enter_steps(run.output_dir, state)
    streams.keep_lost_output(run.output_dir.lost_output)
    _print_start(run)
    try:
        _run_steps(run, run_log, early_save)
    except signals.Stopped as stop:
        _save(run, run_log, state)
        _end_attempt(run)
        name, saved = signal.Signals(stop.number).name, run.output_dir.checkpoint(state.step)
        line = f"stopped by {name}; saved {saved}; rerun the same command to resume"
        raise signals.Stopped(stop.number, line) from None
    except DiskError:
        _end_attempt(run)  # not a failure that a restart repeats: space can be freed
        raise
    if run_log is not None:
        run_log.close()
    _end_attempt(run)
    curves = f"; curves: tensorboard --logdir {run.output_dir.tensorboard}"
    has_board = is_folder(run.output_dir.tensorboard)
    world.print_rank0(f"done: {config.output_dir}{curves if has_board else ''}")


def _end_attempt(run: Run) -> None:
    if run.world.is_main:
        restart_limit.clear(run.output_dir)
    restart_limit.leave_steps()


def _print_start(run: Run) -> None:
    if run.world.is_main:
        first, last = run.state.step + 1, run.last_step
        per_epoch, questions = run.steps.steps_per_epoch, run.steps.questions_per_step
        fields = {
            "zero": run.inputs.stage,
            "precision": run.config.precision,
            "computed by": run.engine.attention,
            "steps": f"{first} to {last}, {per_epoch} per epoch, {questions} questions each",
        }
        if run.config.max_tokens:
            fields["micro-batches"] = f"at most {run.config.max_tokens:,} tokens each"
        log.fields(fields)


def _open_log(run: Run) -> tuple[RunLog, int | None]:
    """Claim output_dir, open the logs, write a new run's args.json. On rank 0. Raises UserError.

    Returns the log, and a step at which to save besides --save_steps (None: there is none).
    """
    output_dir, config, state = run.output_dir, run.config, run.state
    for note in output_dir.claim():
        log.info(note)
    saved = output_dir.read_args() if output_dir.has_run() else None
    if saved is not None and run_id_of(saved) != run.identity.id:
        raise InUseError(
            f"{output_dir}: another run began and wrote here while this one was starting; "
            "choose another --output_dir"
        )
    logs = read_logs(output_dir)
    settings, last_step = config.to_json(), logs.last_step
    early_save = restart_limit.record_start(output_dir, settings, last_step, state.step)
    if config.resume in (None, output_dir.path) and saved is not None:
        first = saved.get("resume")  # where this run first started
        config = replace(config, resume=None if first is None else Path(first))
    steps_per_epoch = run.steps.steps_per_epoch
    if saved is not None:
        position = (state.step, state.evaluation_due, steps_per_epoch)
        for line in gaps(output_dir, logs, *position, from_start=config.resume is None):
            log.info(f"note: {line}")
    facts = {
        "world_size": run.world.size,
        "steps_per_epoch": steps_per_epoch,
        "peak_lr": run.peak_lr,
        "run": run.identity.id,
    }
    args = {**config.to_json(), **facts}
    if saved is None:
        write_json(output_dir.args, args)
    reported = Reported(output_dir, args, run.identity.id, state.step)
    open_reporters = partial(Reporters, chosen(config.report_to), reported)
    run_log = RunLog(output_dir, logs, state.step, state.evaluation_due, open_reporters)
    if saved is not None:
        run_log.args_due = args  # not before a checkpoint of these settings lies beside it
    again = f" ({run_log.num_dropped} step(s) to redo)" if run_log.num_dropped else ""
    if state.step:
        log.info(f"resuming from step {state.step}{again}")
    elif again:
        log.info(
            f"no checkpoint had been saved yet: starting at step 1 again{again}; "
            "--save_steps saves more often"
        )
    if early_save is not None:
        log.info(
            f"note: the last start was killed at step {max(last_step, state.step) + 1}, before it "
            f"saved; this one saves at step {early_save} already"
        )
    return run_log, early_save


def _run_steps(run: Run, run_log: RunLog | None, early_save: int) -> None:
    config, world, state, steps = run.config, run.world, run.state, run.steps
    save_steps = config.save_steps
    if state.evaluation_due:  # the run was stopped between an epoch's last step and its evaluation
        _end_epoch(run, run_log)
    if state.step >= run.last_step:
        return
    order = GradientOrder(run.engine.trainables)
    _dry_run(run)
    order.check(world)
    world.set_phase(f"waiting for the data of step {state.step + 1}")
    shown, every = world.is_main, config.logging_steps
    with ProgressBar("training", run.last_step, "step", shown, state.step, every) as bar:
        started = time.perf_counter()
        for epoch, place, batch in _batches(run):
            lr, number = run.lr(state.step), state.step + 1
            error = run_log.error if run_log else None
            step = train_step(run.engine, batch, number, config.task_weights, lr, world, error)
            order.check(world)  # before anything of the step is logged or saved
            seconds = time.perf_counter() - started  # waiting for data included
            started = time.perf_counter()
            _advance(state, step)
            world.set_phase(f"waiting for the data of step {number + 1}")
            loss = log_step(run_log, config, state.step, steps.steps_per_epoch, step, lr, seconds)
            bar.advance(f"epoch {epoch}  loss {loss:.4f}  lr {lr:.2e}  {seconds:.2f} s/step")
            ends_epoch = place + 1 == steps.steps_per_epoch
            state.evaluation_due = ends_epoch or state.step == run.last_step
            if step.stop_signal:
                raise signals.Stopped(step.stop_signal, "stopped between two steps")
            if state.evaluation_due:
                _end_epoch(run, run_log)
                started = time.perf_counter()
            elif state.step == early_save or (save_steps and state.step % save_steps == 0):
                _save(run, run_log, state)


def _batches(run: Run) -> Iterator[tuple[int, int, Step]]:
    """(epoch, step of the epoch, this rank's share of it) of every step that is left."""
    steps_left = range(run.state.step, run.last_step)
    schedule = [divmod(step, run.steps.steps_per_epoch) for step in steps_left]
    pin = run.world.device.type == "cuda"
    batches = loader(run.steps, schedule, run.config.num_workers, pin)
    for (epoch, place), batch in zip(schedule, batches, strict=True):
        yield epoch, place, batch


def _dry_run(run: Run) -> None:
    """Try the longest micro-batch of all before the first step.

    A run that does not fit in memory then fails in its first minute, not in its tenth hour.
    """
    world = run.world
    with world.raise_together():
        batch, num_questions = run.steps.longest()
    what = f"the longest micro-batch ({num_questions} questions, {batch.num_real_tokens:,} tokens)"
    world.set_phase(f"trying {what}")
    started = time.perf_counter()
    reached("dry_run")
    run.engine.train(True)
    run.engine.dry_run(batch.to(world.device))
    curve, peak_gib = list(memory_curves(world.device).items())[-1]
    memory = curve.removeprefix("memory/").removesuffix("_gib").replace("_", " ")
    seconds = time.perf_counter() - started
    world.print_rank0(f"{what} fits: {seconds:.1f} s, {memory} {peak_gib:.1f} GiB")


def _advance(state: TrainState, step: StepReport) -> None:
    state.step += 1
    state.num_updates += 1
    sums = zip(state.epoch_loss_sums, step.loss_sums, strict=True)
    counts = zip(state.epoch_target_counts, step.target_counts, strict=True)
    state.epoch_loss_sums = [a + b for a, b in sums]
    state.epoch_target_counts = [a + b for a, b in counts]


def _end_epoch(run: Run, run_log: RunLog | None) -> None:
    """Evaluate, log the epoch and save, also as the best checkpoint when it is the best so far.

    With --no_eval none is the best.
    """
    config, state = run.config, run.state
    started = time.perf_counter()
    split, evaluation, accuracy, attention = run.evaluated_split, None, None, None
    if split is not None:
        batches = run.evaluation_batches
        evaluation = evaluate(run.engine, run.inputs, split, config, run.world, batches)
        accuracy = evaluation.accuracies["acc"]
    eval_seconds = time.perf_counter() - started
    if split is not None and (count := config.attention_shares) is not None:
        attention = measure_attention(run.engine, run.inputs, split, count, config, run.world)
    captioned, texts = run.captioned_videos, run.measured_texts
    result = EpochResult(
        epoch=(state.step - 1) // run.steps.steps_per_epoch,
        step=state.step,
        lr=run.lr(state.step - 1),
        losses=mean_losses(state.epoch_loss_sums, state.epoch_target_counts),
        num_without_caption=run.inputs.num_without_caption,
        split=split,
        evaluation=evaluation,
        eval_seconds=eval_seconds,
        is_best=accuracy is not None and is_best(accuracy, state.best_accuracy),
        captions=None if captioned is None else captioned.write(run.engine, run.world),
        texts=measure_texts(run.engine, texts, run.inputs, run.world) if texts.files else None,
        attention=attention,
    )
    best = accuracy if result.is_best else state.best_accuracy
    after = replace(state, best_accuracy=best, evaluation_due=False)
    if state.step % run.steps.steps_per_epoch == 0:
        after = with_empty_sums(after, config)
    _save(run, run_log, after, result)
    state.assign(after)  # last: a run that stops before this line evaluates again
    return_free_memory()


def is_best(accuracy: float, best: float | None) -> bool:
    """Whether an epoch is the best so far. Of equal epochs the first one stays the best."""
    return best is None or accuracy > best


def _save(
    run: Run, run_log: RunLog | None, state: TrainState, epoch: EpochResult | None = None
) -> None:
    """Write the checkpoint of this step and, before it, the results of `epoch`. A collective."""
    run.world.set_phase(f"saving step {state.step}")
    started = time.perf_counter()
    weights, moments = run.engine.state()
    seconds = time.perf_counter() - started
    with run.world.raise_together():
        run.inputs.files.check_unchanged()  # on every host: what was trained on is the run's
        run.engine.require_live(weights)
        if not run.world.is_main:
            return
        assert run_log is not None
        if epoch is not None:
            _log_epoch(run, run_log, epoch, weights)
        started = time.perf_counter()
        if epoch is not None and epoch.is_best:
            # First, because the step's checkpoint records the best accuracy.
            _save_best(run, weights, moments, state)
        keep = run.config.save_total_limit or None  # 0 means no limit, as in Hugging Face's Trainer
        save_step(run.output_dir, weights, moments, state, run.identity, keep)
        if run_log.args_due is not None:
            write_json(run.output_dir.args, run_log.args_due)
            run_log.args_due = None
        run_log.saved(state.step, seconds + time.perf_counter() - started)


def _save_best(
    run: Run, weights: dict[str, Tensor], moments: dict[str, Tensor], state: TrainState
) -> None:
    if run.config.save_legacy:
        content = published.to_bytes(weights, run.config.to_json())
        write_bytes(run.output_dir.best_published, content)
    save(run.output_dir.best_checkpoint, weights, moments, state, run.identity)


def _log_epoch(run: Run, run_log: RunLog, result: EpochResult, weights: dict[str, Tensor]) -> None:
    record = epoch_record(run.config, result)
    shown = {name: value for name, value in record.items() if name != "epoch"}
    curves = epoch_curves(result, run.world.device) | gate_curves(weights)
    record["gates"] = gate_record(weights)
    if result.attention is not None:
        record["attention"] = result.attention.to_json()
        curves |= result.attention.curves()
        shown["attention"] = result.attention.means()
    run_log.epoch(record, curves, gates_picture(weights))
    if result.evaluation is not None and result.split is not None:
        result.evaluation.write(run.output_dir.predictions(result.split))
        if result.captions is not None:
            write_lines(run.output_dir.captions(result.split), result.captions.records)
    log.info(f"epoch {result.epoch}: {json.dumps(shown)}")

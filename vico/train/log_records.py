"""The JSON records and curves of a step and of an epoch. Curves have Hugging Face's names."""

from dataclasses import dataclass
from typing import Any

import torch

from vico.train.attention_shares import AttentionShares
from vico.train.cognition import TextMeasures
from vico.train.config import RunConfig
from vico.train.eval_captions import WrittenCaptions
from vico.train.evaluate import Evaluation
from vico.train.run_log import RunLog, memory_curves
from vico.train.step import StepReport


@dataclass(frozen=True)
class EpochResult:
    """A finished epoch: its losses (means per task) and its evaluation; None with --no_eval."""

    epoch: int
    step: int  # steps done
    lr: float  # of the last step
    losses: list[float | None]
    num_without_caption: int  # training questions that the caption task leaves out
    split: str | None
    evaluation: Evaluation | None
    eval_seconds: float
    is_best: bool
    captions: WrittenCaptions | None = None  # --eval_captions
    texts: TextMeasures | None = None  # --text
    attention: AttentionShares | None = None  # --attention_shares


def total_loss(config: RunConfig, losses: list[float | None]) -> float:
    """The weighted sum of the tasks' mean losses."""
    pairs = zip(config.task_weights, losses, strict=True)
    return sum(weight * loss for weight, loss in pairs if loss is not None)


def log_step(
    run_log: RunLog | None,
    config: RunConfig,
    step: int,
    steps_per_epoch: int,
    report: StepReport,
    lr: float,
    seconds: float,
) -> float:
    """Log a step, on rank 0; returns its loss."""
    losses = report.task_losses()
    total = total_loss(config, losses)
    if run_log is None:
        return total
    # Every record has the keys of the published tasks.
    task_losses: dict[str, float | None] = {"vqa_loss": None, "cap_loss": None}
    targets = {"vqa_targets": 0, "cap_targets": 0}
    for task, loss, count in zip(config.tasks, losses, report.target_counts, strict=True):
        task_losses[f"{task}_loss"] = loss
        targets[f"{task}_targets"] = count
    epoch = (step - 1) // steps_per_epoch
    record: dict[str, Any] = {"step": step, "epoch": epoch, "loss": total, **task_losses}
    record |= {"lr": lr, "grad_norm": report.grad_norm, **targets}
    record |= {"real_tokens": report.num_real_tokens, "step_seconds": seconds}
    curves = {f"train/{name}": loss for name, loss in task_losses.items() if loss is not None}
    curves |= {"train/loss": total, "train/learning_rate": lr}
    curves |= {"train/grad_norm": report.grad_norm, "train/epoch": step / steps_per_epoch}
    curves["perf/step_seconds"] = seconds
    curves["perf/real_tokens_per_second"] = report.num_real_tokens / seconds
    is_shown = step % (config.logging_steps or 1) == 0
    run_log.step(record, curves if is_shown else {})
    return total


def epoch_record(config: RunConfig, result: EpochResult) -> dict[str, Any]:
    """The line of log.txt, with the published names."""
    losses: dict[str, float | None] = {"train_vqa_loss": None, "train_cap_loss": None}
    for task, loss in zip(config.tasks, result.losses, strict=True):
        losses[f"train_{task}_loss"] = loss
    values = {} if result.evaluation is None else result.evaluation.results()
    if result.captions is not None:
        values |= {"n_captions": len(result.captions.records), **result.captions.metrics}
    lacking = result.num_without_caption
    return {
        "train_loss": total_loss(config, result.losses),
        **losses,
        **({"train_n_without_caption": lacking} if lacking else {}),
        "train_lr": result.lr,
        "epoch": result.epoch,
        "step": result.step,
        **{f"{result.split}_{name}": value for name, value in values.items()},
        **({} if result.texts is None else {"cognition": result.texts.summary()}),
    }


def epoch_curves(result: EpochResult, device: torch.device) -> dict[str, float]:
    """Loss and accuracies of the evaluation, speed, memory."""
    evaluation = result.evaluation
    if evaluation is None:
        return memory_curves(device)
    curves = {f"eval/{name}": value for name, value in evaluation.accuracies.items()}
    if (loss := evaluation.loss) is not None:
        curves["eval/loss"] = loss
    num_questions = len(evaluation.questions)
    if result.captions is not None:
        curves |= {f"eval/{name}": value for name, value in result.captions.metrics.items()}
    if result.texts is not None:
        curves |= result.texts.curves()
    curves["perf/eval_questions_per_second"] = num_questions / result.eval_seconds
    return {**curves, **memory_curves(device)}

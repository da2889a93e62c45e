"""The records and curves of a step and of an epoch, key by key."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vico.data.datasets import DATASETS
from vico.data.types import Question
from vico.train.config import RunConfig
from vico.train.eval_captions import WrittenCaptions
from vico.train.evaluate import Evaluation, summarize
from vico.train.log_records import EpochResult, epoch_curves, epoch_record, log_step
from vico.train.step import StepReport

CPU = torch.device("cpu")
# Of three tasks, the last of which had no target.
REPORT = StepReport([6.0, 4.0, 0.0], [4, 2, 0], grad_norm=0.25, num_real_tokens=77, stop_signal=0)


class Log:
    """In the place of RunLog: what it is told."""

    def __init__(self) -> None:
        self.steps: list[tuple[dict[str, Any], dict[str, float]]] = []

    def step(self, record: dict[str, Any], curves: dict[str, float]) -> None:
        self.steps.append((record, curves))


def logged(config: RunConfig, step: int, report: StepReport) -> tuple[Any, Any]:
    """What a step of 3 an epoch logs."""
    log: Any = Log()
    total = log_step(log, config, step, 3, report, lr=0.125, seconds=0.5)
    ((record, curves),) = log.steps
    assert record["loss"] == total == log_step(None, config, step, 3, report, 0.125, 0.5)
    return record, curves


def test_all_numbers_of_a_step() -> None:
    """A task without targets has no curve; a point's place is also told in epochs."""
    record, curves = logged(RunConfig(vaq=True, cap=0.5), 4, REPORT)
    assert record == {
        "step": 4,
        "epoch": 1,
        "loss": 1.5 + 0.5 * 2.0,
        "vqa_loss": 1.5,
        "cap_loss": 2.0,
        "vaq_loss": None,
        "lr": 0.125,
        "grad_norm": 0.25,
        "vqa_targets": 4,
        "cap_targets": 2,
        "vaq_targets": 0,
        "real_tokens": 77,
        "step_seconds": 0.5,
    }
    assert curves == {
        "train/vqa_loss": 1.5,
        "train/cap_loss": 2.0,
        "train/loss": 2.5,
        "train/learning_rate": 0.125,
        "train/grad_norm": 0.25,
        "train/epoch": 4 / 3,
        "perf/step_seconds": 0.5,
        "perf/real_tokens_per_second": 154,
    }


def test_a_step_without_the_caption_task() -> None:
    """The published keys are there all the same."""
    record, curves = logged(RunConfig(cap=0), 3, StepReport([6.0], [4], 0.25, 77, 0))
    assert (record["epoch"], record["vqa_loss"], record["vqa_targets"]) == (0, 1.5, 4)
    assert (record["cap_loss"], record["cap_targets"]) == (None, 0)
    assert "train/cap_loss" not in curves


@pytest.mark.parametrize(("logging_steps", "shown"), [(None, [1, 2, 3, 4]), (2, [2, 4]), (3, [3])])
def test_steps_that_have_a_point(logging_steps: int | None, shown: list[int]) -> None:
    config = RunConfig(vaq=True, logging_steps=logging_steps)
    points = [step for step in (1, 2, 3, 4) if logged(config, step, REPORT)[1]]
    assert points == shown


def evaluation() -> Evaluation:
    """Two questions of which one is answered right; a third has no features."""
    types = ("CW", "TN", "TN")
    asked = [Question(i, str(i), "v", kind, "q", ("a", "b"), 0) for i, kind in enumerate(types)]
    scores = [[0.5, 1.0], [2.5, 2.0]]
    return summarize(asked[:2], scores, {"nextqa": DATASETS["nextqa"]}, asked[2:])


def texts() -> Any:
    return SimpleNamespace(summary=lambda: {"tokens": 9}, curves=lambda: {"cognition/kl": 0.75})


def result(**fields: Any) -> EpochResult:
    values = {"epoch": 3, "step": 12, "lr": 0.125, "losses": [1.0, 3.0], "eval_seconds": 4.0}
    values |= {"num_without_caption": 0, "split": "test", "is_best": True}
    return EpochResult(**{**values, "evaluation": evaluation(), **fields})


TRAINED = {
    "train_loss": 2.5,
    "train_vqa_loss": 1.0,
    "train_cap_loss": 3.0,
    "train_lr": 0.125,
    "epoch": 3,
    "step": 12,
}
EVALUATED = {"test_n": 2, "test_n_total": 3, "test_acc": 0.5, "test_C": 1.0, "test_T": 0.0}


def test_the_record_of_an_epoch() -> None:
    """Results have the name of the split; captions, texts and what is left out only if any."""
    config = RunConfig(cap=0.5)
    assert epoch_record(config, result()) == TRAINED | EVALUATED
    captions = WrittenCaptions([{}, {}, {}], {"cider": 1.25})
    whole = epoch_record(config, result(captions=captions, texts=texts(), num_without_caption=7))
    assert whole == TRAINED | EVALUATED | {
        "test_n_captions": 3,
        "test_cider": 1.25,
        "train_n_without_caption": 7,
        "cognition": {"tokens": 9},
    }
    alone = result(evaluation=None, split=None, captions=None)
    assert epoch_record(config, alone) == TRAINED
    without_task = epoch_record(RunConfig(cap=0), result(losses=[1.0]))
    assert without_task == TRAINED | EVALUATED | {"train_loss": 1.0, "train_cap_loss": None}


def test_the_curves_of_an_epoch() -> None:
    """Without the counts of the record; memory is always there."""
    memory = "memory/host_peak_gib"
    curves = epoch_curves(result(), CPU)
    assert curves.pop(memory) > 0
    assert curves == {
        "eval/acc": 0.5,
        "eval/C": 1.0,
        "eval/T": 0.0,
        "eval/loss": (0.5 + 2.5) / 2,
        "perf/eval_questions_per_second": 0.5,
    }
    captions = WrittenCaptions([{}], {"cider": 1.25})
    whole = epoch_curves(result(captions=captions, texts=texts()), CPU)
    more = {name: value for name, value in whole.items() if name not in (*curves, memory)}
    assert more == {"eval/cider": 1.25, "cognition/kl": 0.75}
    assert list(epoch_curves(result(evaluation=None), CPU)) == [memory]
    unanswered = Evaluation([Question(0, "0", "v", "X", "q", ("a",), None)], [[1.0]], {}, {})
    assert "eval/loss" not in epoch_curves(result(evaluation=unanswered), CPU)


def test_what_an_epoch_has_at_least() -> None:
    assert (result().captions, result().texts) == (None, None)

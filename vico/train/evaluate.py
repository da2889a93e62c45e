"""Evaluation: every option of every question scored once, whatever the number of ranks (METHOD section 4).

An option's score is the mean cross-entropy of its target tokens; the lowest wins. Accuracies are counts.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vico.data.dataloader import loader
from vico.data.datasets import DATASETS, accuracy_groups
from vico.data.evaluation_batches import Chunk, EvaluationChunks
from vico.data.types import Question
from vico.distributed import signals
from vico.distributed.world import World
from vico.errors import TrainingError, UserError, one_line
from vico.io.atomic import make_folder, write_lines
from vico.io.failpoints import reached
from vico.model.batch import PackedBatch
from vico.train.build import Inputs
from vico.train.config import RunConfig
from vico.train.engine import Engine
from vico.train.progress_bar import ProgressBar

CHUNKS_PER_ASKING = 8  # forwards between two looks at whether a rank was asked to stop: the looks make ranks wait for each other


@dataclass(frozen=True)
class Evaluation:
    questions: Sequence[Question]
    scores: list[list[float]]  # per question, per option
    accuracies: dict[str, float]  # "acc" and one per group; empty where the split has no answers
    counts: dict[str, tuple[int, int]]  # group -> (right, asked)
    dropped: dict[str, int] = field(
        default_factory=dict
    )  # group -> questions of the file that were not asked (--missing_features drop)

    @property
    def num_total(self) -> int:
        """Questions of the file, the dropped ones included."""
        return len(self.scores) + sum(self.dropped.values())

    @property
    def used(self) -> str:
        """For every figure that is shown: of how many questions it is."""
        n = len(self.scores)
        return f"{n} used / {self.num_total} total questions" if self.dropped else f"{n} questions"

    def results(self) -> dict[str, float]:
        """What is kept of it beside the predictions: how many questions, then the accuracies."""
        return {"n": len(self.scores), "n_total": self.num_total, **self.accuracies}

    @property
    def predictions(self) -> list[int]:
        return [int(np.argmin(scores)) for scores in self.scores]

    def records(self) -> list[dict[str, Any]]:
        return [
            {
                "index": q.index,
                "qid": q.qid,
                "video": q.video,
                "type": q.type,
                "scores": s,
                "answer": q.answer,
                "prediction": p,
            }
            for q, s, p in zip(self.questions, self.scores, self.predictions, strict=True)
        ]

    def write(self, output_dir: Path, split: str) -> Path:
        path = output_dir / f"predictions_{split}.jsonl"
        write_lines(path, self.records())
        return path

    def table(self) -> str:
        """Accuracy by group, as text."""
        if not self.accuracies:
            return f"{self.used} without answers: predictions only"
        rows = [
            self._row(group, *counts, self.dropped.get(group, 0))
            for group, counts in self.counts.items()
        ]
        rows += [
            f"  {one_line(group):<16}{0:>6} used / {n} total"
            for group, n in self.dropped.items()
            if group not in self.counts
        ]
        right, asked = (sum(c[i] for c in self.counts.values()) for i in (0, 1))
        extra = [
            f"  {name:<16}{'':>15}{value:8.2%}"
            for name, value in self.accuracies.items()
            if name == "Mean"
        ]
        return "\n".join(
            [*rows, self._row("all", right, asked, sum(self.dropped.values())), *extra]
        )

    def _row(self, group: str, right: int, asked: int, dropped: int) -> str:
        of = f"   {asked} used / {asked + dropped} total" if self.dropped else ""
        return f"  {one_line(group):<16}{right:>6} / {asked:<6}{right / asked:8.2%}{of}"


def evaluate(
    engine: Engine, inputs: Inputs, split: str, config: RunConfig, world: World
) -> Evaluation:
    """Score the split's questions. A collective: every rank runs as many forwards, and every rank gets the result."""
    questions = inputs.questions[split]
    if not questions:
        raise UserError(f"{split}: there are no questions to evaluate; name a split that has some")
    with world.raise_together():
        inputs.features.check_unchanged()
    chunks = EvaluationChunks(
        questions,
        inputs.features,
        inputs.prompts,
        num_slots=config.max_feats,
        rank=world.rank,
        world_size=world.size,
    )
    batches = loader(
        chunks, range(len(chunks)), config.num_workers, pin=world.device.type == "cuda"
    )
    engine.train(False)
    error: UserError | None = None
    spare: PackedBatch | None = None
    done: list[tuple[Chunk, torch.Tensor]] = []
    with (
        torch.no_grad(),
        ProgressBar(
            f"evaluating {len(questions)} {split} questions", len(chunks), "batch", world.is_main
        ) as progress,
    ):
        for number, chunk in enumerate(batches, start=1):
            world.set_phase(f"batch {number} of the {split} evaluation")
            reached("evaluation")
            error = error or chunk.error
            spare = (
                chunk.batch or spare
            )  # after an error a rank goes on with some batch: the others count on its forwards
            if spare is None:
                raise error or AssertionError("a chunk without batch brings its error")
            losses = engine.forward(spare.to(world.device))  # they stay on the device: no sync
            if chunk.batch is not None:
                done.append((chunk, losses))
            progress.advance()
            if number % CHUNKS_PER_ASKING == 0 and (signal := world.max(signals.stop_requested())):
                raise signals.Stopped(
                    signal,
                    f"stopped in the evaluation of {len(questions)} {split} questions; start it again",
                )
    with world.raise_together():
        if error is not None:
            raise error
    scores = _gather(done, questions, world)
    _require_finite(scores, questions)
    return summarize(questions, scores, config.dataset, inputs.dropped[split])


def _gather(
    done: list[tuple[Chunk, torch.Tensor]], questions: Sequence[Question], world: World
) -> list[list[float]]:
    """Scores of all ranks. Each question is scored by one rank, so that adding the ranks' tables changes no bit."""
    width = max(len(q.options) for q in questions)
    table = torch.zeros(len(questions), width, dtype=torch.float64)
    times = torch.zeros(len(questions), dtype=torch.int64)
    for chunk, losses in done:
        assert chunk.batch is not None
        sequences = chunk.batch.target_sequences.numpy()
        means = np.bincount(sequences, losses.double().cpu().numpy()) / np.bincount(sequences)
        first = 0
        for place in chunk.questions:
            stop = first + len(questions[place].options)
            table[place, : stop - first] = torch.from_numpy(means[first:stop])
            times[place] += 1
            first = stop
    world.sum(table)
    assert (world.sum(times) == 1).all(), "every question is scored exactly once"
    return [row[: len(q.options)] for row, q in zip(table.tolist(), questions, strict=True)]


def _require_finite(scores: list[list[float]], questions: Sequence[Question]) -> None:
    bad = [q for s, q in zip(scores, questions, strict=True) if not np.isfinite(s).all()]
    if bad:
        raise TrainingError(
            f"{bad[0].place}: {len(bad)} of {len(questions)} questions have scores that are not finite, first question {bad[0].qid} of "
            f"video '{bad[0].video}'; try --precision bf16 or fp32, or another checkpoint"
        )


def summarize(
    questions: Sequence[Question],
    scores: list[list[float]],
    dataset: str,
    dropped: Sequence[Question] = (),
) -> Evaluation:
    """Accuracies as counts over questions: in all, and by the data set's groups of types. `dropped` were not asked."""
    groups = accuracy_groups(dataset, [q.type for q in dropped])
    left_out = {group: sum(q.type in members for q in dropped) for group, members in groups.items()}
    if any(q.answer is None for q in questions):
        return Evaluation(questions, scores, {}, {}, left_out)
    right = np.array(
        [int(np.argmin(s)) == q.answer for s, q in zip(scores, questions, strict=True)]
    )
    types = np.array([q.type for q in questions])
    counts = {}
    for group, members in accuracy_groups(dataset, types.tolist()).items():
        chosen = np.isin(types, members)
        counts[group] = (int(right[chosen].sum()), int(chosen.sum()))
    assert sum(asked for _, asked in counts.values()) == len(questions)
    accuracies = {
        "acc": float(right.sum() / len(right)),
        **{group: r / n for group, (r, n) in counts.items()},
    }
    if mean_of := [accuracies[group] for group in DATASETS[dataset].mean_of if group in counts]:
        accuracies["Mean"] = float(np.mean(mean_of))
    return Evaluation(questions, scores, accuracies, counts, left_out)


def report(evaluation: Evaluation, split: str, config: RunConfig, world: World) -> None:
    """Write the predictions, print the table and, as the last line, one JSON object."""
    with world.raise_together():
        if world.is_main:
            make_folder(config.output_dir)
            path = evaluation.write(config.output_dir, split)
            print(
                f"{split} accuracy of {evaluation.used} ({path}):\n{evaluation.table()}", flush=True
            )
            print(json.dumps({"split": split, **evaluation.results()}), flush=True)

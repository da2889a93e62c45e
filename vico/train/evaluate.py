"""Evaluation: every option of every question is scored once, on any number of ranks.

An option's score is the mean cross-entropy of its target tokens; the lowest wins. Accuracies are
counts (METHOD section 4).
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from vico.data.dataloader import loader
from vico.data.datasets import RESERVED_KEYS, Dataset, accuracy_groups, find_dataset
from vico.data.evaluation_batches import Chunk, EvaluationChunks
from vico.data.types import Question
from vico.distributed.world import World
from vico.errors import TrainingError, UserError, one_line
from vico.io import log
from vico.io.atomic import make_folder, write_lines
from vico.io.failpoints import reached
from vico.model.batch import PackedBatch
from vico.train.build import Inputs
from vico.train.config import RunConfig
from vico.train.engine import Engine
from vico.train.progress_bar import ProgressBar

# Forwards between two checks for a stop signal. Each check makes the ranks wait for each other.
CHUNKS_PER_STOP_CHECK = 8


@dataclass(frozen=True)
class Evaluation:
    questions: Sequence[Question]
    scores: list[list[float]]  # per question, per option
    accuracies: dict[str, float]  # "acc" and one per group; empty for a split without answers
    counts: dict[str, tuple[int, int]]  # group -> (right, scored)
    # group -> questions of the file that were left out by --missing_features drop
    dropped: dict[str, int] = field(default_factory=dict)
    # Of each data set, where there are several. Their accuracies are above too: `star_acc`.
    parts: "dict[str, Evaluation]" = field(default_factory=dict)

    @property
    def num_dropped(self) -> int:
        return sum(self.dropped.values())

    @property
    def num_total(self) -> int:
        """Questions of the file, the dropped ones included."""
        return len(self.scores) + self.num_dropped

    @property
    def used(self) -> str:
        """How many questions the accuracies cover."""
        n, lacking = len(self.scores), self.num_without_subtitles
        used = f"{n} used / {self.num_total} total questions" if self.dropped else f"{n} questions"
        return f"{used}, {lacking} of them without subtitles" if lacking else used

    @property
    def num_without_subtitles(self) -> int:
        """Questions that were asked without the dialogue that they may have, as permitted."""
        return sum(q.lacks_subtitles for q in self.questions)

    @property
    def loss(self) -> float | None:
        """The mean score of the right options; None for a split without answers."""
        pairs = zip(self.questions, self.scores, strict=True)
        right = [scores[q.answer] for q, scores in pairs if q.answer is not None]
        return float(np.mean(right)) if right else None

    def results(self) -> dict[str, float]:
        """The numbers of questions, then the accuracies; then the numbers of each data set."""
        results = {**self._num_questions(), **self.accuracies}
        for name, part in self.parts.items():
            for key, number in part._num_questions().items():
                results[_free_key(f"{name}_{key}", results)] = number
        return results

    def _num_questions(self) -> dict[str, float]:
        numbers: dict[str, float] = {"n": len(self.scores), "n_total": self.num_total}
        if self.num_without_subtitles:
            numbers["n_without_subtitles"] = self.num_without_subtitles
        return numbers

    @property
    def predictions(self) -> list[int]:
        return choose(self.scores)

    def records(self) -> list[dict[str, Any]]:
        """One JSON object per question, in file order."""
        records = []
        rows = zip(self.questions, self.scores, self.predictions, strict=True)
        for question, scores, prediction in rows:
            record: dict[str, Any] = {"dataset": question.dataset} if self.parts else {}
            record |= {
                "index": question.index,
                "qid": question.qid,
                "video": question.video,
                "type": question.type,
                "scores": scores,
                "answer": question.answer,
                "prediction": prediction,
            }
            records.append(record)
        return records

    def write(self, path: Path) -> None:
        """Write the predictions. Raises DiskError."""
        write_lines(path, self.records())

    def table(self) -> str:
        """Accuracy by group, as text."""
        if self.parts:
            return self._table_of_parts()
        if not self.accuracies:
            return f"{self.used} without answers: predictions only"
        rows = []
        num_right = num_scored = 0
        for group, (right, scored) in self.counts.items():
            rows.append(self._row(group, right, scored, self.dropped.get(group, 0)))
            num_right += right
            num_scored += scored
        for group, dropped in self.dropped.items():
            if group not in self.counts:
                rows.append(f"  {one_line(group):<16}{0:>6} used / {dropped} total")
        rows.append(self._row("all", num_right, num_scored, self.num_dropped))
        if "Mean" in self.accuracies:
            rows.append(f"  {'Mean':<16}{'':>15}{self.accuracies['Mean']:8.2%}")
        return "\n".join(rows)

    def _table_of_parts(self) -> str:
        blocks = [f"{name}: {part.used}\n{part.table()}" for name, part in self.parts.items()]
        if "acc" in self.accuracies:
            right = sum(part.num_right for part in self.parts.values())
            blocks.append(self._row("all data sets", right, len(self.scores), self.num_dropped))
        return "\n".join(blocks)

    @property
    def num_right(self) -> int:
        return sum(right for right, _ in self.counts.values())

    def _row(self, group: str, right: int, scored: int, dropped: int) -> str:
        of = f"   {scored} used / {scored + dropped} total" if self.dropped else ""
        return f"  {one_line(group):<16}{right:>6} / {scored:<6}{right / scored:8.2%}{of}"


def evaluate(
    engine: Engine,
    inputs: Inputs,
    split: str,
    config: RunConfig,
    world: World,
    batches: DataLoader[Chunk] | None = None,
) -> Evaluation:
    """Score the questions of a split. A collective: every rank gets the result.

    `batches`: those of `chunk_loader` for this split, where they are used more than once.
    Raises TrainingError for scores that are not finite, Stopped when a rank got a stop signal.
    """
    questions = inputs.questions[split]
    if not questions:
        raise UserError(f"{split}: there are no questions to evaluate; name a split that has some")
    with world.raise_together():
        for dataset in inputs.datasets.values():
            dataset.features.check_unchanged()
        inputs.files.check_unchanged()
    scores = score(engine, inputs, questions, split, config, world, batches=batches)
    return summarize_split(inputs, split, config, scores)


def require_answers(questions: Sequence[Question], split: str) -> None:
    """Raise UserError where there is no accuracy; predictions alone have none."""
    if not questions or any(question.answer is None for question in questions):
        raise UserError(
            f"--split {split}: has no questions with answers, so no accuracy; name another"
        )


def score(
    engine: Engine,
    inputs: Inputs,
    questions: Sequence[Question],
    label: str,
    config: RunConfig,
    world: World,
    num_slots: int | None = None,
    batches: DataLoader[Chunk] | None = None,
) -> list[list[float]]:
    """Per question, the score of each option. A collective: every rank gets the result.

    `label`: what messages call the questions. `num_slots` and `batches`: of `chunk_loader`. A
    score's last bits depend on what else is in its forward, so on the list of questions, and not on
    the number of ranks. Raises as `evaluate` does.
    """
    if batches is None:
        batches = chunk_loader(inputs, questions, config, world, num_slots)
    scored = _score_chunks(engine, batches, len(questions), label, world)
    with world.raise_together():
        inputs.files.check_unchanged()
    scores = _gather(scored, questions, world)
    _require_finite(scores, questions)
    return scores


def chunk_loader(
    inputs: Inputs,
    questions: Sequence[Question],
    config: RunConfig,
    world: World,
    num_slots: int | None = None,
    keep_workers: bool = False,
) -> DataLoader[Chunk]:
    """This rank's batches, for any number of passes. `num_slots`: if they are not the run's."""
    chunks = EvaluationChunks(
        questions,
        inputs.datasets,
        num_slots=config.max_feats if num_slots is None else num_slots,
        rank=world.rank,
        world_size=world.size,
    )
    pin = world.device.type == "cuda"
    return loader(chunks, range(len(chunks)), config.num_workers, pin, keep_workers)


@dataclass(frozen=True, slots=True)
class ScoredChunk:
    """What is kept of a chunk until the end: not its batch, of which pinned memory has no room."""

    questions: tuple[int, ...]
    target_sequences_N: np.ndarray  # the sequence of each target
    losses_N: torch.Tensor  # of the targets, on the device


def _score_chunks(
    engine: Engine, batches: DataLoader[Chunk], num_questions: int, label: str, world: World
) -> list[ScoredChunk]:
    """Run this rank's chunks. All ranks run the same number of forwards, as ZeRO-3 needs."""
    what = f"{num_questions} {label} questions"
    engine.train(False)
    error: UserError | None = None
    last_batch: PackedBatch | None = None
    scored: list[ScoredChunk] = []
    bar = ProgressBar(f"evaluating {what}", len(batches), "batch", world.is_main)
    with torch.no_grad(), bar:
        for number, chunk in enumerate(batches, start=1):
            world.set_phase(f"batch {number} of the {label} evaluation")
            reached("evaluation")
            error = error or chunk.error
            # After an error this rank repeats its last batch: the others need its forwards.
            last_batch = chunk.batch or last_batch
            if last_batch is None:
                raise error or AssertionError("a chunk without a batch carries its error")
            losses = engine.forward(last_batch.to(world.device))  # no sync
            if chunk.batch is not None:
                sequences_N = chunk.batch.target_sequences.numpy().copy()
                scored.append(ScoredChunk(chunk.questions, sequences_N, losses))
            bar.advance()
            if number % CHUNKS_PER_STOP_CHECK == 0:
                world.raise_if_stopped(f"stopped in the evaluation of {what}; start it again")
    with world.raise_together():
        if error is not None:
            raise error
    return scored


def _gather(
    scored: list[ScoredChunk], questions: Sequence[Question], world: World
) -> list[list[float]]:
    """The scores of all ranks.

    Each question is scored by one rank, so summing the ranks' tables changes no bit.
    """
    width = max(len(question.options) for question in questions)
    table = torch.zeros(len(questions), width, dtype=torch.float64)
    times = torch.zeros(len(questions), dtype=torch.int64)
    for chunk in scored:
        sequences_N, losses_N = chunk.target_sequences_N, chunk.losses_N.double().cpu().numpy()
        means = np.bincount(sequences_N, losses_N) / np.bincount(sequences_N)
        start = 0
        for index in chunk.questions:
            stop = start + len(questions[index].options)
            table[index, : stop - start] = torch.from_numpy(means[start:stop])
            times[index] += 1
            start = stop
    world.sum(table)
    assert (world.sum(times) == 1).all(), "every question is scored exactly once"
    return [row[: len(q.options)] for row, q in zip(table.tolist(), questions, strict=True)]


def _require_finite(scores: list[list[float]], questions: Sequence[Question]) -> None:
    bad = [q for s, q in zip(scores, questions, strict=True) if not np.isfinite(s).all()]
    if bad:
        raise TrainingError(
            f"{bad[0].place}: {len(bad)} of {len(questions)} questions have scores that are not "
            f"finite, first question {bad[0].qid} of video '{bad[0].video}'; "
            "try --precision bf16 or fp32, or another checkpoint"
        )


def choose(scores: Sequence[Sequence[float]]) -> list[int]:
    """The option of each question with the lowest score; of equal scores, the first."""
    return [int(np.argmin(row)) for row in scores]


def summarize_split(
    inputs: Inputs, split: str, config: RunConfig, scores: list[list[float]]
) -> Evaluation:
    """`scores`: of all questions of the split, under whatever condition."""
    known = {name: find_dataset(name, config.folder_of(name)) for name in config.dataset_names}
    return summarize(inputs.questions[split], scores, known, inputs.dropped[split])


def summarize(
    questions: Sequence[Question],
    scores: list[list[float]],
    datasets: Mapping[str, Dataset],
    dropped: Sequence[Question] = (),
) -> Evaluation:
    """Accuracies as counts over questions: of all, and of each data set and its groups of types.

    `dropped`: questions that were not scored. With several data sets, `acc` is over the questions
    of all of them, and the names of the others begin with the data set's.
    """
    if len(datasets) == 1:
        return _summarize_one(questions, scores, next(iter(datasets.values())), dropped)
    parts = {}
    for name, dataset in datasets.items():
        of_set = [i for i, question in enumerate(questions) if question.dataset == name]
        parts[name] = _summarize_one(
            [questions[i] for i in of_set],
            [scores[i] for i in of_set],
            dataset,
            [question for question in dropped if question.dataset == name],
        )
    accuracies: dict[str, float] = {}
    if all(part.accuracies for part in parts.values()):
        right = sum(part.num_right for part in parts.values())
        accuracies["acc"] = right / len(questions)
    for name, part in parts.items():
        for group, accuracy in part.accuracies.items():
            accuracies[_free_key(f"{name}_{group}", accuracies)] = accuracy
    num_dropped = {name: part.num_dropped for name, part in parts.items() if part.dropped}
    return Evaluation(questions, scores, accuracies, {}, num_dropped, parts)


def _free_key(key: str, taken: Collection[str]) -> str:
    """`key`, in quotes if it is taken: a_b has a type c, and a has a type b_c."""
    while key in taken or key in RESERVED_KEYS:
        key = f"'{key}'"
    return key


def _summarize_one(
    questions: Sequence[Question],
    scores: list[list[float]],
    dataset: Dataset,
    dropped: Sequence[Question],
) -> Evaluation:
    num_dropped = {}
    for group, types in accuracy_groups(dataset, [q.type for q in dropped]).items():
        num_dropped[group] = sum(q.type in types for q in dropped)
    if any(q.answer is None for q in questions):
        return Evaluation(questions, scores, {}, {}, num_dropped)
    answers = [q.answer for q in questions]
    right = np.array(choose(scores)) == np.array(answers)
    counts, accuracies = {}, {"acc": float(right.sum() / len(right))}
    types_of = np.array([q.type for q in questions])
    for group, types in accuracy_groups(dataset, types_of.tolist()).items():
        members = np.isin(types_of, types)
        counts[group] = (int(right[members].sum()), int(members.sum()))
        accuracies[group] = counts[group][0] / counts[group][1]
    assert sum(scored for _, scored in counts.values()) == len(questions)
    averaged = [accuracies[group] for group in dataset.mean_of if group in counts]
    if averaged:
        accuracies["Mean"] = float(np.mean(averaged))
    return Evaluation(questions, scores, accuracies, counts, num_dropped)


def report(
    evaluation: Evaluation,
    path: Path,
    facts: Mapping[str, str],
    world: World,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write the predictions to `path`, print the table and, as the last line, one JSON object.

    `facts`: what the JSON object begins with, at least the split. `more`: what it ends with.
    """
    with world.raise_together():
        if world.is_main:
            make_folder(path.parent)
            evaluation.write(path)
            split, used = facts["split"], evaluation.used
            log.info(f"{split} accuracy of {used} ({path}):\n{evaluation.table()}")
            log.info(json.dumps({**facts, **evaluation.results(), **(more or {})}))

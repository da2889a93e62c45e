"""The questions that runs have answered: joined over the runs, with their texts and groups."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vico.data.datasets import Dataset, accuracy_groups, find_dataset, read_questions
from vico.data.readers.rows import UNKNOWN
from vico.data.types import Question
from vico.errors import UserError
from vico.report.load import PredictionSet, Run

SetName = tuple[str | None, str]  # (data set, split)
# (video, id, which of several such): ids need not be unique. Then the right answer and the number
# of options: with others it is another question, and is not compared.
Key = tuple[str, str, int, int | None, int]


@dataclass(frozen=True)
class Answer:
    """`scores`: per option the mean loss of its tokens; the lowest is the prediction."""

    prediction: int
    scores: list[float]


@dataclass
class Item:
    """A question, and the answer of each run; None: that run has no line for it."""

    key: Key
    type: str
    answers: list[Answer | None]
    text: Question | None = None

    @property
    def right_answer(self) -> int | None:
        return self.key[3]

    def is_right(self, run: int) -> bool | None:
        """None: the right answer or the run's is unknown."""
        answer = self.answers[run]
        if answer is None or self.right_answer is None:
            return None
        return answer.prediction == self.right_answer


@dataclass
class QuestionSet:
    """`groups`: group of types -> its types, as the data set's accuracies are reported."""

    dataset: str | None
    split: str
    items: list[Item]
    files: list[str]
    groups: dict[str, list[str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.split if self.dataset is None else f"{self.dataset} {self.split}"

    @property
    def with_answer(self) -> list[Item]:
        return [item for item in self.items if item.right_answer is not None]


def join(runs: Sequence[Run]) -> tuple[list[QuestionSet], list[str]]:
    """(the sets of questions of all runs, notes on what is missing)."""
    notes: list[str] = []
    by_set: dict[SetName, dict[int, PredictionSet]] = {}
    known = _known_keys(runs)
    for number, run in enumerate(runs):
        for predictions in run.predictions:
            name = _set_name(predictions, known)
            first = by_set.setdefault(name, {}).setdefault(number, predictions)
            if first is not predictions:
                notes.append(
                    f"{run.name}: {predictions.file} is not shown: {first.file} has answers to "
                    "the same questions"
                )
    sets = []
    for (dataset, split), of_runs in by_set.items():
        joined = _join_set(dataset, split, of_runs, len(runs))
        notes += _add_texts(joined, dataset, split, [runs[number] for number in of_runs])
        sets.append(joined)
    return sets, notes


def _known_keys(runs: Iterable[Run]) -> dict[SetName, set[tuple[str, str]]]:
    known: dict[SetName, set[tuple[str, str]]] = {}
    for run in runs:
        for predictions in run.predictions:
            if predictions.dataset is not None:
                name = (predictions.dataset, predictions.split)
                known.setdefault(name, set()).update(map(_ids, predictions.records))
    return known


def _ids(record: dict[str, Any]) -> tuple[str, str]:
    return record["video"], record["qid"]


def _set_name(predictions: PredictionSet, known: dict[SetName, set[tuple[str, str]]]) -> SetName:
    """Where no file names the data set: the one of another run that has all these questions."""
    if predictions.dataset is None:
        own = set(map(_ids, predictions.records))
        for (dataset, split), ids in known.items():
            if own and split == predictions.split and own <= ids:
                return dataset, split
    return predictions.dataset, predictions.split


def _join_set(
    dataset: str | None, split: str, of_runs: dict[int, PredictionSet], num_runs: int
) -> QuestionSet:
    items: dict[Key, Item] = {}
    for number, predictions in of_runs.items():
        seen: Counter[tuple[str, str]] = Counter()
        for record in predictions.records:
            ids, scores = _ids(record), record["scores"]
            key: Key = (*ids, seen[ids], record.get("answer"), len(scores))
            seen[ids] += 1
            type_name = record.get("type")
            type_name = type_name if isinstance(type_name, str) else UNKNOWN
            item = items.setdefault(key, Item(key, type_name, [None] * num_runs))
            item.answers[number] = Answer(record["prediction"], scores)
    files = sorted({predictions.file for predictions in of_runs.values()})
    return QuestionSet(dataset, split, list(items.values()), files)


def _add_texts(
    joined: QuestionSet, dataset: str | None, split: str, runs: Sequence[Run]
) -> list[str]:
    """Add the groups of types and, where the data set is at hand, the texts. Returns notes."""
    types = [item.type for item in joined.items]
    joined.groups = accuracy_groups(_PLAIN, types)
    if dataset is None:
        return [f"{joined.name}: no file names its data set, so its questions are shown by id"]
    faults = []
    folders = dict.fromkeys(map(_data_path, runs))
    for data_path in folders:
        if data_path is None:
            continue
        try:
            described = find_dataset(dataset, data_path / dataset)
            joined.groups = accuracy_groups(described, types)
            questions = read_questions(dataset, data_path / dataset, split)
        except UserError as error:
            faults.append(str(error))
            continue
        return _match(joined, questions)
    reason = faults[0] if faults else "no run names its data_path"
    return [f"{joined.name}: the texts of its questions are not shown: {reason}"]


_PLAIN = Dataset(lambda folder, split: folder, lambda folder, split: [])  # each type is a group


def _data_path(run: Run) -> Path | None:
    value = run.settings.get("data_path")
    return Path(value) if isinstance(value, str) and "\0" not in value else None


def _match(joined: QuestionSet, questions: Iterable[Question]) -> list[str]:
    """Give each item its text. A note counts those that the data set does not have so."""
    seen: Counter[tuple[str, str]] = Counter()
    by_key: dict[Key, Question] = {}
    for question in questions:
        ids = (question.video, question.qid)
        by_key[(*ids, seen[ids], question.answer, len(question.options))] = question
        seen[ids] += 1
    for item in joined.items:
        item.text = by_key.get(item.key)
    if lacking := sum(item.text is None for item in joined.items):
        return [
            f"{joined.name}: {lacking} of {len(joined.items)} questions are shown by id: the data "
            "set does not have them with this answer and number of options"
        ]
    return []

"""What an evaluation counts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vico.data.datasets import DATASETS
from vico.data.types import Question
from vico.distributed.world import World
from vico.errors import TrainingError
from vico.train.evaluate import _require_finite, report, summarize
from vico.train.loop import is_best

NEXTQA = {"nextqa": DATASETS["nextqa"]}


def test_an_accuracy_is_a_count_of_questions() -> None:
    """Not the mean over groups or batches, which here would be another number."""
    types = ["CW"] * 5 + ["TN"]
    questions = [Question(i, str(i), "v", kind, "q", ("a", "b"), 0) for i, kind in enumerate(types)]
    scores = [[0.0, 1.0]] * 5 + [[1.0, 0.0]]
    evaluation = summarize(questions, scores, NEXTQA)
    assert evaluation.accuracies["acc"] == 5 / 6
    assert evaluation.counts["C"] == (5, 5) and evaluation.counts["T"] == (0, 1)


def test_of_equals_the_first_is_taken() -> None:
    """An option of equal scores, counted as it is written; and an epoch of equal accuracies."""
    options = ("a", "b", "c")
    question = Question(0, "0", "v", "CW", "q", options, 1)
    evaluation = summarize([question], [[1.0, 0.5, 0.5]], NEXTQA)
    assert evaluation.predictions == [1] and evaluation.accuracies["acc"] == 1
    assert is_best(0.5, None) and is_best(0.5, 0.4)
    assert not is_best(0.5, 0.5) and not is_best(0.5, 0.6)


def test_questions_without_subtitles_are_counted() -> None:
    """Beside every result, as the questions are that were left out."""
    questions = [
        Question(i, str(i), "v", "Castle", "q", ("a", "b"), 0, lacks_subtitles=i < 2)
        for i in range(3)
    ]
    evaluation = summarize(questions, [[0.0, 1.0]] * 3, {"tvqa": DATASETS["tvqa"]})
    assert evaluation.used == "3 questions, 2 of them without subtitles"
    assert evaluation.results() == {"n": 3, "n_total": 3, "n_without_subtitles": 2} | {
        "acc": 1.0,
        "Castle": 1.0,
    }
    evaluation = summarize(questions[2:], [[0.0, 1.0]], {"tvqa": DATASETS["tvqa"]}, questions[:2])
    assert evaluation.used == "1 used / 3 total questions"
    assert "n_without_subtitles" not in evaluation.results()


def test_the_table_of_several_data_sets() -> None:
    """One row covers them all; without answers there is none."""
    for answer in (0, None):
        questions = [
            Question(i, str(i), "v", kind, "q", ("a", "b"), answer, dataset=name)
            for i, (name, kind) in enumerate([("nextqa", "CW"), ("tvqa", "Castle")])
        ]
        named = {name: DATASETS[name] for name in ("nextqa", "tvqa")}
        table = summarize(questions, [[0.0, 1.0], [1.0, 0.0]], named).table()
        assert ("all data sets" in table) == (answer is not None)
        if answer is not None:
            last = table.splitlines()[-1].split()
            assert last == ["all", "data", "sets", "1", "/", "2", "50.00%"]


def test_what_an_evaluation_says_and_writes(tmp_path: Path) -> None:
    """By group, with the dropped questions; the mean over groups; a line per question."""

    def ask(index: int, kind: str, answer: int | None = 0) -> Question:
        return Question(index, f"q{index}", "v", kind, "q", ("a", "b"), answer, dataset="star")

    star = {"star": DATASETS["star"]}
    questions = [ask(0, "Interaction"), ask(1, "Interaction", 1), ask(2, "Sequence")]
    dropped = [ask(3, "Interaction"), ask(4, "Feasibility")]
    scores = [[0.25, 1.0], [0.5, 2.0], [1.0, 3.0]]
    evaluation = summarize(questions, scores, star, dropped)
    assert [line.split() for line in evaluation.table().splitlines()] == [
        "Interaction 1 / 2 50.00% 2 used / 3 total".split(),
        "Sequence 1 / 1 100.00% 1 used / 1 total".split(),
        "Feasibility 0 used / 1 total".split(),
        "all 2 / 3 66.67% 3 used / 5 total".split(),
        ["Mean", "75.00%"],
    ]
    assert evaluation.loss == (0.25 + 2.0 + 1.0) / 3
    assert evaluation.results() == {"n": 3, "n_total": 5, "acc": 2 / 3, "Mean": 0.75} | {
        "Interaction": 0.5,
        "Sequence": 1.0,
    }
    evaluation.write(tmp_path / "predictions.jsonl")
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    written = [json.loads(line) for line in lines]
    assert written == evaluation.records() and len(written) == 3
    assert written[1] == {"index": 1, "qid": "q1", "video": "v", "type": "Interaction"} | {
        "scores": [0.5, 2.0],
        "answer": 1,
        "prediction": 0,
    }
    unanswered = summarize([ask(0, "Sequence", None)], [[1.0, 2.0]], star)
    assert unanswered.table() == "1 questions without answers: predictions only"
    assert unanswered.loss is None and unanswered.predictions == [0]
    both = [ask(0, "Sequence"), replace(ask(0, "CW"), dataset="nextqa")]
    several = summarize(both, scores[:2], {**star, **NEXTQA})
    assert [record["dataset"] for record in several.records()] == ["star", "nextqa"]


def test_scores_that_are_not_finite_are_refused() -> None:
    questions = [Question(i, f"q{i}", "v", "X", "q", ("a", "b"), 0, place="p") for i in range(3)]
    _require_finite([[1.0, 2.0]] * 3, questions)
    with pytest.raises(TrainingError, match=r"^p: 2 of 3 questions have .* first question q1 of"):
        _require_finite([[1.0, 2.0], [float("nan"), 1.0], [1.0, float("inf")]], questions)


def test_each_data_set_has_its_own_results() -> None:
    """Questions, scores and what was dropped are those of the set; a key taken is quoted."""
    asked = [("nextqa", "CW", 0), ("a", "b_c", 0), ("a_b", "c", 1), ("a", "b_c", 1), ("a", "x", 0)]
    questions = [
        Question(i, f"q{i}", "v", kind, "q", ("a", "b"), answer, dataset=name)
        for i, (name, kind, answer) in enumerate(asked)
    ]
    sets = {**NEXTQA, "a": DATASETS["tvqa"], "a_b": DATASETS["tvqa"]}
    scores = [[0.0, 1.0], [1.0, 2.0], [3.0, 2.0], [0.5, 4.0], [5.0, 2.0]]
    evaluation = summarize(questions[:4], scores[:4], sets, [questions[4]])
    assert evaluation.accuracies == {
        "acc": 3 / 4,
        "nextqa_acc": 1.0,
        "nextqa_C": 1.0,
        "a_acc": 0.5,
        "a_b_c": 0.5,
        "a_b_acc": 1.0,
        "'a_b_c'": 1.0,
    }
    assert {name: part.num_dropped for name, part in evaluation.parts.items()} == {
        "nextqa": 0,
        "a": 1,
        "a_b": 0,
    }
    assert {name: part.num_right for name, part in evaluation.parts.items()} == {
        "nextqa": 1,
        "a": 1,
        "a_b": 1,
    }
    assert evaluation.parts["a"].scores == [[1.0, 2.0], [0.5, 4.0]]
    lines = evaluation.table().splitlines()
    heads = [line for line in lines if not line.startswith(" ")]
    assert heads == ["nextqa: 1 questions", "a: 2 used / 3 total questions", "a_b: 1 questions"]
    assert lines[-1].split() == "all data sets 3 / 4 75.00% 4 used / 5 total".split()
    assert evaluation.loss == (0.0 + 1.0 + 2.0 + 4.0) / 4


def test_the_report_of_an_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rank 0 writes the predictions and says the table; the last line is one JSON object."""
    question = Question(0, "q", "v", "CW", "why", ("a", "b"), 0)
    evaluation = summarize([question], [[0.5, 1.0]], NEXTQA)
    path, facts = tmp_path / "new" / "predictions_test.jsonl", {"split": "test", "resume": "c"}
    world = World(0, 1, torch.device("cpu"), None)
    report(evaluation, path, facts, replace(world, rank=1))
    assert not path.parent.exists() and capsys.readouterr().out == ""
    report(evaluation, path, facts, world, {"cognition": {"tokens": 3}})
    assert json.loads(path.read_text()) == evaluation.records()[0]
    *table, last = capsys.readouterr().out.splitlines()
    assert table == [f"test accuracy of 1 questions ({path}):", *evaluation.table().splitlines()]
    assert list(json.loads(last).items()) == [
        ("split", "test"),
        ("resume", "c"),
        ("n", 1),
        ("n_total", 1),
        ("acc", 1.0),
        ("C", 1.0),
        ("cognition", {"tokens": 3}),
    ]
    report(evaluation, path, facts, world)
    assert "cognition" not in json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_table_without_dropped_questions() -> None:
    """No row says how many are used; a group that was dropped as a whole has none."""
    questions = [Question(i, str(i), "v", kind, "q", ("a", "b"), 0) for i, kind in enumerate("CT")]
    evaluation = summarize(questions, [[0.0, 1.0], [1.0, 0.0]], {"my": DATASETS["tvqa"]})
    assert evaluation.table().splitlines() == [
        "  C                    1 / 1      100.00%",
        "  T                    0 / 1        0.00%",
        "  all                  1 / 2       50.00%",
    ]
    assert (evaluation.num_dropped, evaluation.num_total, evaluation.used) == (0, 2, "2 questions")


def test_one_question_without_answer_is_enough_for_no_accuracy() -> None:
    """The predictions are there; of the others there is a loss."""
    questions = [
        Question(i, str(i), "v", "CW", "q", ("a", "b"), a) for i, a in enumerate((1, None))
    ]
    evaluation = summarize(questions, [[0.0, 1.0], [1.0, 0.0]], NEXTQA)
    assert (evaluation.accuracies, evaluation.counts) == ({}, {})
    assert (evaluation.predictions, evaluation.loss) == ([0, 1], 1.0)

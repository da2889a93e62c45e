"""What an evaluation counts."""

from vico.data.datasets import DATASETS
from vico.data.types import Question
from vico.train.evaluate import summarize
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

"""What an evaluation counts."""

from vico.data.types import Question
from vico.train.evaluate import summarize


def test_an_accuracy_is_a_count_of_questions() -> None:
    """Not the mean over groups or batches, which here would be another number."""
    types = ["CW"] * 5 + ["TN"]
    questions = [Question(i, str(i), "v", kind, "q", ("a", "b"), 0) for i, kind in enumerate(types)]
    scores = [[0.0, 1.0]] * 5 + [[1.0, 0.0]]
    evaluation = summarize(questions, scores, "nextqa")
    assert evaluation.accuracies["acc"] == 5 / 6
    assert evaluation.counts["C"] == (5, 5) and evaluation.counts["T"] == (0, 1)

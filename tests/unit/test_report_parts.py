"""Parts of the report: its tables as HTML, joined questions, groups, and gates over time."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vico.report.frames import _urgency, ordered_videos
from vico.report.gates import opening_charts
from vico.report.load import Caption, GatesOverTime, PredictionSet, Run
from vico.report.markup import element, table, to_html
from vico.report.questions import Answer, Item, QuestionSet, join
from vico.report.results import ALL, accuracies, confusions, differences
from vico.report.statistics import Share


def run_of(name: str, **parts: Any) -> Run:
    return Run(name, Path(name), **parts)


# ---- HTML ---------------------------------------------------------------------------------------


def test_a_table_as_html() -> None:
    """A heading in each row, and nothing in a text becomes a tag."""
    made = table("a & b", ["type", "n"], [["a&b", element("i", "x")], ["c", "2"]], "settings")
    assert to_html(made) == (
        '<div><p class="caption">a &amp; b</p>'
        '<div class="scroll" tabindex="0" role="region" aria-label="a &amp; b">'
        '<table class="settings" aria-label="a &amp; b">'
        '<thead><tr><th scope="col">type</th><th scope="col">n</th></tr></thead>'
        '<tbody><tr><th scope="row">a&amp;b</th><td><i>x</i></td></tr>'
        '<tr><th scope="row">c</th><td>2</td></tr></tbody></table></div></div>'
    )
    assert '<table class=""' in to_html(table("x", ["a"], []))


# ---- questions ----------------------------------------------------------------------------------


def line(video: str, qid: str, prediction: int, answer: int | None = 0, **more: Any) -> Any:
    record = {"video": video, "qid": qid, "prediction": prediction, "answer": answer}
    return {**record, "scores": [1.0, 0.5], "type": "CW", **more}


def predictions(*lines: Any, dataset: str | None = None, file: str = "p.jsonl") -> PredictionSet:
    return PredictionSet(dataset, "val", file, list(lines))


def test_answers_of_runs_are_joined() -> None:
    """By video, id and which of several such; another right answer is another question."""
    one = predictions(line("v", "1", 1), line("v", "1", 0), line("w", "2", 1, type=3))
    two = predictions(line("v", "1", 0), line("v", "1", 0, answer=1), file="a.jsonl")
    runs = [run_of("a", predictions=[one]), run_of("b", predictions=[two])]
    (found,), _ = join(runs)
    assert found.files == ["a.jsonl", "p.jsonl"] and found.name == "val"
    assert [(item.key, item.type) for item in found.items] == [
        (("v", "1", 0, 0, 2), "CW"),
        (("v", "1", 1, 0, 2), "CW"),
        (("w", "2", 0, 0, 2), "(unknown)"),
        (("v", "1", 1, 1, 2), "CW"),
    ]
    given = []
    for item in found.items:
        given.append([answer and answer.prediction for answer in item.answers])
    assert given == [[1, 0], [0, None], [1, None], [None, 0]]
    assert found.items[0].answers[0] == Answer(1, [1.0, 0.5])
    assert [found.items[0].is_right(run) for run in (0, 1)] == [False, True]
    assert found.items[1].is_right(1) is None and found.items[3].is_right(1) is False


def test_predictions_that_name_no_data_set() -> None:
    """They are of the one of another run that has all these questions, on the same split."""
    known = predictions(line("v", "1", 0), line("v", "2", 0), dataset="my")
    for lines, names in (
        ([line("v", "2", 1)], ["my val"]),
        ([line("v", "2", 1), line("v", "3", 1)], ["my val", "val"]),
        ([], ["my val", "val"]),
    ):
        runs = [run_of("a", predictions=[known]), run_of("b", predictions=[predictions(*lines)])]
        sets, _ = join(runs)
        assert [questions.name for questions in sets] == names
    again = predictions(line("v", "1", 1), dataset="my", file="again.jsonl")
    sets, notes = join([run_of("a", predictions=[known, again])])
    assert len(sets[0].items) == 2
    assert notes == [
        "a: again.jsonl is not shown: p.jsonl has answers to the same questions",
        "my val: the texts of its questions are not shown: no run names its data_path",
    ]


def item(kind: str, *given: int | None, answer: int | None = 0, video: str = "v") -> Item:
    answers = [None if one is None else Answer(one, [0.0]) for one in given]
    return Item((video, "q", 0, answer, 3), kind, answers)


def set_of(groups: dict[str, list[str]], *items: Item) -> QuestionSet:
    return QuestionSet("my", "val", list(items), ["p.jsonl"], groups)


def test_rows_of_accuracies() -> None:
    """A group with several types has its types below it; one that is all questions has no row."""
    items = [item("CW", 0, 1), item("CH", 1, None), item("T", 0, 0), item("X", 0, 0, answer=None)]
    groups = {"C": ["CW", "CH"], "T": ["T"], "X": ["X"]}
    rows = [(row.name, row.is_part, row.shares) for row in accuracies(set_of(groups, *items), 2)]
    assert rows == [
        (ALL, False, [Share(2, 3), Share(1, 2)]),
        ("C", False, [Share(1, 2), Share(0, 1)]),
        ("CW", True, [Share(1, 1), Share(0, 1)]),
        ("CH", True, [Share(0, 1), None]),
        ("T", False, [Share(1, 1), Share(1, 1)]),
    ]
    whole = accuracies(set_of({"T": ["T"]}, items[2]), 2)
    assert [row.name for row in whole] == [ALL]
    assert accuracies(set_of(groups, items[3]), 2) == []


def test_differences_of_each_two_runs() -> None:
    """Of groups where there are several; a run without answers in common has none."""
    items = [item("C", 0, 1, None), item("T", 0, 0, 0)]
    found = differences(set_of({"C": ["C"], "T": ["T"]}, *items), 3)
    assert [(one.first, one.second, one.group, one.paired.n) for one in found] == [
        (0, 1, ALL, 2),
        (0, 1, "C", 1),
        (0, 1, "T", 1),
        (0, 2, ALL, 1),
        (0, 2, "T", 1),
        (1, 2, ALL, 1),
        (1, 2, "T", 1),
    ]
    assert found[0].paired.only_first == 1 and found[0].paired.both == 1
    alone = differences(set_of({"C": ["C", "T"]}, *items), 2)
    assert [one.group for one in alone] == [ALL]


def test_confusions_leave_out_what_is_unknown() -> None:
    items = [item("C", 2, None), item("C", 0, 1, answer=1), item("C", 1, 1, answer=None)]
    assert confusions(set_of({}, *items), 2) == [
        [[0, 0, 1], [1, 0, 0], [0, 0, 0]],
        [[0, 0], [0, 1]],
    ]


def test_videos_to_look_at_first() -> None:
    """Of answers that differ, then of wrong ones, then the others, then of captions alone."""
    items = [
        item("C", 0, 0, video="right"),
        item("C", 1, 1, video="wrong"),
        item("C", 0, 1, video="differs"),
        item("C", 0, 1, answer=None, video="differs too"),
        item("C", None, 1, video="wrong too"),
        item("C", 1, 1, answer=None, video="unknown"),
    ]
    assert [_urgency(one) for one in items] == [2, 1, 0, 0, 1, 2]
    captions = [Caption(None, "val", video, "", []) for video in ("only here", "right")]
    order = ordered_videos([run_of("a", captions=captions)], [set_of({}, *items)])
    assert order == [
        "differs",
        "differs too",
        "wrong",
        "wrong too",
        "right",
        "unknown",
        "only here",
    ]


# ---- gates --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_steps", "num_layers"), [(2, 1), (60, 17), (61, 33)])
def test_gates_over_time(num_steps: int, num_layers: int) -> None:
    """A column per evaluation, of many the ends and some between; a row per head."""
    steps, layers = [1000.0 * i for i in range(num_steps)], list(range(5, 5 + num_layers))
    values = np.arange(num_steps * num_layers * 2, dtype=float).reshape(num_steps, num_layers, 2)
    gates = GatesOverTime(steps, layers, {"gate1": values / 1e6, "gate2": -values})
    first, second = opening_charts(run_of("a"), gates)
    assert first.title == "Adapter gates (tanh of gate1) over time: a"
    (trace,) = second.data
    heads = [f"layer {layer}, head {i}" for layer in layers for i in (0, 1)]
    columns = min(num_steps, 60)
    assert trace["y"] == heads and len(trace["x"]) == columns
    assert (trace["x"][0], trace["x"][-1]) == ("0", f"{steps[-1]:,.0f}")
    assert [row[0] for row in trace["z"]] == (-values[0].flatten()).tolist()
    assert [row[-1] for row in trace["z"]] == (-values[-1].flatten()).tolist()
    assert (trace["zmin"], trace["zmax"]) == (-values.max(), values.max())
    every = {1: 1, 17: 2, 33: 3}[num_layers]  # layers between two ticks
    assert second.layout["yaxis"]["ticktext"] == [str(layer) for layer in layers[::every]]
    assert second.layout["yaxis"]["tickvals"] == [f"layer {n}, head 0" for n in layers[::every]]
    assert second.layout["xaxis"]["type"] == second.layout["yaxis"]["type"] == "category"
    assert second.height == 170 + min(400, 16 * num_layers) and not second.layout["showlegend"]
    left_out = " 1 evaluations between them are left out." if num_steps == 61 else ""
    assert second.caption.endswith(f"From log.txt.{left_out}")


def test_one_evaluation_is_no_time() -> None:
    values = np.ones((1, 2, 2))
    gates = GatesOverTime([3.0], [0, 1], {"gate1": values, "gate2": values})
    assert opening_charts(run_of("a"), gates) == []

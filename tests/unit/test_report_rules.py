"""What the report reads of logs and file names, and the numbers it shows, rule by rule."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.errors import refusal
from vico.report import load, page, sections
from vico.report.load import Caption, Run, accuracy_of, number, run_names, trained_datasets
from vico.report.statistics import Share


def run_of(name: str = "a", **fields: Any) -> Run:
    return Run(name, Path("runs") / name, **fields)


def text_of(part: Any) -> str:
    return "".join(part.itertext())


# ---- numbers of logs ----------------------------------------------------------------------------


def test_numbers_that_can_be_drawn() -> None:
    for value in (0, -3, 0.5, 9.9e199, -9.9e199):
        assert number(value) == value and isinstance(number(value), float)
    assert number(10**199) == 1e199
    for other in (True, False, None, "1", [1], math.nan, math.inf, 1e200, -1e200, 10**400):
        assert number(other) is None


def test_accuracies_of_a_line() -> None:
    """Of val, else of test; with the number of questions that belongs to it."""
    assert accuracy_of({"val_acc": 1, "val_n": 4, "test_acc": 0.5}) == (1.0, 4.0)
    assert accuracy_of({"val_acc": 1.01, "test_acc": 0, "test_n": 3}) == (0.0, 3.0)
    assert accuracy_of({"val_acc": 0.25}) == (0.25, None)
    mixed = {"val_acc": 0.5, "val_n": 9, "val_my_acc": 0.25, "val_my_n": 4}
    assert accuracy_of(mixed, "my_acc") == (0.25, 4.0)
    for line in ({}, {"val_acc": -0.01}, {"val_acc": "1"}, {"acc": 1}):
        assert accuracy_of(line) is None


PARTS = st.lists(st.sampled_from("ab"), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.sets(PARTS.map(tuple), min_size=1, max_size=4))
def test_names_are_the_shortest_that_differ(folders: set[tuple[str, ...]]) -> None:
    """Ends of the paths, each with as many parts where there are so many."""
    paths = [Path("/", *parts) for parts in sorted(folders)]
    names = run_names(paths)
    assert all(str(path).endswith(name) for path, name in zip(paths, names, strict=True))
    assert len(set(names)) == len(names)
    longest = max(len(Path(name).parts) for name in names)
    for path, name in zip(paths, names, strict=True):
        assert Path(name).parts == path.parts[-longest:]
    if longest > 1:  # one part less does not tell all apart
        assert len({path.parts[1 - longest :] for path in paths}) < len(paths)


def test_data_sets_of_settings() -> None:
    assert trained_datasets({"dataset": "star:2, my"}) == ["star", "my"]
    unknown: list[dict[str, Any]] = [{}, {"dataset": None}, {"dataset": [3]}, {"dataset": "a,a"}]
    assert [trained_datasets(saved) for saved in unknown] == [[]] * 4


def test_lines_go_to_their_data_set() -> None:
    """Their own, else the only one that there is."""
    lines: list[dict[str, Any]] = [{"dataset": "star"}, {}, {"dataset": 3}, {"dataset": "star"}]
    assert load._by_dataset(lines, ["my"]) == {
        "star": [lines[0], lines[3]],
        "my": [lines[1]],
        None: [lines[2]],
    }
    for names in ([], ["my", "star"]):
        assert load._by_dataset(lines[1:2], names) == {None: [lines[1]]}


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("predictions_val.jsonl", (None, "val")),
        ("predictions_star_test.jsonl", ("star", "test")),
        ("predictions_my_own+star_val.jsonl", ("my_own+star", "val")),
        ("predictions_.jsonl", None),
        ("predictions_val.jsonl.tmp", None),
        ("my_predictions_val.jsonl", None),
    ],
)
def test_names_of_predictions(name: str, parts: tuple[str | None, str] | None) -> None:
    match = load.PREDICTIONS.fullmatch(name)
    found = None if match is None else (match["datasets"], match["split"])
    assert found == parts


@pytest.mark.parametrize(
    "name",
    "args.json log.txt steps.jsonl cognition.json predictions_a.jsonl captions_x_a.jsonl".split(),
)
def test_any_file_of_a_run_makes_one(name: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    said = f"{tmp_path}: {load.NO_RUN}; name the --output_dir of a run"
    assert refusal(load._require_run, tmp_path) == said
    (tmp_path / name).touch()
    load._require_run(tmp_path)
    (tmp_path / "state.json").touch()
    assert refusal(load._require_run, tmp_path) == (
        f"{tmp_path}: is a checkpoint; name the folder of its run, {tmp_path.parent}"
    )


def test_records_in_the_order_of_steps(tmp_path: Path) -> None:
    """Of a repeated step the last one; what is lacking or damaged is noted."""
    path, notes = tmp_path / "steps.jsonl", list[str]()
    assert load._records(path, "the curves", notes) == []
    path.touch()
    assert load._records(path, "the curves", notes) == []
    lines = [{"step": 3}, {"step": 1, "x": 1}, {"step": 1, "x": 2}]
    path.write_text("\n".join([*map(json.dumps, lines), "{", "7"]))
    assert load._records(path, "the curves", notes) == [{"step": 1, "x": 2}, {"step": 3}]
    assert notes == [
        "no steps.jsonl, so the curves are not shown",
        "steps.jsonl has no line yet, so the curves are not shown",
        "steps.jsonl: 2 damaged line(s) left out",
    ]


def test_lines_of_captions() -> None:
    def caption(**changes: Any) -> Caption:
        line = {"dataset": "my", "video": "v", "caption": "a man", "references": ["a", "b"]}
        return load._caption(Path("x/captions_val.jsonl"), "val", json.dumps(line | changes), 7)

    assert caption(is_cut=True) == Caption("my", "val", "v", "a man", ["a", "b"], True)
    assert caption(dataset=3, references=[], is_cut=1) == Caption(None, "val", "v", "a man", [])
    wrong: list[dict[str, Any]] = [{"video": 3}, {"caption": None}, {"references": "a"}]
    wrong += [{"references": ["a", 3]}, {"references": None}]
    for change in wrong:
        assert refusal(caption, **change) == (
            "captions_val.jsonl:7: 'video', 'caption' and each of 'references' must be texts"
        )
    said = refusal(load._caption, Path("captions_val.jsonl"), "val", "[]", 2)
    assert said == "captions_val.jsonl:2: a list where an object is expected"


def test_notes_have_the_name_of_their_run() -> None:
    runs = [run_of("a", notes=["x", "y"]), run_of("b", notes=["z"])]
    assert load.all_notes(runs) == ["a: x", "a: y", "b: z"]


def gates(*heads: float, layers: tuple[str, ...] = ("2", "10")) -> dict[str, Any]:
    by_layer = {layer: list(heads) for layer in layers}
    return {"gate1": by_layer, "gate2": by_layer}


def test_gates_of_a_log() -> None:
    """Of the shape that the last whole line has."""
    lines: list[dict[str, Any]] = [
        {"step": 1, "gates": gates(0.5)},
        {"step": 2, "gates": gates(0.5, 1.0)},
        {"step": 3, "gates": gates(0.25, 2.0, layers=("3", "10"))},
        {"step": 4, "gates": {**gates(1.0, 1.0), "gate2": gates(1.0)["gate2"]}},
        {"step": 5},
        {"step": 6, "gates": gates(1.5, 3.0)},
    ]
    notes: list[str] = []
    found = load._gates_over_time(lines, notes)
    assert found is not None and (found.steps, found.layers) == ([2, 6], [2, 10])
    expected = np.array([[[0.5, 1.0]] * 2, [[1.5, 3.0]] * 2])
    assert all((found.values[kind] == expected).all() for kind in ("gate1", "gate2"))
    assert notes == ["log.txt: the gates of 4 line(s) are absent or damaged"]
    assert load._gates_over_time([], notes) is None and len(notes) == 1
    assert load._gates_over_time(lines[4:5], notes) is None
    assert notes[1].startswith("log.txt has no gates (it is of an earlier version), so how they")


# ---- what is shown ------------------------------------------------------------------------------


def test_small_words() -> None:
    assert [sections.p_text(p) for p in (0.00099, 0.001, 0.0456, 1.0)] == [
        "< 0.001",
        "0.001",
        "0.046",
        "1.000",
    ]
    assert sections.percent(None) == "–"
    low, high = Share(3, 4).interval
    assert sections.percent(Share(3, 4)) == f"75.0 % ({100 * low:.1f} to {100 * high:.1f})"


def test_the_best_epoch() -> None:
    """Of equal ones the first; lines without an accuracy are passed over."""
    accuracies = [0.5, None, 0.75, 0.75, 0.25]
    epochs = [{"step": 10 * i, "val_acc": acc} for i, acc in enumerate(accuracies)]
    assert sections.best_epoch(run_of(epochs=epochs)) == (0.75, 20)
    assert sections.best_epoch(run_of(epochs=epochs[1:2])) is None
    assert sections.best_epoch(run_of(epochs=[{"step": 3, "val_acc": 0}])) == (0.0, 3)


def test_cards_of_runs() -> None:
    nothing, whole = run_of("b"), run_of("a", epochs=[{"step": 1200, "val_acc": 0.5}])
    assert [text_of(part) for part in sections._card(0, nothing, [], 1)] == [
        "b",
        "no accuracy yet",
        "runs/b",
    ]
    stepped = run_of("a", epochs=whole.epochs, steps=[{"step": 1}, {"step": 12345}])
    assert [text_of(part) for part in sections._card(1, stepped, [], 2)] == [
        "a",
        "50.0 %",
        "best validation accuracy, at step 1,200",
        "12,345 steps logged",
        "runs/a",
    ]


def test_rows_of_speed() -> None:
    """Medians of seconds and of evaluations, sums of tokens, peaks of memory."""
    steps = [
        {"step": 1, "step_seconds": 1.0, "real_tokens": 100},
        {"step": 2, "step_seconds": 7.0, "real_tokens": 300},
        {"step": 3, "step_seconds": 2.0, "real_tokens": "x"},
    ]
    performance = {
        "perf/eval_questions_per_second": [10.0, 90.0, 20.0],
        "memory/host_peak_gib": [1.5, 3.25, 2.0],
        "memory/device_peak_allocated_gib": [4.0, 5.125],
        "memory/device_peak_reserved_gib": [9.0],
    }
    whole = sections._speed_row(0, run_of(steps=steps, performance=performance))
    assert whole[1:] == ["3", "2", "40", "0.0028", "20", "3.25", "5.12"]
    assert sections._speed_row(0, run_of(steps=[{"step": 1}]))[1:] == ["1", *["–"] * 6]
    assert sections.speed_table([run_of()]) is None
    shown = sections.speed_table([run_of("a"), run_of("b", steps=steps)])
    assert shown is not None and "b3240" in text_of(shown) and "a0" not in text_of(shown)


def test_settings_that_differ() -> None:
    """A setting that one run lacks differs; paths of the runs themselves do not count."""
    first = {"lr": 0.5, "output_dir": "a", "run": "1", "text": ["x"], "model": "7B"}
    second = {"lr": 0.5, "output_dir": "b", "run": "2", "text": ["y"], "seed": 3, "model": "7B"}
    changed, every = sections.setting_tables(
        [run_of("a", settings=first), run_of("empty"), run_of("b", settings=second)]
    )
    assert changed is not None and every is not None
    assert text_of(changed).endswith('settingabtext["x"]["y"]seed–3')
    assert "empty" not in text_of(every) and "output_dirab" in text_of(every)
    assert text_of(every).endswith('lr0.50.5output_dirabrun12text["x"]["y"]model7B7Bseed–3')
    same, every = sections.setting_tables([run_of("a", settings=first)])
    assert same is None and every is not None
    assert sections.setting_tables([run_of("a")]) == (None, None)


def test_captions_of_several_runs() -> None:
    """A record per video, with each run's text in its place, and each reference once."""
    first = [Caption("my", "val", "v", "a man", ["x"], True), Caption("my", "test", "v", "b", [])]
    second = [Caption("my", "val", "v", "a dog", ["y", "x"])]
    found = page._captions([run_of("a", captions=first), run_of("b", captions=second)])
    assert found == [
        {
            "dataset": "my",
            "split": "val",
            "video": "v",
            "references": ["x", "y"],
            "texts": ["a man", "a dog"],
            "cut": [True, False],
        },
        {
            "dataset": "my",
            "split": "test",
            "video": "v",
            "references": [],
            "texts": ["b", None],
            "cut": [False, False],
        },
    ]


def test_questions_for_the_scripts() -> None:
    """Scores have five digits; a run without an answer has null."""
    answers = [SimpleNamespace(prediction=1, scores=[1.23456789, 0.5]), None]
    text = SimpleNamespace(question="why", options=("a", "b"))
    item: Any = SimpleNamespace(key=("v", "q", 0, 1, 2), type="CW", answers=answers, text=text)
    expected = {"set": 4, "video": "v", "qid": "q", "type": "CW", "question": "why"}
    expected |= {"options": ("a", "b"), "numOptions": 2, "answer": 1}
    expected["answers"] = [[1, [1.2346, 0.5]], None]
    assert page._question(item, 4) == expected
    item.text = None
    assert page._question(item, 4) == expected | {"question": None, "options": None}
    assert page._safe_json({"a": "</script>é"}) == '{"a":"\\u003c/script>\\u00e9"}'

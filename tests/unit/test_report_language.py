"""The section of the report on language: what training and `vico cognition` have measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.asked_world import NUM_QUESTIONS, AskedWorld
from support.toy_dataset import ToyData
from vico.cli.main import main
from vico.report.language import language_tables
from vico.report.load import Run, load_runs
from vico.report.markup import to_html

PART = {
    "tokens": 1200,
    "perplexity_frozen": 15.0,
    "perplexity_adapted": 16.5,
    "kl_per_token": 0.125,
    "top1_agreement": 0.875,
}


def run(name: str, files: dict[str, Any] | None = None, **more: Any) -> Run:
    epochs = [] if files is None else [{"step": 40, "cognition": {"files": files}}]
    return Run(name, Path(name), epochs=epochs, **more)


def shown(*runs: Run) -> str:
    return "".join(to_html(part) for part in language_tables(runs))


def test_numbers_of_training_and_of_afterwards() -> None:
    later = {"checkpoint": "checkpoint_best", "step": 20, "measured": {"files": {"x/b.txt": PART}}}
    page = shown(run("r", {"x/a.txt": PART}, cognition={"texts": later}))
    for cell in ("a.txt", "training, step 40", "b.txt", "checkpoint_best, step 20", "1,200"):
        assert page.count(f">{cell}<") == (2 if cell == "1,200" else 1), cell
    for cell in ("15", "16.5", "0.1250", "87.5 %"):
        assert page.count(f">{cell}<") == 2, cell


def test_texts_that_differ_are_said() -> None:
    """By name or size; where they lie does not matter."""
    said = "have measured different texts"
    same = {"y/a.txt": {**PART, "kl_per_token": 0.5}}
    assert said not in shown(run("r", {"x/a.txt": PART}), run("s", same), run("t"))
    assert f"{said} (r: a.txt; s: b.txt)" in shown(
        run("r", {"a.txt": PART}), run("s", {"b.txt": PART})
    )
    assert said in shown(run("r", {"a.txt": PART}), run("s", {"a.txt": {**PART, "tokens": 7}}))


@pytest.mark.parametrize(
    ("keep", "is_said"), [(1.0, True), (0, False), (None, False), ("x", False)]
)
def test_a_text_that_was_trained_on_is_said(keep: object, is_said: bool) -> None:
    page = shown(run("r", {"x/a.txt": PART}, settings={"keep": keep}))
    assert (
        "r has trained on the text that its curves measure (a.txt, by --keep)" in page
    ) == is_said
    assert "has trained on" not in shown(run("r", settings={"keep": keep}))


def test_tasks_by_their_metrics() -> None:
    """Numbers that both models have."""
    metrics = {"acc": 0.5, "alias": "t", "only": 1.0}
    tasks = {"t": {"frozen": metrics, "adapted": {"acc": 0.25, "alias": "t"}}, "u": 3}
    page = shown(run("r", cognition={"tasks": {"checkpoint": "c", "measured": tasks}}))
    assert all(f">{cell}<" in page for cell in ("t", "acc", "0.5", "0.25", "c"))
    assert "alias" not in page and "only" not in page


@pytest.mark.parametrize(
    "damaged",
    [
        {"texts": 3, "tasks": [], "without_video": None},
        {"texts": {"measured": {"files": [1]}}, "without_video": {"measured": 2}},
        {
            "texts": {"measured": {"files": {"a": None}}},
            "tasks": {"measured": {"t": {"frozen": 1}}},
        },
    ],
)
def test_what_is_damaged_has_no_row(damaged: dict[str, Any]) -> None:
    assert language_tables([run("r", {"a.txt": 5}, cognition=damaged)]) == []
    odd = {"measured": {"n": "many", "acc_frozen": None}}
    assert ">\u2013<" in shown(run("r", cognition={"without_video": odd}))


@pytest.mark.usefixtures("in_this_process")
def test_what_the_command_saves(
    toy: ToyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each part replaces its own; the report shows all of them; a damaged file stops at once."""
    asked, text = AskedWorld(tmp_path / "world", toy), tmp_path / "plain.txt"
    text.write_text("a man and a dog run. why does the man hold it?\n")
    lines = []
    of_text = ["--text", str(text)]
    recipe = tmp_path / "recipe.yaml"  # of a run with --keep
    recipe.write_text(f"text: [{text}]\nkeep: true\n")
    questions = ["--questions", "--config", str(recipe)]
    for words in (of_text, questions, [*of_text, "--window", "8"]):
        capsys.readouterr()
        assert main(["cognition", "--resume", str(asked.run), *words]) == 0
        lines.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    path = asked.run / "cognition.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    of = {"checkpoint": "checkpoint_best", "step": saved["texts"]["step"]}
    assert saved == {
        "texts": {**of, "measured": lines[2]},
        "without_video": {**of, "measured": lines[1]["without_video"]},
    }
    assert lines[2]["window"] == 8 and lines[1]["without_video"]["n"] == NUM_QUESTIONS

    page = "".join(to_html(part) for part in language_tables(load_runs([asked.run])))
    assert ">plain.txt<" in page and ">val<" in page
    elsewhere = tmp_path / "elsewhere"
    words = ["--text", str(text), "--output_dir", str(elsewhere)]
    assert main(["cognition", "--resume", str(asked.run), *words]) == 0
    assert list(json.loads((elsewhere / "cognition.json").read_text())) == ["texts"]
    path.write_text("{")
    capsys.readouterr()
    assert main(["cognition", "--resume", str(asked.run), "--text", str(text)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "cognition.json:1: " in captured.err
    assert "measuring" not in captured.out
    (loaded,) = load_runs([asked.run])
    assert loaded.cognition == {} and any("cognition.json" in note for note in loaded.notes)

"""`vico ablate`: each row against an evaluation of what it says."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.asked_world import AskedWorld
from support.errors import refusal
from support.toy_dataset import ToyData
from vico.cli.main import main
from vico.data.types import Question
from vico.report.statistics import mcnemar, wilson
from vico.train.ablation import swap_videos

BARE = Question(0, "0", "v", "", "why", ("a", "b"), 0)


@pytest.fixture(scope="module")
def asked(toy: ToyData, tmp_path_factory: pytest.TempPathFactory) -> AskedWorld:
    return AskedWorld(tmp_path_factory.mktemp("ablate"), toy)


def last_line(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capsys.readouterr()
    code = main([*map(str, words)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    result: dict[str, Any] = json.loads(captured.out.splitlines()[-1])
    return result


def test_rows_are_the_evaluations_that_they_name(
    asked: AskedWorld,
    toy: ToyData,
    in_this_process: None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """By files: features of other videos, and a checkpoint whose gates are closed."""
    resume = ["--resume", asked.run]
    result = last_line(capsys, "ablate", *resume)
    rows = result["conditions"]
    assert result["n"] == len(asked.rows)
    chance = sum(1 / len(row["options"]) for row in asked.rows) / len(asked.rows)
    assert result["chance"] == pytest.approx(chance)
    evaluated = last_line(capsys, "eval", *resume, "--output_dir", tmp_path / "a")
    assert rows["as_trained"]["acc"] == evaluated["acc"]
    assert (rows["as_trained"]["difference"], rows["as_trained"]["p_value"]) == (0, 1)

    seen = list(dict.fromkeys(row["video"] for row in asked.rows))
    others = dict(zip(seen, [*seen[1:], seen[0]], strict=True))
    features = tmp_path / "swapped.pth"
    torch.save({video: asked.videos[other] for video, other in others.items()}, features)
    words = ["--features", features, "--allow_change", "features", "--output_dir", tmp_path / "b"]
    swapped = last_line(capsys, "eval", *resume, *words)
    assert rows["video_swapped"]["acc"] == swapped["acc"]

    closed = AskedWorld(tmp_path / "closed", toy, gates=0.0)
    shut = last_line(capsys, "eval", "--resume", closed.run)
    assert rows["without_prompts"]["acc"] == shut["acc"]
    texts = last_line(capsys, "cognition", *resume, "--questions")["without_video"]
    assert rows["without_video"]["acc"] == texts["acc_adapted"]
    assert rows["without_both"]["acc"] == texts["acc_frozen"]
    losses = [row["loss"] for row in rows.values()]
    assert len(set(losses)) == len(rows), "each condition is another model"
    assert (rows["without_video"]["loss"], rows["without_both"]["loss"]) == (
        texts["loss_adapted"],
        texts["loss_frozen"],
    )


def test_other_runs_are_compared_question_by_question(
    asked: AskedWorld, in_this_process: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A run that answers the first six questions right and all others wrong."""
    run, resume = tmp_path / "other", ["--resume", asked.run]
    last_line(capsys, "eval", *resume, "--output_dir", run)
    path = run / "predictions_val.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    own = [record["prediction"] == record["answer"] for record in records]
    for i, record in enumerate(records):
        count = len(record["scores"])
        record["prediction"] = record["answer"] if i < 6 else (record["answer"] + 1) % count
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    row = last_line(capsys, "ablate", *resume, "--runs", run)["runs"][str(run)]
    n = len(own)
    assert (row["acc"], row["difference"]) == (6 / n, (6 - sum(own)) / n)
    assert row["interval"] == list(wilson(6, n))
    assert row["p_value"] == mcnemar(sum(own[6:]), 6 - sum(own[:6]))

    path.write_text("".join(json.dumps(record) + "\n" for record in records[1:]))
    assert main([*map(str, ["ablate", *resume, "--runs", run])]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{path}: holds other questions than --split val: 1 are in one of both" in error
    assert main([*map(str, ["ablate", *resume, "--runs", tmp_path / "none"])]) == 2
    assert "predictions_val.jsonl: no such file" in capsys.readouterr().err


@pytest.mark.usefixtures("in_this_process")
def test_a_run_may_be_called_like_a_condition(
    asked: AskedWorld,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its row is its own, in the last line and in the table."""
    monkeypatch.chdir(tmp_path)
    resume = ["--resume", asked.run]
    last_line(capsys, "eval", *resume, "--output_dir", "as_trained")
    path = Path("as_trained/predictions_val.jsonl")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for record in records:
        record["prediction"] = record["answer"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    assert main([*map(str, ["ablate", *resume, "--runs", "as_trained"])]) == 0
    *_, first, _, _, _, _, last, line = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    own, run = result["conditions"]["as_trained"], result["runs"]["as_trained"]
    assert own["acc"] < run["acc"] == 1
    assert first.split()[:3] == ["as", "trained", f"{own['acc']:.2%}"]
    assert last.split()[:2] == ["as_trained", "100.00%"]


def repeat(records: list[dict[str, Any]]) -> None:
    records.append({**records[7], "prediction": 0})


def edit_an_answer(records: list[dict[str, Any]]) -> None:
    records[7]["answer"] = (records[7]["answer"] + 1) % len(records[7]["scores"])


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (repeat, ": number 7 ('q7' of video 'VIDEO') is there twice; evaluate that run again"),
        (
            edit_an_answer,
            ": the right answer of number 7 ('q7' of video 'VIDEO') is WRONG there, and RIGHT in "
            "--split val; evaluate that run on these questions",
        ),
    ],
)
def test_predictions_of_other_answers_are_refused(
    asked: AskedWorld,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    spoil: Callable[[list[dict[str, Any]]], None],
    expected: str,
) -> None:
    run, resume, row = tmp_path / "run", ["--resume", asked.run], asked.rows[7]
    last_line(capsys, "eval", *resume, "--output_dir", run)
    path = run / "predictions_val.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    spoil(records)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main([*map(str, ["ablate", *resume, "--runs", run])]) == 2
    wrong = (row["answer"] + 1) % len(row["options"])
    for word, value in (("VIDEO", row["video"]), ("WRONG", wrong), ("RIGHT", row["answer"])):
        expected = expected.replace(word, str(value))
    assert f"{path}{expected}" in capsys.readouterr().err.splitlines()[-1]


def test_a_run_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By whatever path: a table that counts one twice looks like two runs that agree."""
    run, link = tmp_path / "run", tmp_path / "link"
    run.mkdir()
    link.symlink_to(run)
    for again in (run, tmp_path / "x" / ".." / "run", link):
        words = ["ablate", "--resume", tmp_path / "c", "--runs", run, tmp_path / "other", again]
        assert main([*map(str, words)]) == 2
        line = f"--runs {again}: is the same run as {run}; name each run once"
        assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", ["--text a.txt", "text=a.txt", "--keep", "--attention_shares", "attention_shares=3"]
)
def test_what_it_does_not_measure_is_refused(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ablate", "--resume", "c", *words.split()]) == 2
    name = words.split()[0].removeprefix("--").partition("=")[0]
    line = f"--{name}: changes nothing that `vico ablate` measures; leave it out"
    assert line in capsys.readouterr().err


@pytest.mark.usefixtures("in_this_process")
def test_a_recipe_of_the_training_is_taken(
    asked: AskedWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("text: /none.txt\nkeep: 1\nattention_shares: 3\n", encoding="utf-8")
    result = last_line(capsys, "ablate", "--config", recipe, "--resume", asked.run)
    assert result["runs"] == {}


clips = st.tuples(st.sampled_from("ab"), st.sampled_from("uvw"), st.sampled_from([None, (0, 2)]))


@given(st.lists(clips, min_size=1, max_size=12))
def test_swapped_clips(asked_about: list[tuple[str, str, tuple[int, int] | None]]) -> None:
    """Another video of the same data set; its clips are those of the questions; all else stays."""
    questions: Sequence[Question] = [
        replace(BARE, index=i, dataset=dataset, video=video, feature_rows=rows)
        for i, (dataset, video, rows) in enumerate(asked_about)
    ]
    videos = {(question.dataset, question.video) for question in questions}
    if 1 in Counter(dataset for dataset, _ in videos).values():
        assert "so there is no other to show" in refusal(swap_videos, questions)
        return
    known = set(asked_about)
    for own, other in zip(questions, swap_videos(questions), strict=True):
        assert other.video != own.video
        assert (own.dataset, other.video, other.feature_rows) in known
        assert replace(other, video=own.video, feature_rows=own.feature_rows) == own

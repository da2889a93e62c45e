"""Small rules of a run, as tables: what is counted, noted and refused, to the exact word."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.errors import refusal
from vico.checkpoint import restart_limit
from vico.checkpoint.format import Checkpoint, TrainState
from vico.data.length_stats import Lengths
from vico.data.types import Question
from vico.errors import TrainingError
from vico.io.output_dir import OutputDir
from vico.io.text import read_json_object
from vico.train import input_notes, rank_consistency, saved_run
from vico.train.config import RunConfig
from vico.train.predictions import read_predictions, read_readable_predictions

ROW: dict[str, Any] = {
    "index": 0,
    "qid": "q",
    "video": "v",
    "scores": [0.5, 1],
    "prediction": 1,
    "answer": 0,
}


# ---- predictions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"qid": 7}, "'qid' is 7 and must be a text"),
        ({"video": None}, "'video' is None and must be a text"),
        ({"scores": []}, "'scores' is [] and must be a list"),
        ({"scores": {"a": 1}}, "'scores' is {'a': 1} and must be a list"),
        ({"scores": [0.5, "1"]}, "'scores' holds '1' and must hold numbers"),
        ({"scores": [True, 1.0]}, "'scores' holds True and must hold numbers"),
        ({"scores": [1e300, 1.0]}, "'scores' holds 1e+300 and must hold numbers"),
        ({"scores": [-1e300, 1.0]}, "'scores' holds -1e+300 and must hold numbers"),
        ({"index": -1}, "'index' is -1 and must be a whole number at least 0"),
        ({"index": True}, "'index' is True and must be a whole number at least 0"),
        ({"index": None}, "'index' is None and must be a whole number at least 0"),
        ({"index": 10**9}, "'index' is 1000000000 and must be a whole number at least 0"),
        ({"scores": [10**400]}, "'scores' holds 1000000000"),
        ({"prediction": 2}, "'prediction' is 2 and must be a whole number from 0 to 1"),
        ({"prediction": -1}, "'prediction' is -1 and must be a whole number from 0 to 1"),
        ({"prediction": None}, "'prediction' is None and must be a whole number from 0 to 1"),
        ({"prediction": 1.0}, "'prediction' is 1.0 and must be a whole number from 0 to 1"),
        ({"answer": 2}, "'answer' is 2 and must be a whole number from 0 to 1"),
        ({"answer": False}, "'answer' is False and must be a whole number from 0 to 1"),
    ],
    ids=str,
)
def test_damaged_predictions(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    """The line is named, and the others can be read."""
    path = tmp_path / "predictions_val.jsonl"
    path.write_text("\n".join(map(json.dumps, (ROW, {**ROW, **change}, ROW))) + "\n")
    assert refusal(read_predictions, path).startswith(f"{path}:2: {said}")
    records, faults = read_readable_predictions(path)
    assert records == [ROW, ROW] and len(faults) == 1


def test_lines_that_are_no_predictions(tmp_path: Path) -> None:
    path = tmp_path / "predictions_val.jsonl"
    remedy = "name the predictions_SPLIT.jsonl of an evaluation"
    for line, kind in (("[1]", "a list"), ("7", "a number")):
        path.write_text(f"{json.dumps(ROW)}\n{line}\n")
        said = f"{path}:2: {kind} where an object is expected; {remedy}"
        assert refusal(read_predictions, path) == said
    for name in ("qid", "scores"):
        path.write_text(json.dumps({key: ROW[key] for key in ROW if key != name}) + "\n")
        assert refusal(read_predictions, path).startswith(f"{path}:1: '{name}' is None and must be")


def test_allowed_predictions(tmp_path: Path) -> None:
    path = tmp_path / "predictions_val.jsonl"
    rows = [
        {**ROW, "answer": None},
        {**ROW, "index": 5, "prediction": 0, "answer": 1},
        {**ROW, "scores": [-9e299, 9e299], "index": 10**9 - 1},
        {**ROW, "scores": [3], "prediction": 0},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_predictions(path) == rows


# ---- notes of the files -------------------------------------------------------------------------


def question(video: str, *options: str) -> Question:
    return Question(0, "q", video, "CW", "why", options or ("a", "b"), 0)


def test_notes_of_usage() -> None:
    used = [question("v1"), question("v2")]
    dropped = [question("v3"), question("v3"), question("v4")]
    assert input_notes.usage_note("val", used, []) == "val: 2 questions"
    assert input_notes.usage_note("val", used, dropped) == (
        "val: 2 used / 5 total questions: 3 dropped, "
        "whose 2 videos have no features (--missing_features drop)"
    )


def test_notes_of_long_captions() -> None:
    """A caption of just --max_cap_len tokens is whole."""
    config = RunConfig(max_cap_len=10)
    assert input_notes.caption_notes(config, "train", Lengths.of([3, 10])) == []
    (note,) = input_notes.caption_notes(config, "train", Lengths.of([3, 10, 11, 15]))
    assert note == (
        "train: 2 of 4 captions are longer than --max_cap_len 10 when whole, and are cut: "
        "they lose 6 of the 39 tokens of all captions"
    )


def test_notes_of_shared_videos() -> None:
    """Of two splits; two data sets may train on the same videos."""
    config = RunConfig(dataset="nextqa")
    train = [question("v1"), question("v2"), question("v2")]
    val = [question("v2"), question("v2"), question("v3")]
    splits = {("nextqa", "train"): train, ("nextqa", "val"): val}
    (note,) = input_notes.shared_video_notes(config, splits)
    assert note == (
        "warning: 1 videos are in train and in val: 2 of 3 questions of val are about them"
    )
    same = {("nextqa", "train"): train, ("star", "train"): train}
    assert input_notes.shared_video_notes(config, same) == []
    apart = {("nextqa", "train"): train, ("nextqa", "val"): val[2:]}
    assert input_notes.shared_video_notes(config, apart) == []


# ---- starts that fail ---------------------------------------------------------------------------


def fail_at(out: OutputDir, step: int) -> None:
    restart_limit.enter_steps(out, TrainState(step=step))
    restart_limit.record_failure()
    restart_limit.record_failure()  # another rank: the same failure
    restart_limit.leave_steps()


def test_the_fourth_start_at_a_failing_step(tmp_path: Path) -> None:
    """It is refused; other settings, another step or a removed file start a new count."""
    out = OutputDir(tmp_path)
    for failures in range(3):
        assert restart_limit.record_start(out, {"lr": 1}, 7, 4) is None
        assert read_json_object(out.attempts, "attempts")["failures"] == failures
        fail_at(out, 7)
        restart_limit.record_failure()  # outside the steps: not counted
        assert read_json_object(out.attempts, "attempts")["failures"] == failures + 1
    with pytest.raises(TrainingError, match="step 8 has failed 3 times in a row"):
        restart_limit.record_start(out, {"lr": 1}, 7, 4)
    recorded = out.attempts.read_text()
    for settings, step in (({"lr": 2}, 7), ({"lr": 1}, 8)):
        out.attempts.write_text(recorded)
        assert restart_limit.record_start(out, settings, step, 4) is None
        assert read_json_object(out.attempts, "attempts")["failures"] == 0
    restart_limit.clear(out)
    assert restart_limit.record_start(out, {"lr": 1}, 7, 4) is None


def test_a_failure_at_a_later_step_is_the_first(tmp_path: Path) -> None:
    out = OutputDir(tmp_path)
    for step in (5, 6):
        restart_limit.record_start(out, {}, step, 4)
        fail_at(out, step + 3)
        record = read_json_object(out.attempts, "attempts")
        assert (record["step"], record["failures"]) == (step + 3, 1)


@pytest.mark.parametrize(("last", "save_at"), [(4, 5), (5, 5), (7, 5), (8, 6), (14, 9)])
def test_a_killed_start_saves_sooner(last: int, save_at: int, tmp_path: Path) -> None:
    """After half of the steps that the killed one did, and at least one."""
    out = OutputDir(tmp_path)
    assert restart_limit.record_start(out, {}, 4, 4) is None
    assert restart_limit.record_start(out, {}, last, 4) == save_at
    assert restart_limit.record_start(out, {}, last, 3) is None, "from another checkpoint"


# ---- between ranks, and from published files ----------------------------------------------------


def test_differences_between_ranks() -> None:
    """Those of either side, three at most."""
    describe = rank_consistency._describe_differences
    first = {"a": "1", "b": "2", "c": "3"}
    assert (
        describe(first, {"a": "1", "b": "4", "d": "5"}) == "b: 2 -> 4; c: 3 -> none; d: none -> 5"
    )
    assert describe(first, {"d": "5"}) == "a: 1 -> none; b: 2 -> none; c: 3 -> none; ..."


def test_a_look_at_both_ends_of_a_file(tmp_path: Path) -> None:
    """The size, and the first and last 256 KiB; a folder, and a file that is not there."""
    path, end = tmp_path / "a.csv", 1 << 18
    seen = {}
    for size in (0, 5, end, end + 1, 2 * end, 3 * end):
        for changed in {0, size // 2, size - 1} if size else {0}:
            data = bytearray(size)
            data[changed : changed + 1] = b"x" if size else b""
            path.write_bytes(data)
            seen[size, changed] = rank_consistency._fingerprint(path)
            assert seen[size, changed].startswith(f"{size} bytes, ")
    assert len(set(seen.values())) == len(seen), "only the middle of a large file is not seen"
    assert rank_consistency._fingerprint(tmp_path) == "a folder"
    assert rank_consistency._fingerprint(tmp_path / "none") == "No such file or directory"


def test_settings_of_a_published_file() -> None:
    """Those that exist here with an allowed value; where it lay and its device mean nothing."""
    published = {"adapter_len": 12, "seed": -1, "device": "cuda", "output_dir": "/x", "pin_mem": 1}

    def settings(**others: Any) -> dict[str, Any]:
        checkpoint = Checkpoint(Path("a.pth"), {}, settings={**published, **others})
        return saved_run._published_settings(checkpoint)

    assert settings(dataset="tvqa", sub=True) == {"adapter_len": 12, "dataset": "tvqa", "sub": True}
    assert settings(dataset="nextqa", sub=True) == {"adapter_len": 12, "dataset": "nextqa"}
    assert settings(sub=True, resume="/y") == {"adapter_len": 12}

"""`vico check` reports all problems at once, and dropped questions are counted in every result."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from support.toy_dataset import ToyData, make_rows, records, write_csv
from vico.cli.check_report import scan_warnings
from vico.cli.main import main
from vico.data import length_stats
from vico.data.features import Features, Scan
from vico.data.prompts import Prompts
from vico.data.types import Question
from vico.distributed import world as dist
from vico.io import file_cache, log

CLIPS = "clipvitl14.pth"


@pytest.fixture
def data(toy: ToyData, tmp_path: Path) -> Path:
    """A copy of the toy data set's folder that a test may change."""
    shutil.copytree(toy.folder / "data", tmp_path / "data")
    return tmp_path / "data" / "nextqa"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def flags(toy: ToyData, data: Path, out: Path) -> list[str]:
    """Flags of a run on the changed data."""
    return [*toy.flags, "--data_path", str(data.parent), "--output_dir", str(out)]


def change_features(data: Path, **videos: Any) -> None:
    """Replace the features of videos; `...` removes a video."""
    content = torch.load(data / CLIPS, weights_only=True) | videos
    kept = {video: value for video, value in content.items() if value is not ...}
    torch.save(kept, data / CLIPS)


def test_captions_with_each_evaluation(
    toy: ToyData, data: Path, flags: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """--eval_captions needs videos of val with a caption."""
    pytest.importorskip("pycocoevalcap")
    assert main(["check", *flags, "--eval_captions", "2"]) == 0
    assert "captions of 2 val videos with each evaluation" in capfd.readouterr().out
    of_train = {video: text for video, text in toy.captions.items() if video.startswith("v")}
    (data / "llava_v15_13b_n6.json").write_text(json.dumps(of_train))
    assert main(["check", *flags, "--eval_captions", "2"]) == 2
    assert "--eval_captions 2: no video of val has a caption" in capfd.readouterr().err


def test_valid_files_are_described(
    toy: ToyData, data: Path, out: Path, flags: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """Warnings are counted and do not fail the check; nothing is written."""
    shutil.copytree(data, data.parent / "intentqa")
    rows = make_rows(6, 2, 2, "w")
    rows[-1] |= {"a1": rows[-1]["a0"], "a2": " "}
    write_csv(data / "test.csv", rows)
    change_features(
        data,
        odd=torch.zeros(7),
        nan=torch.full((2, 768), torch.nan),
        zero=torch.zeros(3, 768),
    )
    assert main(["check", *flags, "--vaq", "--qav", "--max_cap_len", "60", "--epochs", "5"]) == 0
    stdout, stderr = capfd.readouterr()
    assert stderr == "" and not out.exists()
    letter = f"({'ABCDE'[int(toy.rows['train'][0]['answer'])]})"
    no_tensor = "are no floating-point tensor [frames >= 1, 768], and no question uses them"
    shared = "shares 7 videos and 20 questions with train of nextqa"
    parts = (
        "note: --warmup_epochs 40 is above --epochs 5",
        "tiny: 3 layers (3 adapted), width 32, 4 heads; tokenizer.model of 400 pieces, begin '<s>'",
        "14 videos, of which the questions use 11",
        "1 videos hold a frame that is all zeros, of an extraction that failed, e.g. 'zero'",
        f"features: 1 videos {no_tensor}, e.g. 'odd'",
        "1 videos hold NaN or infinite values, and no question uses them, e.g. 'nan'",
        "train: 20 questions about 7 videos; C ",
        "test: 6 questions about 2 videos; C ",
        "warning: test: 2 of 6 questions with two equal options",
        "warning: test: 1 of 6 questions with an empty option",
        "captions are longer than --max_cap_len 60 when whole, and are cut",
        "warning: 2 videos are in val and in test: 6 of 6 questions of test are about them",
        f"warning: intentqa/train.csv: of 20 questions, {shared}: trained on the one",
        "look: train.csv:2 vqa: ...'",
        f" -> '{letter}' and EOS (4 targets of ",
        " cap: ...",
        "Question:' -> ",
        "-> the 10 frames of the video (10 targets of ",
        f"start: a new run in {out}",
    )
    for part in parts:
        assert part in stdout, part
    assert stdout.splitlines()[-1].startswith("vico check: 0 error(s), 9 warning(s), in ")


def test_all_problems_are_reported_at_once(
    toy: ToyData, data: Path, out: Path, flags: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    write_csv(data / "val.csv", [{**row, "answer": "7"} for row in toy.rows["val"]])
    bad_shape, infinite = torch.zeros(3, 7), torch.full((3, 768), torch.inf)
    change_features(data, v0000=..., v0001=bad_shape, v0002=infinite)
    captions = json.loads((data / "llava_v15_13b_n6.json").read_text())
    del captions["v0003"]
    (data / "llava_v15_13b_n6.json").write_text(json.dumps(captions))
    out.write_text("", encoding="utf-8")
    assert main(["check", *flags, "--deepspeed", "zero4", "--model", "13B"]) == 2
    lines = capfd.readouterr().err.splitlines()
    parts = (
        "--output_dir",
        "--deepspeed zero4",
        "13B: no such folder",
        "val.csv: 10 of 10 rows",
        "have no caption",
        "infinite",
        "have no features",
    )
    assert len(lines) == len(parts), lines
    for line, part in zip(lines, parts, strict=True):
        assert line.startswith("vico: error") and part in line, lines


def test_results_are_cached(
    data: Path,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A second check neither scans features nor measures texts.

    A cache that is damaged or cannot be written changes nothing.
    """
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(file_cache, "SETTLED_SECONDS", -1)
    slow_steps: list[str] = []
    scan, measure = Features.scan, length_stats.of_questions

    def counted_scan(features: Features, *arguments: Any) -> Scan:
        slow_steps.append("scan")
        return scan(features, *arguments)

    def counted_measure(*arguments: Any) -> length_stats.QuestionLengths:
        slow_steps.append("measure")
        return measure(*arguments)

    monkeypatch.setattr(Features, "scan", counted_scan)
    monkeypatch.setattr(length_stats, "of_questions", counted_measure)

    def check() -> tuple[list[str], list[str]]:
        """(the report without the line that says how long it took, the slow steps taken)."""
        slow_steps.clear()
        assert main(["check", *flags]) == 0
        stdout, stderr = capfd.readouterr()
        assert stderr == ""
        return stdout.splitlines()[:-1], list(slow_steps)

    report, all_steps = check()
    assert all_steps == ["scan", "measure", "measure"]
    assert check() == (report, [])
    change_features(data, v0000=torch.ones(3, 768))
    assert check() == (report, ["scan"])
    file = cache / "vico" / "checked.json"
    flipped, cut = file.read_bytes().replace(b"1", b"2", 1), file.read_bytes()[:-5]
    for content in (b"", b"\xff{", b"[]", flipped, cut):
        file.write_bytes(content)
        assert check() == (report, all_steps)
    shutil.rmtree(cache)
    cache.write_text("no folder")
    assert check() == (report, all_steps)


def test_a_check_that_was_killed_goes_on(
    data: Path,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Measured rows are reported on the way, and not measured again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(file_cache, "SETTLED_SECONDS", -1)
    monkeypatch.setattr(log, "PROGRESS_SECONDS", -1)
    monkeypatch.setattr(length_stats, "ROWS_PER_REPORT", 8)
    length = Prompts.length
    measured: list[str] = []
    last = 12

    def killed_length(prompts: Prompts, question: Question, task: str) -> int:
        measured.append(question.place)
        if len(measured) == last:
            raise SystemExit
        return length(prompts, question, task)

    monkeypatch.setattr(Prompts, "length", killed_length)
    with pytest.raises(SystemExit):
        main(["check", *flags])
    assert measured[0] == "train.csv:2"
    assert "train: measured 8 of 20 questions\n" in capfd.readouterr().out
    measured.clear()
    last = 0
    assert main(["check", *flags]) == 0
    assert measured[0] == "train.csv:10"
    assert "train: measured 16 of 20 questions\n" in capfd.readouterr().out


def test_dropped_questions_are_counted_in_every_result(
    data: Path,
    out: Path,
    flags: list[str],
    alone: dist.World,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Train, resume and evaluate without the features of one video.

    The run then refuses to continue with those features.
    """
    monkeypatch.setattr(dist, "connect", lambda *_: alone)
    monkeypatch.setattr(dist, "disconnect", lambda *_: None)
    features = torch.load(data / CLIPS, weights_only=True)
    change_features(data, v0003=..., w0001=...)
    flags += "--batch_size 4 --epochs 2".split()
    assert main(["train", *flags]) == 2
    missing = "3 of 20 questions (1 videos) have no features, e.g. 'v0003'"
    assert missing in capfd.readouterr().err

    flags += ["--missing_features", "drop"]
    usage = "train: 17 used / 20 total questions: 3 dropped, whose 1 videos have no features"
    for num_steps in ("3", "5"):
        assert main(["train", *flags, "--max_steps", num_steps]) == 0
        assert f"{usage} (--missing_features drop)" in capfd.readouterr().out
        last = records(out / "log.txt")[-1]
        assert (last["val_n"], last["val_n_total"]) == (7, 10)
    predictions = records(out / "predictions_val.jsonl")
    assert [p["index"] for p in predictions] == [i for i in range(10) if i % 4 != 1]

    assert main(["check", *flags, "--max_steps", "9"]) == 0
    start = f"start: {out / 'checkpoint-5'}, continues from step 5"
    assert start in capfd.readouterr().out
    assert main(["check", *flags, "--seed", "1"]) == 2
    assert "holds a run with other settings (seed" in capfd.readouterr().err

    assert main(["eval", "--resume", str(out / "checkpoint-5")]) == 0
    *table, result = capfd.readouterr().out.splitlines()
    assert {"n": 7, "n_total": 10}.items() <= json.loads(result).items()
    assert any("val accuracy of 7 used / 10 total questions" in line for line in table)
    (all_line,) = (line for line in table if line.startswith("  all "))
    assert all_line.endswith("   7 used / 10 total")
    group_lines = [line for line in table if line.startswith(("  C ", "  T ", "  D "))]
    assert sum(int(line.split("/")[1].split()[0]) for line in group_lines) == 7

    torch.save(features, data / CLIPS)
    assert main(["train", *flags]) == 2
    assert "data train questions" in capfd.readouterr().err
    change_features(data, **{video: ... for video in features if video.startswith("w")})
    assert main(["train", *flags]) == 2
    no_video = "holds features of no video of the 10 val questions"
    fetch = "fetch the file that belongs to them"
    ids = "e.g. 'w0000' (the file's ids are like 'v0000')"
    assert f"{no_video}, {ids}; {fetch}" in capfd.readouterr().err


def test_a_few_suspicious_videos_are_named() -> None:
    scan = Scan(("a", "used"), (), ("v1", "v2", "v3", "v4"))
    zeros, malformed = scan_warnings("star", scan, {"used"}, 768)
    assert zeros.startswith("warning: star: 4 videos hold a frame that is all zeros")
    assert zeros.endswith(", e.g. 'v1', 'v2', 'v3'")
    assert "star: 1 videos are no floating-point tensor [frames >= 1, 768]" in malformed
    assert malformed.endswith("no question uses them, e.g. 'a'")

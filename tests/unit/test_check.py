"""The data gate: `vico check` finds all at once and remembers what it found; dropped questions are counted in every result."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from support.toy_dataset import ToyData, make_rows, records, write_csv
from vico.cli.main import main
from vico.data import length_stats
from vico.data.features import Features
from vico.distributed import world as dist
from vico.io import file_cache


@pytest.fixture
def fixture(toy: ToyData, tmp_path: Path) -> Path:
    """A copy of the world's data, to be changed."""
    shutil.copytree(toy.folder / "data", tmp_path / "data")
    return tmp_path


def flags_of(toy: ToyData, fixture: Path, *more: str) -> list[str]:
    return [
        *toy.flags,
        "--data_path",
        str(fixture / "data"),
        "--output_dir",
        str(fixture / "out"),
        *more,
    ]


def change_features(fixture: Path, **videos: Any) -> None:
    path = fixture / "data" / "nextqa" / "clipvitl14.pth"
    content = torch.load(path, weights_only=True) | videos
    torch.save({k: v for k, v in content.items() if v is not ...}, path)


def test_a_sound_world_is_described(
    toy: ToyData, fixture: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(fixture / "data" / "nextqa", fixture / "data" / "intentqa")
    rows = make_rows(6, 2, 2, "w")
    write_csv(
        fixture / "data" / "nextqa" / "test.csv",
        [*rows[:-1], rows[-1] | {"a1": rows[-1]["a0"], "a2": " "}],
    )
    zero = torch.zeros(3, 768)
    change_features(fixture, odd=torch.zeros(7), nan=torch.full((2, 768), torch.nan), zero=zero)
    assert main(["check", *flags_of(toy, fixture, "--vaq", "--qav", "--max_cap_len", "60")]) == 0
    out, err = capfd.readouterr()
    assert err == "" and not (fixture / "out").exists()
    rows_train = toy.rows["train"]
    letter = f"({'ABCDE'[int(rows_train[0]['answer'])]})"
    for part in (
        "tiny: 3 layers (3 adapted), width 32, 4 heads; tokenizer.model of 400 pieces",
        "14 videos, of which the questions use 11",
        "features: 1 videos hold a frame that is all zeros, of an extraction that failed, e.g. 'zero'",
        "features: 1 videos are no floating-point tensor [frames >= 1, 768], and no question uses them, e.g. 'odd'",
        "features: 1 videos hold NaN or infinite values, and no question uses them, e.g. 'nan'",
        "train: 20 questions about 7 videos; C ",
        "test: 6 questions about 2 videos; C ",
        "warning: test: 2 of 6 questions with two equal options",
        "warning: test: 1 of 6 questions with an empty option",
        "captions are longer than --max_cap_len 60 when whole, and are cut",
        "warning: 2 videos are in val and in test: 6 of 6 questions of test are about them",
        "warning: intentqa/train.csv: of 20 questions, shares 7 videos and 20 questions with train of nextqa: trained on the one",
        "look: train.csv:2 vqa: ...'",
        f" -> '{letter}' and EOS (4 targets of ",
        " cap: ...",
        "Question:' -> ",
        "-> the 10 frames of the video (10 targets of ",
        f"start: a new run in {fixture / 'out'}",
    ):
        assert part in out, part
    assert out.splitlines()[-1].startswith("vico check: 0 error(s), 9 warning(s), in ")


def test_all_problems_are_said_at_once(
    toy: ToyData, fixture: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = fixture / "data" / "nextqa"
    write_csv(data / "val.csv", [{**row, "answer": "7"} for row in toy.rows["val"]])
    change_features(
        fixture, v0000=..., v0001=torch.zeros(3, 7), v0002=torch.full((3, 768), torch.inf)
    )
    captions = json.loads((data / "llava_v15_13b_n6.json").read_text())
    (data / "llava_v15_13b_n6.json").write_text(
        json.dumps({k: v for k, v in captions.items() if k != "v0003"})
    )
    (fixture / "out").write_text("")
    assert main(["check", *flags_of(toy, fixture, "--deepspeed", "zero4", "--model", "13B")]) == 2
    err = capfd.readouterr().err.splitlines()
    parts = (
        "--output_dir",
        "--deepspeed zero4",
        "13B: no such folder",
        "val.csv: 10 of 10 rows",
        "have no caption",
        "infinite",
        "have no features",
    )
    assert len(err) == len(parts) and all(
        line.startswith("vico: error") and part in line
        for line, part in zip(err, parts, strict=True)
    ), err


def test_what_was_found_is_remembered(
    toy: ToyData, fixture: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The second time neither features nor texts are gone through; a cache that is damaged or cannot be written changes nothing."""
    cache = fixture / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(file_cache, "SETTLED_SECONDS", -1)
    slow: list[str] = []
    scan, measure = Features.scan, length_stats.of_questions
    monkeypatch.setattr(Features, "scan", lambda self: slow.append("scan") or scan(self))
    monkeypatch.setattr(
        length_stats, "of_questions", lambda *a: slow.append("measure") or measure(*a)
    )

    def check() -> tuple[list[str], list[str]]:
        slow.clear()
        assert main(["check", *flags_of(toy, fixture)]) == 0
        out, err = capfd.readouterr()
        assert err == ""
        return out.splitlines()[:-1], list(slow)

    first, work = check()
    assert work == ["scan", "measure", "measure"]
    assert check() == (first, [])
    change_features(fixture, v0000=torch.ones(3, 768))
    assert check() == (first, ["scan"])
    stored = cache / "vico" / "checked.json"
    for content in (
        b"",
        b"\xff{",
        b"[]",
        stored.read_bytes().replace(b"1", b"2", 1),
        stored.read_bytes()[:-5],
    ):
        stored.write_bytes(content)
        assert check() == (first, work)
    shutil.rmtree(cache)
    cache.write_text("no folder")
    assert check() == (first, work)


def test_dropped_questions_are_counted_in_every_result(
    toy: ToyData,
    fixture: Path,
    alone: dist.World,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Train, go on, and evaluate without the features of one video; the run then refuses to go on with them."""
    monkeypatch.setattr(dist, "connect", lambda *_: alone)
    monkeypatch.setattr(dist, "disconnect", lambda toy, together: None)
    kept = torch.load(fixture / "data" / "nextqa" / "clipvitl14.pth", weights_only=True)
    change_features(fixture, v0003=..., w0001=...)
    flags = flags_of(toy, fixture, "--batch_size", "4", "--epochs", "2")
    assert main(["train", *flags]) == 2
    assert "3 of 20 questions (1 videos) have no features, e.g. 'v0003'" in capfd.readouterr().err
    flags += ["--missing_features", "drop"]
    for steps in ("3", "5"):
        assert main(["train", *flags, "--max_steps", steps]) == 0
        out = capfd.readouterr().out
        assert (
            "train: 17 used / 20 total questions: 3 dropped, whose 1 videos have no features (--missing_features drop)"
            in out
        )
        last = records(fixture / "out" / "log.txt")[-1]
        assert (last["val_n"], last["val_n_total"]) == (7, 10)
    predictions = records(fixture / "out" / "predictions_val.jsonl")
    assert [p["index"] for p in predictions] == [i for i in range(10) if i % 4 != 1]
    assert main(["check", *flags, "--max_steps", "9"]) == 0
    assert (
        f"start: {fixture / 'out' / 'checkpoint-5'}, continues from step 5"
        in capfd.readouterr().out
    )
    assert main(["check", *flags, "--seed", "1"]) == 2
    assert "holds a run with other settings (seed" in capfd.readouterr().err
    assert main(["eval", "--resume", str(fixture / "out" / "checkpoint-5")]) == 0
    *table, result = capfd.readouterr().out.splitlines()
    assert {"n": 7, "n_total": 10}.items() <= json.loads(result).items()
    assert any("val accuracy of 7 used / 10 total questions" in line for line in table)
    assert next(line for line in table if line.startswith("  all ")).endswith(
        "   7 used / 10 total"
    )
    assert (
        sum(
            int(line.split("/")[1].split()[0])
            for line in table
            if line.startswith(("  C ", "  T ", "  D "))
        )
        == 7
    )
    torch.save(kept, fixture / "data" / "nextqa" / "clipvitl14.pth")
    assert main(["train", *flags]) == 2
    assert "data train questions" in capfd.readouterr().err
    change_features(fixture, **{video: ... for video in kept if video.startswith("w")})
    assert main(["train", *flags]) == 2
    assert (
        "holds features of no video of the 10 val questions; fetch the file that belongs to them"
        in capfd.readouterr().err
    )

"""launch/examples/smollm2_nextqa.py draws rows of a NExT-QA that a user has."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from support.errors import refusal
from support.processes import ROOT
from support.toy_dataset import make_rows, write_csv
from vico.data.features import Features
from vico.data.readers import nextqa


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = ROOT / "launch" / "examples" / "smollm2_nextqa.py"
    spec = importlib.util.spec_from_file_location("smollm2_nextqa", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """As the public files are: a labelled test.csv, and no train.csv."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for split, seed in (("test", 1), ("val", 2)):
        write_csv(folder / f"{split}.csv", make_rows(30, 9, seed, split))
    return folder


def test_rows_and_stand_ins(
    example: ModuleType, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same ones each time, and it is said what they are."""
    target = tmp_path / "data" / "nextqa"
    path = example.main(source, target, 8, "")
    assert path == target / "clipvitl14.pth"
    said = capsys.readouterr().err
    for part in ("rows of test.csv are trained on", "train: 8 of 30 rows", "random stand-ins"):
        assert part in said
    whole = {(q.video, q.qid): q for q in nextqa.read(source, "test")}
    drawn = nextqa.read(target, "train")
    assert len(drawn) == 8 and len(nextqa.read(target, "val")) == 8
    for q in drawn:
        original = whole[q.video, q.qid]
        assert (q.question, q.options, q.answer) == (
            original.question,
            original.options,
            original.answer,
        )
    features = Features(path)
    assert features.check(drawn) == 0
    a, b = (features.frames(video).float() for video in list(features._ids.keys)[:2])
    assert torch.cosine_similarity(a[0], a[1], dim=0) > torch.cosine_similarity(a[0], b[0], dim=0)
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    example.main(source, target, 8, "")
    assert before == {file.name: file.read_bytes() for file in target.iterdir()}


def test_a_users_features(example: ModuleType, source: Path, tmp_path: Path) -> None:
    """Those in the folder, or those that are named; and all rows where there are fewer."""
    (source / "features").mkdir()
    target = tmp_path / "data" / "nextqa"
    assert example.main(source, target, 99, "") == source / "features"
    assert sorted(path.name for path in target.iterdir()) == ["train.csv", "val.csv"]
    assert len(nextqa.read(target, "train")) == 30
    assert "nowhere: no such file" in refusal(example.main, source, target, 9, "/nowhere")


def test_what_is_no_nextqa(example: ModuleType, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "data" / "nextqa"
    unlabelled = [row | {"answer": ""} for row in make_rows(3, 2, 1, "t")]
    write_csv(source / "test.csv", unlabelled)
    assert "test.csv: no row has an answer" in refusal(example.main, source, target, 9, "")
    (source / "val.csv").unlink()
    (source / "test.csv").unlink()
    assert "train.csv: no such file" in refusal(example.main, source, target, 9, "")
    assert not target.exists()

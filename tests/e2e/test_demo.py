"""The demo's world: deterministic, readable by the project's own readers, and answerable from the video alone."""

import hashlib
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from support.processes import ROOT, launch
from vico.cli.demo import main, make_toy_dataset
from vico.cli.demo_dataset import QUESTIONS, TYPES
from vico.data.features import Features
from vico.data.readers import captions, nextqa
from vico.data.tokenizer import Tokenizer
from vico.errors import UserError
from vico.model.weights.meta import MetaWeights

SPLITS = {"train": 60, "val": 20}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature: few videos, a LLaMA that was taught for two steps."""
    out = tmp_path_factory.mktemp("demo") / "world"
    make_toy_dataset(out, steps=2, splits=SPLITS)
    return out


def digests(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_the_same_seed_makes_the_same_files(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_toy_dataset(tmp_path / "again", steps=2, splits=SPLITS)
    assert digests(tmp_path / "again") == digests(world)
    make_toy_dataset(world, steps=2, splits=SPLITS)
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(UserError, match="of other settings"):
        make_toy_dataset(world, seed=1, steps=2, splits=SPLITS)


def test_the_projects_readers_take_it(world: Path) -> None:
    tokenizer = Tokenizer(world / "pretrained" / "llama" / "tokenizer.model")
    MetaWeights(world / "pretrained" / "llama" / "tiny", tokenizer.vocab_size)
    for data in ("data", "data_swapped"):
        folder = world / data / "nextqa"
        features = Features(folder / "clipvitl14.pth")
        for split in SPLITS:
            questions = nextqa.read(folder, split)
            assert features.check(questions) == 0
            captions.check(captions.read(folder, None), questions, folder)


def test_text_tells_nothing(world: Path) -> None:
    """A type's options never change and each is about as often right, so that the best guess without the video is near chance."""
    questions = nextqa.read(world / "data" / "nextqa", "train")
    assert {q.type for q in questions} == set(TYPES)
    for kind in TYPES:
        asked = [q for q in questions if q.type == kind]
        assert {q.options for q in asked} == {QUESTIONS[kind].options}
    counts = Counter(q.answer for q in questions)
    assert max(counts.values()) / len(questions) < 0.3


def test_swapped_features_are_another_videos(world: Path) -> None:
    own, other = (
        torch.load(world / data / "nextqa" / "clipvitl14.pth", weights_only=True)
        for data in ("data", "data_swapped")
    )
    assert set(own) == set(other)
    assert not any(torch.equal(own[name], other[name]) for name in own)
    norms = torch.cat([v.float().norm(dim=1) for v in own.values()])
    assert 8 < norms.mean() < 13


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unrecognized arguments: --sed 1"):
        main(["--sed", "1"])
    (tmp_path / "world.json").write_text("{")
    with pytest.raises(UserError, match=r"world\.json"):
        main(["--output_dir", str(tmp_path)])


@pytest.mark.slow
def test_the_first_step_comes_soon(tmp_path: Path) -> None:
    """Of the demo's recipe on two ranks, from the command on; caches are warm, and what importing takes is not counted."""
    make_toy_dataset(tmp_path / "demo", steps=0)
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-c", "import vico.train.loop, deepspeed"], check=True, cwd=ROOT
    )
    importing, seconds = time.monotonic() - began, []
    where = [
        "--data_path",
        str(tmp_path / "demo" / "data"),
        "--llama_model_path",
        str(tmp_path / "demo" / "pretrained" / "llama"),
    ]
    for start in ("cold", "warm", "again"):
        steps = tmp_path / start / "steps.jsonl"
        began = time.monotonic()
        recipe = [
            "--config",
            str(ROOT / "launch" / "recipes" / "demo.yaml"),
            "--output_dir",
            str(steps.parent),
            "--max_steps",
            "1",
        ]
        run = launch("train.sh", *recipe, *where, ranks=2)
        assert run.wait_until(lambda: steps.exists() and steps.stat().st_size > 0), run.output  # noqa: B023
        seconds.append(time.monotonic() - began)
        assert run.wait() == [0], run.output
    print(
        f"first step after {seconds[1]:.1f} and {seconds[2]:.1f} s, of which imports take {importing:.1f} s"
    )
    assert min(seconds[1:]) - importing <= 15

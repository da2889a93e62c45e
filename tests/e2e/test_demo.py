"""The demo: deterministic, readable by the project's readers, answerable from the video alone."""

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from support.processes import ROOT, launch
from vico.cli.demo import main, make_toy_dataset
from vico.cli.demo_dataset import DOMAIN, QUESTIONS
from vico.data.features import Features
from vico.data.readers import captions, nextqa
from vico.data.tokenizer import Tokenizer
from vico.errors import UserError
from vico.io.digest import digest_files
from vico.model.weights.meta import MetaWeights

SPLITS = {"train": 60, "val": 20}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small demo: few videos, a LLaMA after two steps of pretraining."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    make_toy_dataset(out, steps=2, splits=SPLITS)
    return out


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): digest_files([path]) for path in files}


def test_same_seed_makes_the_same_files(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_toy_dataset(tmp_path / "again", steps=2, splits=SPLITS)
    assert digests(tmp_path / "again") == digests(demo)
    make_toy_dataset(demo, steps=2, splits=SPLITS)
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(UserError, match="of other settings"):
        make_toy_dataset(demo, seed=1, steps=2, splits=SPLITS)


def test_readers_accept_it(demo: Path) -> None:
    llama = demo / "pretrained" / "llama"
    MetaWeights(llama / "tiny", Tokenizer(llama / "tokenizer.model").vocab_size)
    for data in ("data", "data_swapped"):
        folder = demo / data / "nextqa"
        features = Features(folder / "clipvitl14.pth")
        for split in SPLITS:
            questions = nextqa.read(folder, split)
            assert features.check(questions) == 0
            captions.check(captions.read(folder, None), questions)


def test_text_reveals_nothing(demo: Path) -> None:
    """A type's options never change, and each is right about equally often.

    So the best guess without the video is near chance.
    """
    questions = nextqa.read(demo / "data" / "nextqa", "train")
    assert {q.type for q in questions} == set(DOMAIN.types)
    for question_type in DOMAIN.types:
        of_type = [q for q in questions if q.type == question_type]
        assert {q.options for q in of_type} == {QUESTIONS[question_type].options}
    counts = Counter(q.answer for q in questions)
    assert max(counts.values()) / len(questions) < 0.3


def test_swapped_features_are_those_of_another_video(demo: Path) -> None:
    own, swapped = (
        torch.load(demo / data / "nextqa" / "clipvitl14.pth", weights_only=True)
        for data in ("data", "data_swapped")
    )
    assert set(own) == set(swapped)
    assert not any(torch.equal(own[name], swapped[name]) for name in own)
    norms = torch.cat([value.float().norm(dim=1) for value in own.values()])
    assert 8 < norms.mean() < 13


def test_errors_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unrecognized arguments: --sed 1"):
        main(["--sed", "1"])
    (tmp_path / "world.json").write_text("{")
    with pytest.raises(UserError, match=r"world\.json"):
        main(["--output_dir", str(tmp_path)])


def seconds_to_first_step(flags: list[str], out: Path) -> float:
    steps = out / "steps.jsonl"
    start = time.monotonic()
    run = launch("train.sh", *flags, "--output_dir", str(out), ranks=2)
    assert run.wait_until(lambda: steps.exists() and steps.stat().st_size > 0), run.output
    seconds = time.monotonic() - start
    assert run.wait() == [0], run.output
    return seconds


@pytest.mark.slow
def test_first_step_comes_soon(tmp_path: Path) -> None:
    """The demo's recipe on two ranks, timed from the command to the first step.

    Caches are warm, and the time for imports is not counted.
    """
    demo = tmp_path / "demo"
    make_toy_dataset(demo, steps=0)
    start = time.monotonic()
    imports = "import vico.train.loop, deepspeed"
    subprocess.run([sys.executable, "-c", imports], check=True, cwd=ROOT)
    import_seconds = time.monotonic() - start
    recipe = ROOT / "launch" / "recipes" / "demo.yaml"
    flags = f"--config {recipe} --max_steps 1".split()
    flags += ["--data_path", str(demo / "data")]
    flags += ["--llama_model_path", str(demo / "pretrained" / "llama")]
    seconds = [seconds_to_first_step(flags, tmp_path / run) for run in ("cold", "warm", "again")]
    print(
        f"first step after {seconds[1]:.1f} and {seconds[2]:.1f} s, "
        f"of which imports take {import_seconds:.1f} s"
    )
    assert min(seconds[1:]) - import_seconds <= 15

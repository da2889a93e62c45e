"""What --keep does at its default weight, on the demo with the recipe of the demo."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.processes import ROOT, succeeds, vico
from vico.cli.demo import make_toy_dataset
from vico.cli.demo_llama import NUM_STEPS

SEEDS = (0,)
SPLITS = {"train": 240, "val": 300, "test": 60}  # 1,500 questions of val: an error of 0.6 points
TRAIN_SECONDS = 3600.0  # on a machine that others use
MIN_RATIO, MAX_LOSS = 5, 0.01  # of KL per token, and of the accuracy


@dataclass(frozen=True)
class Demo:
    """`steps`: of the pretraining of its LLaMA."""

    folder: Path
    steps: int = NUM_STEPS

    def __post_init__(self) -> None:
        make_toy_dataset(self.folder, steps=self.steps, splits=SPLITS)
        data = self.folder / "data" / "nextqa"
        (captions,) = data.glob("*.json")
        by_video = json.loads(captions.read_text(encoding="utf-8"))
        with (data / "train.csv").open(encoding="utf-8") as file:
            rows = {row["video"]: row["question"] for row in csv.DictReader(file)}
        lines = [f"{by_video[video]} {question}?\n" for video, question in rows.items()]
        self.text.write_text("".join(lines), encoding="utf-8")

    @property
    def text(self) -> Path:
        """The captions of the training videos, each with a question."""
        return self.folder / "text.txt"

    def measured(self, out: Path, seed: int, *words: str) -> tuple[float, float]:
        """(accuracy on val, KL per token of the text) after a training with these flags."""
        train = ["train", "--config", str(ROOT / "launch" / "recipes" / "demo.yaml")]
        train += ["--data_path", str(self.folder / "data")]
        train += ["--llama_model_path", str(self.folder / "pretrained" / "llama")]
        train += "--precision fp32 --batch_size 32 --num_workers 0 --no_eval".split()
        train += ["--report_to", "none", "--seed", str(seed), "--output_dir", str(out)]
        run = vico(*train, *words, seconds=TRAIN_SECONDS)
        assert run.codes == [0], run.output
        of = ["--resume", str(out)]
        scored = last_line(succeeds("eval", *of, "--num_workers", "0").stdouts[0])
        texts = last_line(succeeds("cognition", *of, "--text", str(self.text)).stdouts[0])
        return scored["acc"], texts["kl_per_token"]


def last_line(output: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


@pytest.mark.slow
def test_the_default_weight(tmp_path: Path) -> None:
    """The same seeds with and without --keep: KL per token of the text, and accuracy on val.

    Counted are the means over the seeds. A run takes about 90 seconds of one core.
    """
    demo = Demo(tmp_path / "demo")
    sums = {"without": [0.0, 0.0], "with": [0.0, 0.0]}
    for seed in SEEDS:
        for name, words in (("without", []), ("with", ["--keep", "--text", str(demo.text)])):
            accuracy, divergence = demo.measured(tmp_path / f"{name}-{seed}", seed, *words)
            print(f"seed {seed} {name}: accuracy {accuracy:.2%}, KL per token {divergence:.4f}")
            sums[name][0] += accuracy / len(SEEDS)
            sums[name][1] += divergence / len(SEEDS)
    assert sums["without"][1] >= MIN_RATIO * sums["with"][1]
    assert sums["with"][0] >= sums["without"][0] - MAX_LOSS

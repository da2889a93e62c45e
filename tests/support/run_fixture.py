"""A user's files, to be damaged: a toy data set, a finished run's checkpoint, a published one."""

import argparse
import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from support.warm_process import WarmProcess
from vico.checkpoint import format as names
from vico.cli.demo import make_toy_dataset
from vico.io import output_dir
from vico.io.paths import MAX_BYTES

# Paths in the fixture.
NEXTQA = "toy/data/nextqa"
TRAIN, VAL = f"{NEXTQA}/train.csv", f"{NEXTQA}/val.csv"
FEATURES, CAPTIONS = f"{NEXTQA}/clipvitl14.pth", f"{NEXTQA}/llava_v15_13b_n6.json"
TINY = "toy/pretrained/llama/tiny"
SHARD, SHARD_1 = f"{TINY}/consolidated.00.pth", f"{TINY}/consolidated.01.pth"
PARAMS, TOKENIZER = f"{TINY}/params.json", "toy/pretrained/llama/tokenizer.model"
CHECKPOINT = "run/checkpoint-1"
WEIGHTS, OPTIMIZER = f"{CHECKPOINT}/{names.WEIGHTS}", f"{CHECKPOINT}/{names.OPTIMIZER}"
STATE = f"{CHECKPOINT}/{names.STATE}"
PUBLISHED = "published.pth"
# Videos: 000000 to 000003 in train, 100000 and 100001 in val, each with five questions.
VIDEOS = {"train": 4, "val": 2, "test": 1}
SETTINGS = "--precision fp32 --max_seq_len 256 --num_workers 0 --batch_size 4 --epochs 1".split()


@dataclass(frozen=True)
class RunFixture:
    """`run` is the output_dir of `flags` after a step; PUBLISHED has an optimizer too.

    `out`, the output_dir of `flags`, does not exist yet.
    """

    folder: Path

    @property
    def flags(self) -> list[str]:
        paths = {
            "--llama_model_path": (self.folder / TINY).parent,
            "--data_path": (self.folder / NEXTQA).parent,
            "--output_dir": self.folder / "out",
        }
        flags = ["--model", "tiny", *SETTINGS]
        for flag, path in paths.items():
            flags += [flag, str(path)]
        return flags

    def command(self, line: str) -> list[str]:
        """The words of `line`, a command or flags of train, with `flags` between.

        {fixture} stands for the folder. With an exclamation mark in front, `flags` are left out.
        """
        words = [word.format(fixture=self.folder) for word in line.removeprefix("!").split()]
        if line.startswith("!"):
            return words
        if not words or words[0].startswith("-"):
            return ["train", *self.flags, *words]
        return [words[0], *self.flags, *words[1:]]

    def copy(self, folder: Path) -> "RunFixture":
        return RunFixture(Path(shutil.copytree(self.folder, folder, symlinks=True)))

    def contents(self) -> dict[str, str]:
        """sha256 by relative path, without the lock of a run."""
        contents = {}
        for path in sorted(self.folder.rglob("*")):
            if path.name != output_dir.LOCK:
                content = ""
                if path.is_file():
                    size = path.stat().st_size
                    whole = (
                        b"" if size > MAX_BYTES else path.read_bytes()
                    )  # sparse files are larger
                    content = f"{size} {hashlib.sha256(whole).hexdigest()}"
                contents[str(path.relative_to(self.folder))] = content
        return contents


def make_run_fixture(folder: Path, warm: WarmProcess) -> RunFixture:
    fixture = RunFixture(folder)
    make_toy_dataset(folder / "toy", steps=0, splits=VIDEOS)
    shutil.rmtree(folder / "toy" / "data_swapped")
    result = warm.run(fixture.command("--max_steps 1"), folder)
    assert result.code == 0, result.stderr
    (folder / "out").rename(folder / "run")
    torch.save(published_file(load_file(folder / WEIGHTS)), folder / PUBLISHED)
    return fixture


def published_file(model: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the published code saves, with its optimizer after one step."""
    state = {}
    for i, value in enumerate(model.values()):
        moments = {moment: torch.ones_like(value) for moment in names.MOMENTS}
        state[i] = {"step": torch.tensor(1.0), **moments}
    group = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.05}
    args = argparse.Namespace(
        batch_size=8, epochs=10, dataset="nextqa", output_dir="./checkpoint/nextqa"
    )
    return {
        "model": model,
        "optimizer": {
            "state": state,
            "param_groups": [{**group, "params": list(range(len(model)))}],
        },
        "epoch": 0,
        "scaler": {"scale": 65536.0},
        "args": args,
    }

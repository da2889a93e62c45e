"""A user's files, to be damaged: a small world, the checkpoint of a finished run, a lineage file."""

import argparse
import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from support.warm_process import WarmProcess
from vico.checkpoint.format import MOMENTS
from vico.cli.demo import make_toy_dataset
from vico.io import output_dir

NEXTQA, TINY, CHECKPOINT = "world/data/nextqa", "world/pretrained/llama/tiny", "run/checkpoint-1"
TRAIN, VAL, FEATURES, CAPTIONS = (
    f"{NEXTQA}/{name}"
    for name in ("train.csv", "val.csv", "clipvitl14.pth", "llava_v15_13b_n6.json")
)
SHARD, SHARD_1, PARAMS = (
    f"{TINY}/consolidated.00.pth",
    f"{TINY}/consolidated.01.pth",
    f"{TINY}/params.json",
)
TOKENIZER = "world/pretrained/llama/tokenizer.model"
WEIGHTS, OPTIMIZER, STATE = (
    f"{CHECKPOINT}/{name}"
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "state.json")
)
# Videos of the world: 000000 to 000003 in train, 100000 and 100001 in val, each with five questions.
VIDEOS = {"train": 4, "val": 2, "test": 1}


@dataclass(frozen=True)
class RunFixture:
    """`run`: the output_dir of this very command after a step; `lineage.pth`: with an optimizer; `out` is not there yet."""

    folder: Path

    @property
    def flags(self) -> list[str]:
        where = [
            "--llama_model_path",
            str((self.folder / TINY).parent),
            "--model",
            "tiny",
            "--data_path",
            str((self.folder / NEXTQA).parent),
        ]
        how = [
            "--precision",
            "fp32",
            "--max_seq_len",
            "256",
            "--num_workers",
            "0",
            "--batch_size",
            "4",
            "--epochs",
            "1",
        ]
        return [*where, *how, "--output_dir", str(self.folder / "out")]

    def command(self, line: str) -> list[str]:
        """`line`: a command and flags, or flags of train; {fixture} stands for the folder.

        The flags above come with it, unless it begins with an exclamation mark."""
        words = [word.format(fixture=self.folder) for word in line.removeprefix("!").split()]
        if line.startswith("!"):
            return words
        command, rest = (
            (words[0], words[1:]) if words and not words[0].startswith("-") else ("train", words)
        )
        return [command, *self.flags, *rest]

    def copy(self, folder: Path) -> "RunFixture":
        return RunFixture(Path(shutil.copytree(self.folder, folder, symlinks=True)))

    def contents(self) -> dict[str, str]:
        files = sorted(path for path in self.folder.rglob("*") if path.name != output_dir.LOCK)
        return {
            str(p.relative_to(self.folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            if p.is_file()
            else "no file"
            for p in files
        }


def make_run_fixture(folder: Path, warm: WarmProcess) -> RunFixture:
    fixture = RunFixture(folder)
    make_toy_dataset(folder / "world", steps=0, splits=VIDEOS)
    shutil.rmtree(folder / "world" / "data_swapped")
    made = warm.run(fixture.command("--max_steps 1"), folder)
    assert made.code == 0, made.err
    (folder / "out").rename(folder / "run")
    torch.save(lineage_file(load_file(folder / WEIGHTS)), folder / "lineage.pth")
    return fixture


def lineage_file(model: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the published code saves, the optimizer after one step."""
    state = {
        i: {"step": torch.tensor(1.0), **{moment: torch.ones_like(v) for moment in MOMENTS}}
        for i, v in enumerate(model.values())
    }
    groups = [
        {
            "lr": 0.1,
            "betas": (0.9, 0.95),
            "eps": 1e-8,
            "weight_decay": 0.05,
            "params": list(range(len(model))),
        }
    ]
    args = argparse.Namespace(
        batch_size=8, epochs=10, dataset="nextqa", output_dir="./checkpoint/nextqa"
    )
    return {
        "model": model,
        "optimizer": {"state": state, "param_groups": groups},
        "epoch": 0,
        "scaler": {"scale": 65536.0},
        "args": args,
    }

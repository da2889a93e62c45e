"""Whole training commands on the toy data, with settings that the oracle knows too."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from reference import oracle
from support.processes import succeeds
from support.toy_dataset import ToyData, records

HYPER = oracle.Hyper(
    bias=0.7, vaq=True, qav=True, lr=5e-3, warmup_epochs=1, epochs=2, weight_decay=0.1
)
FLAGS = ("--bias 0.7 --vaq --qav --lr 5e-3 --warmup_epochs 1 --epochs 2 --weight_decay 0.1").split()
PLAIN = "--no_shuffle --caption_crop none".split()


@dataclass
class Run:
    """The output_dir of a run that has ended."""

    folder: Path

    @property
    def steps(self) -> list[dict[str, Any]]:
        return records(self.folder / "steps.jsonl")

    @property
    def epochs(self) -> list[dict[str, Any]]:
        return records(self.folder / "log.txt")

    @property
    def predictions(self) -> list[dict[str, Any]]:
        return records(self.folder / "predictions_val.jsonl")

    @property
    def predictions_text(self) -> bytes:
        return (self.folder / "predictions_val.jsonl").read_bytes()

    def tensors(self, step: int) -> dict[str, Tensor]:
        """Weights and Adam's moments of a checkpoint."""
        folder = self.folder / f"checkpoint-{step}"
        weights = load_file(folder / "adapter_model.safetensors")
        return {**weights, **load_file(folder / "optimizer.safetensors")}


def train(toy: ToyData, folder: Path, *flags: str, ranks: int = 1) -> Run:
    """A run in file order, with whole captions, as the oracle does it."""
    out = ["--output_dir", str(folder)]
    succeeds("train", *toy.flags, *FLAGS, *PLAIN, *out, *flags, ranks=ranks)
    return Run(folder)

"""A small checkpoint to ask: questions with 2 to 6 options in the general schema, open gates."""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support.toy_dataset import ToyData, sentence
from vico.checkpoint.format import TrainState
from vico.checkpoint.write import RunIdentity, save
from vico.model.config import LlamaConfig, trainable_shapes
from vico.model.vico import initial_trainables
from vico.model.weights.load import open_weights
from vico.train.config import RunConfig

FRAMES = {"w0": 3, "w1": 12, "w2": 25, "w3": 1}  # of each video
NUM_QUESTIONS = 60  # of val: several batches of an evaluation


def questions(seed: int, num: int) -> list[dict[str, Any]]:
    """Rows of the general schema, some of them with equal beginnings."""
    rng = random.Random(seed)
    rows = []
    for index in range(num):
        options: list[str] = []
        while len(options) < 2 + index % 5:
            option = sentence(rng, rng.randint(1, 4))
            options += [option] if option not in options else []
        video = list(FRAMES)[rng.randrange(len(FRAMES))]
        text = rng.choice(("what does the", "what does the man", "why")) + " " + sentence(rng, 3)
        row = {"id": f"q{index}", "video": video, "question": text, "options": options}
        rows.append({**row, "answer": rng.randrange(len(options))})
    return rows


@dataclass
class AskedWorld:
    """`run` is the folder of a run with a checkpoint_best; its data set is `data`/my.

    `gates`: the largest adapter gate. `backbone`: a model's folder in Hugging Face's layout, in
    place of the toy's.
    """

    folder: Path
    toy: ToyData
    gates: float = 1.0
    backbone: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=lambda: questions(7, NUM_QUESTIONS))

    def __post_init__(self) -> None:
        self.data, self.run = self.folder / "data" / "my", self.folder / "run"
        self.data.mkdir(parents=True)
        for split, rows in {"train": questions(8, 8), "val": self.rows}.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (self.data / f"{split}.jsonl").write_text(text)
        generator = torch.Generator().manual_seed(3)
        self.videos: dict[str, Tensor] = {}
        for video, length in FRAMES.items():
            self.videos[video] = torch.randn(length, 768, generator=generator)
        self.features = self.data / "clipvitl14.pth"
        torch.save(self.videos, self.features)
        captions = {video: f"the red ball and a dog. the {video} smiles." for video in FRAMES}
        (self.data / "captions.json").write_text(json.dumps(captions))
        self._save_checkpoint()

    @property
    def config(self) -> RunConfig:
        return RunConfig(
            model=str(self.backbone or "tiny"),
            llama_model_path=self.toy.llama,
            dataset="my",
            data_path=self.data.parent,
            precision="fp32",
            max_seq_len=256,
            num_workers=0,
            output_dir=self.run,
        )

    def _save_checkpoint(self) -> None:
        if self.backbone is None:
            vocab_size = self.toy.tokenizer.vocab_size()
            llama = LlamaConfig(dim=32, n_layers=3, n_heads=4, vocab_size=vocab_size)
        else:
            llama = open_weights(self.backbone, None).config
        shapes = trainable_shapes(llama, llama.n_layers, adapter_len=10, num_slots=10)
        weights = initial_trainables(shapes, bias=0.7, seed=5)
        for name, value in weights.items():
            if name.endswith("gate1"):
                value.uniform_(-1, 1, generator=torch.Generator().manual_seed(len(name)))
                value *= self.gates
        moments = {}
        for name, value in weights.items():
            moments |= {f"{name}.{m}": torch.zeros_like(value) for m in ("exp_avg", "exp_avg_sq")}
        identity = RunIdentity("r", self.config.to_json(), {})
        save(self.run / "checkpoint_best", weights, moments, TrainState(1, 1, 1, 0.5), identity)

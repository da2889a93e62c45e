"""The toy data set of most tests: a tokenizer, a random LLaMA, questions, features, captions."""

import csv
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
import torch

from reference import oracle_files
from reference.oracle_sequences import Question

WORDS = (
    "man woman dog ball red blue table kitchen run jump sit hold "
    "after before why what how does the a of on door smiles"
).split()
TYPES = ("CW", "CH", "TN", "TC", "TP", "DL", "DC", "DO")
COLUMNS = tuple("video frame_count width height question answer qid type a0 a1 a2 a3 a4".split())


def sentence(rng: random.Random, length: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(length))


def make_tokenizer(path: Path, vocab_size: int = 400) -> None:
    """LLaMA's recipe in small: BPE, byte fallback, no normalisation, a dummy prefix blank."""
    rng = random.Random(0)
    lines = [
        "Instruction: Predict the answer based on the dialogue, video and question.",
        "Video:",
        "Answer: The answer is (A)",
    ]
    lines += [
        "Instruction: describe the what happens in the video.",
        "Description:",
        "Question:",
        "Choices: (A) (B) (C) (D) (E)",
    ] * 20
    lines += [sentence(rng, 8) + "." for _ in range(300)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(path.with_suffix("")),
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )
    path.with_suffix(".vocab").unlink()


def make_rows(num: int, num_videos: int, seed: int, prefix: str) -> list[dict[str, str]]:
    rng = random.Random(seed)
    rows = []
    for i in range(num):
        row = {"video": f"{prefix}{i % num_videos:04d}", "qid": str(i // num_videos)}
        row |= {"frame_count": "100", "width": "640", "height": "480", "type": TYPES[i % 8]}
        row["question"] = sentence(rng, rng.randint(3, 9))
        row["answer"] = str(rng.randrange(5))
        row |= {f"a{k}": sentence(rng, rng.randint(1, 4)) for k in range(5)}
        rows.append(row)
    return rows


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


@dataclass
class ToyData:
    """A NExT-QA-shaped data set and a tiny LLaMA under `folder`, and the flags that name them."""

    folder: Path
    num_train: int = 20
    num_val: int = 10
    shards: int = 1
    rows: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.llama, self.data = self.folder / "llama", self.folder / "data" / "nextqa"
        self.llama.mkdir(parents=True)
        self.data.mkdir(parents=True)
        tokenizer_path = self.llama / "tokenizer.model"
        make_tokenizer(tokenizer_path)
        self.tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))
        oracle_files.write_tiny_meta(
            self.llama / "tiny",
            self.tokenizer.vocab_size(),
            dim=32,
            n_layers=3,
            n_heads=4,
            shards=self.shards,
        )
        self.rows = {
            "train": make_rows(self.num_train, 7, 1, "v"),
            "val": make_rows(self.num_val, 4, 2, "w"),
        }
        for split, rows in self.rows.items():
            write_csv(self.data / f"{split}.csv", rows)
        videos = sorted({row["video"] for rows in self.rows.values() for row in rows})
        generator = torch.Generator().manual_seed(3)
        self.features = {
            video: torch.randn(4 + 3 * i, 768, generator=generator)
            for i, video in enumerate(videos)
        }
        torch.save(self.features, self.data / "clipvitl14.pth")
        rng = random.Random(4)
        self.captions = {}
        for video in videos:
            sentences = [sentence(rng, 6) for _ in range(5)]
            self.captions[video] = ". ".join(sentences) + "."
        (self.data / "llava_v15_13b_n6.json").write_text(json.dumps(self.captions))

    @property
    def flags(self) -> list[str]:
        settings = "--model tiny --precision fp32 --max_seq_len 256 --num_workers 0".split()
        data = str(self.folder / "data")
        return ["--llama_model_path", str(self.llama), "--data_path", data, *settings]

    def items(self, split: str) -> list[Question]:
        """The rows as the oracle takes them, captions whole."""
        items = []
        for row in self.rows[split]:
            options = [row[f"a{k}"] for k in range(5)]
            video, answer = row["video"], int(row["answer"])
            features, caption = self.features[video], self.captions[video]
            items.append(Question(row["question"], options, answer, features, caption))
        return items


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
